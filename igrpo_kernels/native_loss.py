"""grpo_loss and selective_log_softmax on the compiled operators, for impl="cpu" and impl="cuda".

A token-level loss needs nothing but constants and its own log-probability, so one kernel reads a row, reduces it and
writes the gradient while the row is still close. Every other loss measures all rows, differentiates the objective in
Python and writes the gradient in a second pass. Both happen in forward; backward hands the gradient over.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igrpo_kernels import native_ops, reference
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.native_ops import RowStats, as_rows
from igrpo_kernels.objective import grpo_objective, objective_and_row_gradients
from igrpo_kernels.types import GRPOLossConfig, LogitTransform

LossRows = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def grpo_loss(
    logits: Tensor,  # (B, T, V) or (n, V)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    *,
    inplace: bool,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    if logits.dtype == torch.float64:  # the kernels compute in fp32; fp64 input asks for the reference's accuracy
        return reference.grpo_loss(logits, batch, config, num_items_in_batch, inplace=inplace)
    x = as_rows(logits.detach())
    if not (torch.is_grad_enabled() and logits.requires_grad):
        stats = native_ops.row_stats(x, batch.index, batch.mask, config.logit_transform)
        loss, metrics = grpo_objective(stats.logps, stats.entropy, batch, config, num_items_in_batch)
        return loss, stats.logps, stats.entropy, metrics

    inplace = inplace and _owns_its_rows(x)
    with torch.no_grad():
        if native_ops.is_token_level(batch, config):
            logps, entropy, _, grad = native_ops.token_loss(x, batch, config, num_items_in_batch, inplace=inplace)
            loss, metrics = grpo_objective(logps, entropy, batch, config, num_items_in_batch)
        else:
            stats = native_ops.row_stats(x, batch.index, batch.mask, config.logit_transform)
            logps, entropy = stats.logps, stats.entropy
            loss, metrics, *grads = objective_and_row_gradients(logps, entropy, batch, config, num_items_in_batch)
            grad = native_ops.row_grad(
                x, batch.index, batch.mask, stats, *grads, config.logit_transform, inplace=inplace
            )
    if inplace:  # whoever saved these logits for backward must fail instead of reading gradients
        torch.autograd.graph.increment_version(logits)
    return attach_gradients(loss, [grad.view(logits.shape)], [logits]), logps, entropy, metrics


def selective_log_softmax(
    logits: Tensor,  # (..., V), any strides
    index: Tensor,  # (...)
    transform: LogitTransform,
    *,
    return_entropy: bool,
    row_mask: Tensor | None = None,  # (...) bool; masked rows: not read, output 0, gradient exactly 0
) -> tuple[Tensor, Tensor | None]:
    """logps (...) and entropy (...) or None, fp32 (fp64 for fp64 logits, computed by the reference)."""
    if logits.dtype == torch.float64:
        return reference.selective_log_softmax(
            logits, index, transform, return_entropy=return_entropy, row_mask=row_mask
        )
    mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
    logps, entropy = SelectiveLogSoftmax.apply(logits, index.reshape(-1).contiguous(), mask, transform)
    return logps.view(index.shape), entropy.view(index.shape) if return_entropy else None


class SelectiveLogSoftmax(torch.autograd.Function):
    """Forward keeps the logits it was given and 16 B per row; backward reads them once and writes the gradient."""

    @staticmethod
    def forward(ctx, logits, index, mask, transform):
        ctx.set_materialize_grads(False)  # an unused output must cost nothing in backward
        ctx.transform = transform
        stats = native_ops.row_stats(as_rows(logits.detach()), index, mask, transform)
        ctx.save_for_backward(logits, index, mask, *stats)
        return stats.logps, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None):
        logits, index, mask, *stats = ctx.saved_tensors
        stats = RowStats(*stats)
        grad_logps = torch.zeros_like(stats.logps) if grad_logps is None else grad_logps
        grad = native_ops.row_grad(
            as_rows(logits), index, mask, stats, grad_logps, grad_entropy, ctx.transform, inplace=False
        )
        return grad.view(logits.shape), None, None, None


def attach_gradients(loss: Tensor, grads: list[Tensor | None], inputs: list[Tensor | None]) -> Tensor:
    """A loss () whose backward hands `grads`, times the upstream gradient, to `inputs`."""
    return _AttachGradients.apply(loss, grads, *inputs)


class _AttachGradients(torch.autograd.Function):
    """The gradients exist already. Backward drops them, so that autograd can keep them without a copy."""

    @staticmethod
    def forward(ctx, loss, grads, *inputs):
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError(
                "this loss's gradient was handed out by an earlier backward and is not kept twice; call the loss "
                "again, or use impl='torch' where backward must run twice"
            )
        for grad in grads:
            if grad is not None:
                native_ops.scale_(grad, upstream)
        return None, None, *grads


def _owns_its_rows(x: Tensor) -> bool:
    """Whether writing one element of x changes no other: an expanded tensor repeats its memory."""
    return all(stride != 0 or size == 1 for stride, size in zip(x.stride(), x.shape, strict=True))
