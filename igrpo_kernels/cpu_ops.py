"""`impl="cpu"`: compiled row kernels (csrc/cpu/), vectorised for AVX-512, AVX2 or any processor, threaded over rows.

Row arithmetic is fp32 whatever the logits' dtype (fp64 input is computed by the reference), rounded once when the
gradient is stored. A row's result depends on that row alone: not on the batch, not on the number of threads.
"""

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


def unavailable_reason(device_type: str | None) -> str | None:
    """Why this implementation cannot serve tensors of `device_type` (None: this machine), or None if it can."""
    if device_type not in (None, "cpu"):
        return f"it works on CPU tensors, not on {device_type} ones; use impl='triton', 'cuda' or 'torch'"
    return missing_library("_C_cpu")
