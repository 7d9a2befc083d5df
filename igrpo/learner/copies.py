"""From the computer's memory to the device: many tensors in one copy, for which the host does not wait."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch

ALIGNMENT = 16
"""Bytes: kernels read as many at once."""


def sent(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors on ``device``; on a GPU they share one storage."""
    if device.type == "cpu":
        return dict(tensors)
    return parted(joined(tensors, pinned=device.type == "cuda").to(device, non_blocking=True), tensors)


def joined(tensors: Mapping[str, torch.Tensor], pinned: bool = False) -> torch.Tensor:
    """(N,) uint8: the bytes of all, one after the other."""
    buffer = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, pin_memory=pinned)
    for name, place in parted(buffer, tensors).items():
        place.copy_(tensors[name])
    return buffer


def parted(buffer: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views into what ``joined`` made, with the names, shapes and dtypes of ``like``."""
    return {
        name: buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, (name, tensor) in zip(_starts(like), like.items(), strict=False)
    }


def _starts(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    return [0, *accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values())]
