"""The table of losses: what each `loss_type` computes, beside the line that computes it, and how it is reduced.

A policy term gives the loss per token (n,) from l policy, o old policy, d = l - o, w importance weight and A advantages
before gates, sampler ratio and KL (`objective.py`). It is a multiple of A, unless it says `of_advantage=False`: rows
without one are left out of the work. Losses of one term differ in what epsilon means and in the reduction.

Adding a loss: a row in LOSSES and, if it needs one, a term. It then works everywhere, in two passes over the logits.
For one pass its slope dL/dl joins `policy_slopes` in `triton_math.py` and in `csrc/token_objective.h`, and the term
says `one_pass=True`. All else follows from this table: the choices of both configurations (igrpo reads this file
without importing torch, which is why no line here does), their checks, the kernels' dispatch, reductions, metrics, and
the table in docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Config = Any  # GRPOLossConfig, which reads this table
Batch = Any  # TokenBatch

IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "seq-mask-tis")
KL_ESTIMATORS = ("k1", "k2", "k3")
ROLLOUT_RS = (
    "token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
    "seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3",
)  # fmt: skip
"""What a token or a sequence is rejected by; the equations are in `rejection.py`."""

_VESPO_LOG_RATIO_LIMIT = 20.0
_VESPO_LOG_WEIGHT_MIN = math.log(1e-8)
VESPO_LAMBDA_MIN = 1e-4
_TINY = 1e-8  # added to both sides of a quotient of probabilities


class TermInputs(NamedTuple):
    """What a policy term is given; (n,) each, masked rows 0."""

    logps: Tensor  # l
    old: Tensor  # o
    log_ratio: Tensor  # d
    weight: Tensor  # w
    advantages: Tensor  # A
    sampler: Tensor | None  # sampler ratio, constant; (S,) where it belongs to sequences
    batch: Batch


# ---- policy terms


def clipped(x: TermInputs, config: Config) -> Tensor:
    """-min(min(w, delta)·A, clip(w, low, high)·A), floored for A < 0 by dual-clip at c·A."""
    bounded = _bounded(x.weight, config.clip_low, config.clip_high)
    weight = x.weight if config.delta is None else _bounded(x.weight, -math.inf, config.delta)
    surrogate = times(x.advantages, weight).minimum(x.advantages * bounded)
    if config.dual_clip is not None:
        surrogate = surrogate.maximum(config.dual_clip * x.advantages).where(x.advantages < 0, surrogate)
    return -surrogate


def cispo(x: TermInputs, config: Config) -> Tensor:
    """-stop_gradient(clip(w, low, high))·A·l"""
    return -times(x.weight.detach().clamp(config.clip_low, config.clip_high) * x.advantages, x.logps)


def sapo(x: TermInputs, config: Config) -> Tensor:
    """-(4/t)·sigmoid(t·(w - 1))·A with t = temperature_pos where A > 0, else temperature_neg."""
    positive = x.weight.new_full(x.weight.shape, config.sapo_temperature_pos)
    t = positive.masked_fill(~(x.advantages > 0), config.sapo_temperature_neg)
    return -((t * (x.weight - 1.0)).sigmoid() * 4.0 / t) * x.advantages


def vespo(x: TermInputs, config: Config) -> Tensor:
    """-phi(W)·A·l, with phi a constant; see `vespo_phi`."""
    return -times(vespo_phi(x, config) * x.advantages, x.logps)


def vespo_phi(x: TermInputs, config: Config) -> Tensor:
    """phi(W) = exp(lambda + k·log W - lambda·W) (n,), a constant; W = product of the sequence's token ratios.

    log W = sum_t clip(d_t, ±20) [+ sum_t clip(log sampler ratio_t, log 1e-8, 20)], clipped to [log 1e-8, 20]; k and
    lambda by the sign of A. phi(1) = 1.
    """
    batch = x.batch
    log_weight = x.log_ratio.detach().clamp(-_VESPO_LOG_RATIO_LIMIT, _VESPO_LOG_RATIO_LIMIT)
    if x.sampler is not None:
        log_weight = log_weight + x.sampler.log().clamp(_VESPO_LOG_WEIGHT_MIN, _VESPO_LOG_RATIO_LIMIT)
    log_w = batch.expand(batch.segment_sum(log_weight).clamp(_VESPO_LOG_WEIGHT_MIN, _VESPO_LOG_RATIO_LIMIT))
    negative = ~(x.advantages >= 0)
    k = log_w.new_full(log_w.shape, config.vespo_k_pos).masked_fill(negative, config.vespo_k_neg)
    decay = log_w.new_full(log_w.shape, config.vespo_lambda_pos).masked_fill(negative, config.vespo_lambda_neg)
    decay = decay.clamp(min=VESPO_LAMBDA_MIN)
    log_phi = decay + k * log_w - decay * log_w.exp()
    return log_phi.exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def times(a: Tensor, x: Tensor) -> Tensor:
    """a·x for a constant a, with 0 · inf = 0 in value and in gradient. NaN stays NaN: a poisoned row must show."""
    return (a * x).masked_fill((a == 0) & x.isinf(), 0.0)


def _bounded(x: Tensor, low: float, high: float) -> Tensor:
    """clamp, whose gradient on a bound is 1 whatever the torch; that of ``clamp`` is 0 since 2.14 and was 1 before."""
    return x.masked_fill(x < low, low).masked_fill(x > high, high)


def dppo_tv(x: TermInputs, config: Config) -> Tensor:
    """-stop_gradient(min(w, delta))·A·l, but 0 where A > 0 and exp(l) - exp(o) > high, or A < 0 and it is < low."""
    return _inside(dppo_tv_leaves(x, config), x, config)


def dppo_tv_leaves(x: TermInputs, config: Config) -> Tensor:
    """Bool (n,): tokens whose probability has moved too far the way their advantage pushes it."""
    moved = x.logps.detach().exp() - x.old.exp()
    return ((x.advantages > 0) & (moved > config.clip_high)) | ((x.advantages < 0) & (moved < config.clip_low))


def dppo_kl(x: TermInputs, config: Config) -> Tensor:
    """-stop_gradient(min(w, delta))·A·l, but 0 where A > 0, exp(l) > exp(o) and K > high, or A < 0, exp(l) < exp(o)
    and K > -low; K = KL(o || l) of "this token" against "any other".
    """
    return _inside(dppo_kl_leaves(x, config), x, config)


def dppo_kl_leaves(x: TermInputs, config: Config) -> Tensor:
    """Bool (n,), as `dppo_tv_leaves`."""
    logps, a = x.logps.detach(), x.advantages
    p, mu = logps.exp(), x.old.exp()
    others = [(1.0 - q).clamp(min=0.0) for q in (mu, p)]
    kl = mu * (x.old - logps) + others[0] * ((others[0] + _TINY) / (others[1] + _TINY)).log()
    return ((a > 0) & (p > mu) & (kl > config.clip_high)) | ((a < 0) & (p < mu) & (kl > -config.clip_low))


def _inside(leaves: Tensor, x: TermInputs, config: Config) -> Tensor:
    from igrpo_kernels.silent_exp import silent_times

    weight = x.weight.detach()
    weight = weight if config.delta is None else weight.clamp(max=config.delta)
    return -silent_times(times(x.advantages, weight).masked_fill(leaves, 0.0), x.logps)


def gmpo(x: TermInputs, config: Config) -> Tensor:
    """-A·exp(mean of m over the sequence), m = min(d, high) where A > 0, max(d, low) where A < 0"""
    from igrpo_kernels.silent_exp import silent_exp

    below = _bounded(x.log_ratio, -math.inf, config.clip_high)
    bounded = below.where(x.advantages > 0, _bounded(x.log_ratio, config.clip_low, math.inf))
    mean = x.batch.segment_sum(bounded.masked_fill(x.advantages == 0, 0.0)) / x.batch.lengths.clamp(min=1.0)
    return -times(x.advantages, x.batch.expand(silent_exp(mean)))


def gmpo_leaves(x: TermInputs, config: Config) -> Tensor:
    """Bool (n,): tokens whose log-ratio is clipped."""
    above, below = x.log_ratio > config.clip_high, x.log_ratio < config.clip_low
    return (above & (x.advantages > 0)) | (below & (x.advantages < 0))


def topr(x: TermInputs, config: Config) -> Tensor:
    """-A·l where A > 0, else -stop_gradient(clip(w, 0, 1))·A·l; ROLL's asks for the sign of the reward, not of A"""
    weight = x.weight.detach()
    weight = weight.clamp(max=1.0).masked_fill((x.advantages > 0) & (weight == weight), 1.0)
    return -times(weight * x.advantages, x.logps)


def dro(x: TermInputs, config: Config) -> Tensor:
    """-A·l + dro_beta/2·d²"""
    from igrpo_kernels.silent_exp import silent_square

    return -times(x.advantages, x.logps) + 0.5 * config.dro_beta * silent_square(x.log_ratio)


def clip_cov(x: TermInputs, config: Config) -> Tensor:
    """-min(w·A, clip(w, low, high)·A), but 0 for clip_cov_ratio·n tokens of this call, drawn from those that are not
    clipped and have clip_cov_lb < (A - mean A)·(l - mean l) < clip_cov_ub.
    """
    return clipped(x, config).masked_fill(clip_cov_leaves(x, config), 0.0)


def clip_cov_leaves(x: TermInputs, config: Config) -> Tensor:
    """Bool (n,): the tokens that were drawn, at least one where there is one to draw; the same for the same ids."""
    beyond = (x.weight > config.clip_high) & (x.advantages > 0) | (x.weight < config.clip_low) & (x.advantages < 0)
    covariance = _covariance(x)
    drawn_from = x.batch.mask & ~beyond & (covariance > config.clip_cov_lb) & (covariance < config.clip_cov_ub)
    # No generator: whoever asks twice gets the same tokens, padded or packed.
    lot = (x.batch.index * 0x5851F42D + x.batch.mask.cumsum(0) * 0x9E3779B1) % 0x7FFFFFFF * 0x2545F491 % 0x7FFFFFFF
    return drawn_from & _first(lot.masked_fill(~drawn_from, 0x7FFFFFFF), config.clip_cov_ratio, x.batch)


def kl_cov(x: TermInputs, config: Config) -> Tensor:
    """-w·A, and + ppo_kl_coef·|d| for the kl_cov_ratio·n tokens of this call with the largest
    (A - mean A)·(l - mean l).
    """
    largest = x.batch.mask & _first(-_covariance(x).masked_fill(~x.batch.mask, -math.inf), config.kl_cov_ratio, x.batch)
    return -times(x.advantages, x.weight) + config.ppo_kl_coef * x.log_ratio.abs().masked_fill(~largest, 0.0)


def _covariance(x: TermInputs) -> Tensor:
    """(A - mean A)·(l - mean l) (n,), the means over this call's tokens."""
    count = x.batch.mask.sum().clamp(min=1)
    logps = x.logps.detach()
    return (x.advantages - x.advantages.sum() / count) * (logps - logps.sum() / count)


def _first(key: Tensor, share: float, batch: Batch) -> Tensor:
    """Bool (n,): the rows with the smallest keys, that share of the unmasked ones, rounded down, but at least one."""
    count = (batch.mask.sum().double() * share).floor().clamp(min=1.0)
    return key.argsort(stable=True).argsort() < count


class Term(NamedTuple):
    """A policy term."""

    name: str
    """What the kernels call it."""

    function: Callable[[TermInputs, Config], Tensor]
    """The equation is its docstring."""

    settings: tuple[str, ...]
    """Keys of GRPOLossConfig that belong to this term."""

    one_pass: bool = False
    """Whether the kernels know its slope, so that one pass over the logits gives the gradient."""

    couples: str = "token"
    """Whose log-probabilities a token's term needs: its own ("token"), its "sequence"'s, the "batch"'s."""

    of_advantage: bool = True
    """Whether it is a multiple of A, so that a token without an advantage has no gradient."""

    levels: tuple[str, ...] = IMPORTANCE_SAMPLING_LEVELS
    """Values of importance_sampling_level that it can be combined with."""

    takes_sampler: bool = False
    """Whether the sampler's ratio is part of it; it multiplies every other term."""

    leaves: Callable[[TermInputs, Config], Tensor] | None = None
    """Bool (n,): tokens outside the trust region, for the clip metrics; None = `loss_metrics.py` knows the term or
    has no metric for it."""


_EPSILONS = ("epsilon", "epsilon_high")
_CONSTANT = ("token", "sequence")  # where w is a constant, a gradient of its own for each token is none
CLIPPED = Term("clipped", clipped, (*_EPSILONS, "delta", "dual_clip"), one_pass=True)
CISPO = Term("cispo", cispo, _EPSILONS, one_pass=True, levels=_CONSTANT)
SAPO = Term("sapo", sapo, ("sapo_temperature_neg", "sapo_temperature_pos"), one_pass=True)
VESPO = Term(
    "vespo", vespo, ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    couples="sequence", levels=("token",), takes_sampler=True,
)  # fmt: skip


_DPPO = {"settings": (*_EPSILONS, "delta"), "one_pass": True, "levels": ("token",)}
DPPO_TV = Term("dppo_tv", dppo_tv, leaves=dppo_tv_leaves, **_DPPO)
DPPO_KL = Term("dppo_kl", dppo_kl, leaves=dppo_kl_leaves, **_DPPO)
GMPO = Term("gmpo", gmpo, _EPSILONS, couples="sequence", levels=("token",), leaves=gmpo_leaves)
TOPR = Term("topr", topr, (), one_pass=True, levels=_CONSTANT)
DRO = Term("dro", dro, ("dro_beta",), one_pass=True, levels=("token",), of_advantage=False)
_COV = {"couples": "batch", "levels": ("token",)}
CLIP_COV = Term(
    "clip_cov", clip_cov, (*_EPSILONS, "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"), leaves=clip_cov_leaves, **_COV
)
KL_COV = Term("kl_cov", kl_cov, ("kl_cov_ratio", "ppo_kl_coef"), of_advantage=False, **_COV)


# ---- what epsilon and epsilon_high say: (low, high) from both


def around_one(epsilon: float, epsilon_high: float) -> tuple[float, float]:
    """[1 - epsilon, 1 + epsilon_high]"""
    return 1.0 - epsilon, 1.0 + epsilon_high


def above_only(epsilon: float, epsilon_high: float) -> tuple[float, float]:
    """[0, epsilon_high]"""
    return 0.0, epsilon_high


def around_zero(epsilon: float, epsilon_high: float) -> tuple[float, float]:
    """[-epsilon, epsilon_high]"""
    return -epsilon, epsilon_high


# ---- reductions: weight of each sequence's tokens (S,), from the batch, the configuration and num_items


class Reduction(NamedTuple):
    """A denominator."""

    divides_by: str
    to_accumulate: str
    """What makes the sum over micro-batches exact; S_total and n_total count the whole optimiser step."""

    weights: Callable[[Batch, Config, Any], Tensor]
    share: Callable[[float, float, float, float], float]
    """Factor of a micro-batch's loss, from its S and n and those of the whole step."""
    items: str = "tokens"
    """What num_items_in_batch counts."""


def _sequences(batch: Batch) -> int:
    return max(batch.num_sequences, 1)


def _of_items(batch: Batch, num_items: Tensor | float | None, least: float = 1.0) -> Tensor:
    lengths = batch.lengths
    if num_items is None:
        num_items = lengths.sum()
    elif isinstance(num_items, int | float):
        num_items = lengths.new_full((), num_items)
    return lengths.new_ones(lengths.shape) / num_items.to(lengths).reshape(()).clamp(min=least)


def _of_prompts(batch: Batch, config: Config, num_items: Tensor | float | None) -> Tensor:
    of_prompt = batch.prompt_lengths.clamp(min=1.0)
    prompts = (batch.lengths / of_prompt).sum() if num_items is None else num_items
    return _of_items(batch, prompts, least=1e-6) / of_prompt  # a call may hold a part of a prompt


def _of_sequences(s: float, n: float, s_total: float, n_total: float) -> float:
    return s / max(s_total, 1.0)


SEQUENCE_MEAN = Reduction(
    "S · n_b, n_b the sequence's tokens", "loss · S / S_total",
    lambda batch, config, _: 1.0 / (batch.lengths.clamp(min=1.0) * _sequences(batch)), _of_sequences,
)  # fmt: skip
SEQUENCE_SUM = Reduction(
    "S", "loss · S / S_total",
    lambda batch, config, _: batch.lengths.new_ones(batch.lengths.shape) / _sequences(batch), _of_sequences,
)  # fmt: skip
CONSTANT_LENGTH = Reduction(
    "S · max_completion_length", "loss · S / S_total",
    lambda batch, config, _: batch.lengths.new_ones(batch.lengths.shape)
    / (_sequences(batch) * config.max_completion_length), _of_sequences,
)  # fmt: skip
TOKEN_MEAN = Reduction(
    "n", "loss · n / n_total",
    lambda batch, config, _: _of_items(batch, None), lambda s, n, s_total, n_total: n / max(n_total, 1.0),
)  # fmt: skip
NUM_ITEMS = Reduction(
    "num_items_in_batch", "pass num_items_in_batch = n_total, then add",
    lambda batch, config, num_items: _of_items(batch, num_items), lambda s, n, s_total, n_total: 1.0,
)  # fmt: skip
PROMPT_MEAN = Reduction(
    "P · n_p, P = num_items_in_batch prompts, n_p the tokens of all completions of the prompt",
    "pass num_items_in_batch = P_total and prompt_lengths of the step, then add",
    _of_prompts, lambda s, n, s_total, n_total: 1.0, items="prompts",
)  # fmt: skip


# ---- the losses


class Loss(NamedTuple):
    """A `loss_type`."""

    term: Term
    reduction: Reduction
    bounds: Callable[[float, float], tuple[float, float]] = around_one


LOSSES = {
    "grpo": Loss(CLIPPED, SEQUENCE_MEAN),
    "bnpo": Loss(CLIPPED, TOKEN_MEAN),
    "dr_grpo": Loss(CLIPPED, CONSTANT_LENGTH),
    "dapo": Loss(CLIPPED, NUM_ITEMS),
    "cispo": Loss(CISPO, NUM_ITEMS, above_only),
    "sapo": Loss(SAPO, SEQUENCE_MEAN),
    "luspo": Loss(CLIPPED, SEQUENCE_SUM),
    "vespo": Loss(VESPO, NUM_ITEMS),
    "cispo_two_sided": Loss(CISPO, NUM_ITEMS),
    "dppo_tv": Loss(DPPO_TV, NUM_ITEMS, around_zero),
    "dppo_kl": Loss(DPPO_KL, NUM_ITEMS, around_zero),
    "gmpo": Loss(GMPO, SEQUENCE_MEAN, around_zero),
    "topr": Loss(TOPR, NUM_ITEMS),
    "dro": Loss(DRO, NUM_ITEMS),
    "clip_cov": Loss(CLIP_COV, NUM_ITEMS),
    "kl_cov": Loss(KL_COV, NUM_ITEMS),
    "prompt_mean": Loss(CLIPPED, PROMPT_MEAN),
}
