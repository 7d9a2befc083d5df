"""Every row of the table of idle settings: said where it holds, silent where it does not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.config.unused import TABLE, say_unused, unused
from igrpo.settings import ConfigError
from igrpo.settings.section import field_types

SERVER = {"use_vllm": True, "vllm_mode": "server"}
RUNNING = {**SERVER, "vllm_server_base_url": "http://127.0.0.1:1"}
GYM = {"dataset_name": "reasoning_gym:chain_sum"}
# because -> (settings and machine in which the row holds, settings and machine in which it does not)
CASES = {
    "on the CPU an engine is one process": ({}, "cpu", {}, "gpu"),
    "vLLM's CPU build has no sleep mode": ({}, "cpu", {}, "gpu"),
    "vLLM's CPU build computes no such weights": ({}, "cpu", {}, "gpu"),
    "a machine without a GPU has none to name": (SERVER, "cpu", SERVER, "gpu"),
    "nccl and ipc carry weights between GPUs": (SERVER, "cpu", SERVER, "gpu"),
    "on the CPU the loss is cpu or torch": ({"loss_impl": "cuda"}, "cpu", {}, "gpu"),
    "on a GPU the loss is triton, cuda or torch": ({"loss_impl": "cpu"}, "gpu", {"loss_impl": "cpu"}, "cpu"),
    "there is no GPU": ({}, "cpu", {}, "gpu"),
    "on the CPU activations are in the computer's memory already": ({}, "cpu", {}, "gpu"),
    "an engine sleeps in the trainer's process only": (SERVER, "gpu", {}, "gpu"),
    "vLLM runs on the GPU": ({}, "gpu", {}, "cpu"),
    "use_vllm is false": ({"use_vllm": False}, "gpu", SERVER, "gpu"),
    "vllm_mode is colocate": ({}, "gpu", SERVER, "gpu"),
    "vllm_mode is colocate and weights do not travel as adapters": (
        {}, "gpu", {"use_peft": True, "lora_sync": "adapter"}, "gpu"),
    "the servers run already and were given their own": (RUNNING, "cpu", SERVER, "gpu"),
    "weights do not travel as files": (SERVER, "gpu", SERVER, "cpu"),
    "weights do not travel over nccl": (SERVER, "cpu", SERVER, "gpu"),
    "algorithm is grpo, which has no drafts": ({"algorithm": "grpo"}, "cpu", {}, "cpu"),
    "draft_selection: none shows no draft": ({"draft_selection": "none"}, "cpu", {}, "cpu"),
    "one draft is shown": ({}, "cpu", {"show_drafts": 2}, "cpu"),
    "draft_selection looks at no score": ({"draft_selection": "random"}, "cpu", {}, "cpu"),
    "early_stop_drafts is false": ({}, "cpu", {"early_stop_drafts": True}, "cpu"),
    "refinements are trained behind their draft": ({}, "cpu", {"refinement_context": "both"}, "cpu"),
    "only pass_at_k has a k": ({}, "cpu", {"advantage_estimator": "pass_at_k"}, "cpu"),
    "advantage_estimator: grpo alone divides by a deviation": ({"advantage_estimator": "rloo"}, "cpu", {}, "cpu"),
    "normalize_then_sum divides by both deviations": (
        {"multi_objective_aggregation": "normalize_then_sum"}, "cpu", {}, "cpu"),
    "zero_variance is not resample": ({}, "cpu", {"zero_variance": "resample"}, "cpu"),
    "no reward compares answers": ({"reward_funcs": ["format"]}, "cpu", {}, "cpu"),
    "there is no environment_factory and no tool": ({}, "cpu", {"tools": ["a:b"]}, "cpu"),
    "judge is not in reward_funcs": (
        {}, "cpu", {"reward_funcs": ["judge"], "judge_model": "m", "judge_base_url": "http://h"}, "cpu"),
    "cosine is not in reward_funcs": ({}, "cpu", {"reward_funcs": ["cosine"]}, "cpu"),
    "repetition_penalty is not in reward_funcs": ({}, "cpu", {"reward_funcs": ["repetition_penalty"]}, "cpu"),
    "soft_overlong_punishment is not in reward_funcs": (
        {}, "cpu", {"reward_funcs": ["soft_overlong_punishment"], "soft_punish_cache": 9}, "cpu"),
    "loss_type is not sapo": ({}, "cpu", {"loss_type": "sapo"}, "cpu"),
    "loss_type is not vespo": ({}, "cpu", {"loss_type": "vespo"}, "cpu"),
    "this loss_type does not clip": ({"loss_type": "sapo"}, "cpu", {}, "cpu"),
    "distillation_weight is 1: the divergence is the whole loss": (
        {"distillation_weight": 1.0, "train_on_drafts": True}, "cpu",
        {"distillation_weight": 0.9, "train_on_drafts": True}, "cpu"),
    "distillation_weight is 0": (
        {}, "cpu", {"distillation_weight": 0.1, "train_on_drafts": True, "teacher_model_kind": "ema"}, "cpu"),
    "teacher_model_kind is not ema": (
        {"distillation_weight": 0.1, "train_on_drafts": True}, "cpu",
        {"distillation_weight": 0.1, "train_on_drafts": True, "teacher_model_kind": "ema"}, "cpu"),
    "beta is 0": ({}, "cpu", {"beta": 0.1}, "cpu"),
    "vllm_importance_sampling_correction is false": ({"vllm_importance_sampling_correction": False}, "cpu", {}, "cpu"),
    "no refinement is held against its sampler, which saw the draft": (
        {"refinement_context": "bare"}, "cpu", {"refinement_context": "bare", "train_on_drafts": True}, "cpu"),
    "load_in_4bit is false": ({}, "cpu", {"use_peft": True, "load_in_4bit": True}, "cpu"),
    "push_to_hub is false": ({}, "cpu", {"push_to_hub": True}, "cpu"),
    "use_peft is false": ({}, "cpu", {"use_peft": True}, "cpu"),
    "this optim has no such number": ({"optim": "sgd"}, "cpu", {}, "cpu"),
    "max_steps is set": ({"max_steps": 3}, "cpu", {}, "cpu"),
    "lr_scheduler_type: constant has no warm-up": (
        {"lr_scheduler_type": "constant"}, "cpu", {"lr_scheduler_type": "constant_with_warmup"}, "cpu"),
    "eval_samples is 0": ({}, "cpu", {"eval_samples": 2}, "cpu"),
    "only data sets of the hub have configurations": (GYM, "cpu", {}, "cpu"),
    "a reasoning_gym task has its prompt in question": (GYM, "cpu", {}, "cpu"),
    "a reasoning_gym task has its solution in answer": (GYM, "cpu", {}, "cpu"),
    "the packaged model has one revision": ({"model_name_or_path": "smollm2-135m"}, "cpu", {}, "cpu"),
    "report_to is none": ({}, "cpu", {"report_to": "tensorboard"}, "cpu"),
}  # fmt: skip
PARTICULAR = {
    "vllm_weight_transfer": "nccl", "vllm_server_devices": "0", "rollout_schedule": "barrier", "algorithm": "grpo",
    "draft_template": "see {draft}", "vllm_server_base_url": "http://127.0.0.1:1", "lora_dropout": 0.5,
    "draft_selection": "worst", "vllm_importance_sampling_mode": "token_mask", "repetition_max_penalty": -2.0,
    "vllm_gpu_memory_utilization": 0.85, "vllm_mode": "server", "vllm_server_host": "127.0.0.2", "kl_estimator": "k1",
    "draft_selection_score": "accuracy_first", "early_stop_drafts": True, "draft_policy_lag": 1, "adam_beta1": 0.5,
    "adam_beta2": 0.5, "loss_impl": "cuda", "scale_rewards": "batch", "grader": "math_verify",
    "lora_sync": "adapter", "bnb_4bit_quant_type": "fp4", "hub_private_repo": True,
    "vllm_enable_sleep_mode": True, "vllm_quantization": "fp8", "vllm_engine_args": {"enforce_eager": True},
    "bare_importance_ratio": "behaviour", "refinement_copy_limit": 0.5, "rollout_rs": "token_k2",
    "distillation_alpha": 0.0, "teacher_model_kind": "base", "teacher_update_rate": 0.5, "top_entropy_quantile": 0.5,
}  # fmt: skip
"""Values that are neither the default nor a number more than it."""


def config(**settings) -> TrainConfig:
    return TrainConfig(**{"model_name_or_path": "m", "dataset_name": "d", **settings})


def another(key: str) -> object:
    """A value of the key that is not its default."""
    default = getattr(config(), key)
    if key in PARTICULAR:
        return PARTICULAR[key]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    kinds = str(field_types(TrainConfig)[key])
    if "list" in kinds:
        return ["http://127.0.0.1:1"]
    return "other" if "str" in kinds else 7


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.because)
def test_a_row_speaks_where_it_holds_and_nowhere_else(row):
    idle, machine, active, other_machine = CASES[row.because]
    for key in row.keys:
        written = {key: another(key)}
        assert written[key] != getattr(config(), key)
        there = config(**{**written, **idle, **({} if key in idle else written)})
        if row.instead is not None:
            with pytest.raises(ConfigError, match=f"^{key}: .*{row.instead}") as refused:
                list(unused(there, machine == "cpu"))
            assert "\n" not in str(refused.value)
        elif key not in idle:
            assert (key, row.because) in list(unused(there, machine == "cpu"))
        elsewhere = config(**{**written, **active})
        assert (key, row.because) not in list(unused(elsewhere, other_machine == "cpu"))


def test_every_row_has_a_case_and_its_keys_exist():
    assert [row.because for row in TABLE] == list(CASES) or {row.because for row in TABLE} == CASES.keys()
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert all(row.keys and set(row.keys) <= names for row in TABLE)


def test_defaults_are_silent_whatever_the_situation(capsys):
    for because, (idle, machine, _, _) in CASES.items():
        if "the loss is" in because:  # these settings are the ones that are refused
            continue
        written = list(unused(config(**idle), machine == "cpu"))
        assert all(key in idle for key, _ in written), (idle, written)
    say_unused(config(eval_temperature=0.6), True, rank=1)
    assert capsys.readouterr().out == ""
    say_unused(config(eval_temperature=0.6), True, rank=0)
    assert capsys.readouterr().out == "warning: eval_temperature does nothing here: eval_samples is 0\n"


def test_two_gpus_on_a_machine_without_any_are_refused_before_anything_is_written(tmp_path):
    run = [
        sys.executable,
        "-m",
        "igrpo.train",
        "--config",
        "recipes/quickstart.yaml",
        "--output_dir",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(
        [*run, "--use_cpu", "true", "--vllm_tensor_parallel_size", "2"], capture_output=True, text=True
    )
    assert done.returncode == 2 and not (tmp_path / "r").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: vllm_tensor_parallel_size: 2 cannot be had") and "Traceback" not in done.stderr
