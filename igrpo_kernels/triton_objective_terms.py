"""What `triton_objective_kernels.py` computes of a token and a sequence: values and slopes."""

import triton
import triton.language as tl

from igrpo_kernels.triton_grpo_loss import MASK, NO_SAMPLER, token_slopes
from igrpo_kernels.triton_math import dppo_leaves, kl_and_slope, sampler_correction, times

SCALARS = (
    "clip_low", "clip_high", "delta", "dual_clip", "sapo_temperature_pos", "sapo_temperature_neg", "sampler_low",
    "sampler_high", "beta", "off_policy_threshold", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos",
    "vespo_lambda_neg", "kl_tau", "dro_beta",
)  # fmt: skip

SEQ_MASK = tl.constexpr(3)  # beside NO_SAMPLER, TRUNCATE and MASK: seq-mask-tis


@triton.jit
def clamp(x, low, high):
    """x within the bounds; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def log_sampler_ratio(old, sampling, DTYPE: tl.constexpr):
    """log pi_old - log pi_sampler, finite: 0 where unknown (NaN)."""
    LARGEST: tl.constexpr = 3.4028234663852886e38 if DTYPE is tl.float32 else 1.7976931348623157e308
    x = old - sampling
    return tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, -LARGEST), LARGEST))


@triton.jit
def geometric_keep(log_sum, length, low, high):
    """1 where the geometric mean of a sequence's sampler ratios is within the bounds, else 0."""
    mean = tl.exp(log_sum / length)
    return tl.where((mean < low) | (mean > high), 0.0, 1.0).to(mean.dtype)


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
    clip_low, clip_high, sampler_low, sampler_high = numbers[0], numbers[1], numbers[6], numbers[7]
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
                ratio = sampler_correction(old - sampling, sampler_low, sampler_high, SAMPLER == MASK)
                d += clamp(tl.log(ratio), LOG_TINY, 20.0)
        log_ratio += tl.where(active, d, 0.0).to(tl.float64)
        if SAMPLER_OF_SEQUENCE or SAMPLER == SEQ_MASK:
            sampler_sum += log_sampler_ratio(old, sampling, DTYPE).to(tl.float64)
        if OPSM:
            left += log_sampler_ratio(sampling, logp, DTYPE).to(tl.float64)
    sampler = tl.full((), 1.0, DTYPE)
    if SAMPLER_OF_SEQUENCE:
        of_all = tl.sum(sampler_sum, axis=0).to(DTYPE)
        sampler = sampler_correction(of_all, sampler_low, sampler_high, SAMPLER == MASK)
    elif SAMPLER == SEQ_MASK:
        sampler = geometric_keep(tl.sum(sampler_sum, axis=0).to(DTYPE), length, sampler_low, sampler_high)
    common = tl.sum(log_ratio, axis=0).to(DTYPE)
    common = clamp(common, LOG_TINY, 20.0) if TERM == "vespo" else tl.exp(common / length)
    return common, sampler, tl.sum(left, axis=0).to(DTYPE) / length


LOG_TINY = tl.constexpr(-18.420680743952367)  # log 1e-8


@triton.jit
def vespo_phi(log_w, advantage, numbers):
    """phi(W) of `losses.py`."""
    k = tl.where(advantage >= 0.0, numbers[10], numbers[11])
    decay = tl.where(advantage >= 0.0, numbers[12], numbers[13])
    phi = tl.exp(decay + k * log_w - decay * tl.exp(log_w))
    return tl.where((phi != phi) | (phi == float("inf")), 0.0, phi)


@triton.jit
def policy_value(logp, old, w, common, advantage, numbers, TERM: tl.constexpr):
    """The policy terms of `losses.py`."""
    clip_low, clip_high, delta, dual_clip = numbers[0], numbers[1], numbers[2], numbers[3]
    bounded = clamp(w, clip_low, clip_high)
    capped = tl.where(w > delta, delta, w)
    if TERM == "clipped":
        surrogate = tl.minimum(times(advantage, capped), advantage * bounded, propagate_nan=tl.PropagateNan.ALL)
        floored = tl.maximum(surrogate, dual_clip * advantage, propagate_nan=tl.PropagateNan.ALL)
        value = -tl.where(advantage < 0.0, floored, surrogate)
    elif TERM == "cispo":
        value = -times(bounded * advantage, logp)
    elif TERM == "sapo":
        t = tl.where(advantage > 0.0, numbers[4], numbers[5])
        value = -(4.0 / t) / (1.0 + tl.exp(-t * (w - 1.0))) * advantage
    elif TERM == "vespo":
        value = -times(vespo_phi(common, advantage, numbers) * advantage, logp)
    elif TERM == "gmpo":
        value = -times(advantage, tl.zeros_like(logp) + common)
    elif TERM == "topr":
        weight = tl.where((advantage > 0.0) & (w == w), 1.0, tl.where(w > 1.0, 1.0, w))
        value = -times(weight * advantage, logp)
    elif TERM == "dro":
        value = -times(advantage, logp) + 0.5 * numbers[15] * (logp - old) * (logp - old)
    else:
        leaves = dppo_leaves(logp, old, advantage, clip_low, clip_high, TERM)
        value = -times(tl.where(leaves, 0.0, times(advantage, capped)), logp)
    return value


@triton.jit
def from_sampler(logp, sampling, PULLS: tl.constexpr):
    """What kl_tau squares; PULLS = 1: where the sampler's log-prob is known."""
    return tl.where((sampling != sampling) & (PULLS == 1), 0.0, logp - sampling)


@triton.jit
def row_value(logp, advantage, old, ref, sampling, w, factor, kept, common, numbers, TERM: tl.constexpr,
              KL: tl.constexpr, BIAS_CORRECTED: tl.constexpr, PULLS: tl.constexpr):  # fmt: skip
    """The token losses before loss_weights, and their KL."""
    value = times(factor, tl.where(kept, policy_value(logp, old, w, common, advantage, numbers, TERM), 0.0))
    kl = tl.zeros_like(logp)
    if KL != 0:
        kl, _ = kl_and_slope(ref - logp, KL)
        if BIAS_CORRECTED:
            kl = kl * w
        value += numbers[8] * kl
    if PULLS != 0:
        pull = from_sampler(logp, sampling, PULLS)
        value += numbers[14] * (pull * pull)
    return value, kl


@triton.jit
def slopes(logp, advantage, old, ref, sampling, w, factor, common, numbers, TERM: tl.constexpr, KL: tl.constexpr,
           BIAS_CORRECTED: tl.constexpr, PULLS: tl.constexpr):  # fmt: skip
    """d(token loss)/dw, its slope in logp that goes through nothing, and what goes through the sequence's `common`."""
    policy = factor
    if TERM == "vespo" or TERM == "gmpo":
        policy = tl.zeros_like(factor)
    through_w, direct = token_slopes(
        logp, advantage, old, ref, w, policy, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5],
        numbers[8], TERM, KL, BIAS_CORRECTED,
    )  # fmt: skip
    through_common = through_w
    if TERM == "vespo":
        direct += times(factor, -vespo_phi(common, advantage, numbers) * advantage)
    elif TERM == "gmpo":
        through_common = times(factor, -advantage)
    elif TERM == "dro":
        direct += times(factor, numbers[15] * (logp - old))
    if PULLS != 0:
        direct += 2.0 * numbers[14] * from_sampler(logp, sampling, PULLS)
    return through_w, direct, through_common


@triton.jit
def leaves(logp, old, w, advantage, numbers, TERM: tl.constexpr):
    """Whether a token is clipped below, above, and by dual-clip."""
    clip_low, clip_high, delta, dual_clip = numbers[0], numbers[1], numbers[2], numbers[3]
    capped = tl.where(w > delta, delta, w)
    low, high = capped < clip_low, capped > clip_high
    if TERM == "dppo_tv" or TERM == "dppo_kl":
        low = dppo_leaves(logp, old, advantage, clip_low, clip_high, TERM)
        high = low
    elif TERM == "gmpo":
        low, high = logp - old < clip_low, logp - old > clip_high
    return low & (advantage < 0.0), high & (advantage > 0.0), (capped > dual_clip) & (advantage < 0.0)
