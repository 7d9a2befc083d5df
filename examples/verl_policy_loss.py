"""verl: CISPO under a name of its own, and log-probabilities without logits.

Put this file where verl's workers can import it and start training with

    actor_rollout_ref.model.external_lib=verl_policy_loss
    actor_rollout_ref.actor.policy_loss.loss_mode=igrpo_cispo

`external_lib` is imported by every worker before it builds anything, which is when the name is registered.
"""

from verl.trainer.ppo.core_algos import register_policy_loss

from igrpo_kernels import GRPOLossConfig
from igrpo_kernels.integrations.verl import linear_cross_entropy, policy_loss

register_policy_loss("igrpo_cispo")(policy_loss(GRPOLossConfig(loss_type="cispo", epsilon_high=5.0)))

# In a forward pass of one's own, where verl calls its linear_cross_entropy (use_fused_kernels):
#     log_probs, entropy = linear_cross_entropy(hidden, lm_head.weight, labels, temperature, "none", None)
__all__ = ["linear_cross_entropy"]
