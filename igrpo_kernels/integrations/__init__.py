"""Adapters for other training codebases, one file per library. Nothing here is imported unless you import it.

trl        FusedGRPOTrainer: a subclass of TRL's GRPOTrainer
liger      triton_grpo_loss, LigerFusedLinearGRPOLoss: Liger's names, signatures and return values
verl       a policy loss for `register_policy_loss`, and the log-probability and entropy function of its actors
openrlhf   PolicyLoss and log_probs_from_logits
prime_rl   a custom loss for `trainer.loss`
"""
