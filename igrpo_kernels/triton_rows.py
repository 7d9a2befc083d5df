"""The row kernels of `impl="triton"`, as `row_kernels.py` describes them."""

from torch import Tensor

from igrpo_kernels import triton_ops as ops
from igrpo_kernels.batch import TokenBatch, compute_dtype
from igrpo_kernels.objective import entropy_slope, locality, reduction_weights, rows, sampler_ratio
from igrpo_kernels.row_kernels import RowStats, addressable
from igrpo_kernels.triton_grpo_loss import LossKind, LossScalars, TokenRows
from igrpo_kernels.types import GRPOLossConfig, LogitTransform

__all__ = ["addressable", "gradient", "one_launch", "scale_", "statistics", "token_loss", "token_rows"]


def statistics(
    logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
) -> RowStats:
    """One read of the logits."""
    return RowStats(*ops.row_statistics(logits, index, mask, *transform, with_entropy))


def gradient(
    logits: Tensor,
    out: Tensor | None,
    index: Tensor,
    mask: Tensor | None,
    stats: RowStats,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    transform: LogitTransform,
) -> Tensor:
    """One read of the logits, one write of their gradient."""
    arguments = (index, mask, stats.row_max, stats.log_sum, stats.entropy, grad_logps, grad_entropy, *transform)
    if out is None:
        return ops.row_gradient(logits, *arguments)
    if out.data_ptr() == logits.data_ptr():
        ops.row_gradient_(logits, *arguments)
    else:
        ops.row_gradient_bwd(logits, out, *arguments[:-3], transform)
    return out


def one_launch(batch: TokenBatch, config: GRPOLossConfig) -> bool:
    """Whether dloss/dl of a row follows from that row's logits alone."""
    return locality(batch, config) == "token"


def token_rows(batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None) -> TokenRows:
    """The kernel's per-row inputs: everything the coefficients need and the logits do not decide."""
    mode = config.importance_sampling_mode
    policy_weight = None
    if mode is not None and mode.startswith("sequence") and batch.sampling_per_token_logps is not None:
        policy_weight = rows(sampler_ratio(batch.old_per_token_logps, batch, config), batch, config).contiguous()
    return TokenRows(
        batch.index,
        batch.mask,
        batch.advantages,
        reduction_weights(batch, config, num_items_in_batch),
        batch.old_per_token_logps,
        batch.ref_per_token_logps if config.beta != 0.0 else None,
        batch.sampling_per_token_logps if mode is not None and mode.startswith("token") else None,
        policy_weight,
        entropy_slope(batch, config),
    )


def token_loss(
    logits: Tensor, out: Tensor | None, token_rows: TokenRows, config: GRPOLossConfig
) -> tuple[Tensor, Tensor, None, Tensor]:
    """One launch: two walks over each row, one write."""
    scalars, kind, transform = LossScalars.of(config), LossKind.of(config), config.logit_transform
    if out is None:
        grad, logps, entropy = ops.token_loss(logits, *token_rows, *transform, [*scalars], [*kind])
    elif out.data_ptr() == logits.data_ptr():
        grad, (logps, entropy) = out, ops.token_loss_(logits, *token_rows, *transform, [*scalars], [*kind])
    else:
        rows = TokenRows(*token_rows)
        grad, (logps, entropy) = out, ops.token_loss_fwd(logits, out, rows, transform, scalars, kind)
    return logps, entropy, None, grad


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor; the kernel looks at the factor, so that nothing waits for it."""
    matrix = grad if grad.dim() > 1 else grad[None]
    ops.scale_(matrix, factor.to(compute_dtype(grad.dtype)))
