"""What the kernels with one program per sequence share: where its rows are, and sums over sequences."""

import triton
import triton.language as tl


@triton.jit
def sequence_bounds(cu_seqlens_ptr, b, S, tokens, n):
    """[begin, end) of the rows of a sequence; never outside the tensors, whatever the offsets hold.

    The first and the last sequence take the rows that are in none, which are masked.
    """
    if cu_seqlens_ptr is None:
        begin = b * tokens
        end = begin + tokens
    else:
        begin = tl.where(b == 0, 0, tl.maximum(tl.load(cu_seqlens_ptr + b).to(tl.int64), 0))
        end = tl.where(b == S - 1, n, tl.minimum(tl.load(cu_seqlens_ptr + b + 1).to(tl.int64), n))
    return begin, end


@triton.jit
def column_sum(ptr, count, BLOCK: tl.constexpr):
    """Sum of `count` numbers, in fp64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + i, mask=i < count, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def column_extreme(ptr, count, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Largest or smallest of `count` numbers; infinite if there is none."""
    nothing: tl.constexpr = float("-inf") if LARGEST else float("inf")
    value = tl.full((BLOCK,), nothing, tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(ptr + i, mask=i < count, other=nothing)
        value = tl.maximum(value, x) if LARGEST else tl.minimum(value, x)
    return tl.max(value, axis=0) if LARGEST else tl.min(value, axis=0)
