"""What `triton_objective_kernels.py` computes of a token and a sequence: values and slopes."""

import triton
import triton.language as tl

from igrpo_kernels.triton_grpo_loss import token_slopes
from igrpo_kernels.triton_math import dppo_leaves, kl_and_slope, times
from igrpo_kernels.triton_sampler import (
    NO_SAMPLER,
    SEQ_MASK,
    common_ratio,
    log_sampler_ratio,
    row_ratio,
)

SCALARS = (
    "clip_low", "clip_high", "delta", "dual_clip", "sapo_temperature_pos", "sapo_temperature_neg", "sampler_low",
    "sampler_high", "beta", "off_policy_threshold", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos",
    "vespo_lambda_neg", "kl_tau", "dro_beta", "ppo_kl_coef",
)  # fmt: skip
# Where each is in `numbers`.
CLIP_LOW, CLIP_HIGH, DELTA, DUAL_CLIP, SAPO_POS, SAPO_NEG = (tl.constexpr(i) for i in range(6))
SAMPLER_LOW, SAMPLER_HIGH, BETA, OFF_POLICY, VESPO_K_POS, VESPO_K_NEG = (tl.constexpr(i) for i in range(6, 12))
VESPO_LAMBDA_POS, VESPO_LAMBDA_NEG, KL_TAU, DRO_BETA, PPO_KL_COEF = (tl.constexpr(i) for i in range(12, 17))


@triton.jit
def clamp(x, low, high):
    """x within the bounds; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def load_rows(logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, start, end, BLOCK: tl.constexpr):
    """A block of rows of one sequence: where they are, which count, and their values; absent ones as the policy's."""
    row = start + tl.arange(0, BLOCK)
    active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
    logp = tl.load(logps_ptr + row, mask=active, other=0.0)
    advantage = tl.load(advantages_ptr + row, mask=active, other=0.0)
    old = logp if old_ptr is None else tl.load(old_ptr + row, mask=active, other=0.0)
    ref = logp if ref_ptr is None else tl.load(ref_ptr + row, mask=active, other=0.0)
    sampling = old if sampling_ptr is None else tl.load(sampling_ptr + row, mask=active, other=0.0)
    return row, active, logp, advantage, old, ref, sampling


@triton.jit
def of_sequence(
    logps_ptr, mask_ptr, advantages_ptr, old_ptr, sampling_ptr, begin, end, length, numbers,
    TERM: tl.constexpr, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, OPSM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a sequence has in common: exp of its mean log-ratio (GMPO: clipped; VESPO: its log W instead), the
    sampler's ratio (1: each token has its own; seq-mask-tis: 0 where they do not count), and how far the policy has
    left the sampler.
    """
    DTYPE: tl.constexpr = logps_ptr.dtype.element_ty
    clip_low, clip_high = numbers[CLIP_LOW], numbers[CLIP_HIGH]
    sampler_low, sampler_high = numbers[SAMPLER_LOW], numbers[SAMPLER_HIGH]
    log_ratio = tl.zeros((BLOCK,), tl.float64)
    sampler_sum, left = log_ratio, log_ratio
    for start in range(begin, end, BLOCK):
        _, active, logp, advantage, old, _, sampling = load_rows(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, None, sampling_ptr, start, end, BLOCK
        )
        d = logp - old
        if TERM == "gmpo":
            d = tl.where(advantage > 0.0, tl.where(d > clip_high, clip_high, d), tl.where(d < clip_low, clip_low, d))
            d = tl.where(advantage == 0.0, 0.0, d)
        elif TERM == "vespo":
            d = clamp(d, -20.0, 20.0)
            if SAMPLER != NO_SAMPLER:
                ratio = row_ratio(1.0, old, sampling, sampler_low, sampler_high, SAMPLER, SAMPLER_OF_SEQUENCE)
                d += clamp(tl.log(ratio), LOG_TINY, 20.0)
        log_ratio += tl.where(active, d, 0.0).to(tl.float64)
        if SAMPLER_OF_SEQUENCE or SAMPLER == SEQ_MASK:
            sampler_sum += log_sampler_ratio(old, sampling, DTYPE).to(tl.float64)
        if OPSM:
            left += log_sampler_ratio(sampling, logp, DTYPE).to(tl.float64)
    sampler = common_ratio(
        tl.sum(sampler_sum, axis=0).to(DTYPE), length, sampler_low, sampler_high, SAMPLER, SAMPLER_OF_SEQUENCE
    )
    common = tl.sum(log_ratio, axis=0).to(DTYPE)
    common = clamp(common, LOG_TINY, 20.0) if TERM == "vespo" else tl.exp(common / length)
    return common, sampler, tl.sum(left, axis=0).to(DTYPE) / length


LOG_TINY = tl.constexpr(-18.420680743952367)  # log 1e-8


@triton.jit
def vespo_phi(log_w, advantage, numbers):
    """phi(W) of `losses.py`."""
    k = tl.where(advantage >= 0.0, numbers[VESPO_K_POS], numbers[VESPO_K_NEG])
    decay = tl.where(advantage >= 0.0, numbers[VESPO_LAMBDA_POS], numbers[VESPO_LAMBDA_NEG])
    phi = tl.exp(decay + k * log_w - decay * tl.exp(log_w))
    return tl.where((phi != phi) | (phi == float("inf")), 0.0, phi)


@triton.jit
def policy_value(logp, old, w, common, advantage, drawn, numbers, TERM: tl.constexpr):
    """The policy terms of `losses.py`; what clip_cov has drawn is not kept."""
    clip_low, clip_high, delta, dual_clip = numbers[CLIP_LOW], numbers[CLIP_HIGH], numbers[DELTA], numbers[DUAL_CLIP]
    bounded = clamp(w, clip_low, clip_high)
    capped = tl.where(w > delta, delta, w)
    if TERM == "clipped" or TERM == "clip_cov":
        surrogate = tl.minimum(times(advantage, capped), advantage * bounded, propagate_nan=tl.PropagateNan.ALL)
        floored = tl.maximum(surrogate, dual_clip * advantage, propagate_nan=tl.PropagateNan.ALL)
        value = -tl.where(advantage < 0.0, floored, surrogate)
    elif TERM == "cispo":
        value = -times(bounded * advantage, logp)
    elif TERM == "sapo":
        t = tl.where(advantage > 0.0, numbers[SAPO_POS], numbers[SAPO_NEG])
        value = -(4.0 / t) / (1.0 + tl.exp(-t * (w - 1.0))) * advantage
    elif TERM == "vespo":
        value = -times(vespo_phi(common, advantage, numbers) * advantage, logp)
    elif TERM == "gmpo":
        value = -times(advantage, tl.zeros_like(logp) + common)
    elif TERM == "topr":
        weight = tl.where((advantage > 0.0) & (w == w), 1.0, tl.where(w > 1.0, 1.0, w))
        value = -times(weight * advantage, logp)
    elif TERM == "dro":
        value = -times(advantage, logp) + 0.5 * numbers[DRO_BETA] * (logp - old) * (logp - old)
    elif TERM == "kl_cov":
        value = -times(advantage, w) + numbers[PPO_KL_COEF] * tl.where(drawn, tl.abs(logp - old), 0.0)
    else:
        leaves = dppo_leaves(logp, old, advantage, clip_low, clip_high, TERM)
        value = -times(tl.where(leaves, 0.0, times(advantage, capped)), logp)
    return value


@triton.jit
def from_sampler(logp, sampling, PULLS: tl.constexpr):
    """What kl_tau squares; PULLS = 1: where the sampler's log-prob is known."""
    return tl.where((sampling != sampling) & (PULLS == 1), 0.0, logp - sampling)


@triton.jit
def row_value(logp, advantage, old, ref, sampling, w, factor, kept, drawn, common, numbers, TERM: tl.constexpr,
              KL: tl.constexpr, BIAS_CORRECTED: tl.constexpr, PULLS: tl.constexpr):  # fmt: skip
    """The token losses before loss_weights, and their KL."""
    value = policy_value(logp, old, w, common, advantage, drawn, numbers, TERM)
    value = times(factor, tl.where(kept, value, 0.0))
    kl = tl.zeros_like(logp)
    if KL != 0:
        kl, _ = kl_and_slope(ref - logp, KL)
        if BIAS_CORRECTED:
            kl = kl * w
        value += numbers[BETA] * kl
    if PULLS != 0:
        pull = from_sampler(logp, sampling, PULLS)
        value += numbers[KL_TAU] * (pull * pull)
    return value, kl


@triton.jit
def slopes(logp, advantage, old, ref, sampling, w, factor, drawn, common, numbers, TERM: tl.constexpr,
           KL: tl.constexpr, BIAS_CORRECTED: tl.constexpr, PULLS: tl.constexpr):  # fmt: skip
    """d(token loss)/dw, its slope in logp that goes through nothing, and what goes through the sequence's `common`."""
    policy = factor
    if TERM == "vespo" or TERM == "gmpo":
        policy = tl.zeros_like(factor)
    through_w, direct = token_slopes(
        logp, advantage, old, ref, w, policy, numbers[CLIP_LOW], numbers[CLIP_HIGH], numbers[DELTA],
        numbers[DUAL_CLIP], numbers[SAPO_POS], numbers[SAPO_NEG], numbers[BETA], TERM, KL, BIAS_CORRECTED,
    )  # fmt: skip
    through_common = through_w
    if TERM == "vespo":
        direct += times(factor, -vespo_phi(common, advantage, numbers) * advantage)
    elif TERM == "gmpo":
        through_common = times(factor, -advantage)
    elif TERM == "dro":
        direct += times(factor, numbers[DRO_BETA] * (logp - old))
    elif TERM == "kl_cov":
        side = tl.where(logp > old, 1.0, tl.where(logp < old, -1.0, 0.0))
        direct += times(factor, numbers[PPO_KL_COEF] * tl.where(drawn, side, 0.0))
    if PULLS != 0:
        direct += 2.0 * numbers[KL_TAU] * from_sampler(logp, sampling, PULLS)
    return through_w, direct, through_common


@triton.jit
def leaves(logp, old, w, advantage, drawn, numbers, TERM: tl.constexpr):
    """Whether a token is clipped below, above, and by dual-clip; clip_cov: drawn with A < 0, with A > 0, at all."""
    clip_low, clip_high, delta, dual_clip = numbers[CLIP_LOW], numbers[CLIP_HIGH], numbers[DELTA], numbers[DUAL_CLIP]
    capped = tl.where(w > delta, delta, w)
    low, high = capped < clip_low, capped > clip_high
    if TERM == "dppo_tv" or TERM == "dppo_kl":
        low = dppo_leaves(logp, old, advantage, clip_low, clip_high, TERM)
        high = low
    elif TERM == "gmpo":
        low, high = logp - old < clip_low, logp - old > clip_high
    elif TERM == "clip_cov":
        low, high = drawn, drawn
    dual = drawn if TERM == "clip_cov" else (capped > dual_clip) & (advantage < 0.0)
    return low & (advantage < 0.0), high & (advantage > 0.0), dual
