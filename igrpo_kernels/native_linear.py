"""The fused linear operations on the compiled operators, for impl="cpu" and impl="cuda".

    chunk of rows:  logits = X·Wᵀ + b  ->  statistics  ->  row gradients  ->  dlogits in place  ->  dX, dW, db

With n rows that is 6·n·H·V FLOP, against 8 when backward computes the logits again: a chunk's dlogits replace its
logits at once, because everything its rows' gradients depend on has been measured by then. That holds for any chunk of
a token-level loss, for chunks of whole sequences where sequences couple their tokens, and for a single chunk always.
Where it does not hold, a second walk computes the logits again for the rows whose gradient is not zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igrpo_kernels import native_ops, reference
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.native_loss import LossRows, attach_gradients
from igrpo_kernels.native_ops import RowStats
from igrpo_kernels.objective import grpo_objective, objective_and_row_gradients
from igrpo_kernels.types import GRPOLossConfig, LogitTransform

# Logits per chunk: 2^25 = 128 MiB in fp32, 64 MiB in bf16, e.g. 682 tokens at V = 49k or 220 at V = 152k.
CHUNK_LOGITS = 2**25


def linear_grpo_loss(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    if hidden.dtype == torch.float64:  # the kernels compute in fp32; fp64 input asks for the reference's accuracy
        return reference.linear_grpo_loss(hidden, weight, bias, batch, config, num_items_in_batch)
    inputs = (hidden, weight, bias)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    transform = config.logit_transform
    with torch.no_grad():
        head = Head(hidden, weight, bias)
        stats = empty_stats(hidden)
        rows = batch.mask.nonzero().squeeze(-1)
        if not any(needs):
            measure(head, rows, batch.index, transform, stats)
            loss, metrics = grpo_objective(stats.logps, stats.entropy, batch, config, num_items_in_batch)
            return loss, stats.logps, stats.entropy, metrics

        grads = Gradients.empty(hidden, weight, bias, needs)
        chunks = closed_chunks(rows, batch, native_ops.locality(batch, config), rows_per_chunk(weight))
        if chunks is None:
            measure(head, rows, batch.index, transform, stats)
            chunks = ()
        for chunk in chunks:
            logits = measure_chunk(head, chunk, batch.index, transform, stats)
            # Rows of other chunks still hold 0; none of them enters this chunk's gradients.
            row_grads = objective_and_row_gradients(stats.logps, stats.entropy, batch, config, num_items_in_batch)[2:]
            add_chunk(grads, head, logits, chunk, batch.index, stats, row_grads, transform)
        loss, metrics, *row_grads = objective_and_row_gradients(
            stats.logps, stats.entropy, batch, config, num_items_in_batch
        )
        if not chunks:
            recompute(grads, head, rows, batch.index, stats, row_grads, transform)
    return attach_gradients(loss, grads.finished(weight, bias), inputs), stats.logps, stats.entropy, metrics


def linear_selective_log_softmax(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    index: Tensor,  # (n,)
    transform: LogitTransform,
    *,
    return_entropy: bool,
    row_mask: Tensor | None = None,  # (n,) bool; masked rows: no work, output 0, gradient exactly 0
) -> tuple[Tensor, Tensor | None]:
    """logps (n,) and entropy (n,) or None of `hidden @ weight.T + bias`, without those logits."""
    if hidden.dtype == torch.float64:
        return reference.linear_selective_log_softmax(
            hidden, weight, bias, index, transform, return_entropy=return_entropy, row_mask=row_mask
        )
    logps, entropy = LinearSelectiveLogSoftmax.apply(hidden, weight, bias, index.contiguous(), row_mask, transform)
    return logps, entropy if return_entropy else None


class LinearSelectiveLogSoftmax(torch.autograd.Function):
    """The row gradients come from outside, after forward has ended: backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, index, row_mask, transform):
        ctx.set_materialize_grads(False)  # an unused output must cost nothing in backward
        head, stats = Head(hidden, weight, bias), empty_stats(hidden)
        ctx.transform, ctx.matmul_dtype = transform, head.dtype
        if row_mask is None:
            rows = torch.arange(hidden.shape[0], device=hidden.device)
        else:
            rows = row_mask.nonzero().squeeze(-1)
        measure(head, rows, index, transform, stats)
        ctx.save_for_backward(hidden, weight, bias, index, rows, *stats)
        return stats.logps, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, bias, index, rows, *stats = ctx.saved_tensors
        stats = RowStats(*stats)
        head = Head(hidden, weight, bias, ctx.matmul_dtype)
        grads = Gradients.empty(hidden, weight, bias, ctx.needs_input_grad[:3])
        grad_logps = torch.zeros_like(stats.logps) if grad_logps is None else grad_logps
        recompute(grads, head, rows, index, stats, (grad_logps, grad_entropy), ctx.transform)
        return *grads.finished(weight, bias), None, None, None


class Head:
    """The projection with its dtype settled once, and one buffer for every chunk's logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None):
        self.hidden, self.dtype = hidden, dtype or reference._matmul_dtype(hidden)
        self.weight = weight.to(self.dtype)  # a copy only when the dtypes differ
        self.bias = None if bias is None else bias.to(self.dtype)
        self.buffer = hidden.new_empty(0, dtype=self.dtype)

    def inputs(self, chunk: Tensor) -> Tensor:
        """X (m, H) of the rows in `chunk` (m,), in the matmul dtype."""
        return self.hidden[chunk].to(self.dtype)

    def logits(self, chunk: Tensor) -> Tensor:
        """(m, V) in the matmul dtype, in the buffer: the next call overwrites them."""
        shape = (chunk.numel(), self.weight.shape[0])
        if self.buffer.shape[0] < shape[0]:
            self.buffer = self.hidden.new_empty(shape, dtype=self.dtype)
        out = self.buffer[: shape[0]]
        with torch.autocast(self.hidden.device.type, enabled=False):
            if self.bias is None:
                return torch.mm(self.inputs(chunk), self.weight.t(), out=out)
            return torch.addmm(self.bias, self.inputs(chunk), self.weight.t(), out=out)


@dataclass
class Gradients:
    """dX in hidden's dtype; dW and db accumulated in fp32. None = not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def empty(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> "Gradients":
        """Zeros for the inputs that need a gradient."""
        return cls(
            torch.zeros_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None,
            torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None,
        )

    def add(self, head: Head, grad_logits: Tensor, chunk: Tensor) -> None:
        """The chunk's share: dX rows = dlogits·W, dW += dlogitsᵀ·X, db += column sums."""
        with torch.autocast(head.hidden.device.type, enabled=False):
            if self.weight is not None and head.dtype == torch.float32:
                self.weight.addmm_(grad_logits.t(), head.inputs(chunk))
            elif self.weight is not None:  # one rounding per chunk, none between chunks
                self.weight += torch.mm(grad_logits.t(), head.inputs(chunk))
            if self.bias is not None:
                self.bias += grad_logits.sum(0, dtype=torch.float32)
            if self.hidden is not None:
                self.hidden[chunk] = torch.mm(grad_logits, head.weight).to(self.hidden.dtype)

    def finished(self, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
        """dX, dW, db in their parameters' dtypes."""
        grad_weight = None if self.weight is None else self.weight.to(weight.dtype)
        return [self.hidden, grad_weight, None if self.bias is None else self.bias.to(bias.dtype)]


def empty_stats(hidden: Tensor) -> RowStats:
    """Zeros for every row: what a row outside every chunk keeps."""
    n = hidden.shape[0]
    return RowStats(*(hidden.new_zeros(shape, dtype=torch.float32) for shape in ((n,), (n,), (2, n))))


def measure_chunk(head: Head, chunk: Tensor, index: Tensor, transform: LogitTransform, stats: RowStats) -> Tensor:
    """Fills `stats` for the chunk's rows; returns their logits (m, V), valid until the next chunk."""
    logits = head.logits(chunk)
    chunk_stats = native_ops.row_stats(logits[None], index[chunk], None, transform)
    stats.logps[chunk], stats.entropy[chunk], stats.norm[:, chunk] = chunk_stats
    return logits


def measure(head: Head, rows: Tensor, index: Tensor, transform: LogitTransform, stats: RowStats) -> None:
    """Fills `stats` for `rows`, chunk by chunk."""
    for chunk in split(rows, head.weight):
        measure_chunk(head, chunk, index, transform, stats)


def add_chunk(
    grads: Gradients,
    head: Head,
    logits: Tensor,  # (m, V), overwritten
    chunk: Tensor,  # (m,) row numbers
    index: Tensor,  # (n,), as the rest
    stats: RowStats,
    row_grads: tuple[Tensor, Tensor | None],
    transform: LogitTransform,
) -> None:
    """Turns the chunk's logits into dlogits and adds their share of every gradient. Rows of gradient 0 cost nothing."""
    active = active_rows(chunk, row_grads)
    if active.numel() < chunk.numel():
        chunk, logits = chunk[active], logits[active]
    if chunk.numel() == 0:
        return
    chunk_stats = RowStats(stats.logps[chunk], stats.entropy[chunk], stats.norm[:, chunk].contiguous())
    grad_logps, grad_entropy = (None if g is None else g[chunk] for g in row_grads)
    native_ops.row_grad(
        logits[None], index[chunk], None, chunk_stats, grad_logps, grad_entropy, transform, inplace=True
    )
    grads.add(head, logits, chunk)


def recompute(
    grads: Gradients,
    head: Head,
    rows: Tensor,
    index: Tensor,
    stats: RowStats,
    row_grads: tuple[Tensor, Tensor | None],
    transform: LogitTransform,
) -> None:
    """The second walk: logits again, for the rows whose gradient is not zero."""
    for chunk in split(rows[active_rows(rows, row_grads)], head.weight):
        add_chunk(grads, head, head.logits(chunk), chunk, index, stats, row_grads, transform)


def active_rows(chunk: Tensor, row_grads: tuple[Tensor, Tensor | None]) -> Tensor:
    """Positions in `chunk` whose rows have a gradient. NaN != 0: a poisoned row stays poisoned."""
    active = row_grads[0][chunk] != 0
    if row_grads[1] is not None:
        active = active | (row_grads[1][chunk] != 0)
    return active.nonzero().squeeze(-1)


def rows_per_chunk(weight: Tensor) -> int:
    return max(CHUNK_LOGITS // max(weight.shape[0], 1), 1)


def split(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return rows.split(rows_per_chunk(weight)) if rows.numel() else ()


def closed_chunks(rows: Tensor, batch: TokenBatch, locality: str, size: int) -> list[Tensor] | None:
    """Chunks of at most `size` rows none of which needs another chunk's statistics; None if there are no such."""
    if rows.numel() <= size:
        return [rows] if rows.numel() else []
    if locality == "token":
        return list(rows.split(size))
    if locality == "batch":
        return None
    # Rows are ordered by sequence, so whole sequences are runs; pack runs until the next would not fit.
    lengths = torch.unique_consecutive(batch.seq_id[rows], return_counts=True)[1].tolist()
    if max(lengths) > size:
        return None
    sizes = [0]
    for length in lengths:
        if sizes[-1] + length > size:
            sizes.append(0)
        sizes[-1] += length
    return list(rows.split(sizes))
