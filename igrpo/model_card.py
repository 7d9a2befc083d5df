"""What a run says of the model it made: a card beside the weights, and both on a hub where they are wanted there."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from igrpo.config.train_config import TrainConfig
from igrpo.log_lines import number_of, read_records, step_of
from igrpo.models.names import PACKAGED, looks_local
from igrpo.report.tables import total_hours
from igrpo.run.checkpoints import MANIFEST
from igrpo.settings import ConfigError
from igrpo.settings.section import default_of

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = "README.md"
NOT_UPLOADED = ("state/*", MANIFEST, "adapter/README.md")
"""What only a run that goes on needs, and peft's own empty card, which names folders of this machine."""
OWN_BUSINESS = ("output_dir", "resume_from_checkpoint", "reward_env", "run_name", "report_to")
OWN_FAMILIES = ("vllm_server_", "vllm_weight_dir", "judge_base_url", "judge_api_key_env", "hub_", "push_to_hub")
"""Settings that say something of this machine and nothing of the model."""
HOW = {
    "grpo": "GRPO: several completions of each prompt, each worth its reward against those of its group",
    "igrpo": "iterative GRPO: drafts are sampled first, the best is shown, and the refinements that it leads to are "
    "trained on",
}
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ link }} trained by reinforcement learning with {{ how }}. Written by the run, from its logs.

## Evaluation

{% if evaluations %}{{ held_out }} held-out problems of {{ data }}, bare prompts, temperature {{ temperature }}:

| after step | accuracy | mean reward |
|---|---|---|
{% for one in evaluations -%}
| {{ one.step }} | {{ "%.1f" | format(100 * one["eval/accuracy"]) }} % | {{ "%.3f" | format(one["eval/reward"]) }} |
{% endfor %}{% else %}None: no problems were held out (`eval_samples: 0`).
{% endif %}
## Training

| figure | first | last, or all hours |
|---|---|---|
{% for label, first, last in figures -%}
| {{ label }} | {{ "%.4g" | format(first) }} | {{ "%.4g" | format(last) }} |
{% endfor %}
{{ steps }} steps on {{ data }}.{% if rank %} LoRA adapters of rank {{ rank }} are merged into these weights, and stand
alone in `adapter/`.{% endif %}

## Licence

{{ licence or "That of the base model, which its page tells." }}

## Recipe

What differs from the defaults of `igrpo train`:

```yaml
{{ recipe }}```
"""
EVALUATION = ("eval/accuracy", "eval/reward")
FIGURES = (
    "reward",
    "refinement/accuracy",
    "draft/accuracy",
    "completions/mean_length",
    "kl",
    "gpu_hours",
    "core_hours",
)


class UploadError(RuntimeError):
    """The model is whole on this machine and not on the hub."""


def write_card(config: TrainConfig, run: Path, model: Path, held_out: int) -> ModelCard:
    """Into the folder ``model``, from the logs of the folder ``run``; ``held_out`` problems were evaluated on."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    records = [record for record in read_records(run / "metrics.jsonl", []) if step_of(record) is not None]
    steps = [record for record in records if "reward" in record]
    judged = [record for record in records if None not in map(number_of, map(record.get, EVALUATION))]
    evaluations = [*{record["step"]: record for record in judged}.values()]  # a resume at the end makes one again
    series = {key: [(s["step"], v) for s in steps if (v := number_of(s.get(key))) is not None] for key in FIGURES}
    base, data, licence = _public(config.model_name_or_path), _public(config.dataset_name), licence_of(config)
    name, on_hub = repository(config).rpartition("/")[2], _on_hub(config.model_name_or_path)
    public = _on_hub(config.dataset_name)
    results = [
        EvalResult(
            task_type="text-generation", dataset_type=data if public else "own", dataset_name=data,
            dataset_split="held out",
            metric_type="accuracy", metric_value=one["eval/accuracy"], metric_name="accuracy from the prompt alone",
        )
        for one in evaluations[-1:]
    ]  # fmt: skip
    card = ModelCard.from_template(
        ModelCardData(
            model_name=name, base_model=base if on_hub else None, license=licence, library_name="transformers",
            datasets=[data] if public else None,
            pipeline_tag="text-generation", tags=["igrpo", config.algorithm, config.loss_type], eval_results=results,
        ),
        template_str=TEMPLATE, name=name, data=data, licence=licence, how=HOW[config.algorithm],
        link=f"[{base}](https://huggingface.co/{base})" if on_hub else base,
        evaluations=evaluations, held_out=held_out, temperature=config.eval_temperature,
        steps=steps[-1]["step"] if steps else 0, rank=config.lora_r if config.use_peft else 0,
        figures=[
            (key, points[0][1], total_hours(points) if key.endswith("_hours") else points[-1][1])
            for key, points in series.items() if points
        ],
        recipe=yaml.safe_dump(_recipe(config), sort_keys=False, allow_unicode=True),
    )  # fmt: skip
    card.save(model / CARD)
    return card


def licence_of(config: TrainConfig) -> str | None:
    """That the base's own card names, on this machine or on the hub; None: nothing there says it."""
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HTTPError

    path = Path(config.model_name_or_path).expanduser()
    here = path / CARD
    if not here.is_file() and not _on_hub(config.model_name_or_path):
        return None
    try:
        return ModelCard.load(here if here.is_file() else config.model_name_or_path).data.license
    except (OSError, ValueError, TypeError, HTTPError, yaml.YAMLError):  # no such card or hub, or a card that is none
        return None


def check_hub(config: TrainConfig) -> None:
    """
    Raises:
        ConfigError: an upload at the end could not succeed.
    """
    if not config.push_to_hub:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository(config))
    except HFValidationError as error:
        raise ConfigError(f"hub_model_id: {str(error).splitlines()[0]}; write OWNER/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("push_to_hub: HF_HUB_OFFLINE is set; unset it, or write false")
    if get_token() is None:
        raise ConfigError("push_to_hub: no token was found; export HF_TOKEN, or log in with `hf auth login`")


def repository(config: TrainConfig) -> str:
    return config.hub_model_id or Path(config.output_dir).resolve().name


def upload(config: TrainConfig, model: Path) -> str:
    """Puts the folder ``model`` on the hub; its address there.

    Raises:
        UploadError: it is not there, or not whole. The folder stays as it was.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    hub = HfApi()
    try:
        made = hub.create_repo(repository(config), private=config.hub_private_repo, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id, folder_path=model, ignore_patterns=list(NOT_UPLOADED), commit_message=model.name
        )
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        why = filter(None, (error, error.__cause__))  # of a weight file the first one tells only which
        reason = "; ".join(str(one).strip().partition("\n")[0] or type(one).__name__ for one in why)
        raise UploadError(f"push_to_hub: {model} was not uploaded ({reason})") from error
    return str(made)


def upload_command(config: TrainConfig, model: Path) -> str:
    """That does the same by hand."""
    words = ["hf", "upload", repository(config), os.fspath(model), "."]
    words += [word for pattern in NOT_UPLOADED for word in ("--exclude", pattern)]
    return shlex.join([*words, *(["--private"] if config.hub_private_repo else [])])


def _recipe(config: TrainConfig) -> Mapping[str, Any]:
    values = {f.name: (getattr(config, f.name), default_of(f)) for f in dataclasses.fields(config)}
    return {
        key: _public(value)
        for key, (value, default) in values.items()
        if value != default and key not in OWN_BUSINESS and not key.startswith(OWN_FAMILIES)
    }


def _on_hub(name: str) -> bool:
    """Whether a model or data set is one of the hub's, by its name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name in PACKAGED or looks_local(name) or Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _public(value: Any) -> Any:
    """Without the folders of this machine: of a path, its name."""
    if isinstance(value, list):
        return [_public(one) for one in value]
    if isinstance(value, dict):
        return {key: _public(one) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value)
    of_here = os.path.exists(path) or (not any(map(str.isspace, value)) and value.startswith(("/", "~", "./", "../")))
    return os.path.basename(path.rstrip("/")) if of_here else value
