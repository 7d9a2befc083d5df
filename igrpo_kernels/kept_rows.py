"""Row kernels over a sampler's kept sets (`sampling_mask.py`), for every implementation.

A kept set is small against the vocabulary, so the kept logits are gathered into one packed array, everything is
computed there, and the gradient is zeros with those entries scattered into it: per bf16 logit 2 B written, whatever the
loss. Sums run in fp64 in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.distillation import Teacher
from igrpo_kernels.distilled_rows import DistilledRows
from igrpo_kernels.row_kernels import AroundRows, RowKernels
from igrpo_kernels.sampling_mask import KeptSets
from igrpo_kernels.types import LOG_P_FLOOR, GRPOLossConfig, LogitTransform, RowStats
from igrpo_kernels.vocab_parallel import ShardedRows, VocabShard, columns_at, gather_logits


@dataclass(frozen=True)
class KeptRows(AroundRows):
    """`RowKernels` whose `index` holds row numbers of the mask: a chunk of rows then says which sets are its own.

    With a shard each rank gathers the kept logits that it has, and one sum gives all of them to every rank.
    """

    kept: KeptSets
    shard: VocabShard | None

    def statistics(
        self, logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
    ) -> RowStats:
        """Of the kept columns."""
        at, entry, counts = self.kept.mask.entries(index, mask)
        z, _ = transform.at(at).with_slope(self._gather(logits, at, entry))
        row_max = torch.segment_reduce(z, "max", lengths=counts, unsafe=True)
        shifted = z - row_max[at]
        weight = shifted.exp()
        total = _sums(weight, counts)
        log_sum = total.log()
        mean = _sums(weight * shifted.clamp(min=LOG_P_FLOOR), counts) / total
        place = self.kept.places[index]
        first = counts.cumsum(0) - counts - self.kept.mask.offsets[index]
        chosen = (place + first).clamp(0, max(len(z) - 1, 0))
        logps = shifted[chosen] - log_sum if len(z) else torch.zeros_like(row_max)
        return RowStats(torch.where(place < 0, torch.nan, logps), log_sum - mean, row_max, log_sum).masked(mask)

    def gradient(
        self,
        logits: Tensor,
        out: Tensor | None,
        index: Tensor,
        mask: Tensor | None,
        stats: RowStats,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        """Exactly 0 outside of the kept columns."""
        at, entry, _ = self.kept.mask.entries(index, mask)
        z, slope = transform.at(at).with_slope(self._gather(logits, at, entry))
        log_p = z - stats.row_max[at] - stats.log_sum[at]
        p, grad = log_p.exp(), torch.zeros_like(z)
        if grad_logps is not None:
            place = self.kept.places[index]
            g = torch.where(place < 0, torch.nan, grad_logps)[at]
            grad = torch.where(entry == place[at], g, 0.0) - p * g
        if grad_entropy is not None:
            grad = grad - grad_entropy[at] * p * (log_p.clamp(min=LOG_P_FLOOR) + stats.entropy[at])
        grad, ids = grad * slope, self.kept.mask.ids[entry]
        if self.shard is not None:
            mine, local = self.shard.owned(ids)
            at, ids, grad = at[mine], local[mine], grad[mine]
        out = self._zeros(logits, out, stats)
        out.index_put_(columns_at(out, at, ids), grad.to(out.dtype))
        return out

    def objective(
        self,
        logps: Tensor,
        entropy: Tensor | None,
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items_in_batch: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of rows it is the same; `clip_cov` draws by token ids, not by row numbers."""
        batch = replace(batch, index=self.kept.index)
        return self.kernels.objective(logps, entropy, batch, config, num_items_in_batch)

    def _zeros(self, logits: Tensor, out: Tensor | None, stats: RowStats) -> Tensor:
        """By the implementation's own kernel, to which all rows are masked: its memory, its way of writing."""
        if out is not None and out is not logits:
            return out.zero_()
        n, device = len(stats.logps), logits.device
        none, zeros = torch.zeros(n, dtype=torch.bool, device=device), torch.zeros_like(stats.logps)
        return self.kernels.gradient(
            logits, out, none.long(), none, RowStats(*[zeros] * 4), zeros, None, LogitTransform()
        )

    def _gather(self, logits: Tensor, at: Tensor, entry: Tensor) -> Tensor:
        """Kept logits in the compute dtype."""
        return gather_logits(logits, at, self.kept.mask.ids[entry], self.shard)


def kernels_for(
    kernels: RowKernels,
    index: Tensor,
    shard: VocabShard | None,
    kept: KeptSets | None,
    teacher: Teacher | None = None,
) -> tuple[RowKernels, Tensor]:
    """What serves a call on this rank's columns, over these sets and beside this teacher, and the (n,) `index` that it
    takes."""
    if kept is None:
        kernels = kernels if shard is None else ShardedRows(kernels, shard)
    if kept is None and teacher is None:
        return kernels, index
    numbers = torch.arange(len(index), device=index.device)
    served = DistilledRows(kernels, teacher, index, shard) if kept is None else KeptRows(kernels, kept, shard)
    return served, numbers


def _sums(x: Tensor, counts: Tensor) -> Tensor:
    return torch.segment_reduce(x.double(), "sum", lengths=counts, initial=0, unsafe=True).to(x.dtype)
