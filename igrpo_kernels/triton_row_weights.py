"""The kernel of what is known of a row before its logits: its weight in the loss, and the sampler's ratio."""

import triton
import triton.language as tl

from igrpo_kernels.triton_sampler import (
    BOUNDS,
    SEQ_MASK,
    common_ratio,
    log_sampler_ratio,
    row_ratio,
    row_stays,
    sequence_stays,
)
from igrpo_kernels.triton_sequences import column_sum, sequence_bounds

_NUMBERS = ["n", "tokens", "S", "num_items", "max_length", "entropy_coef", "sampler_low", "sampler_high", *BOUNDS]
_POINTERS = [
    f"{name}_ptr"
    for name in (
        "mask", "lengths", "prompt_lengths", "loss_weights", "cu_seqlens", "num_items", "old", "sampling", "weight",
        "policy_weight", "entropy_slope",
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


@triton.jit
def bonus_slope(lengths_ptr, count_ptr, S, entropy_coef, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """dloss/dentropy of the rows in the bonus, which are all unmasked ones where `count_ptr` is None."""
    total = column_sum(lengths_ptr, S, BLOCK).to(DTYPE) if count_ptr is None else tl.load(count_ptr)
    return -tl.full((), entropy_coef, DTYPE) / tl.maximum(total, tl.full((), 1.0, DTYPE))


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def row_weights_kernel(
    # data: (S,), (n,) and ()
    mask_ptr, lengths_ptr, prompt_lengths_ptr, loss_weights_ptr, cu_seqlens_ptr, num_items_ptr, old_ptr, sampling_ptr,
    weight_ptr, policy_weight_ptr, entropy_slope_ptr,  # written; the last two may be None
    # numbers
    n: tl.int64, tokens: tl.int64, S: tl.int32, num_items: tl.float64, max_length: tl.float64,
    entropy_coef: tl.float64, sampler_low: tl.float64, sampler_high: tl.float64,
    token_k1_low: tl.float64, token_k1: tl.float64, token_k2: tl.float64, token_k3: tl.float64,
    seq_sum_k1_low: tl.float64, seq_sum_k1: tl.float64, seq_sum_k2: tl.float64, seq_sum_k3: tl.float64,
    seq_mean_k1_low: tl.float64, seq_mean_k1: tl.float64, seq_mean_k2: tl.float64, seq_mean_k3: tl.float64,
    seq_max_k2: tl.float64, seq_max_k3: tl.float64,
    # constants
    REDUCTION: tl.constexpr, SAMPLER: tl.constexpr, SAMPLER_OF_SEQUENCE: tl.constexpr, REJECTS: tl.constexpr,
    SLOPE_OF_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sequence: its rows' weight, what their policy term is multiplied with, and dloss/dentropy."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    begin, end = sequence_bounds(cu_seqlens_ptr, b, S, tokens, n)
    weight = loss_weight(
        lengths_ptr, prompt_lengths_ptr, num_items_ptr, b, S, num_items, max_length, DTYPE, REDUCTION, BLOCK
    )
    length = tl.maximum(tl.load(lengths_ptr + b), tl.full((), 1.0, DTYPE))
    low, high, ratio = tl.full((), sampler_low, DTYPE), tl.full((), sampler_high, DTYPE), tl.full((), 1.0, DTYPE)
    if SAMPLER_OF_SEQUENCE or SAMPLER == SEQ_MASK:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(begin, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
            old = tl.load(old_ptr + row, mask=active, other=0.0)
            total += log_sampler_ratio(old, tl.load(sampling_ptr + row, mask=active, other=0.0), DTYPE).to(tl.float64)
        ratio = common_ratio(tl.sum(total, axis=0).to(DTYPE), length, low, high, SAMPLER, SAMPLER_OF_SEQUENCE)
    if REJECTS:
        bounds = [tl.full((), x, DTYPE) for x in (
            token_k1_low, token_k1, token_k2, token_k3, seq_sum_k1_low, seq_sum_k1, seq_sum_k2, seq_sum_k3,
            seq_mean_k1_low, seq_mean_k1, seq_mean_k2, seq_mean_k3, seq_max_k2, seq_max_k3,
        )]  # fmt: skip
        stays = sequence_stays(mask_ptr, old_ptr, sampling_ptr, begin, end, length, bounds, BLOCK)
    slope = tl.zeros((), DTYPE)
    if entropy_slope_ptr is not None:
        slope = bonus_slope(lengths_ptr, None, S, entropy_coef, DTYPE, BLOCK)
        if not SLOPE_OF_ROWS:
            tl.store(entropy_slope_ptr, slope, mask=b == 0)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        active = (row < end) & (tl.load(mask_ptr + row, mask=row < end, other=0) != 0)
        of_row = tl.where(active, weight, 0.0)
        if loss_weights_ptr is not None:
            of_row = of_row * tl.load(loss_weights_ptr + row, mask=row < end, other=0.0)
        tl.store(weight_ptr + row, of_row, mask=row < end)
        if policy_weight_ptr is not None:
            old = tl.load(old_ptr + row, mask=active, other=0.0)
            sampling = tl.load(sampling_ptr + row, mask=active, other=0.0)
            of_row = row_ratio(ratio, old, sampling, low, high, SAMPLER, SAMPLER_OF_SEQUENCE)
            if REJECTS:
                of_row = tl.where(row_stays(stays, old, sampling, bounds), of_row, 0.0)
            tl.store(policy_weight_ptr + row, tl.where(active, of_row, 0.0), mask=row < end)
        if SLOPE_OF_ROWS and entropy_slope_ptr is not None:
            tl.store(entropy_slope_ptr + row, tl.where(active, slope, 0.0), mask=row < end)
