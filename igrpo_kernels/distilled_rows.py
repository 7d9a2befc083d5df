"""Row kernels beside a teacher (`distillation.py`), for every implementation.

D of a row follows from its log-normaliser and k of its logits, so the kernels stay as they are. With c_j = dD/dl_j and
C = sum c_j,

    dD/dz_v = sum_j c_j·[v = id_j] - C·p_v

the kernel is told dloss/dl + C in place of dloss/dl, which is right in every column but the k of the teacher and the
token's own. Those are read before and written after it, rounded once: per row k + 1 values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.distillation import Teacher
from igrpo_kernels.row_kernels import AroundRows
from igrpo_kernels.types import LOG_P_FLOOR, GRPOLossConfig, LogitTransform, RowStats
from igrpo_kernels.vocab_parallel import VocabShard, columns_at, gather_logits


@dataclass(frozen=True)
class DistilledRows(AroundRows):
    """`RowKernels` whose `index` holds row numbers, so that a chunk of rows says which of the teacher's are its own.

    With a shard, `kernels` are its `ShardedRows`; one sum more tells every rank the logits at the teacher's ids.
    """

    teacher: Teacher
    index: Tensor
    """(n,) token ids."""
    shard: VocabShard | None
    teaches = True

    def statistics(
        self, logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
    ) -> RowStats:
        """With the divergence."""
        stats = self.kernels.statistics(logits, self.index[index], mask, transform, with_entropy)
        log_p, _ = self._log_probs(logits, self.teacher.ids[index], stats, transform)
        found = self.teacher.divergence(log_p, index)
        return RowStats(*stats.known, found.to(stats.logps.dtype)).masked(mask)

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
        grad_divergence: Tensor | None = None,
    ) -> Tensor:
        """As the kernels make it, and the columns that a teacher touches once more."""
        token, teacher = self.index[index], self.teacher.logps[index]
        if grad_divergence is None:
            return self.kernels.gradient(logits, out, token, mask, stats, grad_logps, grad_entropy, transform)
        own = token[:, None]
        # Where there is no entry, the token's own column is written twice, with the same number.
        ids = torch.cat([torch.where(teacher == -torch.inf, own, self.teacher.ids[index]), own], -1)
        log_p, slope = self._log_probs(logits, ids, stats, transform)
        c = self._slopes(log_p[:, :-1], index, grad_divergence)
        g = torch.zeros_like(stats.logps) if grad_logps is None else grad_logps
        g, total, at_own = g.double(), c.sum(-1), ids == own
        chosen = g + (c * at_own[:, :-1]).sum(-1)
        added = torch.where(at_own, chosen[:, None], torch.nn.functional.pad(c, (0, 1)))
        p = log_p.exp()
        value = added - p * (g + total)[:, None]
        if grad_entropy is not None:
            level = log_p.clamp(min=LOG_P_FLOOR) + stats.entropy[:, None]
            value = value - grad_entropy[:, None] * p * level
        value = value * slope if mask is None else torch.where(mask[:, None], value * slope, 0.0)
        of_all = (g + total).to(stats.logps.dtype)
        out = self.kernels.gradient(logits, out, token, mask, stats, of_all, grad_entropy, transform)
        self._put(out, ids, value)
        return out

    def objective(
        self,
        logps: Tensor,
        entropy: Tensor | None,
        batch: TokenBatch,
        config: GRPOLossConfig,
        num_items_in_batch: Tensor | float | None,
        divergence: Tensor,  # (n,)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The kernels' own, and the teacher's part."""
        batch = replace(batch, index=self.index)
        found = self.kernels.objective(logps, entropy, batch, config, num_items_in_batch)
        return self.teacher.add(found, divergence, batch, config, num_items_in_batch)

    def _log_probs(
        self, logits: Tensor, ids: Tensor, stats: RowStats, transform: LogitTransform
    ) -> tuple[Tensor, Tensor | float]:
        """fp64 (m, j) at some ids (m, j), and dz/dx there."""
        at = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
        z, slope = transform.with_slope(gather_logits(logits, at, ids, self.shard))
        return z.double() - stats.row_max.double()[:, None] - stats.log_sum.double()[:, None], slope

    def _slopes(self, log_p: Tensor, rows: Tensor, grad_divergence: Tensor) -> Tensor:
        """dloss/dl (m, k) fp64 by way of the divergence."""
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            found = self.teacher.divergence(leaf, rows)
        return torch.autograd.grad(found, leaf, grad_divergence.double())[0]

    def _put(self, out: Tensor, ids: Tensor, value: Tensor) -> None:
        at = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
        if self.shard is not None:
            mine, local = self.shard.owned(ids)
            at, ids, value = at[mine], local[mine], value[mine]
        else:  # what lies outside of the vocabulary has made its row NaN
            inside = (ids >= 0) & (ids < out.shape[-1])
            value, ids = value.masked_fill(~inside.all(-1, keepdim=True), torch.nan), torch.where(inside, ids, 0)
        out.index_put_(columns_at(out, at, ids), value.to(out.dtype))
