"""`linear_grpo_loss` and `linear_selective_log_softmax` on an implementation's row kernels (`row_kernels.py`).

    logits chunk = X_c Wᵀ + b  ->  row kernels in place: dlogits  ->  dX_c = dlogits W,  dW += dlogitsᵀ X_c

One chunk of logits (`lm_head.CHUNK_BYTES`) is all that exists of size V beyond the gradients; dW and db accumulate in
fp32. FLOPs of `linear_grpo_loss` for n rows, forward and backward together, all spent in forward:

    6·n·H·V   rows whose coefficient is known when their chunk is: token-level losses, and sequence-level ones whose
              sequences fit a chunk, because chunk borders are put on sequence borders
    8·n·H·V   rows of longer sequences, and all rows under top_entropy_quantile < 1 if they need several chunks:
              statistics first, logits again afterwards
    2·n·H·V   rows that only have statistics to report: A = 0 with beta = 0 and no entropy bonus; 0 without metrics
    0         masked rows: dropped before the matmul, at the price of one host sync (none with `lengths`)

A frozen weight saves 2·n·H·V; on the CPU, so do rows whose coefficient turns out to be 0 (clipped), twice.
`linear_selective_log_softmax`: 2·n·H·V forward, 6·n·H·V backward (logits again), since its upstream gradients are
unknown in forward.
"""

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch, compute_dtype
from igrpo_kernels.lm_head import HeadPlan, LmHead
from igrpo_kernels.objective import coupling, objective_and_row_gradients
from igrpo_kernels.row_kernels import RowKernels
from igrpo_kernels.types import GRPOLossConfig, LogitTransform, RowStats
from igrpo_kernels.vocab_parallel import VocabShard

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def token_level_loss(
    kernels: RowKernels,
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    inputs: tuple[Tensor | None, ...],  # of `kernels.coefficient_inputs`
    contributes: Tensor | None,  # (n,) bool: rows that may have a gradient; None = all
    reported: Tensor | None,  # (n,) bool: rows of which only the statistics are wanted; None = none
    config: GRPOLossConfig,
    needs: list[bool],  # of hidden, weight, bias
    plan: HeadPlan,
) -> tuple[Tensor, Tensor, *Gradients]:
    """logps and entropy (n,), dX in hidden's dtype, dW and db as `LmHead.gradients` has them; None = not wanted.

    A chunk's logits become its dlogits in one launch.
    """
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head, index = LmHead(hidden.detach(), weight, bias, plan), inputs[0]
        head.expect(*needs)
        stats = RowStats.zeros(hidden.shape[0], head.dtype, hidden.device)
        for chunk in _split(_rows(hidden, reported), plan.chunk_rows) if reported is not None else []:
            stats.put(chunk, kernels.statistics(head.logits(chunk), index[chunk], None, config.logit_transform))
        for chunk in _split(_rows(hidden, contributes), plan.chunk_rows):
            logits = head.logits(chunk)
            some = [x if x is None or x.dim() == 0 else x[chunk] for x in inputs]
            logps, entropy, slope, grad = kernels.token_loss(logits, head.gradient_buffer(logits), some, config)
            stats.logps[chunk], stats.entropy[chunk] = logps, entropy
            if slope is not None and grad.device.type == "cpu" and not config.needs_entropy_gradient:
                active = (slope != 0).nonzero().squeeze(-1)  # NaN != 0: a poisoned row stays poisoned
                if active.numel() < chunk.numel():
                    chunk, grad = chunk[active], grad[active]
            head.accumulate(chunk, grad)
        return stats.logps, stats.entropy, *head.gradients()


def coupled_loss(
    kernels: RowKernels,
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    contributes: Tensor | None,  # (n,) bool, as in `token_level_loss`
    reported: Tensor | None,  # (n,) bool
    needs: list[bool],
    plan: HeadPlan,
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor, *Gradients]:
    """What `token_level_loss` returns, with coefficients from the objective once all rows they need are measured."""
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        head = LmHead(hidden.detach(), weight, bias, plan, shard is not None)
        head.expect(*needs)
        walk = _Walk(kernels, head, batch, config, num_items_in_batch)
        for chunk in _split(_rows(hidden, reported), plan.chunk_rows) if reported is not None else []:
            walk.measure(chunk)
        whole, split = walk.closed_chunks(contributes)
        for chunk in split:  # what cannot wait in the buffer until its coefficients are known
            walk.measure(chunk)
        for chunk in whole:
            walk.finish(chunk, walk.measure(chunk))
        for chunk in split:
            walk.finish(chunk, None)
        return walk.stats.logps, walk.stats.entropy, *_summed(head.gradients(), hidden, shard)


class _Walk:
    """Chunks of a batch, filling `stats` and the head's gradients."""

    def __init__(
        self,
        kernels: RowKernels,
        head: LmHead,
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items: Tensor | float | None,
    ):
        self.kernels, self.head, self.batch, self.config = kernels, head, batch, config
        self.num_items = num_items
        self.stats = RowStats.zeros(head.hidden.shape[0], head.dtype, head.hidden.device)

    def measure(self, chunk: Tensor) -> Tensor:
        """Fills `stats` for the chunk's rows; returns their logits (m, V), valid until the next chunk."""
        logits, index = self.head.logits(chunk), self.batch.index[chunk]
        self.stats.put(chunk, self.kernels.statistics(logits, index, None, self.config.logit_transform))
        return logits

    def finish(self, chunk: Tensor, logits: Tensor | None) -> None:
        """Turns the chunk's logits into dlogits and adds their share of every gradient."""
        stats, config = self.stats, self.config
        # Rows of other chunks may still hold 0; none of them enters this chunk's coefficients.
        _, _, slope, slope_entropy = objective_and_row_gradients(
            stats.logps, stats.entropy, self.batch, config, self.num_items
        )
        if slope.device.type == "cpu":  # elsewhere looking would cost a sync per chunk
            active = slope[chunk] != 0
            active = active if slope_entropy is None else active | (slope_entropy[chunk] != 0)
            kept = active.nonzero().squeeze(-1)
            if kept.numel() < chunk.numel():
                chunk, logits = chunk[kept], None if logits is None else logits[kept]
        if chunk.numel() == 0:
            return
        logits = self.head.logits(chunk) if logits is None else logits
        grad = self.kernels.gradient(
            logits,
            self.head.gradient_buffer(logits),
            self.batch.index[chunk],
            None,
            stats.at(chunk),
            slope[chunk],
            None if slope_entropy is None else slope_entropy[chunk],
            config.logit_transform,
        )
        self.head.accumulate(chunk, grad)

    def closed_chunks(self, contributes: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Row numbers in chunks that need no other chunk's statistics, and in chunks that do."""
        rows, size = _rows(self.head.hidden, contributes), self.head.plan.chunk_rows
        coupled = coupling(self.batch, self.config)
        if coupled == "token" or rows.numel() <= size:
            return _split(rows, size), []
        if coupled == "batch":
            return [], _split(rows, size)
        counts = self.batch.lengths_on_host
        if contributes is not None:
            counts = self.batch.segment_sum(contributes.to(self.batch.advantages.dtype)).long().tolist()
        whole, split, start, end = [], [], 0, 0
        for count in counts:
            if count > size or end - start + count > size:
                whole += [rows[start:end]] if end > start else []
                start = end
            end += count
            if count > size:
                split += _split(rows[start:end], size)
                start = end
        return whole + ([rows[start:end]] if end > start else []), split


def log_probs(
    kernels: RowKernels,
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    index: Tensor,  # (n,)
    row_mask: Tensor | None,  # (n,) bool
    transform: LogitTransform,
    with_entropy: bool,
    plan: HeadPlan,
) -> RowStats:
    """Statistics of every unmasked row; zeros elsewhere."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = LmHead(hidden.detach(), weight, bias, plan)
        stats = RowStats.zeros(hidden.shape[0], compute_dtype(hidden.dtype), hidden.device)
        for chunk in _split(_rows(hidden, row_mask), plan.chunk_rows):
            stats.put(chunk, kernels.statistics(head.logits(chunk), index[chunk], None, transform, with_entropy))
    return stats


def log_probs_backward(
    kernels: RowKernels,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    row_mask: Tensor | None,
    stats: RowStats,
    grad_logps: Tensor | None,  # (n,)
    grad_entropy: Tensor | None,  # (n,)
    transform: LogitTransform,
    needs: list[bool],
    plan: HeadPlan,
    shard: VocabShard | None,
) -> list[Tensor | None]:
    """dX in hidden's dtype, dW and db as `LmHead.gradients` has them; None = not wanted."""
    unneeded = torch.ones_like(index, dtype=torch.bool)  # rows whose gradient is exactly zero need no logits
    for grad in (grad_logps, grad_entropy):
        unneeded = unneeded if grad is None else unneeded & (grad == 0)
    active = ~unneeded if row_mask is None else row_mask & ~unneeded
    with torch.autocast(hidden.device.type, enabled=False):
        head = LmHead(hidden.detach(), weight, bias, plan, shard is not None)
        head.expect(*needs)
        for chunk in _split(_rows(hidden, active), plan.chunk_rows):
            logits = head.logits(chunk)
            grads = [None if g is None else g[chunk] for g in (grad_logps, grad_entropy)]
            arguments = (logits, head.gradient_buffer(logits), index[chunk], None, stats.at(chunk), *grads)
            head.accumulate(chunk, kernels.gradient(*arguments, transform))
        return _summed(head.gradients(), hidden, shard)


def _summed(gradients: list[Tensor | None], hidden: Tensor, shard: VocabShard | None) -> list[Tensor | None]:
    """dX is the sum of what each rank's columns say about it; dW and db are the columns' own."""
    if shard is not None and gradients[0] is not None:
        gradients[0] = shard.sum_(gradients[0]).to(hidden.dtype)
    return gradients


def _rows(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Numbers of the rows that count."""
    return torch.arange(hidden.shape[0], device=hidden.device) if mask is None else mask.nonzero().squeeze(-1)


def _split(rows: Tensor, size: int) -> list[Tensor]:
    return list(rows.split(size)) if rows.numel() else []
