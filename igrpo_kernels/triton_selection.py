"""Rows chosen by their place among all rows of a call: `objective.top_entropy_keep`, and what `losses.py` draws by
covariance. One launch of one program each, without a sort and without a host sync.

A number's bits, put in order, are an integer. Four passes (fp64: eight) over these integers count, of those that
still agree with the wanted one in every higher digit of 8 bits, how many have which next digit. Equal rows are taken
in their order, as a stable sort would.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.losses import CLIP_COV
from igrpo_kernels.triton_launch import on_device
from igrpo_kernels.types import GRPOLossConfig

_BLOCK, _WARPS = 2048, 8
_REGISTERS = 128  # enough: without a bound ptxas spills some to fit more blocks, of which there is one
_NOT_DRAWN = tl.constexpr(0x7FFFFFFF)
_POINTERS = [
    f"{name}_ptr"
    for name in ("entropy", "mask", "logps", "advantages", "old", "index", "keys", "high_entropy", "count", "drawn")
]


@triton.jit
def ordered(x):
    """fp32 or fp64 as unsigned integers in the order of `torch.sort`: -0 is 0, NaN the largest."""
    INT: tl.constexpr = tl.int32 if x.dtype == tl.float32 else tl.int64
    UINT: tl.constexpr = tl.uint32 if x.dtype == tl.float32 else tl.uint64
    bits = tl.where(x == 0.0, 0.0, x).to(INT, bitcast=True)
    sign: tl.constexpr = 1 << (INT.primitive_bitwidth - 1)
    key = bits.to(UINT, bitcast=True)
    key = tl.where(bits < 0, ~key, key ^ tl.full((), sign, UINT))
    return tl.where(x != x, ~tl.zeros_like(key), key)


@triton.jit
def number_of(key, DTYPE: tl.constexpr):
    """The number that `ordered` made an integer of."""
    sign: tl.constexpr = 1 << (key.dtype.primitive_bitwidth - 1)
    top = tl.full((), sign, key.dtype)
    return tl.where(key >= top, key ^ top, ~key).to(DTYPE, bitcast=True)


@triton.jit
def nth_key(keys_ptr, n, nth, BLOCK: tl.constexpr):
    """The integer at place `nth`, from 0, of n sorted ones, and how many are smaller; both ()."""
    KEY: tl.constexpr = keys_ptr.dtype.element_ty
    BITS: tl.constexpr = KEY.primitive_bitwidth
    digits = tl.arange(0, 256)
    found, smaller = tl.zeros((), KEY), tl.zeros((), tl.int32)
    for step in range(BITS // 8):
        shift = tl.full((), BITS - 8 - 8 * step, KEY)
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            higher = tl.load(keys_ptr + i, mask=i < n, other=0) >> shift
            here = (i < n) & ((higher >> 8) == found)
            counts += tl.histogram((higher & 255).to(tl.int32), 256, mask=here)
        digit = tl.sum((tl.cumsum(counts, axis=0) + smaller <= nth).to(tl.int32), axis=0)
        smaller += tl.sum(tl.where(digits < digit, counts, 0), axis=0)
        found = (found << 8) | digit.to(KEY)
    return found, smaller


@triton.jit(do_not_specialize=["n", "below"], do_not_specialize_on_alignment=_POINTERS)
def top_entropy_kernel(
    entropy_ptr, mask_ptr,  # (n,)
    keys_ptr, high_entropy_ptr, count_ptr,  # (n,), (n,), (): written
    n: tl.int32, below: tl.float64,  # 1 - top_entropy_quantile
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Which rows' entropy reaches the quantile, and how many they are."""
    DTYPE: tl.constexpr = entropy_ptr.dtype.element_ty
    counted = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        active = tl.load(mask_ptr + i, mask=i < n, other=0) != 0
        entropy = tl.load(entropy_ptr + i, mask=active, other=float("inf"))
        tl.store(keys_ptr + i, ordered(entropy), mask=i < n)
        counted += active.to(tl.int32)
    tl.debug_barrier()  # every thread sees all of them
    one = tl.full((), 1.0, DTYPE)
    rank = tl.full((), below, DTYPE) * tl.maximum(tl.sum(counted, axis=0).to(DTYPE) - one, 0.0)
    lower = tl.floor(rank)
    low_key, _ = nth_key(keys_ptr, n, lower.to(tl.int32), BLOCK)
    high_key, _ = nth_key(keys_ptr, n, tl.ceil(rank).to(tl.int32), BLOCK)
    low, high, fraction = number_of(low_key, DTYPE), number_of(high_key, DTYPE), rank - lower
    step = high - low  # torch.lerp's two forms
    between = tl.where(fraction < 0.5, low + fraction * step, high - step * (one - fraction))
    threshold = tl.where(lower == rank, low, between)
    counted = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        active = tl.load(mask_ptr + i, mask=i < n, other=0) != 0
        kept = active & (tl.load(entropy_ptr + i, mask=active, other=0.0) >= threshold)
        tl.store(high_entropy_ptr + i, kept.to(tl.uint8), mask=i < n)
        counted += kept.to(tl.int32)
    tl.store(count_ptr, tl.sum(counted, axis=0).to(DTYPE))


@triton.jit
def lots(index, places):
    """The numbers that `losses.clip_cov_leaves` draws lots by."""
    lot = (index * 0x5851F42D + places * 0x9E3779B1) % 0x7FFFFFFF
    lot = tl.where(lot < 0, lot + 0x7FFFFFFF, lot)  # an id outside the vocabulary: Python's sign of a rest
    return lot * 0x2545F491 % 0x7FFFFFFF


@triton.jit(do_not_specialize=["n", "share", "least", "most", "clip_low", "clip_high"],
            do_not_specialize_on_alignment=_POINTERS)  # fmt: skip
def covariance_kernel(
    logps_ptr, advantages_ptr, old_ptr, mask_ptr, index_ptr,  # (n,); old may be None
    keys_ptr, drawn_ptr,  # (n,): written
    n: tl.int32, share: tl.float64, least: tl.float64, most: tl.float64, clip_low: tl.float64, clip_high: tl.float64,
    CLIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which rows clip_cov (CLIPS) or kl_cov draws."""
    DTYPE: tl.constexpr = logps_ptr.dtype.element_ty
    KEY: tl.constexpr = keys_ptr.dtype.element_ty
    counted, zeros = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float64)
    advantage_sum, logp_sum = zeros, zeros
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        active = tl.load(mask_ptr + i, mask=i < n, other=0) != 0
        counted += active.to(tl.int32)
        advantage_sum += tl.load(advantages_ptr + i, mask=active, other=0.0).to(tl.float64)
        logp_sum += tl.load(logps_ptr + i, mask=active, other=0.0).to(tl.float64)
    tokens = tl.sum(counted, axis=0)
    divisor = tl.maximum(tokens, 1).to(DTYPE)
    mean_advantage = tl.sum(advantage_sum, axis=0).to(DTYPE) / divisor
    mean_logp = tl.sum(logp_sum, axis=0).to(DTYPE) / divisor
    before = tl.zeros((), tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        active = tl.load(mask_ptr + i, mask=i < n, other=0) != 0
        logp = tl.load(logps_ptr + i, mask=active, other=0.0)
        advantage = tl.load(advantages_ptr + i, mask=active, other=0.0)
        covariance = (advantage - mean_advantage) * (logp - mean_logp)
        if CLIPS:
            old = logp if old_ptr is None else tl.load(old_ptr + i, mask=active, other=0.0)
            w = tl.exp(logp - old)
            beyond = (w > tl.full((), clip_high, DTYPE)) & (advantage > 0.0)
            beyond |= (w < tl.full((), clip_low, DTYPE)) & (advantage < 0.0)
            of_them = active & (beyond == 0)
            of_them &= (covariance > tl.full((), least, DTYPE)) & (covariance < tl.full((), most, DTYPE))
            places = before + tl.cumsum(active.to(tl.int64), axis=0)
            lot = lots(tl.load(index_ptr + i, mask=active, other=0), places)
            key = tl.where(of_them, lot, _NOT_DRAWN).to(KEY)
            before += tl.sum(active.to(tl.int64), axis=0)
        else:
            key = ordered(tl.where(active, -covariance, float("inf")))
        tl.store(keys_ptr + i, key, mask=i < n)
    tl.debug_barrier()  # every thread sees all of them
    wanted = tl.maximum(tl.floor(tokens.to(tl.float64) * share), 1.0).to(tl.int32)
    last, smaller = nth_key(keys_ptr, n, wanted - 1, BLOCK)
    taken = tl.zeros((), tl.int32)  # of the rows that equal the last one
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        drawn = tl.load(mask_ptr + i, mask=i < n, other=0) != 0
        key = tl.load(keys_ptr + i, mask=i < n, other=0)
        equal = ((i < n) & (key == last)).to(tl.int32)
        place = taken + tl.cumsum(equal, axis=0)
        drawn &= (key < last) | ((key == last) & (place <= wanted - smaller))
        if CLIPS:
            drawn &= key != _NOT_DRAWN
        tl.store(drawn_ptr + i, drawn.to(tl.uint8), mask=i < n)
        taken += tl.sum(equal, axis=0)


def high_entropy_rows(entropy: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> tuple[Tensor, Tensor]:
    """uint8 (n,): rows whose entropy reaches the quantile, and their number ()."""
    n, keep = entropy.numel(), torch.empty_like(batch.mask, dtype=torch.uint8)
    count = entropy.new_empty(())
    with on_device(entropy):
        top_entropy_kernel[(1,)](
            entropy,
            batch.mask.view(torch.uint8),
            _keys(entropy),
            keep,
            count,
            n,
            1.0 - float(config.top_entropy_quantile),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            maxnreg=_REGISTERS,
            enable_fp_fusion=False,
        )
    return keep, count


def drawn_rows(logps: Tensor, batch: TokenBatch, config: GRPOLossConfig) -> Tensor:
    """uint8 (n,): rows that clip_cov or kl_cov draws."""
    drawn, clips = torch.empty_like(batch.mask, dtype=torch.uint8), config.loss.term is CLIP_COV
    with on_device(logps):
        covariance_kernel[(1,)](
            logps,
            batch.advantages.contiguous(),
            batch.old_per_token_logps,
            batch.mask.view(torch.uint8),
            batch.index,
            _keys(logps),
            drawn,
            logps.numel(),
            float(config.clip_cov_ratio if clips else config.kl_cov_ratio),
            float(config.clip_cov_lb),
            float(config.clip_cov_ub),
            float(config.clip_low),
            float(config.clip_high),
            CLIPS=clips,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            maxnreg=_REGISTERS,
            enable_fp_fusion=False,
        )
    return drawn


def _keys(like: Tensor) -> Tensor:
    """Memory for a row's integer."""
    return torch.empty_like(like, dtype=torch.uint32 if like.dtype == torch.float32 else torch.uint64)
