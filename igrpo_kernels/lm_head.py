"""The lm_head over chunks of rows: logits of a chunk, and what a chunk's dlogits mean for X, W and b."""

from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.batch import compute_dtype

# Of logits at a time. CUDA: 1.25 GiB, e.g. 4,352 rows of bf16 at V = 152k, enough for the matmuls to run at full speed.
# CPU: 128 MiB, e.g. 682 rows of fp32 at V = 49k.
CHUNK_BYTES = {"cuda": 5 * 2**28, "cpu": 2**27}
_COLUMNS_AT_ONCE = 8192  # of dW, where a device multiplies into fp32 only what is fp32


class HeadPlan(NamedTuple):
    """How a call runs its matmuls."""

    matmul_dtype: torch.dtype
    """Of the operands: autocast's when it is on (it leaves fp64 alone), else the hidden states'."""

    logits_dtype: torch.dtype
    """Of the chunk's logits."""

    chunk_rows: int
    """Rows whose logits exist at a time."""

    @classmethod
    def of(cls, hidden: Tensor, columns: int, fp32_logits: bool) -> "HeadPlan":
        """`columns` = V, or the most columns any rank has: all ranks must cut the same chunks."""
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        logits_dtype = dtype
        if fp32_logits and dtype.itemsize < 4:
            logits_dtype = torch.float32
            dtype = dtype if device == "cuda" else torch.float32  # only CUDA multiplies 16 bits into 32
        width = logits_dtype.itemsize + (dtype.itemsize if dtype != logits_dtype else 0)
        rows = max(CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (columns * width), 1)
        return cls(dtype, logits_dtype, rows // 256 * 256 if rows > 256 else rows)


class LmHead:
    """The projection with its dtypes settled once, its buffers, and the gradients it has been given so far."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: HeadPlan, sharded: bool = False):
        self.hidden, self.plan, self.sharded = hidden, plan, sharded
        self.weight = weight.detach().to(plan.matmul_dtype)  # a copy only when the dtypes differ
        self.bias = None if bias is None else bias.detach().to(plan.logits_dtype)
        self.dtype = compute_dtype(hidden.dtype)
        # dW from a single chunk is one product, which the CPU's bf16 matmul sums in fp32 and rounds once by itself.
        one_product = hidden.shape[0] <= plan.chunk_rows and hidden.device.type == "cpu"
        rounded = one_product and weight.dtype == plan.matmul_dtype == torch.bfloat16
        self.weight_gradient_dtype = torch.bfloat16 if rounded else self.dtype
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def expect(self, needs_hidden: bool, needs_weight: bool, needs_bias: bool) -> None:
        """Which gradients `accumulate` shall compute; the others cost nothing."""

        def zeros(x: Tensor, needed: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.zeros_like(x, dtype=dtype) if needed else None

        # Shards of dX are summed over the ranks before they are rounded.
        self.grad_hidden = zeros(self.hidden, needs_hidden, self.dtype if self.sharded else self.hidden.dtype)
        self.grad_bias = zeros(self.bias, needs_bias, self.dtype)
        self.needs_weight = needs_weight  # the first chunk writes dW instead of adding to zeros

    def logits(self, chunk: Tensor) -> Tensor:
        """Raw logits (m, V) of the rows in `chunk` (m,), in the one buffer: the next call overwrites them."""
        x, out = self.rows(chunk), self.buffer(chunk, self.plan.logits_dtype)
        if x.dtype != out.dtype:
            torch.mm(x, self.weight.t(), out_dtype=out.dtype, out=out)
        elif self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        else:
            return torch.addmm(self.bias, x, self.weight.t(), out=out)
        return out if self.bias is None else out.add_(self.bias)

    def gradient_buffer(self, logits: Tensor) -> Tensor:
        """Where the dlogits of a chunk go, in the matmul dtype: over the logits, unless those are wider."""
        if logits.dtype == self.plan.matmul_dtype:
            return logits
        return self.buffer(logits, self.plan.matmul_dtype)

    def buffer(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """(m, V) uninitialised, for as many rows as `like` has."""
        if dtype not in self.buffers:
            shape = (min(self.plan.chunk_rows, self.hidden.shape[0]), self.weight.shape[0])
            self.buffers[dtype] = torch.empty(shape, dtype=dtype, device=self.hidden.device)
        return self.buffers[dtype][: like.shape[0]]

    def rows(self, chunk: Tensor) -> Tensor:
        """Hidden states (m, H) of a chunk in the matmul dtype."""
        return self.hidden[chunk].to(self.plan.matmul_dtype)

    def accumulate(self, chunk: Tensor, grad_logits: Tensor) -> None:
        """Add what dlogits (m, V) of a chunk mean for hidden states, weight and bias."""
        if self.grad_hidden is not None:
            self.grad_hidden[chunk] = torch.mm(grad_logits, self.weight).to(self.grad_hidden.dtype)
        if self.needs_weight:
            self.grad_weight = _add_product(
                self.grad_weight, grad_logits.t(), self.rows(chunk), self.weight_gradient_dtype
            )
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0, dtype=self.dtype)

    def gradients(self) -> list[Tensor | None]:
        """dX, dW, db, zeros if no row contributed; db in the compute dtype, dW too unless it was rounded already."""
        if self.needs_weight and self.grad_weight is None:
            self.grad_weight = torch.zeros_like(self.weight, dtype=self.weight_gradient_dtype)
        return [self.grad_hidden, self.grad_weight, self.grad_bias]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b accumulated in `dtype`; `total` is overwritten. Only CUDA multiplies bf16 into fp32 directly."""
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.is_cuda:
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    first = total is None
    total = torch.empty(a.shape[0], b.shape[1], dtype=dtype) if total is None else total
    b = b.to(dtype)
    for part, some in zip(total.split(_COLUMNS_AT_ONCE), a.split(_COLUMNS_AT_ONCE), strict=True):
        torch.addmm(part, some.to(dtype), b, beta=0 if first else 1, out=part)
    return total
