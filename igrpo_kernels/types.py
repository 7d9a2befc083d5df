"""The nouns of the package: what a GRPO loss is told (`GRPOLossConfig`) and what it answers (`GRPOLossOutput`)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.loss_checks import check
from igrpo_kernels.losses import LOSSES, Loss


class LogitTransform(NamedTuple):
    """How raw logits x become the logits z whose softmax is the policy: z = softcap·tanh(scale·x/softcap) / T."""

    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None
    temperature: float = 1.0
    temperatures: Tensor | None = None
    """(n,) compute dtype: each row's own T, in place of `temperature`, which is then 1."""

    def spread(self, dimensions: int) -> Tensor | float:
        """T, or (n, 1, …) beside a tensor of so many dimensions."""
        own = self.temperatures
        return self.temperature if own is None else own.view(-1, *(1 for _ in range(dimensions - 1)))

    def at(self, rows: Tensor | slice) -> "LogitTransform":
        """Of some rows."""
        return self if self.temperatures is None else self._replace(temperatures=self.temperatures[rows])

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """z and dz/dx of some logits of each row, (n,) or (n, j)."""
        scale, cap, temperature = self.logit_scale, self.final_logit_softcapping, self.spread(x.dim())
        if cap is None:
            return x * scale / temperature, scale / temperature
        bent = torch.tanh(x * (scale / cap))
        return bent * cap / temperature, (1.0 - bent * bent) * (scale / temperature)


LOG_P_FLOOR = -1e4
"""Smaller than log p of every p > 0 (fp32: -104, fp64: -746): 0·(-inf) becomes an exact 0 and nothing else changes."""


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

    divergence: Tensor | None = None
    """(n,) nats, to a teacher's top k (`distillation.py`); None without one."""

    @classmethod
    def zeros(cls, n: int, dtype: torch.dtype, device: torch.device, divergence: bool = False) -> "RowStats":
        """What rows that nobody measures keep."""
        return cls(*torch.zeros(4 + divergence, n, dtype=dtype, device=device).unbind())

    @property
    def known(self) -> list[Tensor]:
        """Without a divergence that nobody asked for."""
        return [x for x in self if x is not None]

    @property
    def of_teacher(self) -> list[Tensor]:
        """The divergence, or nothing: the last argument of whatever may be given one."""
        return self.known[4:]

    def at(self, rows: Tensor | slice) -> "RowStats":
        """The statistics of some rows."""
        return RowStats(*(x[rows] for x in self.known))

    def masked(self, mask: Tensor | None) -> "RowStats":
        """0 in masked rows."""
        return self if mask is None else RowStats(*(torch.where(mask, x, 0.0) for x in self.known))

    def put(self, rows: Tensor | slice, part: "RowStats") -> None:
        """Store the statistics of some rows, a slice's in one launch."""
        if isinstance(rows, slice):
            torch._foreach_copy_([mine[rows] for mine in self.known], part.known)
            return
        for mine, new in zip(self.known, part.known, strict=True):
            mine[rows] = new


@dataclass(frozen=True)
class GRPOLossConfig:
    """Everything about a GRPO loss that is not a tensor.

    Names, defaults and formulas are TRL 1.16's where TRL has them, else those of the codebase that had the option
    first, with three deliberate differences: `loss_type` defaults to "grpo"; TRL's `vllm_importance_sampling_*` keys
    lose their prefix, and since there is no `use_vllm` switch here the correction is off until
    `importance_sampling_mode` names one; `max_completion_length` has no default because a guessed loss denominator is
    worse than an error. A level, a mode or a key of one loss that the chosen loss does not have is an error; epsilons,
    `sapo_*`, `vespo_*` and `max_completion_length` of other losses are ignored. l, o, s are log-probabilities of
    policy, old policy and sampler.

    The keys, by family:

        which loss                loss_type, importance_sampling_level, max_completion_length
        its clip                  epsilon, epsilon_high, delta, dual_clip
        one loss only             sapo_*, vespo_*, dro_beta, clip_cov_*, kl_cov_ratio, ppo_kl_coef
        terms around it           beta, kl_estimator, use_bias_correction_kl, kl_tau, entropy_coef, distillation_*
        which tokens count        top_entropy_quantile, off_policy_mask_threshold, rollout_rs, rollout_rs_threshold
        old policy vs sampler     importance_sampling_mode, importance_sampling_clip_min, importance_sampling_clip_max
        from logits to log-probs  temperature, logit_scale, final_logit_softcapping

    Every value is a run-time argument of the kernels: changing one between calls compiles nothing.

    Raises:
        ValueError: a value out of range, or two keys that cannot be combined (the message names both).
    """

    # --- which loss
    loss_type: str = "grpo"
    """Policy term and reduction: a row of the table in `losses.py`."""

    importance_sampling_level: str = "token"
    """"token": one ratio per token. "sequence" (GSPO): exp of the sequence's mean log-ratio, shared by its tokens.
    "sequence_token" (GSPO-token): the same value, each token with the gradient of its own log-probability."""

    max_completion_length: int | None = None
    """Tokens per sequence in dr_grpo's constant denominator; required there and only there."""

    # --- its clip
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

    # --- one loss only
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

    dro_beta: float | None = None
    """DRO: weight of the squared log-ratio to the old policy; required there."""

    clip_cov_ratio: float = 2e-4
    """Clip-Cov: share of this call's tokens that lose their policy term."""

    clip_cov_lb: float = 1.0
    """Clip-Cov: these tokens have a covariance (A - mean A)·(l - mean l) above this."""

    clip_cov_ub: float = 5.0
    """Clip-Cov: and below this."""

    kl_cov_ratio: float = 2e-4
    """KL-Cov: share of this call's tokens, largest covariance first, with a penalty |l - o|."""

    ppo_kl_coef: float = 0.1
    """KL-Cov: weight of that penalty."""

    # --- terms around it
    beta: float = 0.0
    """Weight of the KL term; 0 skips it and `ref_per_token_logps` is not needed."""

    kl_estimator: str = "k3"
    """Per-token KL(policy || reference) estimator: k1, k2 or k3 (TRL has only k3)."""

    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the importance ratio, gradient included (DeepSeek-V3.2)."""

    kl_tau: float = 0.0
    """Weight of the squared log-ratio to the sampler, (l - s)² (Kimi K2.5); s = o where no sampler is given."""

    entropy_coef: float = 0.0
    """Weight of the entropy bonus: loss -= entropy_coef · (mean entropy per token)."""

    distillation_weight: float = 0.0
    """w of (1 - w)·loss + w·distillation: how far the policy is drawn to a teacher's `teacher_topk_logps` (SDPO); 0
    needs none, 1 leaves nothing but the teacher."""

    distillation_alpha: float = 1.0
    """Divergence to the teacher: 0 is KL(teacher || policy), 1 the reverse KL(policy || teacher), between them a
    generalised Jensen-Shannon divergence, 0.5 the usual one."""

    # --- which tokens count
    top_entropy_quantile: float = 1.0
    """Share of tokens, highest entropy first, that keep their policy term; 1.0 keeps all."""

    off_policy_mask_threshold: float | None = None
    """Drop the policy term of negative-advantage sequences whose mean log(sampler/policy) exceeds it (OPSM)."""

    rollout_rs: str | None = None
    """Drop the policy term of tokens or sequences that old policy and sampler disagree about: token_k1, seq_mean_k3 and
    others of `rejection.py`, several with commas; all must agree. The denominators keep counting them."""

    rollout_rs_threshold: str | float | None = None
    """Up to where they stay, for each option or one for all: k1 two ratios, "0.5_2.0"; k2 and k3 an upper bound."""

    # --- old policy vs sampler
    importance_sampling_mode: str | None = None
    """Weigh with old policy / sampler: token_truncate, token_mask, sequence_truncate, sequence_mask; None = off.
    seq-mask-tis: token ratios, of the sequences whose geometric mean ratio is within the bounds."""

    importance_sampling_clip_min: float | None = None
    """Lower bound of the sampler ratio: *_truncate clamps to it, the masks zero below it."""

    importance_sampling_clip_max: float | None = 3.0
    """Upper bound of the sampler ratio: *_truncate clamps to it, the masks zero above it."""

    # --- from logits to log-probs
    temperature: float = 1.0
    """Logits are divided by it before the softmax: the sampling temperature."""

    logit_scale: float = 1.0
    """Multiplier on the logits before soft-capping (Cohere's `logit_scale`, 1/Granite's `logits_scaling`)."""

    final_logit_softcapping: float | None = None
    """Gemma's cap c: logits become c·tanh(logits/c), after `logit_scale` and before `temperature`."""

    def __post_init__(self) -> None:
        check(self)

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
    def needs_advantage(self) -> bool:
        """Whether the loss of a token without an advantage and without an NLL weight has no gradient."""
        around = (self.beta, self.kl_tau, self.entropy_coef, self.distillation_weight)
        return self.loss.term.of_advantage and not any(around)

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
