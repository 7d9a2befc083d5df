"""What a `GRPOLossConfig` refuses: values out of range, and keys that cannot be combined."""

import math
from dataclasses import fields
from typing import Any

from igrpo_kernels.losses import (
    CONSTANT_LENGTH,
    IMPORTANCE_SAMPLING_LEVELS,
    IMPORTANCE_SAMPLING_MODES,
    KL_ESTIMATORS,
    LOSSES,
)
from igrpo_kernels.rejection import criteria

Config = Any  # GRPOLossConfig, which asks for these checks


def check(config: Config) -> None:
    """
    Raises:
        ValueError: the configuration cannot be computed, or not as it says.
    """
    _check_choices(config)
    _check_ranges(config)
    _check_combinations(config)


def _check_choices(config: Config) -> None:
    for name, choices in (
        ("loss_type", tuple(LOSSES)),
        ("importance_sampling_level", IMPORTANCE_SAMPLING_LEVELS),
        ("importance_sampling_mode", (None, *IMPORTANCE_SAMPLING_MODES)),
        ("kl_estimator", KL_ESTIMATORS),
    ):
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")


_RANGES = {  # field -> (test, what the test asks for); None is checked only where the field's default is not None
    "epsilon": (lambda x: x >= 0, ">= 0"),
    "epsilon_high": (lambda x: x >= 0, ">= 0"),
    "delta": (lambda x: x > 0, "> 0"),
    "dual_clip": (lambda x: x > 1, "> 1"),
    "dro_beta": (lambda x: x > 0, "> 0"),
    "clip_cov_ratio": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "kl_cov_ratio": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "ppo_kl_coef": (lambda x: x >= 0, ">= 0"),
    "beta": (lambda x: x >= 0, ">= 0"),
    "kl_tau": (lambda x: x >= 0, ">= 0"),
    "distillation_weight": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "distillation_alpha": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "temperature": (lambda x: x > 0, "> 0"),
    "top_entropy_quantile": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "importance_sampling_clip_min": (lambda x: x >= 0, ">= 0"),
    "importance_sampling_clip_max": (lambda x: x > 0, "> 0"),
    "max_completion_length": (lambda x: x > 0, "> 0"),
    "sapo_temperature_neg": (lambda x: x > 0, "> 0"),
    "sapo_temperature_pos": (lambda x: x > 0, "> 0"),
    "vespo_k_pos": (lambda x: x >= 0, ">= 0"),
    "vespo_lambda_pos": (lambda x: x >= 0, ">= 0"),
    "vespo_k_neg": (lambda x: x >= 0, ">= 0"),
    "vespo_lambda_neg": (lambda x: x >= 0, ">= 0"),
    "logit_scale": (lambda x: x != 0, "different from 0"),
    "final_logit_softcapping": (lambda x: x > 0, "> 0"),
}
_OPTIONAL_NUMBERS = (
    "epsilon_high",
    "delta",
    "dual_clip",
    "dro_beta",
    "off_policy_mask_threshold",
    "importance_sampling_clip_min",
    "importance_sampling_clip_max",
    "max_completion_length",
    "final_logit_softcapping",
)
NAMES = ("loss_type", "importance_sampling_level", "importance_sampling_mode", "kl_estimator", "rollout_rs",
         "rollout_rs_threshold")  # fmt: skip
"""Keys that are not numbers (a threshold may be one)."""
_OF_ONE_LOSS = ("delta", "dual_clip", "dro_beta", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio",
                "ppo_kl_coef")  # fmt: skip


def _check_ranges(config: Config) -> None:
    if not isinstance(config.use_bias_correction_kl, bool):
        raise ValueError(f"use_bias_correction_kl={config.use_bias_correction_kl!r} must be True or False")
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in (*NAMES, "use_bias_correction_kl") or (value is None and name in _OPTIONAL_NUMBERS):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")
        test, wanted = _RANGES.get(name, (None, ""))
        if test is not None and not test(value):
            raise ValueError(f"{name}={value!r} must be {wanted}")


def _check_combinations(config: Config) -> None:
    c = config
    term, defaults = c.loss.term, {f.name: f.default for f in fields(c)}
    for name in _OF_ONE_LOSS:
        if getattr(c, name) != defaults[name] and name not in term.settings:
            others = ", ".join(key for key, loss in LOSSES.items() if name in loss.term.settings)
            raise ValueError(
                f"{name}={getattr(c, name)} has no effect with loss_type={c.loss_type!r}; leave {name} unset or use "
                f"one of {others}"
            )
    if c.delta is not None and c.dual_clip is not None:
        raise ValueError(
            f"delta={c.delta} and dual_clip={c.dual_clip} both bound the ratio of negative-advantage tokens; set one"
        )
    if "dro_beta" in term.settings and c.dro_beta is None:
        raise ValueError(f"loss_type={c.loss_type!r} needs dro_beta, the weight of its squared log-ratio: set dro_beta")
    if c.clip_cov_lb >= c.clip_cov_ub:
        raise ValueError(f"clip_cov_lb={c.clip_cov_lb} must be less than clip_cov_ub={c.clip_cov_ub}")
    if c.importance_sampling_level not in term.levels:
        why = "whose ratio is a constant" if "sequence" in term.levels else "which computes its own weights"
        raise ValueError(
            f"importance_sampling_level={c.importance_sampling_level!r} has no effect with loss_type={c.loss_type!r}, "
            f"{why}; use importance_sampling_level={term.levels[-1]!r}"
        )
    if c.loss.reduction is CONSTANT_LENGTH and c.max_completion_length is None:
        raise ValueError(f"loss_type={c.loss_type!r} divides by B * max_completion_length: set max_completion_length")
    _check_sampler(c)


def _check_sampler(c: Config) -> None:
    if c.loss.term.takes_sampler and c.importance_sampling_mode not in (None, "token_truncate", "token_mask"):
        raise ValueError(
            f"importance_sampling_mode={c.importance_sampling_mode!r} cannot be combined with "
            f"loss_type={c.loss_type!r}, which sums per-token log-ratios; use 'token_truncate' or 'token_mask'"
        )
    low, high = c.importance_sampling_clip_min, c.importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        raise ValueError(f"importance_sampling_clip_min={low} must be less than importance_sampling_clip_max={high}")
    if c.importance_sampling_mode is not None and low is None and high is None:
        raise ValueError(
            f"importance_sampling_mode={c.importance_sampling_mode!r} has no bound: set importance_sampling_clip_min "
            "or importance_sampling_clip_max"
        )
    if c.rollout_rs is not None:
        if not isinstance(c.rollout_rs, str) or isinstance(c.rollout_rs_threshold, bool):
            raise ValueError(
                f"rollout_rs={c.rollout_rs!r} must be text, for example 'seq_mean_k1', and rollout_rs_threshold="
                f"{c.rollout_rs_threshold!r} text or a number"
            )
        criteria(c.rollout_rs, c.rollout_rs_threshold)
    elif c.rollout_rs_threshold is not None:
        raise ValueError(f"rollout_rs_threshold={c.rollout_rs_threshold!r} has no effect without rollout_rs; set both")
