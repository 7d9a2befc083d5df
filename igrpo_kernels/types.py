"""The nouns of the package: what a GRPO loss is told (`GRPOLossConfig`) and what it answers (`GRPOLossOutput`)."""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.losses import (
    CONSTANT_LENGTH,
    IMPORTANCE_SAMPLING_LEVELS,
    IMPORTANCE_SAMPLING_MODES,
    KL_ESTIMATORS,
    LOSSES,
    Loss,
)


class LogitTransform(NamedTuple):
    """How raw logits x become the logits z whose softmax is the policy: z = softcap·tanh(scale·x/softcap) / T."""

    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None
    temperature: float = 1.0


class RowStats(NamedTuple):
    """What a walk over n rows of logits z leaves, in the compute dtype."""

    logps: Tensor
    """(n,) log p[index]."""

    entropy: Tensor
    """(n,) nats; (0,) if it was not wanted."""

    row_max: Tensor
    """(n,) M = max z."""

    log_sum: Tensor
    """(n,) log sum exp(z - M)."""

    @classmethod
    def zeros(cls, n: int, dtype: torch.dtype, device: torch.device) -> "RowStats":
        """What rows that nobody measures keep."""
        return cls(*torch.zeros(4, n, dtype=dtype, device=device).unbind())

    def at(self, rows: Tensor | slice) -> "RowStats":
        """The statistics of some rows."""
        return RowStats(*(x[rows] if x.numel() else x for x in self))

    def put(self, rows: Tensor | slice, part: "RowStats") -> None:
        """Store the statistics of some rows, a slice's in one launch; an entropy that was not wanted stays as it is."""
        pairs = [(mine, new) for mine, new in zip(self, part, strict=True) if new.numel()]
        if isinstance(rows, slice):
            torch._foreach_copy_([mine[rows] for mine, _ in pairs], [new for _, new in pairs])
            return
        for mine, new in pairs:
            mine[rows] = new


@dataclass(frozen=True)
class GRPOLossConfig:
    """Everything about a GRPO loss that is not a tensor.

    Names, defaults and formulas are TRL 1.16's, with three deliberate differences: `loss_type` defaults to "grpo";
    TRL's `vllm_importance_sampling_*` keys lose their prefix, and since there is no `use_vllm` switch here the
    correction is off until `importance_sampling_mode` names one; `max_completion_length` has no default because a
    guessed loss denominator is worse than an error. A `delta`, a `dual_clip`, a level or a mode
    that the chosen loss does not have is an error; epsilons, `sapo_*`, `vespo_*` and `max_completion_length` of other
    losses are ignored.

    Every value is a run-time argument of the kernels: changing one between calls compiles nothing.

    Raises:
        ValueError: a value out of range, or two keys that cannot be combined (the message names both).
    """

    loss_type: str = "grpo"
    """Policy term and reduction: a row of the table in `losses.py`."""

    importance_sampling_level: str = "token"
    """"token": one ratio per token. "sequence" (GSPO): exp of the sequence's mean log-ratio, shared by its tokens."""

    epsilon: float = 0.2
    """Lower clip distance. What the two epsilons bound is the column "[low, high]" in docs/algorithm.md: most losses
    clip ratios below 1 - epsilon where the advantage is negative; cispo, sapo and vespo have no lower bound."""

    epsilon_high: float | None = None
    """Upper clip distance, None = `epsilon`. For cispo it is the bound on the ratio itself, not a distance from 1; for
    dppo_tv and dppo_kl both are bounds on how far a token's probability may move; for gmpo on its log-ratio."""

    delta: float | None = None
    """Upper bound on the unclipped ratio (two-sided clipping, INTELLECT-2); useful values exceed 1 + epsilon_high."""

    dual_clip: float | None = None
    """Dual-clip PPO's c > 1: for a negative advantage the loss of a token is at most c·|A|."""

    beta: float = 0.0
    """Weight of the KL term; 0 skips it and `ref_per_token_logps` is not needed."""

    kl_estimator: str = "k3"
    """Per-token KL(policy || reference) estimator: k1, k2 or k3 (TRL has only k3)."""

    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the importance ratio, gradient included (DeepSeek-V3.2)."""

    temperature: float = 1.0
    """Logits are divided by it before the softmax: the sampling temperature."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus: loss -= entropy_coef · (mean entropy per token)."""

    top_entropy_quantile: float = 1.0
    """Share of tokens, highest entropy first, that keep their policy term; 1.0 keeps all."""

    off_policy_mask_threshold: float | None = None
    """Drop the policy term of negative-advantage sequences whose mean log(sampler/policy) exceeds it (OPSM)."""

    importance_sampling_mode: str | None = None
    """Correct for old policy vs sampler: token_truncate, token_mask, sequence_truncate, sequence_mask; None = off."""

    importance_sampling_clip_min: float | None = None
    """Lower bound of the sampler ratio: *_truncate clamps to it, *_mask zeroes below it."""

    importance_sampling_clip_max: float | None = 3.0
    """Upper bound of the sampler ratio: *_truncate clamps to it, *_mask zeroes above it."""

    max_completion_length: int | None = None
    """Tokens per sequence in dr_grpo's constant denominator; required there and only there."""

    sapo_temperature_neg: float = 1.05
    """Steepness of SAPO's sigmoid gate where the advantage is not positive."""

    sapo_temperature_pos: float = 1.0
    """Steepness of SAPO's sigmoid gate where the advantage is positive."""

    vespo_k_pos: float = 2.0
    """VESPO: power k of the sequence ratio where the advantage is not negative."""

    vespo_lambda_pos: float = 3.0
    """VESPO: exponential decay lambda where the advantage is not negative."""

    vespo_k_neg: float = 3.0
    """VESPO: power k of the sequence ratio where the advantage is negative."""

    vespo_lambda_neg: float = 2.0
    """VESPO: exponential decay lambda where the advantage is negative."""

    logit_scale: float = 1.0
    """Multiplier on the logits before soft-capping (Cohere's `logit_scale`, 1/Granite's `logits_scaling`)."""

    final_logit_softcapping: float | None = None
    """Gemma's cap c: logits become c·tanh(logits/c), after `logit_scale` and before `temperature`."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def loss(self) -> Loss:
        """The row of `loss_type` in the table."""
        return LOSSES[self.loss_type]

    @property
    def clip_low(self) -> float:
        """The lower bound that `epsilon` means for this loss."""
        return self._bounds[0]

    @property
    def clip_high(self) -> float:
        """The upper bound that `epsilon_high` (None: `epsilon`) means for this loss."""
        return self._bounds[1]

    @property
    def _bounds(self) -> tuple[float, float]:
        return self.loss.bounds(self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high)

    @property
    def logit_transform(self) -> LogitTransform:
        """The part of the configuration that turns raw logits into the policy's logits."""
        return LogitTransform(self.logit_scale, self.final_logit_softcapping, self.temperature)

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss depends on the entropies differentiably."""
        return self.entropy_coef != 0.0


@dataclass(frozen=True)
class GRPOLossOutput:
    """What a loss call returns.

    Example: ``out = grpo_loss(logits, ids, advantages); out.loss.backward(); log(out.metrics["entropy"].item())``.
    """

    loss: Tensor
    """() fp32 (fp64 for fp64 input), differentiable: the only field connected to the autograd graph."""

    per_token_logps: Tensor
    """Shape of completion_ids, dtype of `loss`, detached: log pi(token); 0 on masked tokens."""

    entropy: Tensor
    """Shape of completion_ids, dtype of `loss`, detached, in nats: policy entropy; 0 on masked tokens."""

    metrics: dict[str, Tensor]
    """TRL's metric names -> detached 0-d tensors on the loss's device (reading one is the caller's sync)."""


def _check_choices(config: GRPOLossConfig) -> None:
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
    "beta": (lambda x: x >= 0, ">= 0"),
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
    "off_policy_mask_threshold",
    "importance_sampling_clip_min",
    "importance_sampling_clip_max",
    "max_completion_length",
    "final_logit_softcapping",
)
_NOT_NUMBERS = (
    "loss_type",
    "importance_sampling_level",
    "importance_sampling_mode",
    "kl_estimator",
    "use_bias_correction_kl",
)


def _check_ranges(config: GRPOLossConfig) -> None:
    if not isinstance(config.use_bias_correction_kl, bool):
        raise ValueError(f"use_bias_correction_kl={config.use_bias_correction_kl!r} must be True or False")
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in _NOT_NUMBERS or (value is None and name in _OPTIONAL_NUMBERS):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number")
        test, wanted = _RANGES.get(name, (None, ""))
        if test is not None and not test(value):
            raise ValueError(f"{name}={value!r} must be {wanted}")


def _check_combinations(config: GRPOLossConfig) -> None:
    c = config
    term = c.loss.term
    for name in ("delta", "dual_clip"):
        if getattr(c, name) is not None and name not in term.settings:
            others = ", ".join(key for key, loss in LOSSES.items() if name in loss.term.settings)
            raise ValueError(
                f"{name}={getattr(c, name)} has no effect with loss_type={c.loss_type!r}; leave {name} unset or use "
                f"one of {others}"
            )
    if c.delta is not None and c.dual_clip is not None:
        raise ValueError(
            f"delta={c.delta} and dual_clip={c.dual_clip} both bound the ratio of negative-advantage tokens; set one"
        )
    if c.importance_sampling_level not in term.levels:
        raise ValueError(
            f"importance_sampling_level={c.importance_sampling_level!r} has no effect with loss_type={c.loss_type!r}, "
            f"which computes its own weights; use importance_sampling_level={term.levels[0]!r}"
        )
    if term.takes_sampler and c.importance_sampling_mode in ("sequence_truncate", "sequence_mask"):
        raise ValueError(
            f"importance_sampling_mode={c.importance_sampling_mode!r} cannot be combined with "
            f"loss_type={c.loss_type!r}, which sums per-token log-ratios; use 'token_truncate' or 'token_mask'"
        )
    if c.loss.reduction is CONSTANT_LENGTH and c.max_completion_length is None:
        raise ValueError(f"loss_type={c.loss_type!r} divides by B * max_completion_length: set max_completion_length")
    low, high = c.importance_sampling_clip_min, c.importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        raise ValueError(f"importance_sampling_clip_min={low} must be less than importance_sampling_clip_max={high}")
    if c.importance_sampling_mode in ("token_truncate", "sequence_truncate") and low is None and high is None:
        raise ValueError(
            f"importance_sampling_mode={c.importance_sampling_mode!r} needs importance_sampling_clip_min or "
            "importance_sampling_clip_max"
        )
