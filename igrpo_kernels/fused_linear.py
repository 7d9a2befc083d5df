"""`linear_grpo_loss` and `linear_selective_log_softmax` on an implementation's row kernels (`row_kernels.py`).

    logits chunk = X_c Wᵀ + b  ->  row kernels in place: dlogits  ->  dX_c = dlogits W,  dW += dlogitsᵀ X_c

One chunk of logits (`lm_head.CHUNK_BYTES`) is all that exists of size V beyond the gradients. dW of a single chunk is
one product in the weight's dtype; of several, the matmul adds it up in fp32, rounded once at the end. On CUDA a chunk
is worked on in halves, the row kernel on a second stream beside the next product:

    current stream   logits A    logits B    dX A    dX B    dW
    second stream                rows A      rows B

FLOPs of `linear_grpo_loss` for n rows, forward and backward together, all spent in forward:

    6·n·H·V   rows whose coefficient is known when their chunk is: token-level losses, and sequence-level ones whose
              sequences fit a chunk, because chunk borders are put on sequence borders
    8·n·H·V   rows of longer sequences, and all rows under top_entropy_quantile < 1 if they need several chunks:
              statistics first, logits again afterwards
    2·n·H·V   rows that only have statistics to report: A = 0 with beta = 0 and no entropy bonus; 0 without metrics
    0         masked rows: dropped before the matmul

Which rows those are is known on the device. On CUDA the host asks it once per call, and only where rows are to be
dropped: with a mask or without metrics (and once more for the sequences' borders, where several chunks of coupled rows
come without `lengths`). Otherwise, and while a CUDA graph is captured (not tried), every row gets the full work and the
host waits for nothing.

A frozen weight saves 2·n·H·V; on the CPU, so do rows whose coefficient turns out to be 0 (clipped), twice.
`linear_selective_log_softmax`: 2·n·H·V forward, 6·n·H·V backward (logits again), since its upstream gradients are
unknown in forward; 4·n·H·V backward on the CPU where all logits are 32 MiB at most, which then wait for it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.lm_head import KEPT_BYTES, Half, HeadPlan, LmHead, UsedRows
from igrpo_kernels.objective import coupling, objective_and_row_gradients
from igrpo_kernels.row_kernels import RowKernels
from igrpo_kernels.side_stream import SideStream, may_ask
from igrpo_kernels.types import GRPOLossConfig, LogitTransform, RowStats
from igrpo_kernels.vocab_parallel import VocabShard

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Objective = tuple[Tensor, dict[str, Tensor]]


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
    used = UsedRows.of(hidden.shape[0], contributes, reported, may_ask(hidden))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), SideStream(hidden.device) as side:
        head = LmHead(hidden.detach(), weight, bias, plan, used)
        head.expect(*needs)
        inputs, found = tuple(used.take(x) for x in inputs), []

        def turn(half: Half, logits: Tensor) -> Tensor | None:
            """Logits of a half into dlogits; on the CPU also which rows have any."""
            some = [x if x is None or x.dim() == 0 else x[half.rows] for x in inputs]
            *values, slope, grad = kernels.token_loss(logits, head.dlogits(half.place, logits), some, config)
            found.append(values)
            if slope is None or grad.device.type != "cpu" or config.needs_entropy_gradient:
                return None
            return slope != 0  # NaN != 0: a poisoned row stays poisoned

        for chunk in _chunks(0, used.with_gradient, plan.chunk_rows):
            _multiply(head, _beside(side, head.halves(chunk), head.logits, turn))
        transform = config.logit_transform._replace(temperatures=inputs[-1])
        measure = _statistics(kernels, inputs[0], None, transform)
        for chunk in _chunks(used.with_gradient, used.count, plan.chunk_rows):
            found += [job()[:2] for _, job in _beside(side, head.halves(chunk), head.logits, measure)]
        rows = _joined(found or [RowStats.zeros(0, head.dtype, head.device)[:2]], head)
        if used.masked is not None:
            rows = [x.masked_fill(used.masked, 0.0) for x in rows]
        return *rows, *head.gradients()


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
) -> tuple[Objective, Tensor, Tensor, *Gradients]:
    """The loss () and its metrics, then what `token_level_loss` returns, with coefficients from the objective once all
    rows they need are measured."""
    used = UsedRows.of(hidden.shape[0], contributes, reported, may_ask(hidden))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), SideStream(hidden.device) as side:
        head = LmHead(hidden.detach(), weight, bias, plan, used, shard is not None)
        head.expect(*needs)
        walk = _Walk(kernels, head, batch, config, num_items_in_batch, side)
        whole, split = walk.closed_chunks(contributes)
        # What only reports, and what cannot wait in the buffer until its coefficients are known.
        for chunk in [*_chunks(used.with_gradient, used.count, plan.chunk_rows), *split]:
            walk.measure(chunk)
        for chunk in whole:
            walk.measure(chunk)
            walk.finish(chunk, again=False)
        for chunk in split:
            walk.finish(chunk, again=True)
        logps, entropy = walk.stats.logps, walk.stats.entropy
        # The last chunk's objective was the first that saw every row.
        rest = walk.stats.of_teacher
        found = walk.objective or kernels.objective(logps, entropy, batch, config, num_items_in_batch, *rest)
        return found, logps, entropy, *_summed(head.gradients(), hidden, shard)


class _Walk:
    """Chunks of a batch, filling `stats` and the head's gradients."""

    def __init__(
        self,
        kernels: RowKernels,
        head: LmHead,
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items: Tensor | float | None,
        side: SideStream,
    ):
        self.kernels, self.head, self.batch, self.config = kernels, head, batch, config
        self.num_items, self.side = num_items, side
        self.objective: Objective | None = None
        self.index = head.used.take(batch.index)
        self.mask = None if head.used.masked is None else batch.mask
        self.transform = config.logit_transform._replace(temperatures=head.used.take(batch.temperatures))
        self.stats = _no_statistics(kernels, head, head.n)

    def measure(self, chunk: slice) -> None:
        """Fills `stats` for the chunk's rows and leaves their logits in the buffer."""
        statistics = _statistics(self.kernels, self.index, self.mask, self.transform)
        for half, job in _beside(self.side, self.head.halves(chunk), self.head.logits, statistics):
            self.stats.put(self.numbers(half.rows), job())

    def numbers(self, rows: slice | Tensor) -> slice | Tensor:
        """Where used rows are in the batch."""
        return rows if self.head.used.numbers is None else self.head.used.numbers[rows]

    def finish(self, chunk: slice, again: bool) -> None:
        """Turns the chunk's logits, computed once more if `again`, into dlogits; adds their share of every gradient."""
        stats, config, head = self.stats, self.config, self.head
        # Rows of other chunks may still hold 0; none of them enters this chunk's coefficients.
        loss, metrics, *slopes = objective_and_row_gradients(
            stats.logps, stats.entropy, self.batch, config, self.num_items, self.kernels.objective, *stats.of_teacher
        )
        self.objective = loss, metrics
        halves = head.halves(chunk)
        if head.device.type == "cpu":  # elsewhere looking would cost a sync per chunk
            at = self.numbers(chunk)
            active = torch.stack([slope[at] != 0 for slope in slopes if slope is not None]).any(0)
            rows = head.kept_rows(chunk, active, in_buffer=not again)
            if isinstance(rows, Tensor):
                halves = [Half(rows, slice(0, rows.numel()))]

        def turn(half: Half, logits: Tensor) -> None:
            at = self.numbers(half.rows)
            mask = None if self.mask is None else self.mask[half.rows]
            g, h, *rest = [None if slope is None else slope[at] for slope in slopes]
            arguments = (self.index[half.rows], mask, stats.at(at), g, h, self.transform.at(half.rows), *rest)
            self.kernels.gradient(logits, head.dlogits(half.place, logits), *arguments)

        _multiply(head, _beside(self.side, halves, head.logits if again else head.logits_there, turn))

    def closed_chunks(self, contributes: Tensor | None) -> tuple[list[slice], list[slice]]:
        """Used rows in chunks that need no other chunk's statistics, and in chunks that do."""
        used, size, batch = self.head.used, self.head.plan.chunk_rows, self.batch
        coupled = coupling(batch, self.config)
        if coupled == "token" or used.with_gradient <= size:
            return _chunks(0, used.with_gradient, size), []
        if coupled == "batch" or not may_ask(batch.index):
            return [], _chunks(0, used.with_gradient, size)
        counts = batch.lengths_on_host
        if contributes is not None:
            counts = batch.segment_sum(contributes.to(batch.advantages.dtype)).long().tolist()
        elif counts is None:
            counts = batch.cu_seqlens.diff().tolist() if len(batch.shape) == 1 else [batch.shape[1]] * batch.shape[0]
        whole, split, start, end = [], [], 0, 0
        for count in counts:
            if count > size or end - start + count > size:
                whole += [slice(start, end)] if end > start else []
                start = end
            end += count
            if count > size:
                split += _chunks(start, end, size)
                start = end
        return whole + ([slice(start, end)] if end > start else []), split


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
    shard: VocabShard | None = None,
    keep: bool = False,
) -> tuple[RowStats, Tensor | None]:
    """Statistics of every unmasked row, zeros elsewhere; with `keep` the logits (n, V) as well, if they are few."""
    used = UsedRows.of(hidden.shape[0], row_mask, None, may_ask(hidden))
    with torch.autocast(hidden.device.type, enabled=False), SideStream(hidden.device) as side:
        head = LmHead(hidden.detach(), weight, bias, plan, used, shard is not None)
        mask = None if used.masked is None else row_mask
        transform = transform._replace(temperatures=used.take(transform.temperatures))
        work, found = _statistics(kernels, used.take(index), mask, transform, with_entropy), []
        for chunk in _chunks(0, used.count, plan.chunk_rows):
            found += [job().known for _, job in _beside(side, head.halves(chunk), head.logits, work)]
        stats = RowStats(*_joined(found or [_no_statistics(kernels, head, 0).known], head))
        whole = keep and used.numbers is None and 0 < used.count <= plan.chunk_rows
        kept = head.buffer(plan.logits_dtype) if whole else None
        return stats, None if kept is None or kept.nbytes > KEPT_BYTES.get(kept.device.type, 0) else kept


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
    kept: Tensor | None = None,  # (n, V) logits of forward, overwritten
    *grad_divergence: Tensor | None,  # (n,), of `DistilledRows`
) -> list[Tensor | None]:
    """dX in hidden's dtype, dW and db as `LmHead.gradients` has them; None = not wanted."""
    active, grads = row_mask, [grad_logps, grad_entropy, *grad_divergence]
    if row_mask is not None or hidden.device.type == "cpu":  # rows whose gradient is exactly zero need no logits
        given = [grad != 0 for grad in grads if grad is not None]
        active = torch.stack(given).any(0) if given else torch.zeros_like(index, dtype=torch.bool)
        active = active if row_mask is None else active & row_mask
    used = UsedRows.of(hidden.shape[0], active, None, may_ask(hidden))
    with torch.autocast(hidden.device.type, enabled=False), SideStream(hidden.device) as side:
        head = LmHead(hidden.detach(), weight, bias, plan, used, shard is not None)
        head.expect(*needs)
        index, grads = used.take(index), [used.take(grad) for grad in grads]
        transform = transform._replace(temperatures=used.take(transform.temperatures))
        mask, stats = None if used.masked is None else active, RowStats(*map(used.take, stats.known))

        def turn(half: Half, logits: Tensor) -> None:
            some = [None if x is None else x[half.rows] for x in (index, mask)]
            g, h, *rest = [None if grad is None else grad[half.rows] for grad in grads]
            arguments = (*some, stats.at(half.rows), g, h, transform.at(half.rows), *rest)
            kernels.gradient(logits, head.dlogits(half.place, logits), *arguments)

        if kept is not None:
            head.buffers[plan.logits_dtype] = used.take(kept)
        logits = head.logits if kept is None else head.logits_there
        for chunk in _chunks(0, used.with_gradient, plan.chunk_rows):
            _multiply(head, _beside(side, head.halves(chunk), logits, turn))
        return _summed(head.gradients(), hidden, shard)


def _chunks(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def _beside(
    side: SideStream,
    halves: list[Half],
    logits: Callable[[slice | Tensor, slice], Tensor],
    work: Callable[[Half, Tensor], Any],
) -> list[tuple[Half, Callable[[], Any]]]:
    """Each half's logits, and `work` on them beside the products that follow."""
    return [(half, side.start(partial(work, half, logits(*half)))) for half in halves]


def _multiply(head: LmHead, jobs: list[tuple[Half, Callable[[], Tensor | None]]]) -> None:
    """What a chunk's dlogits mean for the head, as soon as the work on them is done."""
    active = []
    for half, job in jobs:
        active.append(job())
        if active[-1] is None:
            head.to_hidden(half.rows, head.dlogits(half.place))
    first, last = jobs[0][0], jobs[-1][0]
    rows, size = first.rows if first is last else slice(first.rows.start, last.rows.stop), last.place.stop
    if active[0] is not None:
        rows = head.kept_rows(rows, torch.cat(active), in_buffer=True)
        size = size if isinstance(rows, slice) else rows.numel()
        head.to_hidden(rows, head.dlogits(slice(0, size)))
    head.to_weight(rows, head.dlogits(slice(0, size)))


def _statistics(
    kernels: RowKernels, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
) -> Callable[[Half, Tensor], RowStats]:
    def measure(half: Half, logits: Tensor) -> RowStats:
        some = None if mask is None else mask[half.rows]
        return kernels.statistics(logits, index[half.rows], some, transform.at(half.rows), with_entropy)

    return measure


def _no_statistics(kernels: RowKernels, head: LmHead, n: int) -> RowStats:
    return RowStats.zeros(n, head.dtype, head.device, divergence=kernels.teaches)


def _joined(found: list[Sequence[Tensor]], head: LmHead) -> list[Tensor]:
    """What the halves found, (n,) each, in the batch's order; zeros for rows that were not used."""
    columns = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True)]
    return [head.used.give(x, head.n) if x.numel() else x.new_zeros(head.n) for x in columns]


def _summed(gradients: list[Tensor | None], hidden: Tensor, shard: VocabShard | None) -> list[Tensor | None]:
    """dX is the sum of what each rank's columns say about it; dW and db are the columns' own."""
    if shard is not None and gradients[0] is not None:
        gradients[0] = shard.sum_(gradients[0]).to(hidden.dtype)
    return gradients
