"""TRL's GRPO objective in plain PyTorch, for providers that end at the log-probs."""

import torch
from torch import Tensor

EPSILON = 0.2


def grpo_from_logps(
    logps: Tensor,  # (B, T)
    entropy: Tensor | None,  # (B, T)
    advantages: Tensor,  # (B,)
    old: Tensor | None,  # (B, T); None: the current log-probs
    ref: Tensor | None,  # (B, T); used when beta != 0
    *,
    sequence: bool,
    beta: float,
    entropy_coef: float,
) -> Tensor:
    """Mean over each sequence's tokens, then over sequences; every token counts."""
    log_ratio = logps - (logps.detach() if old is None else old)
    if sequence:
        log_ratio = log_ratio.mean(-1, keepdim=True)
    ratio = log_ratio.exp()
    a = advantages[:, None]
    loss = -torch.min(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a)
    if beta:
        loss = loss + beta * ratio * (torch.exp(ref - logps) - (ref - logps) - 1)
    loss = loss.expand_as(logps).mean(-1).mean()
    if entropy_coef:
        loss = loss - entropy_coef * entropy.mean()
    return loss
