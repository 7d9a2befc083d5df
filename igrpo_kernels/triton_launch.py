"""How the Triton kernels see a logits tensor and in which tiles they walk it. Nothing here depends on a batch size."""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from igrpo_kernels.types import LogitTransform


class Tile(NamedTuple):
    """Columns per step as (TILE, LANES), how many neighbours of them a thread takes, and the warps that share them."""

    tile: int
    lanes: int
    near: int
    num_warps: int


# Columns per lane group when V is large, and warps: one known-good choice; nothing is tuned at run time.
_DEPTH, _WARPS = 4, 8
_WARP = 32


def tile_for(vocab_size: int, itemsize: int) -> Tile:
    """The tile of every kernel for rows of `vocab_size` columns: a thread loads 16 bytes at a time where V allows."""
    warps = _WARPS
    per_thread = max(16 // itemsize, 1)
    width = triton.next_power_of_2(vocab_size)
    while warps > 1 and _WARP * warps * per_thread > width:
        warps //= 2
    lanes = min(_WARP * warps * per_thread, width)
    tile = min(_DEPTH, triton.next_power_of_2(triton.cdiv(vocab_size, lanes)))
    return Tile(tile, lanes, min(per_thread, lanes), warps)


@dataclass(frozen=True)
class RowStrides:
    """A (B, T, V) or (n, V) tensor whose last stride is 1, as the kernels address it."""

    count: int
    tokens: int
    stride_batch: int
    stride_token: int

    @classmethod
    def of(cls, x: Tensor) -> "RowStrides":
        """Row strides of x; x keeps its layout."""
        assert x.dim() in (2, 3) and (x.shape[-1] == 1 or x.stride(-1) == 1), (x.shape, x.stride())
        if x.dim() == 2:
            return cls(x.shape[0], max(x.shape[0], 1), 0, x.stride(0))
        return cls(x.shape[0] * x.shape[1], max(x.shape[1], 1), x.stride(0), x.stride(1))


def vector_length(*tensors: Tensor) -> int:
    """Elements of a 16-byte access if every row of every tensor starts on 16 bytes and V fills them, else 1.

    A property of V and the dtype in practice, not of the lengths: rows of a (B, T, V) tensor lie V elements apart.
    """
    for x in tensors:
        starts = (x.data_ptr(), x.shape[-1] * x.itemsize, *(s * x.itemsize for s in x.stride()[:-1]))
        if any(start % 16 for start in starts):
            return 1
    return min(16 // x.itemsize for x in tensors)


def transform_factors(transform: LogitTransform) -> tuple[float, float, bool]:
    """(inner, outer, capped) of `triton_math.policy_logits`, before a row's own temperature."""
    scale, cap, temperature, _ = transform
    if cap is None:
        return scale / temperature, 1.0, False
    return scale / cap, cap / temperature, True


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's own GPU, whatever the current one is."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
