"""TRL: `FusedGRPOTrainer`, its `GRPOTrainer` with log-probabilities, loss and gradient straight from hidden states.

A plain subclass that overrides methods of the trainer; nothing of TRL is patched. The loss TRL would compute is kept
exactly (tests/integrations/test_trl.py compares ten training steps of every loss type). What these kernels do not
cover takes TRL's own path, and says so once in the log: image inputs, the router loss of mixture-of-experts models,
the adaptive entropy controller, `top_entropy_quantile` on several processes. `igrpo.integrations.trl` puts iGRPO's two
stages on top.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import Tensor

from igrpo_kernels import GRPOLossConfig, linear_grpo_loss, linear_selective_log_softmax
from igrpo_kernels.losses import CONSTANT_LENGTH, LOSSES, NUM_ITEMS
from igrpo_kernels.model_logits import language_model, logit_transform_of

SUPPORTED_VERSIONS = ("1.14", "1.15", "1.16")
"""TRL releases whose trainer this class is tested with; its private methods change between releases."""


def check_version(version: str) -> None:
    """ImportError with one sentence for a TRL release that this class does not know."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise ImportError(
            f"igrpo_kernels.integrations.trl works with TRL {SUPPORTED_VERSIONS[0]} to {SUPPORTED_VERSIONS[-1]}, found "
            f"{version}: install one of these, or call igrpo_kernels.linear_grpo_loss in your own trainer"
        )


check_version(trl.__version__)

_CLIP_MEANS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio")
_MEANS = ("entropy", "kl", *_CLIP_MEANS, "vespo/phi_seq_mean")

_logger = logging.getLogger(__name__)


class FusedGRPOTrainer(trl.GRPOTrainer):
    """TRL's `GRPOTrainer` whose log-probabilities, loss and gradient come from these kernels.

    Takes the same arguments, plus:

    Args:
        loss_impl: "auto", or a name from `igrpo_kernels.available_impls()`.

    Raises:
        ValueError: a setting whose model call this class cannot enter (`torch_compile`, DeepSpeed ZeRO-3,
            prompt-learning adapters).

    Example:
        >>> trainer = FusedGRPOTrainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=data)
        >>> trainer.train()
    """

    def __init__(self, *args: Any, loss_impl: str = "auto", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.loss_impl = loss_impl
        reason = _unsupported(self)
        if reason is not None:
            raise ValueError(f"{type(self).__name__} does not work with {reason}; use trl.GRPOTrainer there")

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,  # (B, P+T)
        attention_mask: Tensor,  # (B, P+T)
        logits_to_keep: int,  # T
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **modalities: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities (B, T), entropies (B, T) or None, router loss or None; fp32, 0 where the mask is 0."""
        if compute_aux_loss or any(x is not None for x in modalities.values()):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size,
                compute_entropy=compute_entropy, compute_aux_loss=compute_aux_loss, **modalities,
            )  # fmt: skip

        def of_some(inner: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            return self._from_hidden(
                inner, ids, mask, logits_to_keep,
                lambda hidden, weight, bias, transform: linear_selective_log_softmax(
                    hidden, weight, ids[:, -logits_to_keep:], lm_head_bias=bias, temperature=self.temperature,
                    row_mask=mask[:, -logits_to_keep:], return_entropy=compute_entropy, impl=self.loss_impl,
                    **transform,
                ),
            )  # fmt: skip

        rows = batch_size or len(input_ids)  # as many sequences as fit through the model at once
        parts = [
            self._inside(model, of_some, input_ids[i : i + rows], attention_mask[i : i + rows])
            for i in range(0, len(input_ids), rows)
        ]
        if not compute_entropy:
            return torch.cat(parts), None, None
        logps, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return logps, entropies, None

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of one micro-batch, scaled as TRL scales it; logs TRL's metrics."""
        reason = _only_trl_can(self, inputs)
        if reason is not None:
            _note_once(f"{reason}: TRL's own loss is used on fused log-probabilities")
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1
        scale = 1.0 / accumulation
        divides_by_items = LOSSES[self.loss_type].reduction is NUM_ITEMS
        if divides_by_items:  # num_items_in_batch counts the whole generation batch, all ranks
            steps = self.args.steps_per_generation if mode == "train" else 1
            scale = self.accelerator.num_processes * steps / accumulation
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        # TRL's entropy bonus is a mean over tokens divided by the accumulation steps, whatever the loss's own scale
        coef = self.entropy_coef / (accumulation * scale) if self._entropy_bonus_enabled else 0.0
        loss_of = functools.partial(self._loss_from_hidden, inputs=inputs, mask=mask, entropy_coef=coef)
        loss, metrics = self._inside(model, loss_of, input_ids, attention_mask)

        if self._entropy_bonus_enabled:
            policy_loss = metrics["policy_loss"] * (scale if divides_by_items else 1.0)
            self._metrics[mode]["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
            if mode == "train" and self.accelerator.sync_gradients:
                self._metrics[mode]["entropy_coef"].append(self.entropy_coef)
        self._log_loss_metrics(mode, metrics, mask, per_sequence=inputs["advantages"].dim() == 1)
        return loss * scale

    def _loss_from_hidden(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,  # (B, P+T)
        attention_mask: Tensor,  # (B, P+T)
        *,
        inputs: dict[str, Any],
        mask: Tensor,  # (B, T)
        entropy_coef: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        corrects = self.use_vllm and self.vllm_importance_sampling_correction

        def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: dict) -> tuple[Tensor, dict]:
            out = linear_grpo_loss(
                hidden, weight, inputs["completion_ids"], inputs["advantages"], lm_head_bias=bias,
                completion_mask=mask, old_per_token_logps=inputs.get("old_per_token_logps"),
                ref_per_token_logps=inputs.get("ref_per_token_logps"),
                sampling_per_token_logps=inputs.get("sampling_per_token_logps"),
                num_items_in_batch=inputs["num_items_in_batch"], impl=self.loss_impl,
                config=_loss_config(self, corrects, entropy_coef, transform),
            )  # fmt: skip
            return out.loss, out.metrics

        return self._from_hidden(model, input_ids, attention_mask, mask.shape[1], loss_of)

    def _from_hidden(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,  # (B, P+T)
        attention_mask: Tensor,  # (B, P+T)
        keep: int,  # T
        function: Callable[[Tensor, Tensor, Tensor | None, dict], Any],
    ) -> Any:
        """`function(hidden (B, T, H), lm_head weight (V, H), bias, logit transform)`: row t predicts token t."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # under a PEFT adapter
        with self.accelerator.autocast():
            hidden = language_model(base)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        head = base.get_output_embeddings()
        weight, bias = _whole(head.weight), _whole(head.bias)
        hidden = hidden[:, -keep - 1 : -1].to(weight.device)
        transform = logit_transform_of(base.config)
        if self.args.cast_lm_head_to_fp32:
            with torch.autocast(hidden.device.type, enabled=False):
                return function(hidden.float(), weight, bias, transform)
        with self.accelerator.autocast():
            return function(hidden, weight, bias, transform)

    def _inside(self, model: torch.nn.Module, function: Callable, *args: Tensor) -> Any:
        """`function(inner model, *args)` as the forward pass of `model`.

        DDP and FSDP gather parameters and arm the reduction of gradients in the hooks around the forward of the module
        they wrap, so for this one call that module's forward is `function`.
        """
        inner = self.accelerator.unwrap_model(model)
        was = inner.__dict__.get("forward")

        def put_back() -> None:
            if was is None:
                inner.__dict__.pop("forward", None)
            else:
                inner.forward = was

        def forward(*args: Tensor) -> Any:
            put_back()  # first, because `function` may call the model itself
            return function(inner, *args)

        inner.forward = forward
        try:
            return model(*args)
        finally:
            put_back()

    def _log_loss_metrics(self, mode: str, metrics: dict[str, Tensor], mask: Tensor, *, per_sequence: bool) -> None:
        """TRL's means over all processes' tokens (or sequences) and extremes over all sequences, in two exchanges."""
        names = [name for name in _MEANS if name in metrics]
        by_sequence = {"vespo/phi_seq_mean"}
        if self.importance_sampling_level == "sequence":
            by_sequence |= set(_CLIP_MEANS)
        tokens, sequences = mask.sum().float(), torch.full_like(mask[0, 0], len(mask), dtype=torch.float32)
        counts = torch.stack([sequences if per_sequence and name in by_sequence else tokens for name in names])
        sums = torch.stack([metrics[name].float() for name in names]) * counts
        sums, counts = self.accelerator.reduce(torch.stack([sums, counts]), reduction="sum")
        for name, value in zip(names, (sums / counts.clamp(min=1.0)).tolist(), strict=True):
            self._metrics[mode][name].append(value)
        if "clip_ratio/low_min" in metrics:
            extremes = torch.stack([metrics["clip_ratio/low_min"], -metrics["clip_ratio/high_max"]]).float()
            # A process without a token has no extreme of its own; +inf leaves the minimum to the others. TRL takes
            # completions of one token for sequences with one ratio, of which an empty one counts as unclipped.
            alone = (tokens == 0) & (self.importance_sampling_level == "token" and mask.shape[1] > 1)
            gathered = self.accelerator.gather(torch.where(alone, torch.inf, extremes)[None]).amin(0)
            low, high = gathered.tolist()
            self._metrics[mode]["clip_ratio/low_min"].append(low if low < torch.inf else float("nan"))
            self._metrics[mode]["clip_ratio/high_max"].append(-high if high < torch.inf else float("nan"))


def _loss_config(
    trainer: trl.GRPOTrainer, corrects: bool, entropy_coef: float, transform: dict[str, Any]
) -> GRPOLossConfig:
    """The trainer's settings as a `GRPOLossConfig`; a key that TRL ignores for this loss type is left out."""
    args, loss = trainer.args, LOSSES[trainer.loss_type]
    return GRPOLossConfig(
        loss_type=trainer.loss_type,
        importance_sampling_level=trainer.importance_sampling_level,
        epsilon=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=args.delta if "delta" in loss.term.settings else None,
        beta=trainer.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
        temperature=trainer.temperature,
        entropy_coef=entropy_coef,
        top_entropy_quantile=trainer.top_entropy_quantile,
        off_policy_mask_threshold=trainer.off_policy_mask_threshold,
        importance_sampling_mode=trainer.vllm_importance_sampling_mode if corrects else None,
        importance_sampling_clip_min=trainer.vllm_importance_sampling_clip_min if corrects else None,
        importance_sampling_clip_max=trainer.vllm_importance_sampling_clip_max if corrects else 3.0,
        max_completion_length=trainer.max_completion_length if loss.reduction is CONSTANT_LENGTH else None,
        sapo_temperature_neg=args.sapo_temperature_neg,
        sapo_temperature_pos=args.sapo_temperature_pos,
        vespo_k_pos=args.vespo_k_pos,
        vespo_lambda_pos=args.vespo_lambda_pos,
        vespo_k_neg=args.vespo_k_neg,
        vespo_lambda_neg=args.vespo_lambda_neg,
        **transform,
    )


def _whole(parameter: Tensor | None) -> Tensor | None:
    """FSDP2's shards gathered; anything else as it is."""
    return parameter.full_tensor() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


def _unsupported(trainer: trl.GRPOTrainer) -> str | None:
    plugin = getattr(trainer.args, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3, which takes the lm_head's weight away before the backward pass needs it"
    if trainer.args.torch_compile:
        return "torch_compile, which would compile another forward pass than the one called here"
    adapters = getattr(trainer.model, "peft_config", {})
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        return "adapters that learn a prompt"
    return None


def _only_trl_can(trainer: trl.GRPOTrainer, inputs: dict[str, Any]) -> str | None:
    """What makes this batch's loss one that `GRPOLossConfig` cannot express, or None."""
    if trainer.aux_loss_enabled:
        return "router_aux_loss_coef"
    if trainer.use_adaptive_entropy:
        return "use_adaptive_entropy"
    if trainer.top_entropy_quantile < 1.0 and trainer.accelerator.num_processes > 1:
        return "top_entropy_quantile on several processes, whose quantile is taken over all of them"
    level = trainer.importance_sampling_level
    if level not in LOSSES[trainer.loss_type].term.levels:
        return f"loss_type {trainer.loss_type!r} with importance_sampling_level {level!r}"
    bounds = (trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max)
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction and bounds == (None, None):
        return "an importance-sampling correction without a bound"
    if inputs.get("num_images") is not None or "pixel_values" in inputs:
        return "image inputs"
    return None


@functools.cache
def _note_once(line: str) -> None:
    _logger.warning(line)
