"""The interval of every number among the settings, and what a text or a nested value may hold.

A key that is missing in the table fails a test, so that no number reaches a run unchecked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from igrpo.settings import ConfigError, shown

if TYPE_CHECKING:
    from igrpo.config.train_config import TrainConfig

LARGEST_COUNT = 2**31 - 1
"""What engines and tensor libraries index with 32 bits."""
LARGEST_SECONDS = 1e7
"""Four months; clocks and locks of the operating system refuse much longer waits."""
DEEPEST, MOST_ITEMS = 20, 100_000
"""Levels and items of a nested value; YAML's references can make one that no program walks to its end."""


@dataclass(frozen=True)
class Interval:
    """The finite numbers from ``low`` to ``high``, the ends included unless ``above`` or ``below`` says otherwise."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def advice(self, x: float) -> str | None:
        """What to write in place of x; None where x is inside."""
        if isinstance(x, float) and not math.isfinite(x):
            return "a finite number"
        if x < self.low or (self.above and x == self.low):
            return f"a number above {self.low}" if self.above else f"{self.low} or more"
        if x > self.high or (self.below and x == self.high):
            return f"a number below {self.high}" if self.below else f"{self.high} or less"
        return None


COUNT = Interval(1, LARGEST_COUNT)
COUNT_OR_NONE = Interval(0, LARGEST_COUNT)
SHARE = Interval(0.0, 1.0)
POSITIVE = Interval(0.0, above=True)
NOT_NEGATIVE = Interval(0.0)
FINITE = Interval()
SECONDS = Interval(0.0, LARGEST_SECONDS, above=True)
PORT = Interval(0, 65535)
PROCESSES = Interval(1, 4096)

RANGES: dict[str, Interval] = {
    **dict.fromkeys(
        (
            "lora_r", "lora_alpha", "max_train_samples", "draft_max_tokens", "num_drafts", "num_generations",
            "vllm_max_model_length", "vllm_max_num_seqs", "max_completion_length", "repetition_n_grams",
            "cosine_max_len", "judge_max_tokens", "per_device_train_batch_size", "gradient_accumulation_steps",
            "token_budget", "num_iterations", "save_total_limit", "soft_punish_cache",
        ), COUNT,
    ),
    **dict.fromkeys(("top_k", "eval_samples", "judge_max_retries"), COUNT_OR_NONE),
    **dict.fromkeys(
        ("vllm_tensor_parallel_size", "vllm_num_servers", "reward_workers", "judge_max_concurrency"), PROCESSES
    ),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), PORT),
    **dict.fromkeys(
        ("reward_timeout", "vllm_server_timeout", "vllm_request_timeout", "vllm_sync_timeout", "judge_timeout"), SECONDS
    ),
    **dict.fromkeys(
        (
            "epsilon", "epsilon_high", "beta", "vllm_importance_sampling_clip_min", "vespo_k_pos", "vespo_lambda_pos",
            "vespo_k_neg", "vespo_lambda_neg", "learning_rate", "weight_decay", "max_grad_norm", "eval_temperature",
            "warmup_steps", "save_steps", "logging_steps", "eval_steps",
        ), NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "temperature", "delta", "vllm_importance_sampling_clip_max", "sapo_temperature_pos", "sapo_temperature_neg",
            "weight_sync_tolerance", "adam_epsilon",
        ), POSITIVE,
    ),
    **dict.fromkeys(("min_p", "top_entropy_quantile"), SHARE),
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), Interval(0.0, 1.0, above=True)),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2"), Interval(0.0, 1.0, below=True)),
    **dict.fromkeys(
        (
            "early_stop_reward", "reward_error_value", "cosine_min_value_wrong", "cosine_max_value_wrong",
            "cosine_min_value_correct", "cosine_max_value_correct", "repetition_max_penalty", "entropy_coef",
            "off_policy_mask_threshold", "reward_weights",
        ), FINITE,
    ),
    "dual_clip": Interval(1.0, above=True),
    "dynamic_sampling_max_gen_batches": Interval(2, LARGEST_COUNT),
    **dict.fromkeys(("vllm_cpu_kvcache_gib", "reward_memory_gib"), Interval(0.0, 2.0**20, above=True)),
    "num_train_epochs": Interval(0.0, 1e9, above=True),
    "max_steps": Interval(-1, LARGEST_COUNT),
    "seed": Interval(0, 2**32 - 1),  # numpy takes no larger one
}  # fmt: skip
"""Interval of each numeric key; of a list, of each of its numbers. ``Literal`` keys choose from their own list."""

PATHS = (
    "model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint", "judge_cache", "vllm_weight_dir",
)  # fmt: skip
NEVER_EMPTY = (
    "model_name_or_path", "dataset_name", "dataset_train_split", "dataset_prompt_column", "dataset_solution_column",
    "output_dir", "optim", "lr_scheduler_type", "judge_api_key_env", "judge_prompt", "vllm_server_host",
)  # fmt: skip


def check_ranges(config: TrainConfig, hints: dict[str, Any]) -> None:
    for key, allowed in RANGES.items():
        or_null = ", or null" if type(None) in get_args(hints[key]) else ""
        value = getattr(config, key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (advice := allowed.advice(number)):
                raise ConfigError(f"{key}: {shown(number)} does not work; write {advice}{or_null}")
    for key in ("save_steps", "eval_steps", "logging_steps"):
        every = getattr(config, key)
        if every is not None and every >= 1 and every != int(every):
            raise ConfigError(f"{key}: {every} does not work; write a whole number of steps, or a share of all below 1")
    if config.logging_steps == 0 or config.eval_steps == 0:
        key = "logging_steps" if config.logging_steps == 0 else "eval_steps"
        raise ConfigError(f"{key}: 0 does not work; write a number of steps, or a share of all below 1")
    if config.max_steps == 0:
        raise ConfigError("max_steps: 0 does not work; write 1 or more, or -1 for num_train_epochs")


def check_plain(config: TrainConfig, keys: Iterable[str]) -> None:
    """Nothing that cannot be written into config.yaml, opened as a file or walked through."""
    for key in keys:
        check_value(key, getattr(config, key))
    for key in NEVER_EMPTY:
        if not getattr(config, key).strip():
            raise ConfigError(f"{key}: the text is empty; write a value, or leave the key out")
    for key in PATHS:
        try:
            Path(getattr(config, key) or "").expanduser()
        except RuntimeError:
            raise ConfigError(
                f"{key}: there is no home folder for {getattr(config, key)}; write the whole path"
            ) from None


def check_value(key: str, value: Any) -> None:
    """A list or mapping may hold text, numbers, true, false, null and such lists and mappings."""
    open_items, count = [(value, 0)], 0
    while open_items:
        item, depth = open_items.pop()
        count += 1
        if depth > DEEPEST or count > MOST_ITEMS:
            raise ConfigError(f"{key}: it is nested more than {DEEPEST} levels deep or has over {MOST_ITEMS} items")
        if isinstance(item, str):
            if "\0" in item or not _is_unicode(item):
                raise ConfigError(f"{key}: {shown(item)} holds a NUL or half a character; write plain text")
        elif isinstance(item, dict):
            if strangers := [name for name in item if not isinstance(name, str)]:
                raise ConfigError(f"{key}: the name {shown(strangers[0])} is not text; put it in quotes")
            open_items += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            open_items += [(part, depth + 1) for part in item]
        elif isinstance(item, int) and abs(item) >= 2**63:
            raise ConfigError(f"{key}: {shown(item)} does not work; write a smaller one")
        elif not isinstance(item, int | float | None):  # a date, a set, bytes
            raise ConfigError(f"{key}: {shown(item)} is a {type(item).__name__}; put it in quotes to write it as text")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
