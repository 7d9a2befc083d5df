"""Kernels of `triton_objective.py`: one program per sequence, then one that adds the sequences up.

The equations are those of `objective.py` and `loss_metrics.py` in the same order. Sums run in fp64.
"""

import triton
import triton.language as tl

from igrpo_kernels.triton_grpo_loss import MASK, NO_SAMPLER, token_slopes
from igrpo_kernels.triton_math import dppo_leaves, kl_and_slope, sampler_correction, times
from igrpo_kernels.triton_sequences import column_extreme, column_sum, sequence_bounds

# Columns of a sequence's shares. Up to LENGTH they are added up, then the largest counts, then the smallest.
LOSS, ENTROPY, KL_SUM, LOW, HIGH, REGION, DUAL = (tl.constexpr(i) for i in range(7))
DIFFERENCE, SCORED, RATIO, COUNTED, LENGTH = (tl.constexpr(i) for i in range(7, 12))
DIFFERENCE_MAX, RATIO_MAX, HIGH_MAX, RATIO_MIN, LOW_MIN = (tl.constexpr(i) for i in range(12, 17))
COLUMNS = 17

SCALARS = (
    "clip_low", "clip_high", "delta", "dual_clip", "sapo_temperature_pos", "sapo_temperature_neg", "sampler_low",
    "sampler_high", "beta",
)  # fmt: skip
_NUMBERS = ["n", "tokens", "S", "num_items", "max_length", "entropy_coef", *SCALARS]
_POINTERS = [
    f"{name}_ptr"
    for name in (
        "logps", "entropy", "mask", "advantages", "sequence_advantages", "old", "ref", "sampling", "lengths",
        "cu_seqlens", "num_items", "shares", "grad_logps", "grad_entropy", "weight", "policy_weight", "entropy_slope",
        "loss", "results",
    )
]  # fmt: skip


@triton.jit
def loss_weight(lengths_ptr, num_items_ptr, b, S, num_items, max_length, DTYPE: tl.constexpr, REDUCTION: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """dloss/d(token loss) of a sequence's tokens: the reductions of `losses.py`."""
    one = tl.full((), 1.0, DTYPE)
    sequences = tl.full((), S, DTYPE)
    if REDUCTION == "sequence_mean":
        divisor = tl.maximum(tl.load(lengths_ptr + b), one) * sequences
    elif REDUCTION == "sequence_sum":
        divisor = sequences
    elif REDUCTION == "constant_length":
        divisor = sequences * tl.full((), max_length, DTYPE)
    elif REDUCTION == "token_mean":
        divisor = tl.maximum(column_sum(lengths_ptr, S, BLOCK).to(DTYPE), one)
    else:
        tl.static_assert(REDUCTION == "num_items")
        divisor = tl.full((), num_items, DTYPE)
        if num_items_ptr is not None:
            divisor = tl.load(num_items_ptr).to(DTYPE)
        divisor = tl.where(divisor < one, one, divisor)
    return one / divisor


@triton.jit
def log_sampler_ratio(old, sampling, DTYPE: tl.constexpr):
    """log pi_old - log pi_sampler, finite: 0 where unknown (NaN)."""
    LARGEST: tl.constexpr = 3.4028234663852886e38 if DTYPE is tl.float32 else 1.7976931348623157e308
    x = old - sampling
    return tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, -LARGEST), LARGEST))


@triton.jit
def policy_value(
    logp, old, w, advantage, clip_low, clip_high, delta, dual_clip, temperature_pos, temperature_neg,
    TERM: tl.constexpr,
):  # fmt: skip
    """The policy terms of `losses.py`."""
    bounded = tl.where(w < clip_low, clip_low, tl.where(w > clip_high, clip_high, w))
    capped = tl.where(w > delta, delta, w)
    if TERM == "clipped":
        surrogate = tl.minimum(times(advantage, capped), advantage * bounded, propagate_nan=tl.PropagateNan.ALL)
        floored = tl.maximum(surrogate, dual_clip * advantage, propagate_nan=tl.PropagateNan.ALL)
        value = -tl.where(advantage < 0.0, floored, surrogate)
    elif TERM == "cispo":
        value = -times(bounded * advantage, logp)
    elif TERM == "sapo":
        t = tl.where(advantage > 0.0, temperature_pos, temperature_neg)
        value = -(4.0 / t) / (1.0 + tl.exp(-t * (w - 1.0))) * advantage
    else:
        leaves = dppo_leaves(logp, old, advantage, clip_low, clip_high, TERM)
        value = -times(tl.where(leaves, 0.0, times(advantage, capped)), logp)
    return value


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def row_weights_kernel(
    # data: (S,), (n,) and ()
    mask_ptr, lengths_ptr, cu_seqlens_ptr, num_items_ptr, old_ptr, sampling_ptr,
    weight_ptr, policy_weight_ptr, entropy_slope_ptr,  # written; the last two may be None
    # numbers
    n: tl.int64, tokens: tl.int64, S: tl.int32, num_items: tl.float64, max_length: tl.float64,
    entropy_coef: tl.float64, sampler_low: tl.float64, sampler_high: tl.float64,
    # constants
    REDUCTION: tl.constexpr, MASKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence: its rows' weight, the sampler's ratio of the sequence, and dloss/dentropy."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(cu_seqlens_ptr, b, S, tokens, n)
    weight = loss_weight(lengths_ptr, num_items_ptr, b, S, num_items, max_length, DTYPE, REDUCTION, BLOCK)
    ratio = tl.full((), 1.0, DTYPE)
    if policy_weight_ptr is not None:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(begin, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
            old = tl.load(old_ptr + row, mask=active, other=0.0)
            total += log_sampler_ratio(old, tl.load(sampling_ptr + row, mask=active, other=0.0), DTYPE).to(tl.float64)
        low = tl.full((), sampler_low, DTYPE)
        ratio = sampler_correction(tl.sum(total, axis=0).to(DTYPE), low, tl.full((), sampler_high, DTYPE), MASKS)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = tl.load(mask_ptr + row, mask=row < end, other=0) != 0
        tl.store(weight_ptr + row, tl.where(active, weight, 0.0), mask=row < end)
        if policy_weight_ptr is not None:
            tl.store(policy_weight_ptr + row, tl.where(active, ratio, 0.0), mask=row < end)
    if entropy_slope_ptr is not None:  # noqa: SIM102, decided when compiling
        if b == 0:
            total_tokens = tl.maximum(column_sum(lengths_ptr, S, BLOCK).to(DTYPE), tl.full((), 1.0, DTYPE))
            tl.store(entropy_slope_ptr, -tl.full((), entropy_coef, DTYPE) / total_tokens)


@triton.jit
def sequence_ratios(
    logps_ptr, mask_ptr, old_ptr, sampling_ptr, begin, end, length, sampler_low, sampler_high,
    SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a sequence has in common: exp of its mean log-ratio, and the sampler's ratio (1: each token has its own)."""
    DTYPE: tl.constexpr = logps_ptr.dtype.element_ty
    d_sum = tl.zeros((BLOCK,), tl.float64)
    r_sum = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
        logp = tl.load(logps_ptr + row, mask=active, other=0.0)
        old = logp if old_ptr is None else tl.load(old_ptr + row, mask=active, other=0.0)
        d_sum += (logp - old).to(tl.float64)
        if SAMPLER_OF_SEQUENCE:
            sampling = tl.load(sampling_ptr + row, mask=active, other=0.0)
            r_sum += log_sampler_ratio(old, sampling, DTYPE).to(tl.float64)
    sampler = tl.full((), 1.0, DTYPE)
    if SAMPLER_OF_SEQUENCE:
        sampler = sampler_correction(tl.sum(r_sum, axis=0).to(DTYPE), sampler_low, sampler_high, SAMPLER == MASK)
    return tl.exp(tl.sum(d_sum, axis=0).to(DTYPE) / length), sampler


@triton.jit
def leaves(logp, old, w, advantage, clip_low, clip_high, delta, dual_clip, TERM: tl.constexpr):
    """Whether a token is clipped below, above, and by dual-clip."""
    capped = tl.where(w > delta, delta, w)
    low, high = capped < clip_low, capped > clip_high
    if TERM == "dppo_tv" or TERM == "dppo_kl":
        low = dppo_leaves(logp, old, advantage, clip_low, clip_high, TERM)
        high = low
    return low & (advantage < 0.0), high & (advantage > 0.0), (capped > dual_clip) & (advantage < 0.0)


@triton.jit
def store_decisions(share, low, high, dual, b, S, length, counted_length, sequence_advantages_ptr, clip_low,
                    clip_high, delta):  # fmt: skip
    """The clip counts of a sequence's tokens; with advantages of sequences 0 or 1, an empty one with the weight 1."""
    low_share, high_share = low / counted_length, high / counted_length
    empty = length == 0.0
    if sequence_advantages_ptr is not None:
        a = tl.load(sequence_advantages_ptr + b)
        one = tl.minimum(tl.full((), 1.0, delta.dtype), delta)
        low = tl.where(empty, tl.where((one < clip_low) & (a < 0.0), 1.0, 0.0).to(tl.float64), low_share)
        high = tl.where(empty, tl.where((one > clip_high) & (a > 0.0), 1.0, 0.0).to(tl.float64), high_share)
        dual = tl.where(empty, 0.0, dual / counted_length)
        low_share, high_share = low, high
    else:
        low_share = tl.where(empty, float("inf"), low_share)
        high_share = tl.where(empty, float("-inf"), high_share)
    tl.store(share + LOW * S, low)
    tl.store(share + HIGH * S, high)
    tl.store(share + REGION * S, low + high)
    tl.store(share + DUAL * S, dual)
    tl.store(share + HIGH_MAX * S, high_share)
    tl.store(share + LOW_MIN * S, low_share)


@triton.jit
def write_slopes(
    logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, grad_logps_ptr, grad_entropy_ptr,
    begin, end, w_of_sequence, sampler_of_sequence, through_mean, weight, entropy_slope, clip_low, clip_high,
    delta, dual_clip, hot, cold, sampler_low, sampler_high, beta,
    TERM: tl.constexpr, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss/dlogp and dloss/dentropy of a sequence's rows, 0 on masked ones."""
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
        logp = tl.load(logps_ptr + row, mask=active, other=0.0)
        advantage = tl.load(advantages_ptr + row, mask=active, other=0.0)
        old = logp if old_ptr is None else tl.load(old_ptr + row, mask=active, other=0.0)
        ref = logp if KL == 0 else tl.load(ref_ptr + row, mask=active, other=0.0)
        w = tl.exp(logp - old)
        if LEVEL != "token":
            w = tl.zeros_like(logp) + w_of_sequence
        sampler = tl.zeros_like(logp) + sampler_of_sequence
        if SAMPLER != NO_SAMPLER and not SAMPLER_OF_SEQUENCE:
            sampling = tl.load(sampling_ptr + row, mask=active, other=0.0)
            sampler = sampler_correction(old - sampling, sampler_low, sampler_high, SAMPLER == MASK)
        slope, direct = token_slopes(
            logp, advantage, old, ref, w, sampler, clip_low, clip_high, delta, dual_clip, hot, cold, beta,
            TERM, KL, BIAS_CORRECTED,
        )  # fmt: skip
        through_w = times(slope, w)
        if LEVEL == "sequence":
            through_w = tl.zeros_like(w) + through_mean
        elif LEVEL == "sequence_token":  # an infinite log-ratio has no gradient of its own
            through_w = tl.where(tl.abs(logp - old) == float("inf"), 0.0, through_w)
        grad = through_w + direct
        grad = tl.where(w != w, w, grad * weight)
        tl.store(grad_logps_ptr + row, tl.where(active, grad, 0.0), mask=row < end)
        if grad_entropy_ptr is not None:
            tl.store(grad_entropy_ptr + row, tl.where(active, entropy_slope, 0.0), mask=row < end)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def objective_kernel(
    # data: (n,), (S,) and ()
    logps_ptr, entropy_ptr, mask_ptr, advantages_ptr, sequence_advantages_ptr, old_ptr, ref_ptr, sampling_ptr,
    lengths_ptr, cu_seqlens_ptr, num_items_ptr,
    shares_ptr, grad_logps_ptr, grad_entropy_ptr,  # (COLUMNS, S), (n,), (n,): written
    # numbers
    n: tl.int64, tokens: tl.int64, S: tl.int32, num_items: tl.float64, max_length: tl.float64,
    entropy_coef: tl.float64,
    clip_low: tl.float64, clip_high: tl.float64, delta: tl.float64, dual_clip: tl.float64,
    sapo_temperature_pos: tl.float64, sapo_temperature_neg: tl.float64, sampler_low: tl.float64,
    sampler_high: tl.float64, beta: tl.float64,
    # constants
    TERM: tl.constexpr, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr, LEVEL: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence: `grpo_objective` of its rows, before anything is added up over sequences."""
    DTYPE: tl.constexpr = logps_ptr.dtype.element_ty
    clip_low, clip_high = tl.full((), clip_low, DTYPE), tl.full((), clip_high, DTYPE)
    delta, dual_clip = tl.full((), delta, DTYPE), tl.full((), dual_clip, DTYPE)
    hot, cold = tl.full((), sapo_temperature_pos, DTYPE), tl.full((), sapo_temperature_neg, DTYPE)
    sampler_low, sampler_high = tl.full((), sampler_low, DTYPE), tl.full((), sampler_high, DTYPE)
    beta = tl.full((), beta, DTYPE)
    b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(cu_seqlens_ptr, b, S, tokens, n)
    length = tl.load(lengths_ptr + b)
    counted_length = tl.maximum(length, tl.full((), 1.0, DTYPE))
    weight = loss_weight(lengths_ptr, num_items_ptr, b, S, num_items, max_length, DTYPE, REDUCTION, BLOCK)

    w_of_sequence, sampler_of_sequence = tl.full((), 1.0, DTYPE), tl.full((), 1.0, DTYPE)
    if LEVEL != "token" or SAMPLER_OF_SEQUENCE:
        w_of_sequence, sampler_of_sequence = sequence_ratios(
            logps_ptr, mask_ptr, old_ptr, sampling_ptr, begin, end, counted_length, sampler_low, sampler_high,
            SAMPLER, SAMPLER_OF_SEQUENCE, BLOCK,
        )  # fmt: skip
    zeros = tl.zeros((BLOCK,), tl.float64)
    loss, entropy_sum, kl_sum, ratio_slopes = zeros, zeros, zeros, zeros
    lows, highs, duals, difference_sum, scored_sum, ratio_sum = zeros, zeros, zeros, zeros, zeros, zeros
    difference_max = tl.full((BLOCK,), float("-inf"), DTYPE)
    ratio_max = tl.full((BLOCK,), float("-inf"), DTYPE)
    ratio_min = tl.full((BLOCK,), float("inf"), DTYPE)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
        logp = tl.load(logps_ptr + row, mask=active, other=0.0)
        advantage = tl.load(advantages_ptr + row, mask=active, other=0.0)
        old = logp if old_ptr is None else tl.load(old_ptr + row, mask=active, other=0.0)
        w = tl.exp(logp - old)
        if LEVEL != "token":
            w = tl.zeros_like(logp) + w_of_sequence
        value = policy_value(logp, old, w, advantage, clip_low, clip_high, delta, dual_clip, hot, cold, TERM)
        sampler = tl.zeros_like(logp) + sampler_of_sequence
        if sampling_ptr is not None:
            sampling = tl.load(sampling_ptr + row, mask=active, other=0.0)
            difference = tl.abs(old - sampling)
            scored = active & (difference == difference)
            difference_sum += tl.where(scored, difference, 0.0).to(tl.float64)
            scored_sum += scored.to(tl.float64)
            difference_max = tl.maximum(difference_max, tl.where(scored, difference, float("-inf")))
            if SAMPLER != NO_SAMPLER:
                if not SAMPLER_OF_SEQUENCE:
                    sampler = sampler_correction(old - sampling, sampler_low, sampler_high, SAMPLER == MASK)
                value = times(sampler, value)
                ratio_sum += tl.where(active, sampler, 0.0).to(tl.float64)
                ratio_max = tl.maximum(ratio_max, tl.where(active, sampler, float("-inf")))
                ratio_min = tl.minimum(ratio_min, tl.where(active, sampler, float("inf")))
        ref = logp
        if KL != 0:
            ref = tl.load(ref_ptr + row, mask=active, other=0.0)
            kl, _ = kl_and_slope(ref - logp, KL)
            if BIAS_CORRECTED:
                kl = kl * w
            value += beta * kl
            kl_sum += tl.where(active, kl, 0.0).to(tl.float64)
        loss += tl.where(active, value, 0.0).to(tl.float64)
        if entropy_ptr is not None:
            entropy_sum += tl.load(entropy_ptr + row, mask=active, other=0.0).to(tl.float64)
        low, high, dual = leaves(logp, old, w, advantage, clip_low, clip_high, delta, dual_clip, TERM)
        lows += (active & low).to(tl.float64)
        highs += (active & high).to(tl.float64)
        duals += (active & dual).to(tl.float64)
        if LEVEL == "sequence" and grad_logps_ptr is not None:
            slope, _ = token_slopes(
                logp, advantage, old, ref, w, sampler, clip_low, clip_high, delta, dual_clip, hot, cold, beta,
                TERM, KL, BIAS_CORRECTED,
            )  # fmt: skip
            ratio_slopes += tl.where(active, slope, 0.0).to(tl.float64)

    share = shares_ptr + b
    store_decisions(
        share, tl.sum(lows, axis=0), tl.sum(highs, axis=0), tl.sum(duals, axis=0), b, S, length, counted_length,
        sequence_advantages_ptr if LEVEL == "sequence" else None, clip_low, clip_high, delta,
    )  # fmt: skip
    tl.store(share + LOSS * S, weight.to(tl.float64) * tl.sum(loss, axis=0))
    tl.store(share + ENTROPY * S, tl.sum(entropy_sum, axis=0))
    tl.store(share + KL_SUM * S, tl.sum(kl_sum, axis=0))
    tl.store(share + DIFFERENCE * S, tl.sum(difference_sum, axis=0))
    tl.store(share + SCORED * S, tl.sum(scored_sum, axis=0))
    tl.store(share + LENGTH * S, length.to(tl.float64))
    tl.store(share + DIFFERENCE_MAX * S, tl.max(difference_max, axis=0).to(tl.float64))
    ratio, counted = tl.sum(ratio_sum, axis=0), length.to(tl.float64)
    largest, smallest = tl.max(ratio_max, axis=0), tl.min(ratio_min, axis=0)
    if SAMPLER_OF_SEQUENCE:
        ratio, counted = sampler_of_sequence.to(tl.float64), tl.full((), 1.0, tl.float64)
        largest, smallest = sampler_of_sequence, sampler_of_sequence
    tl.store(share + RATIO * S, ratio)
    tl.store(share + COUNTED * S, counted)
    tl.store(share + RATIO_MAX * S, largest.to(tl.float64))
    tl.store(share + RATIO_MIN * S, smallest.to(tl.float64))

    if grad_logps_ptr is not None:
        through_mean = times(tl.sum(ratio_slopes, axis=0).to(DTYPE), w_of_sequence) / counted_length
        entropy_slope = tl.zeros((), DTYPE)
        if grad_entropy_ptr is not None:
            total = tl.maximum(column_sum(lengths_ptr, S, BLOCK).to(DTYPE), tl.full((), 1.0, DTYPE))
            entropy_slope = -tl.full((), entropy_coef, DTYPE) / total
        write_slopes(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, grad_logps_ptr, grad_entropy_ptr,
            begin, end, w_of_sequence, sampler_of_sequence, through_mean, weight, entropy_slope, clip_low, clip_high,
            delta, dual_clip, hot, cold, sampler_low, sampler_high, beta,
            TERM, SAMPLER, SAMPLER_OF_SEQUENCE, KL, BIAS_CORRECTED, LEVEL, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def finish_kernel(shares_ptr, loss_ptr, results_ptr, S: tl.int32, entropy_coef: tl.float64, OF_SEQUENCES: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """(COLUMNS, S) shares -> loss () and RESULTS, in one program."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    tokens = tl.maximum(column_sum(shares_ptr + LENGTH * S, S, BLOCK), 1.0)
    policy_loss = column_sum(shares_ptr + LOSS * S, S, BLOCK).to(DTYPE)
    entropy = (column_sum(shares_ptr + ENTROPY * S, S, BLOCK) / tokens).to(DTYPE)
    loss = policy_loss
    if entropy_coef != 0.0:
        loss = policy_loss - tl.full((), entropy_coef, DTYPE) * entropy
    tl.store(loss_ptr, loss)
    tl.store(results_ptr + 0, policy_loss)
    tl.store(results_ptr + 1, entropy)
    tl.store(results_ptr + 2, (column_sum(shares_ptr + KL_SUM * S, S, BLOCK) / tokens).to(DTYPE))
    decisions = tl.full((), S, tl.float64) if OF_SEQUENCES else tokens
    for i in tl.static_range(4):  # LOW, HIGH, REGION, DUAL
        tl.store(results_ptr + 3 + i, (column_sum(shares_ptr + (LOW + i) * S, S, BLOCK) / decisions).to(DTYPE))
    low_min = column_extreme(shares_ptr + LOW_MIN * S, S, False, BLOCK)
    high_max = column_extreme(shares_ptr + HIGH_MAX * S, S, True, BLOCK)
    tl.store(results_ptr + 7, tl.where(low_min == float("inf"), 0.0, low_min).to(DTYPE))
    tl.store(results_ptr + 8, tl.where(high_max == float("-inf"), 0.0, high_max).to(DTYPE))
    scored = column_sum(shares_ptr + SCORED * S, S, BLOCK)
    difference = column_sum(shares_ptr + DIFFERENCE * S, S, BLOCK) / tl.maximum(scored, 1.0)
    difference_max = column_extreme(shares_ptr + DIFFERENCE_MAX * S, S, True, BLOCK)
    tl.store(results_ptr + 9, difference.to(DTYPE))
    tl.store(results_ptr + 10, tl.where(scored > 0.0, difference_max, 0.0).to(DTYPE))
    counted = column_sum(shares_ptr + COUNTED * S, S, BLOCK)
    ratio_min = column_extreme(shares_ptr + RATIO_MIN * S, S, False, BLOCK)
    ratio_max = column_extreme(shares_ptr + RATIO_MAX * S, S, True, BLOCK)
    ratio = column_sum(shares_ptr + RATIO * S, S, BLOCK) / tl.maximum(counted, 1.0)
    tl.store(results_ptr + 11, tl.where(counted > 0.0, ratio_min, 0.0).to(DTYPE))
    tl.store(results_ptr + 12, ratio.to(DTYPE))
    tl.store(results_ptr + 13, tl.where(counted > 0.0, ratio_max, 0.0).to(DTYPE))
