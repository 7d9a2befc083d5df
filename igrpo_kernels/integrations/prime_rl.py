"""prime-rl: a custom loss for its trainer. Its own default is

[trainer.loss]
type = "custom"
import_path = "igrpo_kernels.integrations.prime_rl.policy_loss"
kwargs = { loss_type = "dppo_tv", epsilon = 0.2, kl_tau = 1e-3 }

and `FusedOutputLinear` takes the place of the lm_head of that name, before the model is made:

import prime_rl.trainer.models.layers.lm_head as lm_head
lm_head.FusedOutputLinear = FusedOutputLinear

prime-rl looks the name up where it puts in its lm_head: only if its chunk size is a number, not for a soft-capped head.
"""

from typing import Any

import torch
from torch import Tensor

from igrpo_kernels import GRPOLossConfig, linear_selective_log_softmax
from igrpo_kernels.integrations.per_token import per_token_policy_loss, policy_settings
from igrpo_kernels.losses import DPPO_KL, DPPO_TV
from igrpo_kernels.silent_exp import silent_square

__all__ = ["FusedOutputLinear", "policy_loss"]


def policy_loss(inputs: Any, **config: Any) -> Any:
    """The sum of a sequence's policy terms and kl_tau·(l - s)²; prime-rl divides by the batch's tokens.

    o and s are both the sampler's log-probability. With the DPPO losses the value is prime-rl's -w·A, whose gradient is
    that of -sg(w)·A·l. `dppo_mask_low` and `dppo_mask_high` are `epsilon` and `epsilon_high`.

    Args:
        inputs: prime-rl's LossInputs of one sequence: `trainer_logprobs`, `inference_logprobs`, `advantages`,
            `loss_mask` and, in releases that have them, `loss_weights`; each (T,).
        config: keys of `GRPOLossConfig`: loss_type, importance_sampling_level, epsilon, epsilon_high, delta, …
            kl_tau. A key that shapes something else is a ValueError.

    Returns:
        prime-rl's LossOutputs: `loss` (), `metrics` of 0-d tensors.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    loss, metrics = sequence_loss(
        inputs.trainer_logprobs,
        inputs.inference_logprobs,
        inputs.advantages,
        inputs.loss_mask,
        policy_settings(GRPOLossConfig(**config), "kl_tau"),
        getattr(inputs, "loss_weights", None),
    )
    return LossOutputs(loss=loss, metrics=metrics)


class FusedOutputLinear(torch.nn.Linear):
    """prime-rl's lm_head of that name (`prime_rl.trainer.models.layers.lm_head`): log-probabilities and entropies of
    `labels`, each token's logits divided by its own temperature, and logits never whole.

    Both outputs are differentiable, prime-rl's entropy is not. `chunk_size` is not used: chunks are of bytes.
    """

    def __init__(self, in_features: int, out_features: int, chunk_size: int | None = None):
        super().__init__(in_features, out_features, bias=False)

    def forward(
        self,
        hidden_states: Tensor,  # (b, s, H)
        labels: Tensor | None = None,  # (b, s)
        temperature: Tensor | None = None,  # (b, s)
    ) -> Any:
        """prime-rl's PrimeLmOutput: `logprobs` and `entropy`, (b, s) fp32."""
        from prime_rl.trainer.models.layers.lm_head import PrimeLmOutput

        if labels is None or temperature is None:
            raise ValueError("FusedOutputLinear needs labels and temperature, one of each per token")
        logps, entropy = linear_selective_log_softmax(
            hidden_states, self.weight, labels, temperatures=temperature, return_entropy=True
        )
        return PrimeLmOutput(logprobs=logps, entropy=entropy)


def sequence_loss(
    logps: Tensor,  # (T,)
    old_logps: Tensor,  # (T,)
    advantages: Tensor,  # (T,)
    mask: Tensor,  # (T,)
    config: GRPOLossConfig,
    weights: Tensor | None = None,  # (T,)
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the tokens' losses (), and the mean importance weight and log-ratio over its tokens."""
    mask = mask != 0 if weights is None else (mask != 0) & (weights != 0)
    term = per_token_policy_loss(logps[None], old_logps[None], advantages[None], mask[None], config)
    loss, weight = term.loss, term.weight
    if config.loss.term in (DPPO_TV, DPPO_KL):  # one gradient, two values
        bounded = weight if config.delta is None else weight.clamp(max=config.delta)
        value = -(bounded * torch.where(mask, advantages, 0.0)).masked_fill(term.leaves, 0.0)
        loss = loss + (value - loss).detach()
    log_ratio = torch.where(mask, logps - old_logps, 0.0)
    if config.kl_tau:
        loss = loss + config.kl_tau * silent_square(log_ratio)
    loss = loss if weights is None else loss * torch.where(mask, weights, 0.0)
    count, log_ratio = mask.sum().clamp(min=1), log_ratio.detach()
    return loss.sum(), {"importance_ratio": weight.sum() / count, "log_ratio": log_ratio.sum() / count}
