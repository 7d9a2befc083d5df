"""An evaluation samples and scores as its run did: over all keys there are."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Literal, get_args, get_origin

import pytest

from igrpo.config.recipe import key_groups
from igrpo.config.train_config import TrainConfig
from igrpo.engines.config import EngineConfig
from igrpo.eval import command
from igrpo.eval.config import EvalConfig
from igrpo.eval.evaluated import EvaluatedModel
from igrpo.eval.records import open_folder
from igrpo.eval.run import FREE_SETTINGS, KEPT_SETTINGS
from igrpo.settings import ConfigError
from igrpo.settings.section import default_of, field_types


def test_an_evaluation_samples_and_scores_as_its_run_did():
    """All keys of the run, not a list of them: cosine_* and repetition_* came from defaults, top_k and min_p too."""
    plain = TrainConfig(model_name_or_path="m", dataset_name="d")
    arguments = argparse.Namespace(temperature=0.6, top_p=0.9, seed=1)
    own = {
        "model_name_or_path": "s", "algorithm": "grpo", "draft_selection": "best", "show_drafts": 1,
        "eval_temperature": 0.6, "top_p": 0.9, "seed": 1,
    }  # fmt: skip
    tried = set()
    for key, hint in field_types(EvalConfig).items():
        changed = another_value(key, getattr(plain, key), hint)
        assert changed != getattr(plain, key), key

        def seen(run=None, recipe=None, overrides=None, key=key):
            subject = EvaluatedModel("s", "s", run)
            return getattr(command._config(subject, recipe or {}, overrides or {}, arguments, False), key)

        if key in own:
            assert seen(replace(plain, **{key: changed})) == own[key]
            with pytest.raises(ConfigError, match="sets this itself"):
                seen(overrides={key: changed})
            continue
        default, run = seen(), replace(plain, **{"use_peft": key == "load_in_4bit", key: changed})
        beside = {"reward_funcs": ["accuracy", "format"]} if key == "reward_weights" else {}
        assert seen(overrides=beside | {key: changed}) == changed, key
        # A run's folder may be somebody else's: it must not say where this machine's keys go, or which code runs.
        assert seen(run) == (default if key in NOT_THE_RUNS else changed), key
        assert seen(recipe={key: changed}) == (default if key in NOT_THE_RECIPES else changed), key
        tried.add(key)
    assert tried >= NOT_THE_RUNS
    for key in ("learning_rate", "warmup_ratio", "dataset_name"):
        with pytest.raises(ConfigError, match=f"{key}: it is a key of `igrpo train`"):
            seen(overrides={key: 0.5})
    # Whatever else a run says is about learning, about its own data or its own files.
    others = set(key_groups()) - {group for group, keys in key_groups().items() if set(keys) & {*tried, *own}}
    assert others == {"adapters", "batches", "data", "loss", "optimisation", "output", "rollout", "run"}


NOT_THE_RECIPES = {
    "model_revision", "trust_remote_code", "reward_funcs", "reward_weights", "vllm_mode", "vllm_max_model_length",
    "weight_sync_tolerance", "vllm_num_servers", "vllm_request_timeout", "vllm_sync_timeout", "vllm_weight_transfer",
    "vllm_weight_dir", "vllm_group_port", "vllm_server_base_url", "vllm_server_urls", "vllm_server_host",
    "vllm_server_port", "vllm_server_allow_public", "vllm_server_devices", "vllm_server_timeout",
    "vllm_enable_sleep_mode", "vllm_quantization", "vllm_engine_args", "lora_sync", "load_in_4bit",
}  # fmt: skip
NOT_THE_RUNS = NOT_THE_RECIPES | {
    "judge_base_url", "judge_api_key_env", "judge_cache", "reward_env", "environment_factory", "tools",
}  # fmt: skip


def another_value(key: str, value: object, hint: object) -> object:
    special = {
        "draft_template": "Look:\n{draft}", "few_shot_examples": [{"prompt": "p", "completion": "c"}],
        "chat_template_kwargs": {"enable_thinking": False}, "repetition_max_penalty": -0.5,
        "judge_base_url": "http://127.0.0.1:9", "judge_api_key_env": "OTHER", "reward_weights": [1.0, 0.5],
        "vllm_gpu_memory_utilization": 0.5, "top_p": 0.8, "activation_offloading": True, "min_p": 0.1,
        "environment_factory": "a:b", "tools": ["a:b"], "reward_funcs": ["accuracy", "length"], "vllm_group_port": 1,
        "vllm_enable_sleep_mode": True, "vllm_quantization": "fp8", "vllm_engine_args": {"enforce_eager": True},
    }  # fmt: skip
    if key in special:
        return special[key]
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1 if isinstance(value, int) else value * 1.25 + 0.1
    if isinstance(value, list):
        return ["OTHER"]
    if value is None:
        return 7 if int in get_args(hint) else 0.5 if float in get_args(hint) else "text"
    return f"{value} and more"


def test_an_evaluation_goes_on_only_with_what_it_was_begun_with(tmp_path):
    """All keys that can change a completion or a score; those of a folder of an older version are the defaults."""
    defaults = {field.name: default_of(field) for field in fields(EvalConfig)}
    assert {*KEPT_SETTINGS, *FREE_SETTINGS, *field_types(EngineConfig)} == set(field_types(EvalConfig))
    assert {"chat_template", "cosine_max_len", "repetition_n_grams", "judge_prompt", "top_k"} <= set(KEPT_SETTINGS)
    kept = {key: defaults[key] for key in KEPT_SETTINGS}
    open_folder(tmp_path, {key: kept[key] for key in ("seed", "top_k")}, defaults)  # as an older version wrote it
    open_folder(tmp_path, kept, defaults)
    for key in KEPT_SETTINGS:
        changed = kept | {key: another_value(key, defaults[key], field_types(EvalConfig)[key])}
        with pytest.raises(ConfigError, match=f"another {key} "):
            open_folder(tmp_path, changed, defaults)


def test_weights_without_functions_and_keys_that_a_recipe_does_not_give_are_said(capsys):
    arguments = argparse.Namespace(temperature=0.6, top_p=0.9, seed=1)
    subject = EvaluatedModel("s", "s", None)
    with pytest.raises(ConfigError, match="reward_weights: write reward_funcs beside it"):
        command._config(subject, {}, {"reward_weights": "[1, 2]"}, arguments, False)
    command._config(subject, {"vllm_mode": "server", "top_k": 5}, {}, arguments, False)
    assert capsys.readouterr().err == "warning: vllm_mode is not taken from a recipe; write --vllm_mode\n"
