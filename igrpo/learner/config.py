"""Settings of the learner: adapters, the loss and the optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from igrpo.models.config import ModelConfig
from igrpo.settings import ConfigError
from igrpo.settings.kinds import (
    Count,
    Finite,
    Interval,
    NotNegative,
    Positive,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Text,
)
from igrpo.settings.losses import CorrectionMode, KLEstimator, Level, LossType
from igrpo.settings.shared import BatchConfig, OutputConfig, SamplingConfig, WeightsConfig


@dataclass(frozen=True, kw_only=True)
class LearnerConfig(ModelConfig, OutputConfig, SamplingConfig, BatchConfig, WeightsConfig):
    # --- adapters
    lora_r: Count = 16
    """Rank of the adapters."""
    lora_alpha: Count = 32
    """Scale of the adapters: alpha / r."""
    lora_dropout: ShareBelowOne = 0.05
    """Dropout before the adapters while training."""
    lora_target_modules: list[str] | None = None
    """Layers that get one: names or their ends, a regular expression, `all-linear`; null: the same as `all-linear`."""

    # --- loss
    loss_type: LossType = "grpo"
    """Surrogate and normalisation; `grpo` is the paper's: mean over tokens per sequence, then over sequences."""
    importance_sampling_level: Level = "token"
    """`sequence` is GSPO, `sequence_token` GSPO-token."""
    epsilon: NotNegative = 0.2
    """Lower clip range."""
    epsilon_high: NotNegative | None = None
    """Upper clip range; null: the same as `epsilon`."""
    delta: Positive | None = None
    """Upper bound of the ratio itself (two-sided clipping)."""
    dual_clip: Annotated[float, Interval(1.0, above=True)] | None = None
    """Lower bound of the objective for negative advantages, as a multiple of the advantage (> 1)."""
    beta: NotNegative = 0.0
    """KL coefficient; 0 loads no reference model, but for `teacher_model_kind: base`."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of the KL to the reference model."""
    use_bias_correction_kl: bool = True
    """Weight the KL term by the importance ratio."""
    kl_tau: NotNegative = 0.0
    """Weight of the squared log-ratio between learner and sampler."""
    positive_example_nll_weight: NotNegative = 0.0
    """Weight of a likelihood term, the mean of -log-prob over the tokens of all completions with a reward above 0."""
    entropy_coef: Finite = 0.0
    """Entropy bonus."""
    distillation_alpha: Share = 1.0
    """`distillation_weight`: 0 is the forward KL(teacher || policy), 1 the reverse one, between them Jensen-Shannon."""
    distillation_topk: Count = 100
    """`distillation_weight`: so many of the teacher's likeliest tokens; all others are one."""
    teacher_model_kind: Literal["live", "base", "ema"] = "live"
    """`distillation_weight`: the teacher's weights are the policy's own of each update, those the run began with, or an
    average over the updates."""
    teacher_update_rate: Share = 0.05
    """`teacher_model_kind: ema`: what an update's weights count for in the average."""
    top_entropy_quantile: Share = 1.0
    """Train only on the tokens with the highest entropy: this share of them."""
    off_policy_mask_threshold: Finite | None = None
    """Mask negative-advantage sequences whose sampler-to-learner KL exceeds this."""
    rollout_rs: str | None = None
    """Leave out tokens or sequences that learner and sampler disagree about: `token_k1`, `seq_mean_k3`, …"""
    rollout_rs_threshold: str | None = None
    """Up to where they stay, in quotes (YAML reads 1_2 as 12): for k1 two ratios, `"0.5_2.0"`; for k2 and k3 an upper
    bound, `"0.01"`."""
    bypass_mode: bool = False
    """Take the sampler's log-probabilities for the old policy's: ratio and clip are against the sampler. Needs
    `vllm_importance_sampling_correction: false`."""
    vllm_importance_sampling_correction: bool = True
    """Weight by the learner-to-sampler ratio, capped."""
    vllm_importance_sampling_mode: CorrectionMode = "sequence_mask"
    """Per token or per sequence; cap the ratio, or leave out what exceeds it; `seq-mask-tis`: judge sequences by their
    geometric mean, weigh tokens."""
    vllm_importance_sampling_clip_max: Positive | None = 3.0
    """Upper cap of that ratio."""
    vllm_importance_sampling_clip_min: NotNegative | None = None
    """Lower cap of that ratio."""
    bare_importance_ratio: Literal["bare", "behaviour"] = "bare"
    """`refinement_context: bare`: no correction, or that of a sampler for what was sampled behind the draft."""
    sapo_temperature_pos: Positive = 1.0
    """SAPO: gate temperature for positive advantages."""
    sapo_temperature_neg: Positive = 1.05
    """SAPO: gate temperature for negative advantages."""
    vespo_k_pos: NotNegative = 2.0
    """VESPO: exponent for advantages >= 0."""
    vespo_lambda_pos: NotNegative = 3.0
    """VESPO: decay for advantages >= 0."""
    vespo_k_neg: NotNegative = 3.0
    """VESPO: exponent for negative advantages."""
    vespo_lambda_neg: NotNegative = 2.0
    """VESPO: decay for negative advantages."""
    dro_beta: Positive | None = None
    """DRO: weight of the squared log-ratio to the old policy; there it must be set."""
    clip_cov_ratio: ShareAboveZero = 2e-4
    """Clip-Cov: share of a micro-batch's tokens that are left out, drawn from those of high covariance."""
    clip_cov_lb: Finite = 1.0
    """Clip-Cov: the covariance is high above this."""
    clip_cov_ub: Finite = 5.0
    """Clip-Cov: and below this."""
    kl_cov_ratio: ShareAboveZero = 2e-4
    """KL-Cov: share of a micro-batch's tokens that are penalised, those of the highest covariance."""
    ppo_kl_coef: NotNegative = 0.1
    """KL-Cov: weight of that penalty, |log-ratio to the old policy|."""
    router_aux_loss_coef: NotNegative | None = None
    """Weight of the load-balancing loss of mixtures of experts; null: what the model's config says, 0: none."""
    router_replay: bool = False
    """The learner sends each token to the experts that the engine chose for it, where the engine can say which."""
    mask_truncated_completions: bool = False
    """Leave completions cut at the length limit out of the loss."""
    loss_impl: Literal["auto", "torch", "triton", "cuda", "cpu"] = "auto"
    """Implementation of the fused loss."""

    # --- optimisation
    learning_rate: NotNegative = 1.0e-6
    """Peak learning rate."""
    lr_scheduler_type: Text = "cosine_with_min_lr"
    """Any schedule of transformers."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Its options; `cosine_with_min_lr` without any gets `min_lr_rate: 0.1`."""
    warmup_steps: NotNegative = 0.0
    """Warm-up: a number of steps, or below 1 a share of all steps."""
    weight_decay: NotNegative = 0.0
    """AdamW weight decay; as everywhere, not of norms and biases."""
    optim: Text = "adamw_torch_fused"
    """An optimiser of transformers; `adamw_8bit` and `paged_adamw_8bit` need the bitsandbytes package."""
    adam_beta1: ShareBelowOne = 0.9
    """AdamW."""
    adam_beta2: ShareBelowOne = 0.999
    """AdamW."""
    adam_epsilon: Positive = 1.0e-8
    """AdamW."""
    max_grad_norm: NotNegative = 1.0
    """Clip the gradient's norm to this; 0 = no clipping."""
    token_budget: Count | None = None
    """Tokens computed per micro-batch; null: `per_device_train_batch_size` completions per micro-batch."""
    shared_prefix: bool = True
    """Compute the prompt of a group once for all its completions; the gradient is the same."""
    num_iterations: Count = 1
    """Optimiser steps per rollout batch."""
    trust_checkpoint: bool = False
    """Unpickle what a checkpoint holds beyond tensors and plain data; its files can then run code on this machine."""

    @property
    def averages_weights(self) -> bool:
        """Whether an average of the weights over the updates is kept beside them."""
        return self.distillation_weight > 0 and self.teacher_model_kind == "ema"

    @property
    def has_reference(self) -> bool:
        """Whether the model the run began with is kept beside the policy; with adapters it is there without them."""
        fixed_teacher = self.distillation_weight > 0 and self.teacher_model_kind == "base"
        return (self.beta > 0 or fixed_teacher) and not self.use_peft

    def check(self) -> None:
        if self.bypass_mode and (self.vllm_importance_sampling_correction or self.rollout_rs is not None):
            key = "rollout_rs" if self.rollout_rs is not None else "vllm_importance_sampling_correction"
            raise ConfigError(
                f"bypass_mode: the ratio is against the sampler already, and {key} compares the old policy with it; "
                f"write {key}: {'null' if self.rollout_rs is not None else 'false'}, or bypass_mode: false"
            )
        corrects = self.vllm_importance_sampling_correction or self.bypass_mode
        if self.bare_importance_ratio == "behaviour" and not corrects:
            raise ConfigError(
                "bare_importance_ratio: behaviour is a correction for the sampler; write "
                "vllm_importance_sampling_correction: true, or bare_importance_ratio: bare"
            )
        if self.bypass_mode and self.refinement_context != "draft" and self.bare_importance_ratio == "bare":
            raise ConfigError(
                "bypass_mode: the ratio is against the sampler, which saw the draft; write bare_importance_ratio: "
                "behaviour, or bypass_mode: false"
            )
