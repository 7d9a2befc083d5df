"""The lm_head over chunks of rows: logits of a chunk, and what a chunk's dlogits mean for X, W and b."""

from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.batch import compute_dtype
from igrpo_kernels.compiled_rows import new_tensor

# Of logits at a time. CUDA: 2.5 GiB in two halves, e.g. 2 x 4,352 rows of bf16 at V = 152k, meant to keep the matmuls
# at full speed while the row kernel works on the other half (not measured). CPU: 128 MiB, e.g. 512 rows of fp32 at
# V = 49k.
CHUNK_BYTES = {"cuda": 5 * 2**29, "cpu": 2**27}
KEPT_BYTES = {"cpu": 2**25}
"""Of log-probs' logits at most that wait for backward in place of being computed again. On a GPU memory is dearer."""
HALF_ROWS = {"cuda": 1024}
"""A chunk of at least twice as many rows is worked on in halves. Where there is no second stream nothing is gained."""
_COLUMNS_AT_ONCE = 8192  # of dW, where a device multiplies into fp32 only what is fp32


class Half(NamedTuple):
    """Rows that share a matmul and a launch."""

    rows: slice | Tensor
    """Of the rows that are used: which, in their order in the buffer."""

    place: slice
    """Where their logits lie in the buffer."""


class UsedRows(NamedTuple):
    """Which of n rows meet a matmul, those with a gradient first."""

    numbers: Tensor | None
    """(count,) int64; None = all n, in their order."""

    with_gradient: int
    count: int

    masked: Tensor | None = None
    """(n,) bool: rows among all n that may hold anything and must come out as 0."""

    @classmethod
    def of(cls, n: int, contributes: Tensor | None, reported: Tensor | None, ask: bool = True) -> "UsedRows":
        """Rows (n,) bool with a gradient (None = all), and others that have only statistics (None = none).

        Their number is on the device: the host waits for it once. Without `ask` it does not, and all rows are used.
        """
        if contributes is None:
            return cls(None, n, n)
        if not ask:
            return cls(None, n, n, ~(contributes if reported is None else contributes | reported))
        kind = torch.where(contributes, 0, 2) if reported is None else torch.where(contributes, 0, 2 - reported.long())
        first, second = torch.stack([(kind == 0).sum(), (kind < 2).sum()]).tolist()
        if first == n:
            return cls(None, n, n)
        return cls(kind.sort(stable=True).indices[:second], first, second)

    def take(self, x: Tensor | None) -> Tensor | None:
        """The rows' part of a tensor (n, ...); numbers () and None are everybody's."""
        return x if x is None or x.dim() == 0 or self.numbers is None else x[self.numbers]

    def give(self, x: Tensor, n: int) -> Tensor:
        """(n, ...) with the rows of x, which begin with the first used one, in their places and zeros elsewhere."""
        if self.numbers is None:
            return x
        return x.new_zeros(n, *x.shape[1:]).index_copy_(0, self.numbers[: x.shape[0]], x)


class HeadPlan(NamedTuple):
    """How a call runs its matmuls."""

    matmul_dtype: torch.dtype
    """Of the operands: autocast's when it is on (it leaves fp64 alone), else the hidden states'."""

    logits_dtype: torch.dtype
    """Of the chunk's logits."""

    chunk_rows: int
    """Rows whose logits exist at a time."""

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, columns: int, fp32_logits: bool, trained: bool) -> "HeadPlan":
        """`columns` = V, or the most columns any rank has: all ranks must cut the same chunks.

        One chunk's dW is one product, rounded by the matmul itself; several chunks need a sum of twice the size in
        fp32. So on CUDA all rows are one chunk if the logits beyond CHUNK_BYTES take no more memory than that saves.
        """
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        logits_dtype = dtype
        if fp32_logits and dtype.itemsize < 4:
            logits_dtype = torch.float32
            dtype = dtype if device == "cuda" else torch.float32  # only CUDA multiplies 16 bits into 32
        width = logits_dtype.itemsize + (dtype.itemsize if dtype != logits_dtype else 0)
        size, row = CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]), columns * width
        saved = 2 * columns * weight.shape[1] if device == "cuda" and trained and _rounds_once(weight, dtype) else 0
        rows = max(size // row, 1)
        # A graph must not depend on the number of rows.
        if not torch.compiler.is_compiling() and rows < hidden.shape[0] <= (size + saved) // row:
            return cls(dtype, logits_dtype, hidden.shape[0])
        return cls(dtype, logits_dtype, rows // 256 * 256 if rows > 256 else rows)


class LmHead:
    """The projection with its dtypes settled once, its buffers, and the gradients it has been given so far."""

    def __init__(
        self,
        hidden: Tensor,  # (n, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        plan: HeadPlan,
        used: UsedRows,
        sharded: bool = False,
    ):
        self.plan, self.used, self.sharded = plan, used, sharded
        self.n, self.hidden_dtype, self.device = hidden.shape[0], hidden.dtype, hidden.device
        if used.masked is not None:
            hidden = hidden.masked_fill(used.masked[:, None], 0.0)  # 0·NaN would reach every row of dW
        self.x = used.take(hidden).to(plan.matmul_dtype)
        self.weight = weight.detach().to(plan.matmul_dtype)  # a copy only when the dtypes differ
        self.bias = None if bias is None else bias.detach().to(plan.logits_dtype)
        self.dtype = compute_dtype(hidden.dtype)
        # dW from a single chunk is one product, which the bf16 matmul sums in fp32 and rounds once by itself.
        rounded = used.with_gradient <= plan.chunk_rows and _rounds_once(weight, plan.matmul_dtype)
        self.weight_gradient_dtype = torch.bfloat16 if rounded else self.dtype
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def expect(self, needs_hidden: bool, needs_weight: bool, needs_bias: bool) -> None:
        """Which gradients `to_hidden` and `to_weight` shall compute; the others cost nothing."""
        # Shards of dX are summed over the ranks before they are rounded.
        dtype = self.dtype if self.sharded else self.hidden_dtype
        shape = (self.used.with_gradient, self.x.shape[1])
        self.grad_hidden = torch.empty(shape, dtype=dtype, device=self.device) if needs_hidden else None
        self.grad_bias = torch.zeros_like(self.bias, dtype=self.dtype) if needs_bias else None
        self.needs_weight = needs_weight  # the first chunk writes dW instead of adding to zeros

    def halves(self, chunk: slice) -> list[Half]:
        """The chunk's rows in two parts, or one where there is no second stream or too little to do."""
        start, size = chunk.start, chunk.stop - chunk.start
        least = HALF_ROWS.get(self.device.type)
        if self.sharded or least is None or size < 2 * least:
            return [Half(chunk, slice(0, size))]
        step = min(256, least)  # whole tiles of the matmul
        middle = -(-size // (2 * step)) * step
        first, second = slice(0, middle), slice(middle, size)
        return [Half(slice(start + place.start, start + place.stop), place) for place in (first, second)]

    def logits(self, rows: slice | Tensor, place: slice) -> Tensor:
        """Raw logits (m, V) of used rows, at a place of the buffer."""
        x, out = self.x[rows], self.buffer(self.plan.logits_dtype)[place]
        wide = {} if x.dtype == out.dtype else {"out_dtype": out.dtype}
        if self.bias is None:
            return torch.mm(x, self.weight.t(), **wide, out=out)
        return torch.addmm(self.bias, x, self.weight.t(), **wide, out=out)

    def logits_there(self, rows: slice | Tensor, place: slice) -> Tensor:
        """What `logits` left at a place."""
        return self.buffer(self.plan.logits_dtype)[place]

    def dlogits(self, place: slice, logits: Tensor | None = None) -> Tensor:
        """Where the gradients of logits go, in the matmul dtype: over the logits, unless those are wider."""
        if logits is not None and logits.dtype == self.plan.matmul_dtype:
            return logits  # itself, which row kernels know as "in place"
        return self.buffer(self.plan.matmul_dtype)[place]

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """(rows, V) uninitialised, for as many rows as a chunk has."""
        if dtype not in self.buffers:
            shape = (min(self.plan.chunk_rows, self.used.count), self.weight.shape[0])
            self.buffers[dtype] = new_tensor(self.x, shape, dtype)
        return self.buffers[dtype]

    def kept_rows(self, chunk: slice, active: Tensor, in_buffer: bool) -> slice | Tensor:
        """The rows of a chunk that are active (m,) bool, or the chunk if all are; the others get a gradient of 0.

        `in_buffer`: what the buffer holds of them shall be side by side, so rows from its end fill the gaps.
        """
        count = int(active.sum())
        if count == active.numel():
            return chunk
        rows = torch.arange(chunk.start, chunk.stop)
        if self.grad_hidden is not None:
            self.grad_hidden[rows[~active]] = 0.0
        if not in_buffer:
            return rows[active]
        gaps, late = (~active[:count]).nonzero().squeeze(-1), active[count:].nonzero().squeeze(-1) + count
        buffer = self.buffer(self.plan.matmul_dtype)
        buffer[gaps], rows[gaps] = buffer[late], rows[late]
        return rows[:count]

    def to_hidden(self, rows: slice | Tensor, grad_logits: Tensor) -> None:
        """Store what dlogits (m, V) mean for the hidden states of used rows."""
        if self.grad_hidden is None:
            return
        dtype, kept = self.grad_hidden.dtype, isinstance(rows, slice)
        if kept and dtype == grad_logits.dtype:
            torch.mm(grad_logits, self.weight, out=self.grad_hidden[rows])
        elif kept and grad_logits.is_cuda and dtype == torch.float32:
            torch.mm(grad_logits, self.weight, out_dtype=dtype, out=self.grad_hidden[rows])
        else:
            self.grad_hidden[rows] = torch.mm(grad_logits, self.weight).to(dtype)

    def to_weight(self, rows: slice | Tensor, grad_logits: Tensor) -> None:
        """Add what dlogits (m, V) mean for weight and bias."""
        if self.needs_weight:
            self.grad_weight = _add_product(self.grad_weight, grad_logits.t(), self.x[rows], self.weight_gradient_dtype)
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=self.dtype)

    def gradients(self) -> list[Tensor | None]:
        """dX (n, H), dW, db, zeros if no row contributed; db in the compute dtype, dW too unless rounded already."""
        if self.needs_weight and self.grad_weight is None:
            self.grad_weight = torch.zeros_like(self.weight, dtype=self.weight_gradient_dtype)
        if self.grad_hidden is not None:
            self.grad_hidden = self.used.give(self.grad_hidden, self.n)
        return [self.grad_hidden, self.grad_weight, self.grad_bias]


def _rounds_once(weight: Tensor, matmul_dtype: torch.dtype) -> bool:
    return weight.dtype == matmul_dtype == torch.bfloat16


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b accumulated in `dtype`; `total` is overwritten. Only CUDA multiplies bf16 into fp32 directly."""
    first = total is None
    total = new_tensor(a, (a.shape[0], b.shape[1]), dtype) if total is None else total
    if a.dtype == dtype:
        return torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype, out=total) if first else (
            torch.addmm(total, a, b, out_dtype=dtype, out=total)
        )  # fmt: skip
    b = b.to(dtype)
    for part, some in zip(total.split(_COLUMNS_AT_ONCE), a.split(_COLUMNS_AT_ONCE), strict=True):
        torch.addmm(part, some.to(dtype), b, beta=0 if first else 1, out=part)
    return total
