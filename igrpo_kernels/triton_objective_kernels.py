"""Kernels of `triton_objective.py`: one program per sequence, then one that adds the sequences up.

The equations are those of `objective.py` and `loss_metrics.py` in the same order. Sums run in fp64.
"""

import triton
import triton.language as tl

from igrpo_kernels.triton_grpo_loss import MASK, NO_SAMPLER
from igrpo_kernels.triton_math import sampler_correction, times
from igrpo_kernels.triton_objective_terms import (
    SCALARS,
    SEQ_MASK,
    geometric_keep,
    leaves,
    load_rows,
    log_sampler_ratio,
    of_sequence,
    row_value,
    slopes,
    vespo_phi,
)
from igrpo_kernels.triton_sequences import column_extreme, column_sum, sequence_bounds

# Columns of a sequence's shares. Up to LENGTH they are added up, then the largest counts, then the smallest.
LOSS, ENTROPY, KL_SUM, LOW, HIGH, REGION, DUAL = (tl.constexpr(i) for i in range(7))
DIFFERENCE, SCORED, RATIO, COUNTED, NLL, LENGTH = (tl.constexpr(i) for i in range(7, 13))
DIFFERENCE_MAX, RATIO_MAX, HIGH_MAX, RATIO_MIN, LOW_MIN = (tl.constexpr(i) for i in range(13, 18))
COLUMNS = 18

_NUMBERS = ["n", "tokens", "S", "num_items", "max_length", "entropy_coef", *SCALARS]
_POINTERS = [
    f"{name}_ptr"
    for name in (
        "logps", "entropy", "mask", "advantages", "sequence_advantages", "old", "ref", "sampling", "loss_weights",
        "nll_weights", "lengths", "prompt_lengths", "cu_seqlens", "num_items", "shares", "grad_logps", "grad_entropy",
        "weight", "policy_weight", "entropy_slope", "loss", "results",
    )
]  # fmt: skip


@triton.jit
def loss_weight(lengths_ptr, prompt_lengths_ptr, num_items_ptr, b, S, num_items, max_length, DTYPE: tl.constexpr,
                REDUCTION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
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
        tl.static_assert(REDUCTION == "num_items" or REDUCTION == "prompt_mean" or REDUCTION == "prompts")
        divisor = tl.full((), num_items, DTYPE)
        if num_items_ptr is not None:
            divisor = tl.load(num_items_ptr).to(DTYPE)
        elif REDUCTION == "prompts":  # as many as the sequences' shares add up to
            shares = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, S, BLOCK):
                i = start + tl.arange(0, BLOCK)
                of_prompt = tl.maximum(tl.load(prompt_lengths_ptr + i, mask=i < S, other=1.0), one)
                shares += (tl.load(lengths_ptr + i, mask=i < S, other=0.0) / of_prompt).to(tl.float64)
            divisor = tl.sum(shares, axis=0).to(DTYPE)
        least = tl.full((), 1.0 if REDUCTION == "num_items" else 1e-6, DTYPE)  # a call may hold a part of a prompt
        divisor = tl.where(divisor < least, least, divisor)
    weight = one / divisor
    if prompt_lengths_ptr is not None:
        weight = weight / tl.maximum(tl.load(prompt_lengths_ptr + b), one)
    return weight


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def row_weights_kernel(
    # data: (S,), (n,) and ()
    mask_ptr, lengths_ptr, prompt_lengths_ptr, loss_weights_ptr, cu_seqlens_ptr, num_items_ptr, old_ptr, sampling_ptr,
    weight_ptr, policy_weight_ptr, entropy_slope_ptr,  # written; the last two may be None
    # numbers
    n: tl.int64, tokens: tl.int64, S: tl.int32, num_items: tl.float64, max_length: tl.float64,
    entropy_coef: tl.float64, sampler_low: tl.float64, sampler_high: tl.float64,
    # constants
    REDUCTION: tl.constexpr, MASKS: tl.constexpr, OF_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence: its rows' weight, the sampler's ratio of the sequence, and dloss/dentropy."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(cu_seqlens_ptr, b, S, tokens, n)
    weight = loss_weight(
        lengths_ptr, prompt_lengths_ptr, num_items_ptr, b, S, num_items, max_length, DTYPE, REDUCTION, BLOCK
    )
    ratio = tl.full((), 1.0, DTYPE)
    if policy_weight_ptr is not None:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(begin, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
            old = tl.load(old_ptr + row, mask=active, other=0.0)
            total += log_sampler_ratio(old, tl.load(sampling_ptr + row, mask=active, other=0.0), DTYPE).to(tl.float64)
        low = tl.full((), sampler_low, DTYPE)
        high, of_all = tl.full((), sampler_high, DTYPE), tl.sum(total, axis=0).to(DTYPE)
        if OF_TOKENS:  # seq-mask-tis
            length = tl.maximum(tl.load(lengths_ptr + b), tl.full((), 1.0, DTYPE))
            ratio = geometric_keep(of_all, length, low, high)
        else:
            ratio = sampler_correction(of_all, low, high, MASKS)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
        of_row = tl.where(active, weight, 0.0)
        if loss_weights_ptr is not None:
            of_row = of_row * tl.load(loss_weights_ptr + row, mask=row < end, other=0.0)
        tl.store(weight_ptr + row, of_row, mask=row < end)
        if policy_weight_ptr is not None:
            of_row = tl.where(active, ratio, 0.0)
            if OF_TOKENS:
                old = tl.load(old_ptr + row, mask=active, other=0.0)
                sampling = tl.load(sampling_ptr + row, mask=active, other=0.0)
                of_row = tl.where(of_row == 0.0, 0.0, sampler_correction(old - sampling, 0.0, float("inf"), False))
            tl.store(policy_weight_ptr + row, of_row, mask=row < end)
    if entropy_slope_ptr is not None:  # noqa: SIM102, decided when compiling
        if b == 0:
            total_tokens = tl.maximum(column_sum(lengths_ptr, S, BLOCK).to(DTYPE), tl.full((), 1.0, DTYPE))
            tl.store(entropy_slope_ptr, -tl.full((), entropy_coef, DTYPE) / total_tokens)


@triton.jit
def store_decisions(share, low, high, dual, b, S, length, counted_length, sequence_advantages_ptr, numbers,
                    TERM: tl.constexpr):  # fmt: skip
    """The clip counts of a sequence's tokens; with advantages of sequences 0 or 1, an empty one with the weight 1.

    VESPO's phi takes the place of the lower count, and is 1 for an empty sequence.
    """
    clip_low, clip_high, delta = numbers[0], numbers[1], numbers[2]
    low, high, dual = low.to(tl.float64), high.to(tl.float64), dual.to(tl.float64)
    low_share, high_share = low / counted_length, high / counted_length
    empty = length == 0.0
    if sequence_advantages_ptr is not None:
        a = tl.load(sequence_advantages_ptr + b)
        one = tl.minimum(tl.full((), 1.0, delta.dtype), delta)
        of_none = tl.where((one < clip_low) & (a < 0.0), 1.0, 0.0).to(tl.float64)
        low = tl.where(empty, 1.0 if TERM == "vespo" else of_none, low_share)
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
def store_sampler(share, ratio, largest, smallest, S, length, sampler_of_sequence, SAMPLER_OF_SEQUENCE: tl.constexpr):
    """Sum, number and extremes of a sequence's sampler ratios: of its tokens, or its one."""
    counted = length.to(tl.float64)
    if SAMPLER_OF_SEQUENCE:
        ratio, counted = sampler_of_sequence.to(tl.float64), tl.full((), 1.0, tl.float64)
        largest, smallest = sampler_of_sequence, sampler_of_sequence
    tl.store(share + RATIO * S, ratio)
    tl.store(share + COUNTED * S, counted)
    tl.store(share + RATIO_MAX * S, largest.to(tl.float64))
    tl.store(share + RATIO_MIN * S, smallest.to(tl.float64))


@triton.jit
def factors(active, logp, advantage, old, sampling, common, sampler_of_sequence, left, numbers, TERM: tl.constexpr,
            SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, BIAS_CORRECTED: tl.constexpr,
            LEVEL: tl.constexpr, OPSM: tl.constexpr):  # fmt: skip
    """Of rows: w, the sampler's ratio, the policy term's factor, and which are active and keep the policy term."""
    w = tl.exp(logp - old)
    if LEVEL != "token":
        w = tl.zeros_like(logp) + common
    elif (TERM == "vespo" or TERM == "gmpo") and not BIAS_CORRECTED:
        w = tl.zeros_like(logp) + 1.0  # no part of the loss, so that no NaN of it may show
    sampler = tl.zeros_like(logp) + sampler_of_sequence
    if SAMPLER == SEQ_MASK:
        sampler = tl.where(sampler == 0.0, 0.0, sampler_correction(old - sampling, 0.0, float("inf"), False))
    elif SAMPLER != NO_SAMPLER and not SAMPLER_OF_SEQUENCE:
        sampler = sampler_correction(old - sampling, numbers[6], numbers[7], SAMPLER == MASK)
    kept = active
    if OPSM:
        kept &= (advantage >= 0.0) | (tl.zeros_like(logp) + left <= numbers[9])
    factor = sampler
    if TERM == "vespo":
        factor = tl.zeros_like(sampler) + 1.0  # the sampler's ratio is part of W
    return w, sampler, factor, kept


@triton.jit
def write_slopes(
    logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, loss_weights_ptr, nll_weights_ptr,
    grad_logps_ptr, grad_entropy_ptr, begin, end, common, sampler_of_sequence, left, through_mean, weight,
    entropy_slope, numbers,
    TERM: tl.constexpr, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr, LEVEL: tl.constexpr, OPSM: tl.constexpr, PULLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss/dlogp and dloss/dentropy of a sequence's rows, 0 on masked ones."""
    for start in range(begin, end, BLOCK):
        row, active, logp, advantage, old, ref, sampling = load_rows(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, start, end, BLOCK
        )
        w, _, factor, kept = factors(
            active, logp, advantage, old, sampling, common, sampler_of_sequence, left, numbers, TERM, SAMPLER,
            SAMPLER_OF_SEQUENCE, BIAS_CORRECTED, LEVEL, OPSM,
        )  # fmt: skip
        factor = tl.where(kept, factor, 0.0)
        slope, direct, _ = slopes(
            logp, advantage, old, ref, sampling, w, factor, common, numbers, TERM, KL, BIAS_CORRECTED, PULLS
        )
        through_w = times(slope, w)
        shared = tl.zeros_like(w)
        if LEVEL == "sequence":
            through_w, shared = shared, shared + through_mean
        elif LEVEL == "sequence_token":  # an infinite log-ratio has no gradient of its own
            through_w = tl.where(tl.abs(logp - old) == float("inf"), 0.0, through_w)
        elif TERM == "gmpo":
            clipped = tl.where(advantage > 0.0, logp - old > numbers[1], logp - old < numbers[0])
            shared = tl.where(clipped | (advantage == 0.0), 0.0, through_mean)
        grad = tl.where(w != w, w, through_w + direct)
        if loss_weights_ptr is not None:
            of_row = tl.load(loss_weights_ptr + row, mask=active, other=0.0)
            grad = tl.where(of_row == 0.0, 0.0, grad * of_row)
        grad = (grad + shared) * weight
        if nll_weights_ptr is not None:
            grad -= tl.load(nll_weights_ptr + row, mask=active, other=0.0)
        tl.store(grad_logps_ptr + row, tl.where(active, grad, 0.0), mask=row < end)
        if grad_entropy_ptr is not None:
            tl.store(grad_entropy_ptr + row, tl.where(active, entropy_slope, 0.0), mask=row < end)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def objective_kernel(
    # data: (n,), (S,) and ()
    logps_ptr, entropy_ptr, mask_ptr, advantages_ptr, sequence_advantages_ptr, old_ptr, ref_ptr, sampling_ptr,
    loss_weights_ptr, nll_weights_ptr, lengths_ptr, prompt_lengths_ptr, cu_seqlens_ptr, num_items_ptr,
    shares_ptr, grad_logps_ptr, grad_entropy_ptr,  # (COLUMNS, S), (n,), (n,): written
    # numbers
    n: tl.int64, tokens: tl.int64, S: tl.int32, num_items: tl.float64, max_length: tl.float64,
    entropy_coef: tl.float64,
    clip_low: tl.float64, clip_high: tl.float64, delta: tl.float64, dual_clip: tl.float64,
    sapo_temperature_pos: tl.float64, sapo_temperature_neg: tl.float64, sampler_low: tl.float64,
    sampler_high: tl.float64, beta: tl.float64, off_policy_threshold: tl.float64, vespo_k_pos: tl.float64,
    vespo_k_neg: tl.float64, vespo_lambda_pos: tl.float64, vespo_lambda_neg: tl.float64,
    kl_tau: tl.float64, dro_beta: tl.float64,
    # constants
    TERM: tl.constexpr, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr, LEVEL: tl.constexpr, OPSM: tl.constexpr, PULLS: tl.constexpr,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence: `grpo_objective` of its rows, before anything is added up over sequences."""
    DTYPE: tl.constexpr = logps_ptr.dtype.element_ty
    numbers = (
        tl.full((), clip_low, DTYPE), tl.full((), clip_high, DTYPE), tl.full((), delta, DTYPE),
        tl.full((), dual_clip, DTYPE), tl.full((), sapo_temperature_pos, DTYPE),
        tl.full((), sapo_temperature_neg, DTYPE), tl.full((), sampler_low, DTYPE), tl.full((), sampler_high, DTYPE),
        tl.full((), beta, DTYPE), tl.full((), off_policy_threshold, DTYPE), tl.full((), vespo_k_pos, DTYPE),
        tl.full((), vespo_k_neg, DTYPE), tl.full((), vespo_lambda_pos, DTYPE), tl.full((), vespo_lambda_neg, DTYPE),
        tl.full((), kl_tau, DTYPE), tl.full((), dro_beta, DTYPE),
    )  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(cu_seqlens_ptr, b, S, tokens, n)
    length = tl.load(lengths_ptr + b)
    counted_length = tl.maximum(length, tl.full((), 1.0, DTYPE))
    weight = loss_weight(
        lengths_ptr, prompt_lengths_ptr, num_items_ptr, b, S, num_items, max_length, DTYPE, REDUCTION, BLOCK
    )

    common = tl.full((), 1.0, DTYPE)
    sampler_of_sequence, left = common, common
    if LEVEL != "token" or SAMPLER_OF_SEQUENCE or SAMPLER == SEQ_MASK or OPSM or TERM == "vespo" or TERM == "gmpo":
        common, sampler_of_sequence, left = of_sequence(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, sampling_ptr, begin, end, counted_length, numbers,
            TERM, SAMPLER, SAMPLER_OF_SEQUENCE, OPSM, BLOCK,
        )  # fmt: skip
    zeros, none = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    loss, nll_sum, entropy_sum, kl_sum, ratio_slopes = zeros, zeros, zeros, zeros, zeros
    difference_sum, ratio_sum, scored_sum, highs, duals = zeros, zeros, none, none, none
    lows = zeros if TERM == "vespo" else none
    difference_max = tl.full((BLOCK,), float("-inf"), DTYPE)
    ratio_max, ratio_min = difference_max, -difference_max
    for start in range(begin, end, BLOCK):
        row, active, logp, advantage, old, ref, sampling = load_rows(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, start, end, BLOCK
        )
        w, sampler, factor, kept = factors(
            active, logp, advantage, old, sampling, common, sampler_of_sequence, left, numbers, TERM, SAMPLER,
            SAMPLER_OF_SEQUENCE, BIAS_CORRECTED, LEVEL, OPSM,
        )  # fmt: skip
        value, kl = row_value(
            logp, advantage, old, ref, sampling, w, factor, kept, common, numbers, TERM, KL, BIAS_CORRECTED, PULLS
        )
        kl_sum += tl.where(active, kl, 0.0).to(tl.float64)
        of_row = tl.zeros_like(w) + 1.0
        if loss_weights_ptr is not None:
            of_row = tl.load(loss_weights_ptr + row, mask=active, other=0.0)
        loss += tl.where(active & (of_row != 0.0), times(of_row, value), 0.0).to(tl.float64)
        if nll_weights_ptr is not None:
            nll_sum += times(tl.load(nll_weights_ptr + row, mask=active, other=0.0), logp).to(tl.float64)
        if sampling_ptr is not None:
            difference = tl.abs(old - sampling)
            scored = active & (difference == difference)
            difference_sum += tl.where(scored, difference, 0.0).to(tl.float64)
            scored_sum += scored.to(tl.int32)
            difference_max = tl.maximum(difference_max, tl.where(scored, difference, float("-inf")))
            if SAMPLER != NO_SAMPLER:
                ratio_sum += tl.where(active, sampler, 0.0).to(tl.float64)
                ratio_max = tl.maximum(ratio_max, tl.where(active, sampler, float("-inf")))
                ratio_min = tl.minimum(ratio_min, tl.where(active, sampler, float("inf")))
        if entropy_ptr is not None:
            entropy_sum += tl.load(entropy_ptr + row, mask=active, other=0.0).to(tl.float64)
        low, high, dual = leaves(logp, old, w, advantage, numbers, TERM)
        low = vespo_phi(common, advantage, numbers) if TERM == "vespo" else low
        lows += tl.where(active, low, 0).to(lows.dtype)
        highs += (active & high).to(tl.int32)
        duals += (active & dual).to(tl.int32)
        if (LEVEL == "sequence" or TERM == "gmpo") and grad_logps_ptr is not None:
            factor = tl.where(kept, factor, 0.0)
            _, _, slope = slopes(
                logp, advantage, old, ref, sampling, w, factor, common, numbers, TERM, KL, BIAS_CORRECTED, PULLS
            )
            ratio_slopes += tl.where(active & (of_row != 0.0), of_row * slope, 0.0).to(tl.float64)

    share = shares_ptr + b
    store_decisions(
        share, tl.sum(lows, axis=0), tl.sum(highs, axis=0), tl.sum(duals, axis=0), b, S, length, counted_length,
        sequence_advantages_ptr if LEVEL == "sequence" or TERM == "vespo" else None, numbers, TERM,
    )  # fmt: skip
    tl.store(share + LOSS * S, weight.to(tl.float64) * tl.sum(loss, axis=0))
    tl.store(share + ENTROPY * S, tl.sum(entropy_sum, axis=0))
    tl.store(share + KL_SUM * S, tl.sum(kl_sum, axis=0))
    tl.store(share + NLL * S, tl.sum(nll_sum, axis=0))
    tl.store(share + DIFFERENCE * S, tl.sum(difference_sum, axis=0))
    tl.store(share + SCORED * S, tl.sum(scored_sum, axis=0).to(tl.float64))
    tl.store(share + LENGTH * S, length.to(tl.float64))
    tl.store(share + DIFFERENCE_MAX * S, tl.max(difference_max, axis=0).to(tl.float64))
    store_sampler(
        share, tl.sum(ratio_sum, axis=0), tl.max(ratio_max, axis=0), tl.min(ratio_min, axis=0), S, length,
        sampler_of_sequence, SAMPLER_OF_SEQUENCE,
    )  # fmt: skip

    if grad_logps_ptr is not None:
        through_mean = times(tl.sum(ratio_slopes, axis=0).to(DTYPE), common) / counted_length
        entropy_slope = tl.zeros((), DTYPE)
        if grad_entropy_ptr is not None:
            total = tl.maximum(column_sum(lengths_ptr, S, BLOCK).to(DTYPE), tl.full((), 1.0, DTYPE))
            entropy_slope = -tl.full((), entropy_coef, DTYPE) / total
        write_slopes(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, loss_weights_ptr, nll_weights_ptr,
            grad_logps_ptr, grad_entropy_ptr, begin, end, common, sampler_of_sequence, left, through_mean, weight,
            entropy_slope, numbers, TERM, SAMPLER, SAMPLER_OF_SEQUENCE, KL, BIAS_CORRECTED, LEVEL, OPSM, PULLS, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def finish_kernel(shares_ptr, loss_ptr, results_ptr, S: tl.int32, entropy_coef: tl.float64, OF_SEQUENCES: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """(COLUMNS, S) shares -> loss () and RESULTS, in one program."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    tokens = tl.maximum(column_sum(shares_ptr + LENGTH * S, S, BLOCK), 1.0)
    policy_loss = column_sum(shares_ptr + LOSS * S, S, BLOCK).to(DTYPE)
    entropy = (column_sum(shares_ptr + ENTROPY * S, S, BLOCK) / tokens).to(DTYPE)
    loss = policy_loss - column_sum(shares_ptr + NLL * S, S, BLOCK).to(DTYPE)
    if entropy_coef != 0.0:
        loss = loss - tl.full((), entropy_coef, DTYPE) * entropy
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
