"""What impl="cpu" and impl="cuda" share: the fused losses on the compiled row kernels (`native_rows.py`).

Those compute in fp32; fp64 input asks for the reference's accuracy and gets the reference.
"""

import torch
from torch import Tensor

from igrpo_kernels import fused_loss, linear_ops, native_rows, reference


def grpo_loss(logits: Tensor, *arguments, **keywords):
    """See `fused_loss.grpo_loss`."""
    if logits.dtype == torch.float64:
        return reference.grpo_loss(logits, *arguments, **keywords)
    return fused_loss.grpo_loss(native_rows, logits, *arguments, **keywords)


def selective_log_softmax(logits: Tensor, *arguments, **keywords):
    """See `fused_loss.selective_log_softmax`."""
    if logits.dtype == torch.float64:
        return reference.selective_log_softmax(logits, *arguments, **keywords)
    return fused_loss.selective_log_softmax(native_rows, logits, *arguments, **keywords)


def linear_grpo_loss(hidden: Tensor, *arguments, **keywords):
    """See `linear_ops.linear_grpo_loss`."""
    if hidden.dtype == torch.float64:
        return reference.linear_grpo_loss(hidden, *arguments, **keywords)
    return linear_ops.linear_grpo_loss("native", hidden, *arguments, **keywords)


def linear_selective_log_softmax(hidden: Tensor, *arguments, **keywords):
    """See `linear_ops.linear_selective_log_softmax`."""
    if hidden.dtype == torch.float64:
        return reference.linear_selective_log_softmax(hidden, *arguments, **keywords)
    return linear_ops.linear_selective_log_softmax("native", hidden, *arguments, **keywords)
