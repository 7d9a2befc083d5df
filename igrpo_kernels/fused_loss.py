"""`grpo_loss` and `selective_log_softmax` on an implementation's row kernels (`row_kernels.py`).

Bytes are per logit element in bf16, n·V of them:

    selective_log_softmax    forward 2 B; backward 4 B
    grpo_loss                losses whose coefficients are known row by row: one launch, at most 6 B (4 where the row
                             stays on chip), loss and gradient together, in forward
                             losses that need a whole sequence or batch before any gradient is known (sequence-level
                             ratios, vespo, gmpo, clip_cov, kl_cov, off_policy_mask_threshold, top_entropy_quantile,
                             sequence_* corrections and rejection without old log-probs), vocabulary shards, a teacher:
                             statistics 2 B, objective on (n,) rows, gradient 4 B in backward

Besides the logits there is one gradient buffer, or none with `inplace`.
"""

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.first_order import first_order_only
from igrpo_kernels.row_kernels import RowKernels
from igrpo_kernels.types import GRPOLossConfig, LogitTransform, RowStats

LossRows = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def selective_log_softmax(
    kernels: RowKernels,
    logits: Tensor,  # (..., V), any strides
    index: Tensor,  # (...)
    transform: LogitTransform,
    *,
    return_entropy: bool,
    row_mask: Tensor | None = None,  # (...) bool; masked rows are not read: output 0, gradient exactly 0
    inplace: bool = False,  # backward overwrites logits with their gradient
) -> tuple[Tensor | None, ...]:
    """logps (...) and entropy (...) or None, in the compute dtype; of `DistilledRows` also the divergence (...)."""
    rows = index.reshape(-1).contiguous()  # the kernels step through rows one by one
    mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
    logits = adjacent_columns(logits)
    shared, temperatures = transform._replace(temperatures=None), transform.temperatures
    logps, entropy, *rest = SelectiveLogSoftmax.apply(
        kernels, logits, rows, mask, shared, temperatures, return_entropy, inplace
    )
    shaped = [x.view(index.shape) for x in rest]
    return logps.view(index.shape), entropy.view(index.shape) if return_entropy else None, *shaped


def grpo_loss(
    kernels: RowKernels,
    logits: Tensor,  # (B, T, V) or (n, V)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    *,
    inplace: bool,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    logits = adjacent_columns(logits)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    # A graph decides for itself what it overwrites; an expanded tensor has one memory for many rows.
    inplace = inplace and not torch.compiler.is_compiling() and _owns_its_rows(logits)
    # fp16 lives on a loss scale, which comes with backward: a gradient made before it would have lost its small values.
    at_once = differentiable and logits.dtype != torch.float16
    if at_once and kernels.fits_one_pass(batch, config):
        with torch.no_grad():
            x = logits.detach()  # shares the storage and autograd's version counter
            inputs = kernels.coefficient_inputs(batch, config, num_items_in_batch)
            logps, entropy, _, grad = kernels.token_loss(x, x if inplace else None, inputs, config)
            if inplace:  # whoever saved these logits for backward must fail instead of reading gradients
                torch.autograd.graph.increment_version(logits)
            loss, metrics = kernels.objective(logps, entropy, batch, config, num_items_in_batch)
        return with_gradients(kernels, loss, [logits], [grad]), logps, entropy, metrics
    logps, entropy, *divergence = selective_log_softmax(
        kernels,
        logits,
        batch.index,
        config.logit_transform._replace(temperatures=batch.temperatures),
        return_entropy=True,
        row_mask=batch.mask,
        inplace=inplace,
    )
    # An entropy that only feeds metrics must not send the gradient kernel a zero coefficient to multiply with.
    used = entropy if config.needs_entropy_gradient else entropy.detach()
    loss, metrics = kernels.objective(logps, used, batch, config, num_items_in_batch, *divergence)
    return loss, logps, entropy, metrics


class SelectiveLogSoftmax(torch.autograd.Function):
    """Statistics kernel forward, gradient kernel backward. State: the logits and four numbers per row."""

    @staticmethod
    def forward(ctx, kernels, logits, index, row_mask, transform, temperatures, return_entropy, inplace):
        ctx.set_materialize_grads(False)  # an unused output must cost nothing in backward
        ctx.kernels, ctx.transform, ctx.inplace = kernels, transform, inplace
        transform = transform._replace(temperatures=temperatures)
        stats = kernels.statistics(logits.detach(), index, row_mask, transform, return_entropy)
        ctx.save_for_backward(logits, index, row_mask, temperatures, *stats.known)
        return stats.logps, stats.entropy, *stats.of_teacher

    @staticmethod
    @first_order_only
    def backward(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None, *grad_divergence: Tensor | None):
        logits, index, row_mask, temperatures, *stats = ctx.saved_tensors
        stats, grad, transform = RowStats(*stats), None, ctx.transform._replace(temperatures=temperatures)
        if stats.entropy.numel() == 0:  # not computed, but torch.compile passes zeros for it, shaped like it: (0,)
            grad_entropy = None
        if any(g is not None for g in (grad_logps, grad_entropy, *grad_divergence)):
            x = logits.detach()
            out = x if ctx.inplace else None
            slopes = (grad_logps, grad_entropy, transform, *grad_divergence)
            grad = ctx.kernels.gradient(x, out, index, row_mask, stats, *slopes)
            if ctx.inplace:
                torch.autograd.graph.increment_version(logits)
        return None, grad, None, None, None, None, None, None


def with_gradients(
    kernels: RowKernels, loss: Tensor, leaves: list[Tensor | None], gradients: list[Tensor | None]
) -> Tensor:
    """The loss (), whose backward gives `gradients`, times the upstream gradient, to `leaves` in their dtypes."""
    return LossWithGradients.apply(kernels, loss, len(leaves), *leaves, *gradients)


class LossWithGradients(torch.autograd.Function):
    """Backward scales the gradients in place and gives them away, so that they exist once."""

    @staticmethod
    def forward(ctx, kernels, value: Tensor, count: int, *leaves_and_gradients: Tensor | None) -> Tensor:
        leaves, gradients = leaves_and_gradients[:count], leaves_and_gradients[count:]
        ctx.save_for_backward(*gradients)  # autograd then refuses a gradient that somebody has overwritten
        ctx.kernels, ctx.count = kernels, count
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in leaves]
        ctx.handed_out = False
        return value.clone()

    @staticmethod
    @first_order_only
    def backward(ctx, upstream: Tensor):
        if torch.compiler.is_compiling():  # a graph keeps what it saved, so the factor makes a new tensor
            gradients = [None if g is None else (g * upstream).to(g.dtype) for g in ctx.saved_tensors]
        else:
            if ctx.handed_out:
                raise RuntimeError(
                    "this loss computed its gradient once, in forward, and a first backward has already taken it; "
                    "compute the loss again instead of a second backward with retain_graph=True, or use impl='torch'"
                )
            ctx.handed_out, gradients = True, ctx.saved_tensors
            for gradient in gradients:
                if gradient is not None:
                    ctx.kernels.scale_(gradient, upstream)
        typed = [None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *typed, *(None for _ in typed)


def adjacent_columns(logits: Tensor) -> Tensor:
    """(..., V) as (n, V) or (B, T, V) with adjacent columns: a view where the strides allow, else a copy."""
    if logits.dim() not in (2, 3):
        logits = logits.reshape(-1, logits.shape[-1])
    if logits.shape[-1] == 1 or logits.stride(-1) == 1:
        return logits
    return logits.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of an empty tensor


def _owns_its_rows(x: Tensor) -> bool:
    """Whether writing one element of x changes no other: expanded and overlapping tensors repeat their memory."""
    last = 0  # offset of the last element that smaller strides lead to
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= last:
            return False
        last += stride * (size - 1)
    return True
