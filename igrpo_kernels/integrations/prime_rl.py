"""prime-rl: a custom loss for its trainer.

[trainer.loss]
type = "custom"
import_path = "igrpo_kernels.integrations.prime_rl.policy_loss"
kwargs = { loss_type = "cispo", epsilon_high = 5.0 }
"""

from typing import Any

import torch
from torch import Tensor

from igrpo_kernels import GRPOLossConfig
from igrpo_kernels.integrations.per_token import per_token_policy_loss, policy_settings

__all__ = ["policy_loss"]


def policy_loss(inputs: Any, **config: Any) -> Any:
    """The sum of a sequence's policy terms; prime-rl divides by the batch's tokens.

    Args:
        inputs: prime-rl's LossInputs of one sequence: `trainer_logprobs`, `inference_logprobs`, `advantages`,
            `loss_mask` and, in releases that have them, `loss_weights`; each (T,).
        config: keys of `GRPOLossConfig`: loss_type, importance_sampling_level, epsilon, epsilon_high, delta, …
            A key that shapes something else than the policy term is a ValueError.

    Returns:
        prime-rl's LossOutputs: `loss` (), `metrics` of 0-d tensors.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    loss, metrics = sequence_loss(
        inputs.trainer_logprobs,
        inputs.inference_logprobs,
        inputs.advantages,
        inputs.loss_mask,
        policy_settings(GRPOLossConfig(**config)),
        getattr(inputs, "loss_weights", None),
    )
    return LossOutputs(loss=loss, metrics=metrics)


def sequence_loss(
    logps: Tensor,  # (T,)
    old_logps: Tensor,  # (T,)
    advantages: Tensor,  # (T,)
    mask: Tensor,  # (T,)
    config: GRPOLossConfig,
    weights: Tensor | None = None,  # (T,)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the policy terms (), and the mean importance weight and log-ratio over the sequence's tokens."""
    loss, weight = per_token_policy_loss(logps[None], old_logps[None], advantages[None], mask[None], config)
    loss = loss if weights is None else loss * torch.where(mask != 0, weights, 0.0)
    count = mask.sum().clamp(min=1)
    log_ratio = torch.where(mask != 0, logps.detach() - old_logps, 0.0)
    return loss.sum(), {"importance_ratio": weight.sum() / count, "log_ratio": log_ratio.sum() / count}
