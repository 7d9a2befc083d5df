"""OpenRLHF: the two lines of `openrlhf/trainer/ray/ppo_actor.py` and `openrlhf/models/actor.py` that change.

    - from openrlhf.models import PolicyLoss
    + from igrpo_kernels.integrations.openrlhf import PolicyLoss
    - from .utils import log_probs_from_logits
    + from igrpo_kernels.integrations.openrlhf import log_probs_from_logits

Below, one actor step as it is written there, on a model of any kind.
"""

import torch

from igrpo_kernels.integrations.openrlhf import PolicyLoss, log_probs_from_logits


def actor_step(
    model: torch.nn.Module,
    sequences: torch.Tensor,  # (B, L)
    action_mask: torch.Tensor,  # (B, T)
    old_log_probs: torch.Tensor,  # (B, T)
    advantages: torch.Tensor,  # (B, T)
    temperature: float = 1.0,
) -> torch.Tensor:
    """Runs backward and returns the loss ()."""
    actions = action_mask.shape[1]
    logits = model(sequences).logits[:, -actions - 1 : -1]
    log_probs = log_probs_from_logits(logits, sequences[:, -actions:], temperature)
    loss_fn = PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, token_level_loss=True)
    loss, *_ = loss_fn(log_probs, old_log_probs, advantages, action_mask)
    loss.backward()
    return loss.detach()
