"""Kernels of `triton_objective.py`: one program per sequence, then one that adds the sequences up.

The equations are those of `objective.py` and `loss_metrics.py` in the same order. Sums run in fp64.
"""

import triton
import triton.language as tl

from igrpo_kernels.triton_math import times
from igrpo_kernels.triton_objective_terms import (
    CLIP_HIGH,
    CLIP_LOW,
    DELTA,
    OFF_POLICY,
    SAMPLER_HIGH,
    SAMPLER_LOW,
    SCALARS,
    leaves,
    load_rows,
    of_sequence,
    row_value,
    slopes,
    vespo_phi,
)
from igrpo_kernels.triton_row_weights import bonus_slope, loss_weight
from igrpo_kernels.triton_sampler import BOUNDS, NO_SAMPLER, SEQ_MASK, row_ratio, row_stays, sequence_stays
from igrpo_kernels.triton_sequences import column_extreme, column_sum, sequence_bounds

# Columns of a sequence's shares. Up to LENGTH they are added up, then the largest counts, then the smallest.
LOSS, ENTROPY, KL_SUM, LOW, HIGH, REGION, DUAL = (tl.constexpr(i) for i in range(7))
DIFFERENCE, SCORED, RATIO, COUNTED, NLL, BONUS = (tl.constexpr(i) for i in range(7, 13))
REJECTED, LENGTH = (tl.constexpr(i) for i in range(13, 15))
DIFFERENCE_MAX, RATIO_MAX, HIGH_MAX, RATIO_MIN, LOW_MIN = (tl.constexpr(i) for i in range(15, 20))
COLUMNS = 20

_NUMBERS = ["n", "tokens", "S", "num_items", "max_length", "entropy_coef", *SCALARS, *BOUNDS]
_POINTERS = [
    f"{name}_ptr"
    for name in (
        "logps", "entropy", "mask", "advantages", "sequence_advantages", "old", "ref", "sampling", "loss_weights",
        "nll_weights", "lengths", "prompt_lengths", "cu_seqlens", "num_items", "shares", "grad_logps", "grad_entropy",
        "loss", "results", "high_entropy", "high_entropy_count", "drawn",
    )
]  # fmt: skip


@triton.jit
def store_decisions(share, low, high, dual, b, S, length, counted_length, sequence_advantages_ptr, numbers,
                    TERM: tl.constexpr):  # fmt: skip
    """The clip counts of a sequence's tokens; with advantages of sequences 0 or 1, an empty one with the weight 1.

    VESPO's phi takes the place of the lower count, and is 1 for an empty sequence.
    """
    clip_low, clip_high, delta = numbers[CLIP_LOW], numbers[CLIP_HIGH], numbers[DELTA]
    DTYPE: tl.constexpr = length.dtype
    low_share, high_share = low.to(DTYPE) / counted_length, high.to(DTYPE) / counted_length
    low, high, dual = low.to(tl.float64), high.to(tl.float64), dual.to(tl.float64)
    low_share, high_share = low_share.to(tl.float64), high_share.to(tl.float64)
    empty = length == 0.0
    if sequence_advantages_ptr is not None:
        a = tl.load(sequence_advantages_ptr + b)
        one = tl.minimum(tl.full((), 1.0, delta.dtype), delta)
        of_none = tl.where((one < clip_low) & (a < 0.0), 1.0, 0.0).to(tl.float64)
        low = tl.where(empty, 1.0 if TERM == "vespo" else of_none, low_share)
        high = tl.where(empty, tl.where((one > clip_high) & (a > 0.0), 1.0, 0.0).to(tl.float64), high_share)
        dual = tl.where(empty, 0.0, (dual.to(DTYPE) / counted_length).to(tl.float64))
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
def add_sampled(sampled, active, old, sampling, sampler, SAMPLER: tl.constexpr):
    """Of rows so far: sum, number and largest of |log pi_old - log pi_sampler|; sum, largest and smallest ratio."""
    difference_sum, scored_sum, difference_max, ratio_sum, ratio_max, ratio_min = sampled
    difference = tl.abs(old - sampling)
    scored = active & (difference == difference)
    difference_sum += tl.where(scored, difference, 0.0).to(tl.float64)
    scored_sum += scored.to(tl.int32)
    difference_max = tl.maximum(difference_max, tl.where(scored, difference, float("-inf")))
    if SAMPLER != NO_SAMPLER:
        ratio_sum += tl.where(active, sampler, 0.0).to(tl.float64)
        ratio_max = tl.maximum(ratio_max, tl.where(active, sampler, float("-inf")))
        ratio_min = tl.minimum(ratio_min, tl.where(active, sampler, float("inf")))
    return difference_sum, scored_sum, difference_max, ratio_sum, ratio_max, ratio_min


@triton.jit
def store_sampled(share, sampled, S, length, sampler_of_sequence, SAMPLER_OF_SEQUENCE: tl.constexpr):
    """What `add_sampled` has found; of a sequence's one ratio that."""
    difference_sum, scored_sum, difference_max, ratio_sum, ratio_max, ratio_min = sampled
    ratio, counted = tl.sum(ratio_sum, axis=0), length.to(tl.float64)
    largest, smallest = tl.max(ratio_max, axis=0), tl.min(ratio_min, axis=0)
    if SAMPLER_OF_SEQUENCE:
        ratio, counted = sampler_of_sequence.to(tl.float64), tl.full((), 1.0, tl.float64)
        largest, smallest = sampler_of_sequence, sampler_of_sequence
    tl.store(share + LENGTH * S, length.to(tl.float64))
    tl.store(share + DIFFERENCE * S, tl.sum(difference_sum, axis=0))
    tl.store(share + SCORED * S, tl.sum(scored_sum, axis=0).to(tl.float64))
    tl.store(share + DIFFERENCE_MAX * S, tl.max(difference_max, axis=0).to(tl.float64))
    tl.store(share + RATIO * S, ratio)
    tl.store(share + COUNTED * S, counted)
    tl.store(share + RATIO_MAX * S, largest.to(tl.float64))
    tl.store(share + RATIO_MIN * S, smallest.to(tl.float64))


@triton.jit
def store_sums(share, S, weight, loss, entropy, bonus, kl, nll, rejected):
    """What a sequence's rows add up to."""
    tl.store(share + LOSS * S, weight.to(tl.float64) * tl.sum(loss, axis=0))
    tl.store(share + ENTROPY * S, tl.sum(entropy, axis=0))
    tl.store(share + BONUS * S, tl.sum(bonus, axis=0))
    tl.store(share + KL_SUM * S, tl.sum(kl, axis=0))
    tl.store(share + NLL * S, tl.sum(nll, axis=0))
    tl.store(share + REJECTED * S, tl.sum(rejected, axis=0).to(tl.float64))


@triton.jit
def flagged(ptr, row, active):
    """Bool of rows: active ones that are marked; all active ones where none is marked."""
    if ptr is not None:
        active &= tl.load(ptr + row, mask=active, other=0) != 0
    return active


@triton.jit
def factors(logp, advantage, old, sampling, shared, high_entropy, drawn, numbers, bounds, TERM: tl.constexpr,
            SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, BIAS_CORRECTED: tl.constexpr,
            LEVEL: tl.constexpr, OPSM: tl.constexpr, REJECTS: tl.constexpr):  # fmt: skip
    """Of rows: w, the sampler's ratio, the policy term's factor, which are active and keep the policy term, and which
    are not rejected."""
    common, sampler_of_sequence, left, stays = shared
    w = tl.exp(logp - old)
    if LEVEL != "token":
        w = tl.zeros_like(logp) + common
    elif (TERM == "vespo" or TERM == "gmpo") and not BIAS_CORRECTED:
        w = tl.zeros_like(logp) + 1.0  # no part of the loss, so that no NaN of it may show
    sampler = row_ratio(
        sampler_of_sequence, old, sampling, numbers[SAMPLER_LOW], numbers[SAMPLER_HIGH], SAMPLER, SAMPLER_OF_SEQUENCE
    )
    kept, accepted = high_entropy, high_entropy
    if OPSM:
        kept &= (advantage >= 0.0) | (tl.zeros_like(logp) + left <= numbers[OFF_POLICY])
    if TERM == "clip_cov":
        kept &= drawn == 0
    if REJECTS:
        accepted = row_stays(stays, old, sampling, bounds)
        kept &= accepted
    factor = sampler
    if TERM == "vespo":
        factor = tl.zeros_like(sampler) + 1.0  # the sampler's ratio is part of W
    return w, sampler, factor, kept, accepted


@triton.jit
def write_slopes(
    logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, loss_weights_ptr, nll_weights_ptr,
    high_entropy_ptr, drawn_ptr, grad_logps_ptr, grad_entropy_ptr, begin, end, shared, through_mean, weight,
    entropy_slope, numbers, bounds,
    TERM: tl.constexpr, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr, LEVEL: tl.constexpr, OPSM: tl.constexpr, REJECTS: tl.constexpr,
    PULLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss/dlogp and dloss/dentropy of a sequence's rows, 0 on masked ones."""
    for start in range(begin, end, BLOCK):
        row, active, logp, advantage, old, ref, sampling = load_rows(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, start, end, BLOCK
        )
        high_entropy, drawn = flagged(high_entropy_ptr, row, active), flagged(drawn_ptr, row, active)
        w, _, factor, kept, _ = factors(
            logp, advantage, old, sampling, shared, high_entropy, drawn, numbers, bounds, TERM, SAMPLER,
            SAMPLER_OF_SEQUENCE, BIAS_CORRECTED, LEVEL, OPSM, REJECTS,
        )  # fmt: skip
        factor = tl.where(kept, factor, 0.0)
        slope, direct, _ = slopes(
            logp, advantage, old, ref, sampling, w, factor, drawn, shared[0], numbers, TERM, KL, BIAS_CORRECTED, PULLS
        )
        through_w = times(slope, w)
        of_all = tl.zeros_like(w)
        if LEVEL == "sequence":
            through_w, of_all = of_all, of_all + through_mean
        elif LEVEL == "sequence_token":  # an infinite log-ratio has no gradient of its own
            through_w = tl.where(tl.abs(logp - old) == float("inf"), 0.0, through_w)
        elif TERM == "gmpo":
            clipped = tl.where(advantage > 0.0, logp - old > numbers[CLIP_HIGH], logp - old < numbers[CLIP_LOW])
            of_all = tl.where(clipped | (advantage == 0.0), 0.0, through_mean)
        grad = tl.where(w != w, w, through_w + direct)
        if loss_weights_ptr is not None:
            of_row = tl.load(loss_weights_ptr + row, mask=active, other=0.0)
            grad = tl.where(of_row == 0.0, 0.0, grad * of_row)
        grad = (grad + of_all) * weight
        if nll_weights_ptr is not None:
            grad -= tl.load(nll_weights_ptr + row, mask=active, other=0.0)
        tl.store(grad_logps_ptr + row, tl.where(active, grad, 0.0), mask=row < end)
        if grad_entropy_ptr is not None:
            tl.store(grad_entropy_ptr + row, tl.where(high_entropy, entropy_slope, 0.0), mask=row < end)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def objective_kernel(
    # data: (n,), (S,) and ()
    logps_ptr, entropy_ptr, mask_ptr, advantages_ptr, sequence_advantages_ptr, old_ptr, ref_ptr, sampling_ptr,
    loss_weights_ptr, nll_weights_ptr, lengths_ptr, prompt_lengths_ptr, cu_seqlens_ptr, num_items_ptr,
    high_entropy_ptr, high_entropy_count_ptr, drawn_ptr,  # (n,), (), (n,) of triton_selection.py, or None
    shares_ptr, grad_logps_ptr, grad_entropy_ptr,  # (COLUMNS, S), (n,), (n,): written
    # numbers
    n: tl.int64, tokens: tl.int64, S: tl.int32, num_items: tl.float64, max_length: tl.float64,
    entropy_coef: tl.float64,
    clip_low: tl.float64, clip_high: tl.float64, delta: tl.float64, dual_clip: tl.float64,
    sapo_temperature_pos: tl.float64, sapo_temperature_neg: tl.float64, sampler_low: tl.float64,
    sampler_high: tl.float64, beta: tl.float64, off_policy_threshold: tl.float64, vespo_k_pos: tl.float64,
    vespo_k_neg: tl.float64, vespo_lambda_pos: tl.float64, vespo_lambda_neg: tl.float64,
    kl_tau: tl.float64, dro_beta: tl.float64, ppo_kl_coef: tl.float64,
    token_k1_low: tl.float64, token_k1: tl.float64, token_k2: tl.float64, token_k3: tl.float64,
    seq_sum_k1_low: tl.float64, seq_sum_k1: tl.float64, seq_sum_k2: tl.float64, seq_sum_k3: tl.float64,
    seq_mean_k1_low: tl.float64, seq_mean_k1: tl.float64, seq_mean_k2: tl.float64, seq_mean_k3: tl.float64,
    seq_max_k2: tl.float64, seq_max_k3: tl.float64,
    # constants
    TERM: tl.constexpr, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, KL: tl.constexpr,
    BIAS_CORRECTED: tl.constexpr, LEVEL: tl.constexpr, OPSM: tl.constexpr, REJECTS: tl.constexpr, PULLS: tl.constexpr,
    REDUCTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence: `grpo_objective` of its rows, before anything is added up over sequences."""
    DTYPE: tl.constexpr = logps_ptr.dtype.element_ty
    numbers = [tl.full((), x, DTYPE) for x in (
        clip_low, clip_high, delta, dual_clip, sapo_temperature_pos, sapo_temperature_neg, sampler_low, sampler_high,
        beta, off_policy_threshold, vespo_k_pos, vespo_k_neg, vespo_lambda_pos, vespo_lambda_neg, kl_tau, dro_beta,
        ppo_kl_coef,
    )]  # fmt: skip
    bounds = [tl.full((), x, DTYPE) for x in (
        token_k1_low, token_k1, token_k2, token_k3, seq_sum_k1_low, seq_sum_k1, seq_sum_k2, seq_sum_k3,
        seq_mean_k1_low, seq_mean_k1, seq_mean_k2, seq_mean_k3, seq_max_k2, seq_max_k3,
    )]  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(cu_seqlens_ptr, b, S, tokens, n)
    length = tl.load(lengths_ptr + b)
    counted_length = tl.maximum(length, tl.full((), 1.0, DTYPE))
    weight = loss_weight(
        lengths_ptr, prompt_lengths_ptr, num_items_ptr, b, S, num_items, max_length, DTYPE, REDUCTION, BLOCK
    )

    common = tl.full((), 1.0, DTYPE)
    sampler_of_sequence, left, stays = common, common, common
    if LEVEL != "token" or SAMPLER_OF_SEQUENCE or SAMPLER == SEQ_MASK or OPSM or TERM == "vespo" or TERM == "gmpo":
        common, sampler_of_sequence, left = of_sequence(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, sampling_ptr, begin, end, counted_length, numbers,
            TERM, SAMPLER, SAMPLER_OF_SEQUENCE, OPSM, BLOCK,
        )  # fmt: skip
    if REJECTS:
        known_ptr = logps_ptr if old_ptr is None else old_ptr
        stays = sequence_stays(mask_ptr, known_ptr, sampling_ptr, begin, end, counted_length, bounds, BLOCK)
    shared = (common, sampler_of_sequence, left, stays)
    zeros, none = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.int32)
    loss, nll_sum, entropy_sum, bonus_sum, kl_sum, ratio_slopes = zeros, zeros, zeros, zeros, zeros, zeros
    lows, highs, duals, rejected = zeros if TERM == "vespo" else none, none, none, none
    lowest = tl.full((BLOCK,), float("-inf"), DTYPE)
    sampled = (zeros, none, lowest, zeros, lowest, -lowest)
    for start in range(begin, end, BLOCK):
        row, active, logp, advantage, old, ref, sampling = load_rows(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, start, end, BLOCK
        )
        high_entropy, drawn = flagged(high_entropy_ptr, row, active), flagged(drawn_ptr, row, active)
        w, sampler, factor, kept, accepted = factors(
            logp, advantage, old, sampling, shared, high_entropy, drawn, numbers, bounds, TERM, SAMPLER,
            SAMPLER_OF_SEQUENCE, BIAS_CORRECTED, LEVEL, OPSM, REJECTS,
        )  # fmt: skip
        value, kl = row_value(
            logp, advantage, old, ref, sampling, w, factor, kept, drawn, common, numbers, TERM, KL, BIAS_CORRECTED,
            PULLS,
        )  # fmt: skip
        kl_sum += tl.where(active, kl, 0.0).to(tl.float64)
        of_row = tl.zeros_like(w) + 1.0
        if loss_weights_ptr is not None:
            of_row = tl.load(loss_weights_ptr + row, mask=active, other=0.0)
        loss += tl.where(active & (of_row != 0.0), times(of_row, value), 0.0).to(tl.float64)
        if nll_weights_ptr is not None:
            nll_sum += times(tl.load(nll_weights_ptr + row, mask=active, other=0.0), logp).to(tl.float64)
        if REJECTS:
            rejected += (active & (accepted == 0)).to(tl.int32)
        if sampling_ptr is not None:
            sampled = add_sampled(sampled, active, old, sampling, sampler, SAMPLER)
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + row, mask=active, other=0.0).to(tl.float64)
            entropy_sum += entropy
            if high_entropy_ptr is not None:
                bonus_sum += tl.where(high_entropy, entropy, 0.0)
        low, high, dual = leaves(logp, old, w, advantage, drawn, numbers, TERM)
        low = vespo_phi(common, advantage, numbers) if TERM == "vespo" else low
        lows += tl.where(active, low, 0).to(lows.dtype)
        highs += (active & high).to(tl.int32)
        duals += (active & dual).to(tl.int32)
        if (LEVEL == "sequence" or TERM == "gmpo") and grad_logps_ptr is not None:
            factor = tl.where(kept, factor, 0.0)
            _, _, slope = slopes(
                logp, advantage, old, ref, sampling, w, factor, drawn, common, numbers, TERM, KL, BIAS_CORRECTED, PULLS
            )
            ratio_slopes += tl.where(active & (of_row != 0.0), of_row * slope, 0.0).to(tl.float64)

    share = shares_ptr + b
    store_decisions(
        share, tl.sum(lows, axis=0), tl.sum(highs, axis=0), tl.sum(duals, axis=0), b, S, length, counted_length,
        sequence_advantages_ptr if LEVEL == "sequence" or TERM == "vespo" else None, numbers, TERM,
    )  # fmt: skip
    store_sums(share, S, weight, loss, entropy_sum, bonus_sum, kl_sum, nll_sum, rejected)
    store_sampled(share, sampled, S, length, sampler_of_sequence, SAMPLER_OF_SEQUENCE)

    if grad_logps_ptr is not None:
        through_mean = times(tl.sum(ratio_slopes, axis=0).to(DTYPE), common) / counted_length
        entropy_slope = tl.zeros((), DTYPE)
        if grad_entropy_ptr is not None:
            entropy_slope = bonus_slope(lengths_ptr, high_entropy_count_ptr, S, entropy_coef, DTYPE, BLOCK)
        write_slopes(
            logps_ptr, mask_ptr, advantages_ptr, old_ptr, ref_ptr, sampling_ptr, loss_weights_ptr, nll_weights_ptr,
            high_entropy_ptr, drawn_ptr, grad_logps_ptr, grad_entropy_ptr, begin, end, shared, through_mean, weight,
            entropy_slope, numbers, bounds, TERM, SAMPLER, SAMPLER_OF_SEQUENCE, KL, BIAS_CORRECTED, LEVEL, OPSM,
            REJECTS, PULLS, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def finish_kernel(shares_ptr, high_entropy_count_ptr, loss_ptr, results_ptr, S: tl.int32, entropy_coef: tl.float64,
                  OF_SEQUENCES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """(COLUMNS, S) shares -> loss () and RESULTS, in one program."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    tokens = tl.maximum(column_sum(shares_ptr + LENGTH * S, S, BLOCK), 1.0)
    policy_loss = column_sum(shares_ptr + LOSS * S, S, BLOCK).to(DTYPE)
    entropy = (column_sum(shares_ptr + ENTROPY * S, S, BLOCK) / tokens).to(DTYPE)
    loss = policy_loss - column_sum(shares_ptr + NLL * S, S, BLOCK).to(DTYPE)
    if entropy_coef != 0.0:
        bonus = entropy
        if high_entropy_count_ptr is not None:
            in_bonus = tl.maximum(tl.load(high_entropy_count_ptr).to(tl.float64), 1.0)
            bonus = (column_sum(shares_ptr + BONUS * S, S, BLOCK) / in_bonus).to(DTYPE)
        loss = loss - tl.full((), entropy_coef, DTYPE) * bonus
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
    tl.store(results_ptr + 14, (column_sum(shares_ptr + REJECTED * S, S, BLOCK) / tokens).to(DTYPE))
