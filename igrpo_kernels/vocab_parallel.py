"""Logits whose columns are spread over a process group: each rank holds a contiguous shard of the vocabulary.

A rank reduces its own columns to four numbers per row, all ranks gather them, and every rank combines them in rank
order, so that log-probabilities, entropies, losses and metrics are the same bits on every rank:

    M = max_k M_k,   S = sum_k S_k·exp(M_k - M),   log p_t = (z_t - M_owner) + (M_owner - M) - log S
    H = log S - sum_k (S_k·exp(M_k - M) / S)·(mean_k (z - M_k) + M_k - M)

with M_k, S_k the maximum and sum of exp(z - M_k) over rank k's columns, and mean_k the mean under its own softmax. The
gradient kernel then needs nothing from other ranks. Every rank must be given the same rows and upstream gradient.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from igrpo_kernels.batch import check_index, compute_dtype
from igrpo_kernels.row_kernels import AroundRows
from igrpo_kernels.types import LOG_P_FLOOR, LogitTransform, RowStats


@dataclass(frozen=True)
class VocabShard:
    """Where this rank's columns lie in the whole vocabulary."""

    group: dist.ProcessGroup
    sizes: tuple[int, ...]
    """Columns of each rank, in rank order."""

    @classmethod
    def of(cls, group: dist.ProcessGroup, columns: int, device: torch.device) -> "VocabShard":
        """One small gather, and a host sync."""
        if torch.compiler.is_compiling():
            raise NotImplementedError("process_group does not work inside torch.compile; call the loss outside of it")
        mine = torch.tensor([columns], device=device)
        sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, mine, group=group)
        return cls(group, tuple(torch.cat(sizes).tolist()))

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return dist.get_rank(self.group)

    @property
    def first(self) -> int:
        """The token id of this rank's first column."""
        return sum(self.sizes[: self.rank])

    @property
    def vocab_size(self) -> int:
        """Columns of all ranks."""
        return sum(self.sizes)

    def owned(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each token id is a column of this rank, and which (0 where it is not)."""
        local = index - self.first
        mine = (local >= 0) & (local < self.sizes[self.rank])
        return mine, torch.where(mine, local, 0)

    def owners(self, index: Tensor) -> Tensor:
        """The rank that has each token id; ids outside the vocabulary get any rank."""
        ends = torch.tensor(self.sizes, device=index.device).cumsum(0)
        return torch.bucketize(index, ends, right=True).clamp(max=len(self.sizes) - 1)

    def gather_columns(self, x: Tensor, dim: int) -> Tensor:
        """The shards of every rank, side by side along `dim`; shards may be of different sizes."""
        widest = x.new_zeros([*x.shape[:dim], max(self.sizes), *x.shape[dim:][1:]])
        widest.narrow(dim, 0, x.shape[dim]).copy_(x)
        return torch.cat([y.narrow(dim, 0, size) for y, size in zip(self.gather(widest), self.sizes, strict=True)], dim)

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank, stacked in rank order."""
        parts = [torch.empty_like(x) for _ in self.sizes]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def sum_(self, x: Tensor) -> Tensor:
        """x summed over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x


def vocabulary(
    group: dist.ProcessGroup | None,
    columns: int,
    device: torch.device,
    index: Tensor,  # (n,)
) -> tuple[VocabShard | None, int]:
    """Where this rank's columns lie, and the number of all, which holds every token id."""
    shard = None if group is None else VocabShard.of(group, columns, device)
    vocab_size = columns if shard is None else shard.vocab_size
    check_index(index, device, vocab_size)
    return shard, vocab_size


def columns_at(logits: Tensor, at: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """Indices of rows and columns in (n, V) or (B, T, V), whose strides may not allow a view as (n, V)."""
    if logits.dim() == 2:
        return at, ids
    return at // logits.shape[1], at % logits.shape[1], ids


def gather_logits(logits: Tensor, at: Tensor, ids: Tensor, shard: VocabShard | None) -> Tensor:
    """Those of some rows and token ids, in the compute dtype, of any rank's columns; some other for an id that is none.

    One sum over the group.
    """
    dtype = compute_dtype(logits.dtype)
    if shard is None:
        return logits[columns_at(logits, at, ids.clamp(0, logits.shape[-1] - 1))].to(dtype)
    mine, local = shard.owned(ids)
    return shard.sum_(torch.where(mine, logits[columns_at(logits, at, local)].to(dtype), 0.0))


def whole_vocabulary(x: Tensor, dim: int, shard: VocabShard | None) -> Tensor:
    """The tensor without sharding, differentiable: what the reference computes with. The gradient is local."""
    return x if shard is None else _Whole.apply(x, dim % x.dim(), shard)


class _Whole(torch.autograd.Function):
    """Every rank computes the same from the whole tensor, so the gradient of its shard is a slice, not a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, shard: VocabShard) -> Tensor:
        ctx.dim, ctx.shard = dim, shard
        return shard.gather_columns(x, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.narrow(ctx.dim, ctx.shard.first, ctx.shard.sizes[ctx.shard.rank]).contiguous(), None, None


@dataclass(frozen=True)
class ShardedRows(AroundRows):
    """`RowKernels` that work on this rank's columns and answer for the whole rows."""

    shard: VocabShard

    def statistics(
        self, logits: Tensor, index: Tensor, mask: Tensor | None, transform: LogitTransform, with_entropy: bool = True
    ) -> RowStats:
        """Of the whole rows; index (n,) holds ids in the whole vocabulary."""
        shard = self.shard
        _, local = shard.owned(index)
        part = self.kernels.statistics(logits, local, mask, transform)
        row_max, log_sum, entropy, target = shard.gather(
            torch.stack([part.row_max, part.log_sum, part.entropy, part.logps + part.log_sum])
        ).unbind(1)
        # A shard of -inf columns has no statistics of its own: its maximum is -inf, or its sum is 0.
        top, empty = row_max.amax(0), (row_max == -torch.inf) | (log_sum == -torch.inf)
        log_sum, target = log_sum.masked_fill(empty, -torch.inf), target.masked_fill(empty, -torch.inf)
        shift = row_max - top
        weight = torch.softmax(log_sum + shift, 0)  # each shard's share of the row's probability
        log_total = torch.logsumexp(log_sum + shift, 0)
        mean = torch.where(weight > 0, weight * (log_sum - entropy + shift), 0.0).sum(0)
        logps = (target + shift).gather(0, shard.owners(index)[None]).squeeze(0) - log_total
        logps = torch.where((index >= 0) & (index < shard.vocab_size), logps, torch.nan)
        return RowStats(logps, log_total - mean, top, log_total).masked(mask)

    def gradient(
        self,
        logits: Tensor,
        out: Tensor | None,
        index: Tensor,
        mask: Tensor | None,
        stats: RowStats,  # of the whole rows
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        """Of this rank's columns.

        A kernel always adds dloss/dlogp at one column. Where the target lies elsewhere that is column 0, which is then
        computed again without it.
        """
        mine, local = self.shard.owned(index)
        if grad_logps is not None:  # an id outside the whole vocabulary poisons its row on every rank
            grad_logps = torch.where((index >= 0) & (index < self.shard.vocab_size), grad_logps, torch.nan)
        arguments = (stats, grad_logps, grad_entropy, transform)
        first = _first_column(logits, *arguments)
        out = self.kernels.gradient(logits, out, local, mask, *arguments)
        keep = mine if mask is None else mine | ~mask
        column = out[..., 0]
        column.copy_(torch.where(keep.view(column.shape), column, first.view(column.shape).to(out.dtype)))
        return out


def _first_column(
    logits: Tensor,
    stats: RowStats,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    transform: LogitTransform,
) -> Tensor:
    """-p·(g_l + g_H·(log p + H))·dz/dx of column 0 (n,)."""
    z, slope = transform.with_slope(logits[..., 0].reshape(-1).to(stats.logps.dtype))
    log_p = (z - stats.row_max - stats.log_sum).clamp(min=LOG_P_FLOOR)
    weight = 0.0 if grad_logps is None else grad_logps
    if grad_entropy is not None:
        weight = weight + grad_entropy * (log_p + stats.entropy)
    return -log_p.exp() * weight * slope
