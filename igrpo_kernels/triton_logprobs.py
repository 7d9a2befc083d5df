"""Log-probability and entropy of each row of logits, and the gradient of both.

Forward reads the row once: 2 B per bf16 logit. Backward reads it again and writes dlogits: 4 B, in place or not. Saved
per row in between: four fp32 numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from igrpo_kernels.batch import compute_dtype
from igrpo_kernels.triton_launch import RowStrides, on_device, tile_for, transform_factors, vector_length
from igrpo_kernels.triton_math import (
    row_pointer,
    row_statistics,
    target_log_prob,
    tempered,
    write_gradient,
)
from igrpo_kernels.types import LogitTransform

_STATISTICS_POINTERS = [
    "logits_ptr",
    "index_ptr",
    "mask_ptr",
    "temperatures_ptr",
    "logps_ptr",
    "entropy_ptr",
    "row_max_ptr",
    "log_sum_ptr",
]
_RUN_TIME = ["V", "tokens", "stride_batch", "stride_token", "inner", "outer"]


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=_STATISTICS_POINTERS)
def row_statistics_kernel(
    # data, one value per row except the logits
    logits_ptr,
    index_ptr,
    mask_ptr,
    temperatures_ptr,
    logps_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    # shape and strides
    V: tl.int32,
    tokens: tl.int64,
    stride_batch: tl.int64,
    stride_token: tl.int64,
    # transform
    inner: tl.float64,
    outer: tl.float64,
    # constants
    SOFTCAP: tl.constexpr,
    VEC: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    NEAR: tl.constexpr,
):
    DTYPE: tl.constexpr = logps_ptr.dtype.element_ty
    V = V // VEC * VEC  # tells the compiler that V fills whole vectors
    row = tl.program_id(0).to(tl.int64)
    inner, outer = tempered(inner, outer, temperatures_ptr, row, DTYPE, SOFTCAP)
    row_ptr = row_pointer(logits_ptr, row, tokens, stride_batch, stride_token, VEC)
    target = tl.load(index_ptr + row)
    active = row < tl.num_programs(0)
    if mask_ptr is not None:
        active = tl.load(mask_ptr + row) != 0
    columns = tl.where(active, V, 0)  # a masked row is not read
    row_max, s, e = row_statistics(row_ptr, columns, inner, outer, DTYPE, SOFTCAP, TILE, LANES, NEAR)
    s = tl.where(active, s, 1.0)
    log_sum = tl.log(s)
    logp = target_log_prob(row_ptr, target, columns, inner, outer, row_max, log_sum, DTYPE, SOFTCAP)
    tl.store(logps_ptr + row, tl.where(active, logp, 0.0))
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(active, log_sum - e / s, 0.0))
    tl.store(row_max_ptr + row, tl.where(active, row_max, 0.0))
    tl.store(log_sum_ptr + row, tl.where(active, log_sum, 0.0))


def row_statistics_fwd(
    logits: Tensor,  # (n, V) or (B, T, V), adjacent columns
    index: Tensor,  # (n,) int64
    row_mask: Tensor | None,  # (n,) bool
    transform: LogitTransform,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy (empty if not wanted), row maximum and log-sum of exp(z - maximum), each (n,)."""
    rows, V, dtype = RowStrides.of(logits), logits.shape[-1], compute_dtype(logits.dtype)
    logps, row_max, log_sum = (torch.empty(rows.count, dtype=dtype, device=logits.device) for _ in range(3))
    entropy = torch.empty(rows.count if with_entropy else 0, dtype=dtype, device=logits.device)
    inner, outer, capped = transform_factors(transform)
    tile, lanes, near, num_warps = tile_for(V, logits.itemsize)
    if rows.count:
        with on_device(logits):
            row_statistics_kernel[(rows.count,)](
                logits,
                index,
                None if row_mask is None else row_mask.view(torch.uint8),
                transform.temperatures,
                logps,
                entropy if with_entropy else None,
                row_max,
                log_sum,
                V,
                rows.tokens,
                rows.stride_batch,
                rows.stride_token,
                inner,
                outer,
                SOFTCAP=capped,
                VEC=vector_length(logits),
                TILE=tile,
                LANES=lanes,
                NEAR=near,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return logps, entropy, row_max, log_sum


_GRADIENT_POINTERS = [
    "logits_ptr",
    "grad_ptr",
    "index_ptr",
    "mask_ptr",
    "temperatures_ptr",
    "row_max_ptr",
    "log_sum_ptr",
    "entropy_ptr",
    "grad_logps_ptr",
    "grad_entropy_ptr",
]
_GRADIENT_RUN_TIME = [*_RUN_TIME, "grad_stride_batch", "grad_stride_token"]


@triton.jit(do_not_specialize=_GRADIENT_RUN_TIME, do_not_specialize_on_alignment=_GRADIENT_POINTERS)
def row_gradient_kernel(
    # data, one value per row except logits and grad; grad may be logits
    logits_ptr,
    grad_ptr,
    index_ptr,
    mask_ptr,
    temperatures_ptr,
    row_max_ptr,
    log_sum_ptr,
    entropy_ptr,
    grad_logps_ptr,
    grad_entropy_ptr,
    # shape and strides
    V: tl.int32,
    tokens: tl.int64,
    stride_batch: tl.int64,
    stride_token: tl.int64,
    grad_stride_batch: tl.int64,
    grad_stride_token: tl.int64,
    # transform
    inner: tl.float64,
    outer: tl.float64,
    # constants
    SOFTCAP: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = row_max_ptr.dtype.element_ty
    V = V // VEC * VEC
    row = tl.program_id(0).to(tl.int64)
    inner, outer = tempered(inner, outer, temperatures_ptr, row, DTYPE, SOFTCAP)
    row_ptr = row_pointer(logits_ptr, row, tokens, stride_batch, stride_token, VEC)
    grad_row_ptr = row_pointer(grad_ptr, row, tokens, grad_stride_batch, grad_stride_token, VEC)
    target = tl.load(index_ptr + row)
    grad_logp = tl.zeros((), DTYPE)
    grad_entropy = tl.zeros((), DTYPE)
    entropy = tl.zeros((), DTYPE)
    if grad_logps_ptr is not None:
        grad_logp = tl.load(grad_logps_ptr + row).to(DTYPE)
        grad_logp = tl.where((target >= 0) & (target < V), grad_logp, float("nan"))
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + row).to(DTYPE)
        entropy = tl.load(entropy_ptr + row)
    active = (grad_logp != 0.0) | (grad_entropy != 0.0)
    if mask_ptr is not None:
        active = active & (tl.load(mask_ptr + row) != 0)
    row_max = tl.load(row_max_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    write_gradient(
        row_ptr, grad_row_ptr, target, V, inner, outer, row_max, log_sum, entropy, grad_logp, grad_entropy, active,
        DTYPE, grad_entropy_ptr is not None, SOFTCAP, BLOCK,
    )  # fmt: skip


def row_gradient_bwd(
    logits: Tensor,  # (n, V) or (B, T, V)
    grad: Tensor,  # same shape: written; may be logits itself
    index: Tensor,  # (n,) int64
    row_mask: Tensor | None,  # (n,) bool
    row_max: Tensor,  # (n,)
    log_sum: Tensor,  # (n,)
    entropy: Tensor,  # (n,) or empty
    grad_logps: Tensor | None,  # (n,)
    grad_entropy: Tensor | None,  # (n,)
    transform: LogitTransform,
) -> None:
    """grad = dloss/dlogits from dloss/dlogps and dloss/dentropy; masked rows become 0 without being read."""
    if entropy.numel() == 0:  # not computed, but torch.compile passes zeros for it, shaped like it: (0,)
        grad_entropy = None
    rows, grad_rows, V = RowStrides.of(logits), RowStrides.of(grad), logits.shape[-1]
    inner, outer, capped = transform_factors(transform)
    tile, lanes, _, num_warps = tile_for(V, logits.itemsize)
    if rows.count:
        with on_device(logits):
            row_gradient_kernel[(rows.count,)](
                logits,
                grad,
                index,
                None if row_mask is None else row_mask.view(torch.uint8),
                transform.temperatures,
                row_max,
                log_sum,
                entropy,
                None if grad_logps is None else grad_logps.contiguous(),
                None if grad_entropy is None else grad_entropy.contiguous(),
                V,
                rows.tokens,
                rows.stride_batch,
                rows.stride_token,
                grad_rows.stride_batch,
                grad_rows.stride_token,
                inner,
                outer,
                SOFTCAP=capped,
                VEC=vector_length(logits, grad),
                BLOCK=tile * lanes,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
