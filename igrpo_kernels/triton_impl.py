"""`impl="triton"`: the losses and log-probabilities from logits. The fused-linear ones are in `triton_linear.py`.

Bytes are per logit element in bf16, n·V of them:

    selective_log_softmax    forward 2 B; backward 4 B
    grpo_loss                token-level losses: one launch, at most 6 B, loss and gradient together
                             losses that need a whole sequence or batch before any gradient is known (sequence-level
                             ratios, vespo, off_policy_mask_threshold, top_entropy_quantile, sequence_* corrections
                             without old log-probs): statistics 2 B, objective on (n,) rows, gradient 4 B

Besides the logits there is one gradient buffer, or none with `inplace`.
"""

import os

import torch
from torch import Tensor

from igrpo_kernels import triton_ops as ops
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.objective import grpo_objective
from igrpo_kernels.triton_autograd import LossWithGradients, SelectiveLogSoftmax
from igrpo_kernels.triton_grpo_loss import LossKind, LossScalars
from igrpo_kernels.triton_launch import addressable
from igrpo_kernels.triton_linear import linear_grpo_loss, linear_selective_log_softmax
from igrpo_kernels.triton_objective import coefficients_are_local, token_rows
from igrpo_kernels.types import GRPOLossConfig, LogitTransform

__all__ = [
    "grpo_loss",
    "linear_grpo_loss",
    "linear_selective_log_softmax",
    "selective_log_softmax",
    "unavailable_reason",
]

LossRows = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


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


def selective_log_softmax(
    logits: Tensor,  # (..., V), any strides
    index: Tensor,  # (...)
    transform: LogitTransform,
    *,
    return_entropy: bool,
    row_mask: Tensor | None = None,  # (...) bool; masked rows are not read: output 0, gradient exactly 0
    inplace: bool = False,  # backward overwrites logits with their gradient
) -> tuple[Tensor, Tensor | None]:
    """logps (...) and entropy (...) or None, fp32 (fp64 for fp64 logits)."""
    rows = index.reshape(-1).contiguous()  # the kernels step through rows one by one
    mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
    logps, entropy = SelectiveLogSoftmax.apply(addressable(logits), rows, mask, transform, return_entropy, inplace)
    return logps.view(index.shape), entropy.view(index.shape) if return_entropy else None


def grpo_loss(
    logits: Tensor,  # (B, T, V) or (n, V)
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    *,
    inplace: bool,
) -> LossRows:
    """Loss (), logps (n,), entropy (n,), metrics."""
    logits = addressable(logits)
    if torch.is_grad_enabled() and logits.requires_grad and coefficients_are_local(config, batch):
        return _token_level_loss(logits, batch, config, num_items_in_batch, inplace)
    logps, entropy = selective_log_softmax(
        logits,
        batch.index,
        config.logit_transform,
        return_entropy=True,
        row_mask=batch.mask,
        inplace=inplace,
    )
    # An entropy that only feeds metrics must not send the gradient kernel a zero coefficient to multiply with.
    differentiable = entropy if config.needs_entropy_gradient else entropy.detach()
    loss, metrics = grpo_objective(logps, differentiable, batch, config, num_items_in_batch)
    return loss, logps, entropy, metrics


def _token_level_loss(
    logits: Tensor,
    batch: TokenBatch,
    config: GRPOLossConfig,
    num_items_in_batch: Tensor | float | None,
    inplace: bool,
) -> LossRows:
    with torch.no_grad():
        arguments = (
            *token_rows(batch, config, num_items_in_batch),
            *config.logit_transform,
            [*LossScalars.of(config)],
            [*LossKind.of(config)],
        )
        if inplace:
            grad = logits.detach()  # shares the storage and autograd's version counter
            logps, entropy = ops.token_loss_(grad, *arguments)
        else:
            grad, logps, entropy = ops.token_loss(logits.detach(), *arguments)
        value, metrics = grpo_objective(logps, entropy, batch, config, num_items_in_batch)
    return LossWithGradients.apply(value, 1, logits, grad), logps, entropy, metrics
