"""`impl="triton"`: the fused losses on Triton row kernels (`triton_rows.py`)."""

import os
from functools import partial

import torch

from igrpo_kernels import fused_loss, linear_ops, triton_rows

__all__ = [
    "grpo_loss",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "selective_log_softmax",
    "unavailable_reason",
]

grpo_loss = partial(fused_loss.grpo_loss, triton_rows)
selective_log_softmax = partial(fused_loss.selective_log_softmax, triton_rows)
linear_grpo_loss = partial(linear_ops.linear_grpo_loss, "triton")
linear_selective_log_softmax = partial(linear_ops.linear_selective_log_softmax, "triton")


def unavailable_reason(device_type: str | None) -> str | None:
    """Why a call on this kind of device cannot run here; None = it can."""
    if device_type not in (None, "cpu", "cuda"):
        return f"the Triton kernels run on CUDA devices, not on {device_type}; use impl='torch'"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cpu" and not interpreted:
        return "on CPU tensors Triton only runs interpreted: start Python with TRITON_INTERPRET=1, or use impl='torch'"
    if device_type is None and not interpreted and not torch.cuda.is_available():
        return "there is no CUDA device; start Python with TRITON_INTERPRET=1 to run interpreted, or use impl='torch'"
    return None
