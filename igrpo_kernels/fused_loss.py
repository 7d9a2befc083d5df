"""`grpo_loss` and `selective_log_softmax` on an implementation's row kernels (`row_kernels.py`).

Bytes are per logit element in bf16, n·V of them:

    selective_log_softmax    forward 2 B; backward 4 B
    grpo_loss                losses whose coefficients are known row by row: one launch, at most 6 B (4 where the row
                             stays on chip), loss and gradient together, in forward
                             losses that need a whole sequence or batch before any gradient is known (sequence-level
                             ratios, vespo, off_policy_mask_threshold, top_entropy_quantile, sequence_* corrections
                             without old log-probs), and vocabulary shards: statistics 2 B, objective on (n,) rows,
                             gradient 4 B in backward

Besides the logits there is one gradient buffer, or none with `inplace`.
"""

from types import ModuleType

import torch
from torch import Tensor

from igrpo_kernels import vocab_parallel
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.first_order import first_order_only
from igrpo_kernels.gradient_handover import hand_over
from igrpo_kernels.objective import grpo_objective
from igrpo_kernels.row_kernels import RowStats
from igrpo_kernels.types import GRPOLossConfig, LogitTransform
from igrpo_kernels.vocab_parallel import VocabShard

LossRows = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def selective_log_softmax(
    kernels: ModuleType,
    logits: Tensor,  # (..., V), any strides
    index: Tensor,  # (...)
    transform: LogitTransform,
    *,
    return_entropy: bool,
    row_mask: Tensor | None = None,  # (...) bool; masked rows are not read: output 0, gradient exactly 0
    inplace: bool = False,  # backward overwrites logits with their gradient
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """logps (...) and entropy (...) or None, in the compute dtype."""
    rows = index.reshape(-1).contiguous()  # the kernels step through rows one by one
    mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
    logits = kernels.addressable(logits)
    logps, entropy = SelectiveLogSoftmax.apply(kernels, logits, rows, mask, transform, return_entropy, inplace, shard)
    return logps.view(index.shape), entropy.view(index.shape) if return_entropy else None


def grpo_loss(
    kernels: ModuleType,
    logits: Tensor,  # (B, T, V) or (n, V)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    *,
    inplace: bool,
    shard: VocabShard | None = None,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    logits = kernels.addressable(logits)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    # A graph decides for itself what it overwrites; an expanded tensor has one memory for many rows.
    inplace = inplace and not torch.compiler.is_compiling() and _owns_its_rows(logits)
    # fp16 lives on a loss scale, which comes with backward: a gradient made before it would have lost its small values.
    at_once = differentiable and shard is None and logits.dtype != torch.float16
    if at_once and kernels.one_launch(batch, config):
        with torch.no_grad():
            x = logits.detach()  # shares the storage and autograd's version counter
            rows = kernels.token_rows(batch, config, num_items_in_batch)
            logps, entropy, _, grad = kernels.token_loss(x, x if inplace else None, rows, config)
            if inplace:  # whoever saved these logits for backward must fail instead of reading gradients
                torch.autograd.graph.increment_version(logits)
            loss, metrics = grpo_objective(logps, entropy, batch, config, num_items_in_batch)
        return hand_over(kernels, loss, [logits], [grad]), logps, entropy, metrics
    logps, entropy = selective_log_softmax(
        kernels,
        logits,
        batch.index,
        config.logit_transform,
        return_entropy=True,
        row_mask=batch.mask,
        inplace=inplace,
        shard=shard,
    )
    # An entropy that only feeds metrics must not send the gradient kernel a zero coefficient to multiply with.
    used = entropy if config.needs_entropy_gradient else entropy.detach()
    loss, metrics = grpo_objective(logps, used, batch, config, num_items_in_batch)
    return loss, logps, entropy, metrics


class SelectiveLogSoftmax(torch.autograd.Function):
    """Statistics kernel forward, gradient kernel backward. State: the logits and four numbers per row."""

    @staticmethod
    def forward(ctx, kernels, logits, index, row_mask, transform, return_entropy, inplace, shard):
        ctx.set_materialize_grads(False)  # an unused output must cost nothing in backward
        ctx.kernels, ctx.transform, ctx.inplace, ctx.shard = kernels, transform, inplace, shard
        stats = vocab_parallel.statistics(kernels, logits.detach(), index, row_mask, transform, return_entropy, shard)
        ctx.save_for_backward(logits, index, row_mask, *stats)
        return stats.logps, stats.entropy

    @staticmethod
    @first_order_only
    def backward(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None):
        logits, index, row_mask, *stats = ctx.saved_tensors
        stats, grad = RowStats(*stats), None
        if stats.entropy.numel() == 0:  # not computed, but torch.compile passes zeros for it, shaped like it: (0,)
            grad_entropy = None
        if grad_logps is not None or grad_entropy is not None:
            x = logits.detach()
            grad = vocab_parallel.gradient(
                ctx.kernels,
                x,
                x if ctx.inplace else None,
                index,
                row_mask,
                stats,
                grad_logps,
                grad_entropy,
                ctx.transform,
                ctx.shard,
            )
            if ctx.inplace:
                torch.autograd.graph.increment_version(logits)
        return None, grad, None, None, None, None, None, None


def _owns_its_rows(x: Tensor) -> bool:
    """Whether writing one element of x changes no other: expanded and overlapping tensors repeat their memory."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True
