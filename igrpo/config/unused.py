"""Settings that do nothing in the run they stand in: one line for each, or an error where they promise hardware.

A key is said only where its value is not the default, so somebody wrote it. ``TABLE`` is the one place that knows when
a key is idle; whoever adds a key that matters in some situations only adds it there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from igrpo.config.train_config import TrainConfig
from igrpo.settings import ConfigError
from igrpo.settings.losses import takes
from igrpo.settings.section import Section, default_of

GYM, PACKAGED = "reasoning_gym:", "smollm2-135m"
DRAFTS = (
    "num_drafts", "show_drafts", "draft_separator", "draft_selection", "draft_selection_score", "draft_template",
    "draft_max_tokens", "draft_hide_answer",
    "draft_policy_lag", "early_stop_drafts", "early_stop_reward", "rollout_schedule",
)  # fmt: skip
OF_STARTED_SERVERS = ("vllm_server_host", "vllm_server_port", "vllm_num_servers", "vllm_server_devices")
OF_SERVERS = (
    "vllm_server_base_url", "vllm_server_urls", *OF_STARTED_SERVERS, "vllm_server_allow_public", "vllm_server_timeout",
    "vllm_request_timeout", "vllm_sync_timeout", "vllm_weight_transfer", "vllm_group_port",
)  # fmt: skip
OF_THE_ENGINE = ("vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "vllm_cpu_kvcache_gib")
ON_CPU = (None, "fp8_per_channel", "int8_per_channel_weight_only")


@dataclass(frozen=True)
class Row:
    """Keys that do nothing where ``idle(config, on_cpu)``."""

    because: str
    idle: Callable[[TrainConfig, bool], bool]
    keys: tuple[str, ...]
    instead: str | None = None
    """For keys that are refused then: what to write."""


def family(prefix: str) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(TrainConfig) if f.name.startswith(prefix))


def _starts_engine(c: TrainConfig) -> bool:
    return c.use_vllm and not (c.uses_servers and c.server_urls)


TABLE = (
    # --- what the machine lacks
    Row("on the CPU an engine is one process", lambda c, cpu: cpu and _starts_engine(c),
        ("vllm_tensor_parallel_size",), "write 1, or run on a machine with so many GPUs"),
    Row("vLLM's CPU build computes no such weights", lambda c, cpu: cpu and _starts_engine(c)
        and c.vllm_quantization not in ON_CPU, ("vllm_quantization",), f"write {' or '.join(filter(None, ON_CPU))}"),
    Row("vLLM's CPU build has no sleep mode", lambda c, cpu: cpu and c.colocates and bool(c.vllm_enable_sleep_mode),
        ("vllm_enable_sleep_mode",), "leave it out"),
    Row("a machine without a GPU has none to name", lambda c, cpu: cpu and c.uses_servers and not c.server_urls,
        ("vllm_server_devices",), "write null"),
    Row("nccl and ipc carry weights between GPUs", lambda c, cpu: cpu and c.uses_servers
        and c.vllm_weight_transfer in ("nccl", "ipc"), ("vllm_weight_transfer",), "write auto or file"),
    Row("on the CPU the loss is cpu or torch", lambda c, cpu: cpu and (c.loss_impl == "cuda" or (c.loss_impl == "triton"
        and os.environ.get("TRITON_INTERPRET") != "1")), ("loss_impl",), "write auto"),
    Row("on a GPU the loss is triton, cuda or torch", lambda c, cpu: not cpu and c.loss_impl == "cpu",
        ("loss_impl",), "write auto"),
    Row("there is no GPU", lambda c, cpu: cpu and _starts_engine(c), ("vllm_gpu_memory_utilization",)),
    Row("an engine sleeps in the trainer's process only", lambda c, _: c.uses_servers, ("vllm_enable_sleep_mode",)),
    Row("on the CPU activations are in the computer's memory already", lambda c, cpu: cpu, ("activation_offloading",)),
    Row("vLLM runs on the GPU", lambda c, cpu: not cpu and _starts_engine(c), ("vllm_cpu_kvcache_gib",)),
    # --- the engine
    Row("use_vllm is false", lambda c, _: not c.use_vllm, ("vllm_mode", "vllm_enable_sleep_mode", "vllm_quantization",
        "vllm_engine_args", "vllm_weight_dir", *OF_SERVERS, *OF_THE_ENGINE)),
    Row("vllm_mode is colocate", lambda c, _: c.colocates, OF_SERVERS),
    Row("vllm_mode is colocate and weights do not travel as adapters", lambda c, _: c.colocates and not c.sends_adapter,
        ("vllm_weight_dir",)),
    Row("the servers run already and were given their own", lambda c, _: c.uses_servers and bool(c.server_urls),
        (*OF_STARTED_SERVERS, *OF_THE_ENGINE, "vllm_engine_args")),
    Row("weights do not travel as files", lambda c, cpu: c.uses_servers and c.weight_backend(cpu) != "igrpo_file",
        ("vllm_weight_dir",)),
    Row("weights do not travel over nccl", lambda c, cpu: c.uses_servers and c.weight_backend(cpu) != "nccl",
        ("vllm_group_port",)),
    # --- the algorithm
    Row("algorithm is grpo, which has no drafts", lambda c, _: c.algorithm == "grpo", DRAFTS),
    Row("draft_selection: none shows no draft", lambda c, _: c.algorithm == "igrpo" and not c.shows_draft,
        ("draft_template", "draft_max_tokens", "draft_hide_answer", "show_drafts", "draft_separator")),
    Row("one draft is shown", lambda c, _: c.algorithm == "igrpo" and c.show_drafts == 1, ("draft_separator",)),
    Row("draft_selection looks at no score", lambda c, _: c.algorithm == "igrpo" and
        c.draft_selection in ("none", "random"), ("draft_selection_score",)),
    Row("early_stop_drafts is false", lambda c, _: c.algorithm == "igrpo" and not c.early_stop_drafts,
        ("early_stop_reward",)),
    Row("refinements are trained behind their draft", lambda c, _: c.refinement_context == "draft",
        ("bare_importance_ratio", "refinement_copy_limit")),
    Row("only pass_at_k has a k", lambda c, _: "pass_at_k" not in (c.advantage_estimator, c.draft_advantage_estimator),
        ("advantage_pass_k",)),
    Row("advantage_estimator: grpo alone divides by a deviation", lambda c, _: c.advantage_estimator != "grpo"
        and (not c.train_on_drafts or c.estimator_of_drafts != "grpo"), ("scale_rewards",)),
    Row("normalize_then_sum divides by both deviations", lambda c, _: c.multi_objective_aggregation ==
        "normalize_then_sum", ("scale_rewards",)),
    Row("zero_variance is not resample", lambda c, _: c.zero_variance != "resample",
        ("dynamic_sampling_max_gen_batches",)),
    Row("there is no environment_factory and no tool", lambda c, _: not c.has_environment,
        ("max_tool_calling_iterations", "tool_timeout")),
    # --- rewards
    Row("no reward compares answers", lambda c, _: not {"accuracy", "cosine", "length"} & set(c.reward_funcs),
        ("grader",)),
    Row("judge is not in reward_funcs", lambda c, _: "judge" not in c.reward_funcs, family("judge_")),
    Row("cosine is not in reward_funcs", lambda c, _: "cosine" not in c.reward_funcs, family("cosine_")),
    Row("repetition_penalty is not in reward_funcs", lambda c, _: "repetition_penalty" not in c.reward_funcs,
        family("repetition_")),
    Row("soft_overlong_punishment is not in reward_funcs", lambda c, _: "soft_overlong_punishment" not in
        c.reward_funcs, ("soft_punish_cache",)),
    # --- the loss
    Row("loss_type is not sapo", lambda c, _: not takes(c.loss_type, "sapo_temperature_pos"), family("sapo_")),
    Row("loss_type is not vespo", lambda c, _: not takes(c.loss_type, "vespo_k_pos"), family("vespo_")),
    Row("this loss_type does not clip", lambda c, _: not takes(c.loss_type, "epsilon"),
        ("epsilon", "epsilon_high")),
    Row("distillation_weight is 0", lambda c, _: c.distillation_weight == 0, ("distillation_alpha",
        "distillation_topk", *family("teacher_"))),
    Row("teacher_model_kind is not ema", lambda c, _: c.distillation_weight > 0 and not c.averages_weights,
        ("teacher_update_rate",)),
    Row("distillation_weight is 1: the divergence is the whole loss", lambda c, _: c.distillation_weight == 1,
        ("beta", "entropy_coef", "kl_tau", "positive_example_nll_weight", "top_entropy_quantile",
         "off_policy_mask_threshold")),
    Row("beta is 0", lambda c, _: c.beta == 0, ("kl_estimator", "use_bias_correction_kl")),
    Row("vllm_importance_sampling_correction is false", lambda c, _: not c.vllm_importance_sampling_correction,
        ("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min")),
    Row("no refinement is held against its sampler, which saw the draft", lambda c, _: not c.holds_sampler,
        ("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
         "kl_tau", "off_policy_mask_threshold", "rollout_rs")),
    # --- the learner
    Row("load_in_4bit is false", lambda c, _: not c.load_in_4bit, ("bnb_4bit_quant_type", "use_bnb_nested_quant")),
    Row("use_peft is false", lambda c, _: not c.use_peft, family("lora_")),
    Row("this optim has no such number", lambda c, _: c.optim in ("adafactor", "adagrad", "rmsprop", "sgd"),
        ("adam_beta1", "adam_beta2", "adam_epsilon")),
    Row("max_steps is set", lambda c, _: c.max_steps > 0, ("num_train_epochs",)),
    Row("lr_scheduler_type: constant has no warm-up", lambda c, _: c.lr_scheduler_type == "constant",
        ("warmup_steps",)),
    # --- data, evaluation, output
    Row("eval_samples is 0", lambda c, _: c.eval_samples == 0, ("dataset_test_split", "eval_temperature")),
    Row("only data sets of the hub have configurations", lambda c, _: c.dataset_name.startswith(GYM),
        ("dataset_config",)),
    Row("a reasoning_gym task has its prompt in question", lambda c, _: c.dataset_name.startswith(GYM)
        and c.dataset_prompt_column != "question", ("dataset_prompt_column",)),
    Row("a reasoning_gym task has its solution in answer", lambda c, _: c.dataset_name.startswith(GYM)
        and c.dataset_solution_column != "answer", ("dataset_solution_column",)),
    Row("the packaged model has one revision", lambda c, _: c.model_name_or_path == PACKAGED, ("model_revision",)),
    Row("push_to_hub is false", lambda c, _: not c.push_to_hub, ("hub_model_id", "hub_private_repo")),
    Row("report_to is none", lambda c, _: not c.trackers, ("run_name",)),
)  # fmt: skip


def check_hardware(config: Section, on_cpu: bool) -> None:
    """
    Raises:
        ConfigError: a setting promises hardware that this machine lacks.
    """
    for key, row in _idle(config, on_cpu, [row for row in TABLE if row.instead]):
        raise ConfigError(f"{key}: {getattr(config, key)} cannot be had, as {row.because}; {row.instead}")


def unused(config: TrainConfig, on_cpu: bool) -> Iterator[tuple[str, str]]:
    """Each key that was written and does nothing, with the reason. Raises as ``check_hardware`` does."""
    check_hardware(config, on_cpu)
    for key, row in _idle(config, on_cpu, TABLE):
        yield key, row.because


def _idle(config: Section, on_cpu: bool, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Keys of this section that differ from their default and do nothing."""
    defaults = {f.name: default_of(f) for f in dataclasses.fields(config)}
    for row in rows:
        keys = [key for key in row.keys if key in defaults and getattr(config, key) != defaults[key]]
        if keys and row.idle(config, on_cpu):  # type: ignore[arg-type]
            for key in keys:
                yield key, row


def say_unused(config: TrainConfig, on_cpu: bool, rank: int) -> None:
    """One line for each, for the user, from one of the run's processes. Raises as ``unused`` does."""
    for key, because in list(unused(config, on_cpu)):
        if rank == 0:
            print(f"warning: {key} does nothing here: {because}", flush=True)
