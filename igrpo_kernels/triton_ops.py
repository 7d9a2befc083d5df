"""The Triton kernels as `torch.library` operators, so that torch.compile treats a launch as one opaque call.

Each operator has a fake kernel (shapes and dtypes only). The names ending in `_` write into their first argument; the
registration tells autograd, whose version counter then refuses a backward that still needs the old values.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from igrpo_kernels.batch import compute_dtype
from igrpo_kernels.triton_grpo_loss import CoefficientInputs, LossKind, LossScalars, token_loss_fwd
from igrpo_kernels.triton_launch import RowStrides, on_device, tile_for, vector_length
from igrpo_kernels.triton_logprobs import row_gradient_bwd, row_statistics_fwd
from igrpo_kernels.triton_math import row_pointer
from igrpo_kernels.types import LogitTransform


def _statistics_like(logits: Tensor, with_entropy: bool = True) -> tuple[Tensor, Tensor]:
    """Uninitialised (n,) and (n,) or (0,) in the compute dtype."""
    n, dtype = logits.numel() // logits.shape[-1], compute_dtype(logits.dtype)
    return logits.new_empty(n, dtype=dtype), logits.new_empty(n if with_entropy else 0, dtype=dtype)


@torch.library.custom_op("igrpo_kernels::row_statistics", mutates_args=())
def row_statistics(
    logits: Tensor,  # (n, V) or (B, T, V), adjacent columns
    index: Tensor,  # (n,) int64
    row_mask: Tensor | None,  # (n,) bool
    scale: float,
    softcap: float | None,
    temperature: float,
    temperatures: Tensor | None,  # (n,)
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy ((0,) if not wanted), row maximum, log of the row's sum; see `triton_math`."""
    transform = LogitTransform(scale, softcap, temperature, temperatures)
    return row_statistics_fwd(logits, index, row_mask, transform, with_entropy)


@row_statistics.register_fake
def _(logits, index, row_mask, scale, softcap, temperature, temperatures, with_entropy):
    logps, entropy = _statistics_like(logits, with_entropy)
    return logps, entropy, torch.empty_like(logps), torch.empty_like(logps)


@torch.library.custom_op("igrpo_kernels::row_gradient_", mutates_args=("logits",))
def row_gradient_(
    logits: Tensor,  # (n, V) or (B, T, V); becomes dlogits
    index: Tensor,  # (n,) int64
    row_mask: Tensor | None,  # (n,) bool
    row_max: Tensor,  # (n,)
    log_sum: Tensor,  # (n,)
    entropy: Tensor,  # (n,) or (0,)
    grad_logps: Tensor | None,  # (n,)
    grad_entropy: Tensor | None,  # (n,)
    scale: float,
    softcap: float | None,
    temperature: float,
    temperatures: Tensor | None,  # (n,)
) -> None:
    """Overwrite logits with their gradient."""
    transform = LogitTransform(scale, softcap, temperature, temperatures)
    row_gradient_bwd(logits, logits, index, row_mask, row_max, log_sum, entropy, grad_logps, grad_entropy, transform)


@torch.library.custom_op("igrpo_kernels::row_gradient", mutates_args=())
def row_gradient(
    logits: Tensor,  # (n, V) or (B, T, V)
    index: Tensor,  # (n,) int64
    row_mask: Tensor | None,  # (n,) bool
    row_max: Tensor,  # (n,)
    log_sum: Tensor,  # (n,)
    entropy: Tensor,  # (n,) or (0,)
    grad_logps: Tensor | None,  # (n,)
    grad_entropy: Tensor | None,  # (n,)
    scale: float,
    softcap: float | None,
    temperature: float,
    temperatures: Tensor | None,  # (n,)
) -> Tensor:
    """dlogits, contiguous, in the dtype of logits."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    transform = LogitTransform(scale, softcap, temperature, temperatures)
    row_gradient_bwd(logits, grad, index, row_mask, row_max, log_sum, entropy, grad_logps, grad_entropy, transform)
    return grad


@row_gradient.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("igrpo_kernels::token_loss_", mutates_args=("logits",))
def token_loss_(
    logits: Tensor,  # (n, V) or (B, T, V); becomes dlogits
    inputs: Sequence[Tensor | None],  # CoefficientInputs
    scale: float,
    softcap: float | None,
    temperature: float,
    scalars: Sequence[float],  # LossScalars
    term: str,  # LossKind
    kind: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """logps and entropy (n,), and logits overwritten with their gradient."""
    transform, kind = LogitTransform(scale, softcap, temperature), LossKind(term, *kind)
    return token_loss_fwd(logits, logits, CoefficientInputs(*inputs), transform, LossScalars(*scalars), kind)


@token_loss_.register_fake
def _(logits, *_):
    return _statistics_like(logits)


@torch.library.custom_op("igrpo_kernels::token_loss", mutates_args=())
def token_loss(
    logits: Tensor,  # (n, V) or (B, T, V)
    inputs: Sequence[Tensor | None],  # CoefficientInputs
    scale: float,
    softcap: float | None,
    temperature: float,
    scalars: Sequence[float],  # LossScalars
    term: str,  # LossKind
    kind: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """dlogits (contiguous, dtype of logits), logps and entropy (n,)."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    transform, kind = LogitTransform(scale, softcap, temperature), LossKind(term, *kind)
    return grad, *token_loss_fwd(logits, grad, CoefficientInputs(*inputs), transform, LossScalars(*scalars), kind)


@token_loss.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape), *_statistics_like(logits)


_RUN_TIME = ["V", "tokens", "stride_batch", "stride_token"]


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=["grad_ptr", "factor_ptr"])
def scale_kernel(
    # data
    grad_ptr,
    factor_ptr,
    # shape and strides
    V: tl.int32,
    tokens: tl.int64,
    stride_batch: tl.int64,
    stride_token: tl.int64,
    # constants
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1.0:  # the usual case, `loss.backward()`, costs a launch and no traffic
        V = V // VEC * VEC
        blocks = tl.cdiv(V, BLOCK)
        row = tl.program_id(0).to(tl.int64) // blocks
        column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        row_ptr = row_pointer(grad_ptr, row, tokens, stride_batch, stride_token, VEC)
        grad = tl.load(row_ptr + column, mask=column < V, other=0.0).to(factor_ptr.dtype.element_ty)
        tl.store(row_ptr + column, (grad * factor).to(grad_ptr.dtype.element_ty), mask=column < V)


@torch.library.custom_op("igrpo_kernels::scale_", mutates_args=("grad",))
def scale_(
    grad: Tensor,  # (n, V) or (B, T, V)
    factor: Tensor,  # () compute dtype, read on the device
) -> None:
    """grad *= factor, skipped on the device when factor is 1."""
    rows, V = RowStrides.of(grad), grad.shape[-1]
    tile, lanes, _, num_warps = tile_for(V, grad.itemsize)
    if rows.count:
        with on_device(grad):
            scale_kernel[(rows.count * triton.cdiv(V, tile * lanes),)](
                grad,
                factor,
                V,
                rows.tokens,
                rows.stride_batch,
                rows.stride_token,
                VEC=vector_length(grad),
                BLOCK=tile * lanes,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
