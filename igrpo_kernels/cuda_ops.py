"""`impl="cuda"`: compiled row kernels (csrc/cuda/) that keep a row on chip between its statistics and its gradient.

The same Python as impl="cpu" (native_impl.py) on the CUDA implementation of the same operators:
sm_90 and later hold a row in a cluster's shared memory, sm_80 in one block's shared memory and registers; rows that
cannot fit are read twice. docs/kernels.md says what has been measured on which device, and what has not.
"""

import torch

from igrpo_kernels.native_impl import (
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from igrpo_kernels.native_ops import missing_library

__all__ = [
    "grpo_loss",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "selective_log_softmax",
    "unavailable_reason",
]

_OLDEST_CAPABILITY = (8, 0)


def unavailable_reason(device_type: str | None) -> str | None:
    """Why this implementation cannot serve tensors of `device_type` (None: this machine), or None if it can."""
    if device_type not in (None, "cuda"):
        return f"it works on CUDA tensors, not on {device_type} ones; use impl='cpu' or impl='torch'"
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build of torch, or use impl='cpu' or impl='torch'"
    if not torch.cuda.is_available():
        return "there is no CUDA device; use impl='cpu' or impl='torch'"
    if torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        return "it needs compute capability 8.0 or newer; use impl='triton' or impl='torch'"
    # The operators' schemas come with the CPU library.
    return missing_library("_C_cpu") or missing_library("_C_cuda")
