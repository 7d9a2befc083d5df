"""The policy term on log-probabilities that a trainer already has: what verl, OpenRLHF and prime-rl hand to a loss."""

from collections.abc import Callable
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.losses import LOSSES, TermInputs
from igrpo_kernels.objective import importance_weight
from igrpo_kernels.types import GRPOLossConfig

EFFECTIVE = {"loss_type", "importance_sampling_level", "max_completion_length"}.union(
    *(loss.term.settings for loss in LOSSES.values())
)
"""Keys that shape the policy term or that a loss type must be given."""


LOG_RATIO_LIMIT = 20.0
"""verl and OpenRLHF hold a token's log-ratio inside this band, on both sides, gradient and all."""


class PolicyLoss(NamedTuple):
    """Of each token (B, T), 0 where masked."""

    loss: Tensor
    """Differentiable in the log-probabilities."""

    weight: Tensor
    """Importance weight, detached."""

    leaves: Tensor | None
    """Bool: outside the loss's trust region; None where it has none, or clips a ratio."""


def per_token_policy_loss(
    logps: Tensor,  # (B, T)
    old_logps: Tensor,  # (B, T)
    advantages: Tensor,  # (B,) or (B, T)
    mask: Tensor,  # (B, T)
    config: GRPOLossConfig,
    *,
    log_ratio_limit: float = torch.inf,
    sequence_weight: Callable[[Tensor, TokenBatch], Tensor] | None = None,
) -> PolicyLoss:
    """The equations are those of `losses.py`; only keys of `config` that shape the policy term have an effect.

    `log_ratio_limit` clamps each token's log-ratio; `sequence_weight(log_ratio (n,), batch) -> (n,)` takes the place of
    the weight that another importance_sampling_level than "token" defines.
    """
    batch = TokenBatch.build(
        torch.zeros_like(mask, dtype=torch.int64),
        advantages.to(torch.promote_types(advantages.dtype, torch.float32)),
        dtype=torch.promote_types(logps.dtype, torch.float32),
        completion_mask=mask,
        old_per_token_logps=old_logps,
    )
    rows = batch.masked(logps.reshape(-1).to(batch.advantages.dtype))
    log_ratio = (rows - batch.old_per_token_logps).clamp(-log_ratio_limit, log_ratio_limit)
    if sequence_weight is not None and config.importance_sampling_level != "token":
        weight = sequence_weight(log_ratio, batch)
    else:
        weight = importance_weight(log_ratio, batch, config)
    terms = TermInputs(rows, batch.old_per_token_logps, log_ratio, weight, batch.advantages, None, batch)
    term = config.loss.term
    leaves = None if term.leaves is None else (term.leaves(terms, config) & batch.mask).view(batch.shape)
    loss, weight = (batch.masked(x).view(batch.shape) for x in (term.function(terms, config), weight.detach()))
    return PolicyLoss(loss, weight, leaves)


def policy_settings(config: GRPOLossConfig, *others: str) -> GRPOLossConfig:
    """`config`, or ValueError for a key that would have no effect: the rest of the loss is the other trainer's.

    `others` are keys that have one with this trainer.
    """
    default = GRPOLossConfig()
    idle = [
        name
        for name in (f.name for f in fields(GRPOLossConfig))
        if name not in (*EFFECTIVE, *others) and getattr(config, name) != getattr(default, name)
    ]
    if idle:
        raise ValueError(
            f"{', '.join(idle)}: no effect on this trainer's policy term, which adds up tokens and penalties itself; "
            "leave them out here and set them there"
        )
    return config


def clipped(weight: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    """Bool (B, T): the clipped branch is the smaller one. `advantages` (B, T)."""
    return ((weight < config.clip_low) & (advantages < 0)) | ((weight > config.clip_high) & (advantages > 0))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean () of x (B, T) where the mask is not 0, whatever stands elsewhere; 0 if it is nowhere."""
    return torch.where(mask != 0, x.detach(), 0.0).sum() / mask.sum().clamp(min=1)
