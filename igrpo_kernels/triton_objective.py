"""What a row's loss coefficient needs besides its logits, and whether anything else is needed at all."""

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.objective import reduce_loss, rows, sampler_ratio
from igrpo_kernels.triton_grpo_loss import TokenRows
from igrpo_kernels.types import GRPOLossConfig


def coefficients_are_local(config: GRPOLossConfig, batch: TokenBatch) -> bool:
    """Whether dloss/dl of a row follows from that row's logits alone, so that one launch can do everything."""
    mode = config.importance_sampling_mode
    return (
        config.importance_sampling_level == "token"
        and config.loss_type != "vespo"
        and config.off_policy_mask_threshold is None
        and config.top_entropy_quantile == 1.0
        and (mode is None or mode.startswith("token") or batch.old_per_token_logps is not None)
    )


def token_rows(batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None) -> TokenRows:
    """The kernel's per-row inputs: everything the coefficients need and the logits do not decide."""
    mode = config.importance_sampling_mode
    policy_weight = None
    if mode is not None and mode.startswith("sequence"):
        policy_weight = rows(sampler_ratio(batch.old_per_token_logps, batch, config), batch, config).contiguous()
    grad_entropy = None
    if config.needs_entropy_gradient:
        grad_entropy = -config.entropy_coef / batch.lengths.sum().clamp(min=1.0)
    return TokenRows(
        batch.index,
        batch.mask,
        batch.advantages,
        reduction_weights(batch, config, num_items_in_batch),
        batch.old_per_token_logps,
        batch.ref_per_token_logps if config.beta != 0.0 else None,
        batch.sampling_per_token_logps if mode is not None and mode.startswith("token") else None,
        policy_weight,
        grad_entropy,
    )


def reduction_weights(batch: TokenBatch, config: GRPOLossConfig, num_items_in_batch: Tensor | float | None) -> Tensor:
    """dloss/d(token loss) (n,). The reduction is linear, so its gradient anywhere is its weights."""
    with torch.enable_grad():
        token_loss = torch.zeros_like(batch.advantages).requires_grad_()
        loss = reduce_loss(token_loss, batch, config, num_items_in_batch)
        (weights,) = torch.autograd.grad(loss, token_loss)
    return weights
