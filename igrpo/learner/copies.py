"""Between the computer's memory and the device, without the host waiting: many tensors in one copy; there and back."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch

ALIGNMENT = 16
"""Bytes: kernels read as many at once."""


def sent(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors on ``device``; on a GPU they share one storage."""
    if device.type == "cpu" or not tensors:
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


Away = tuple[torch.device, torch.Tensor]
"""Where a tensor belongs, and its copy in the computer's memory."""


def put_away(tensor: torch.Tensor) -> Away:
    """A pinned copy. Both ways follow the stream that computes, so only ``fetched`` may read it."""
    if tensor.device.type == "cpu":
        return tensor.device, tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return tensor.device, copy.copy_(tensor, non_blocking=True)


def fetched(kept: Away) -> torch.Tensor:
    """What was put away, where it belongs."""
    device, tensor = kept
    return tensor.to(device, non_blocking=True)


class Offloaded(torch.autograd.graph.saved_tensors_hooks):
    """Inside, what autograd keeps of a GPU lies in the computer's memory. The host waits for none of it, as it does in
    torch's ``save_on_cpu``."""

    def __init__(self) -> None:
        super().__init__(put_away, fetched)


def _starts(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    return [0, *accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values())]
