"""What the fused losses ask of an implementation's row kernels. `triton_rows` and `native_rows` provide it.

    addressable(logits (..., V)) -> logits         a view its kernels can walk, a copy only where no view can
    statistics(logits, index (n,), mask (n,)|None, transform, with_entropy) -> RowStats
    gradient(logits, out, index, mask, stats, grad_logps (n,), grad_entropy (n,)|None, transform) -> dlogits
    one_launch(batch, config) -> bool              whether `token_loss` can serve this loss
    token_rows(batch, config, num_items) -> tuple  what a row's coefficient needs besides its logits; (n,), () or None
    token_loss(logits, out, rows, config) -> logps (n,), entropy (n,), dloss/dlogps (n,)|None, dlogits
    scale_(grad, factor ())                        grad *= factor in place, free where factor is 1

`out` is where dlogits go: None = a new tensor of logits' dtype, `logits` itself = in place, or a tensor of any dtype.
Masked rows are not read; their statistics and gradients are 0. An index outside the vocabulary makes its row NaN.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """What a walk over n rows of logits z leaves, in the compute dtype."""

    logps: Tensor
    """(n,) log p[index]."""

    entropy: Tensor
    """(n,) nats; (0,) if it was not wanted."""

    row_max: Tensor
    """(n,) M = max z."""

    log_sum: Tensor
    """(n,) log sum exp(z - M)."""

    @classmethod
    def zeros(cls, n: int, dtype: torch.dtype, device: torch.device) -> "RowStats":
        """What rows that nobody measures keep."""
        return cls(*(torch.zeros(n, dtype=dtype, device=device) for _ in range(4)))

    def at(self, rows: Tensor) -> "RowStats":
        """The statistics of some rows."""
        return RowStats(*(x[rows] if x.numel() else x for x in self))

    def put(self, rows: Tensor, part: "RowStats") -> None:
        """Store the statistics of some rows; an entropy that was not wanted stays as it is."""
        for mine, new in zip(self, part, strict=True):
            if new.numel():
                mine[rows] = new


def row_kernels(name: str) -> ModuleType:
    """The row kernels called "triton" or "native" (C++ and CUDA C++)."""
    if name == "triton":
        from igrpo_kernels import triton_rows as module
    else:
        from igrpo_kernels import native_rows as module
    return module


def addressable(logits: Tensor) -> Tensor:
    """(..., V) as (n, V) or (B, T, V) with adjacent columns: a view where the strides allow, else a copy."""
    if logits.dim() not in (2, 3):
        logits = logits.reshape(-1, logits.shape[-1])
    if logits.shape[-1] == 1 or logits.stride(-1) == 1:
        return logits
    return logits.clone(memory_format=torch.contiguous_format)  # contiguous() keeps the strides of an empty tensor
