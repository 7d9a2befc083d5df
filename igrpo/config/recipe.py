"""YAML recipes and command-line overrides into a ``TrainConfig``; unknown keys are errors that name the nearest key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from igrpo.config.train_config import TrainConfig
from igrpo.settings import ConfigError, did_you_mean, shared, shown
from igrpo.settings.kinds import describe_type
from igrpo.settings.section import Section, default_of, field_types
from igrpo.settings.yaml_text import load_yaml
from igrpo.terminal import printable

RENAMED = {
    "dataset_configs": "dataset_config",
    "warmup_ratio": "warmup_steps",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
}
"""Keys of older TRL / transformers / open-r1 recipes that live on under another name."""

DROPPED = {
    "max_prompt_length": "questions are never cropped; rows too long for vllm_max_model_length are left out",
    "overwrite_output_dir": "an earlier run in the same folder is always kept, under another name",
    "torch_dtype": "master weights are float32, bf16 chooses the compute type",
    "dtype": "master weights are float32, bf16 chooses the compute type",
    "use_liger_kernel": "the loss is always fused",
    "use_liger_loss": "the loss is always fused",
    "vllm_device": "the engine runs beside the learner",
    "vllm_guided_decoding_regex": "structured output is not used",
    "use_transformers_paged": "Hugging Face generation is only the fallback engine",
    "wandb_log_unique_prompts": "completions.jsonl holds every prompt once",
    "gradient_checkpointing_kwargs": "non-reentrant checkpointing is always used",
    "do_eval": "eval_samples and eval_steps decide",
    "eval_strategy": "eval_samples and eval_steps decide",
    "per_device_eval_batch_size": "the engine batches by itself",
    "hub_strategy": "a model is uploaded at the end",
    "logging_first_step": "logging_steps decides",
    "logging_strategy": "logging_steps decides",
    "log_level": "warnings are always shown",
    "save_strategy": "save_steps decides",
    "remove_unused_columns": "all columns reach the reward functions",
    "num_completions_to_print": "completions.jsonl holds all of them",
    "steps_per_generation": "gradient_accumulation_steps decides",
    "generation_batch_size": "per_device_train_batch_size and gradient_accumulation_steps decide",
    "num_generations_eval": "eval_samples decides",
    "benchmarks": "`igrpo eval` measures checkpoints",
    "callbacks": "there are no callbacks",
    "hub_model_revision": "checkpoints stay in output_dir",
    "save_only_model": "checkpoints hold the optimiser, so that a run can go on",
    "sync_ref_model": "the reference model stays the initial one",
    "disable_dropout": "dropout stays as the model's config has it",
    "wandb_entity": "set the environment variable WANDB_ENTITY",
    "wandb_project": "set the environment variable WANDB_PROJECT",
    "wandb_run_group": "set the environment variable WANDB_RUN_GROUP",
    "code_language": "no reward here runs code",
    "code_eval_test_batch_size": "no reward here runs code",
    "parallel_code_exec_per_proc": "no reward here runs code",
    "code_provider": "no reward here runs code",
    "code_eval_scoring_mode": "no reward here runs code",
    "ioi_provider": "no reward here runs code",
    "e2b_router_url": "no reward here runs code",
    "morph_router_url": "no reward here runs code",
    "max_completion_len": "max_completion_length decides",
    "overwrite_hub_revision": "checkpoints stay in output_dir",
    "push_to_hub_revision": "checkpoints stay in output_dir",
}
"""Keys of real recipes that have no counterpart here, with the reason: one warning line each."""

REQUIRED = ("model_name_or_path", "dataset_name")
AnySection = TypeVar("AnySection", bound=Section)


def parse_args(argv: Sequence[str]) -> TrainConfig:
    """``--config recipe.yaml --key value --other_key=value`` into a config.

    Raises:
        ConfigError: unknown key, bad value, missing file; one line that says what to change.
    """
    if any(a in ("-h", "--help") for a in argv):
        print(help_text())
        raise SystemExit(0)
    path, overrides = split_args(list(argv))
    values = read_yaml(path) if path is not None else {}
    values.update(overrides)
    return build_config(values)


def build_config(values: dict[str, Any], section: type[AnySection] = TrainConfig) -> AnySection:
    """Keys as written in a recipe into a config; old key names are mapped with one warning line each."""
    known = field_types(section)
    settings: dict[str, Any] = {}
    for key, value in values.items():
        if RENAMED.get(key, key) in field_types(TrainConfig).keys() - known.keys():
            raise ConfigError(f"{key}: it is a key of `igrpo train` that has no effect here; leave it out")
        if key in DROPPED:
            _warn(f"{key} is ignored: {DROPPED[key]}")
        elif key in RENAMED:
            new = RENAMED[key]
            if key == "warmup_ratio" and value == 1:  # from 1 on it would count steps
                raise ConfigError("warmup_ratio: 1 leaves no step at the full rate; write a share below 1")
            _warn(f"{key} is now called {new}")
            if new not in values:
                settings[new] = coerce(new, value)
        elif key == "hub_token":
            raise ConfigError("hub_token: settings are logged; export HF_TOKEN, or log in with `hf auth login`")
        elif key in known:
            settings[key] = coerce(key, value)
        else:
            name = key if key.isidentifier() and len(key) < 80 else shown(key)
            raise ConfigError(f"{name}: there is no such key{did_you_mean(key[:80], field_types(TrainConfig))}")
    if "eval_steps" in settings and "eval_samples" not in settings and {"do_eval", "eval_strategy"} & values.keys():
        _warn("eval_steps is ignored: eval_samples says how many prompts to evaluate, and there is none")
        del settings["eval_steps"]
    for key in REQUIRED:
        if key in known and key not in settings:
            raise ConfigError(f"{key} is missing; write it in the recipe or as --{key} VALUE")
    return section(**settings)


def read_yaml(path: str) -> dict[str, Any]:
    try:
        file = Path(path).expanduser()
        if not file.is_file():
            there = os.listdir(file.parent) if file.parent.is_dir() else []
            raise ConfigError(f"--config {path}: there is no such file{did_you_mean(file.name, there)}")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"--config {path}: it is not UTF-8 text") from None
    except (OSError, RuntimeError) as error:  # no permission, too long a name, a home that is not there
        raise ConfigError(f"--config {path}: it cannot be read ({getattr(error, 'strerror', error)})") from None
    values = load_yaml(text, f"--config {path}")
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: write one `key: value` per line")
    return {str(k): v for k, v in values.items()}


def coerce(key: str, value: Any) -> Any:
    """What YAML reads as text though a number is meant: ``1e-6`` (no dot) and the command line's words."""
    hint, kinds = field_types(TrainConfig)[key], _kinds(key)
    if isinstance(value, str) and float in kinds and str not in kinds:
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{key}: {shown(value)} does not fit; write {describe_type(hint)}") from None
    if key == "report_to" and isinstance(value, list):
        return ",".join(map(str, value))
    if key == "dataset_config" and isinstance(value, list) and len(value) == 1:  # an older open-r1 spelling
        return value[0]
    if key == "scale_rewards" and isinstance(value, bool):  # TRL's older spelling
        return "group" if value else "none"
    if any(get_origin(kind) is list for kind in kinds) and isinstance(value, str | int | float):
        return [value]
    return value


def help_text() -> str:
    """The command line, by example, and every key with its type, default and meaning."""
    lines = [
        "usage: igrpo train --config recipes/quickstart.yaml [--key value ...]",
        "",
        "examples:",
        "  igrpo train --config recipes/quickstart.yaml --max_steps 5 --output_dir runs/try",
        "  igrpo train --config recipes/gsm8k.yaml --dataset_name train.jsonl --dataset_config null",
        "  igrpo train --config recipes/quickstart.yaml --algorithm grpo",
        "  igrpo train --config recipes/quickstart.yaml --resume_from_checkpoint last",
        "",
        "keys:",
    ]
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for key, doc in field_docs().items():
        default = "required" if key in REQUIRED else f"default {default_of(fields[key])!r}"
        lines.append(f"  --{key}  ({describe_type(field_types(TrainConfig)[key])}; {default})")
        lines.append(f"      {doc}")
    return "\n".join(lines)


def key_groups() -> dict[str, tuple[str, ...]]:
    """The keys under each `# --- title` of the sections, as docs/configuration.md has them."""
    groups: dict[str, list[str]] = {}
    for section in _sections():
        for line in inspect.getsource(section).splitlines():
            if title := re.match(r"    # --- (.+)", line):
                keys = groups.setdefault(title[1], [])
            elif key := re.match(r"    (\w+): ", line):
                keys.append(key[1])
    return {title: tuple(keys) for title, keys in groups.items()}


def field_docs() -> dict[str, str]:
    """The sentence under each key, read from the sections' source."""
    docs = {}
    for section in _sections():
        body = ast.parse(inspect.getsource(section)).body[0].body  # type: ignore[attr-defined]
        for node, following in itertools.pairwise(body):
            if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[node.target.id] = following.value.value  # type: ignore[union-attr,attr-defined]
    return docs


def _sections() -> list[type]:
    """Those that keys are written in: the rooms', then those that rooms share."""
    written = [one for one in reversed(TrainConfig.__mro__) if vars(one).get("__annotations__")]
    return sorted(written, key=lambda section: section.__module__ == shared.__name__)


def split_args(argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """``--key value``, ``--key=value`` and bare ``--flag``; the recipe's path apart from the rest."""
    overrides: dict[str, Any] = {}
    path = None
    while argv:
        word = argv.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} stands alone; write --key value")
        name, has_value, text = word[2:].partition("=")
        key = name.replace("-", "_")
        if not has_value:
            if argv and not argv[0].startswith("--"):
                text = argv.pop(0)
            elif bool in _kinds(key):
                text = "true"  # a bare flag switches on
            else:
                raise ConfigError(f"--{name}: write a value after it")
        if key == "config":
            path = text
        else:
            overrides[key] = _parse_value(key, text)
    return path, overrides


def _kinds(key: str) -> tuple[Any, ...]:
    """The alternatives of a key's type: ``float | None`` gives both."""
    hint = field_types(TrainConfig).get(key)
    return (hint,) if get_origin(hint) in (list, dict, Literal) else (get_args(hint) or (hint,))


def _parse_value(key: str, text: str) -> Any:
    """The command line speaks YAML (lists, mappings, null), except for keys that hold text."""
    kinds = _kinds(key)
    if type(None) in kinds and text.lower() in ("null", "none"):
        return None
    if str in kinds:
        return text
    return load_yaml(text, f"--{key} {shown(text)}")


def _warn(line: str) -> None:
    print(f"warning: {printable(line)}", file=sys.stderr)
