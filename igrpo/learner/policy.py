"""The causal LM and the fused loss as one module, so that DDP and FSDP see a single forward.

hidden states -> rows that predict completion tokens -> ``linear_grpo_loss``; logits never exist whole, and prompt or
padding positions never meet the vocabulary.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from igrpo.learner.adapters import head_product
from igrpo.learner.batching import MicroBatch
from igrpo.learner.config import LearnerConfig
from igrpo.learner.copies import Offloaded, sent
from igrpo.learner.experts import aux_coefficient, aux_loss, follow_autocast, load_of
from igrpo.models.routers import Routers
from igrpo.settings import ConfigError
from igrpo_kernels import (
    GRPOLossConfig,
    GRPOLossOutput,
    linear_grpo_loss,
    linear_selective_log_softmax,
    linear_topk_log_softmax,
)
from igrpo_kernels.model_logits import language_model, logit_transform_of, text_config


def loss_config(config: LearnerConfig, model_config: Any = None) -> GRPOLossConfig:
    """The loss's settings from the run's: those of the same names, and the sampler's correction under its own.

    Raises:
        ConfigError: settings of the loss that exclude each other.
    """
    same = {f.name: getattr(config, f.name) for f in fields(GRPOLossConfig) if hasattr(config, f.name)}
    correct = config.vllm_importance_sampling_correction
    correction = {
        f"importance_sampling_{part}": getattr(config, f"vllm_importance_sampling_{part}") if correct else None
        for part in ("mode", "clip_min", "clip_max")
    }
    try:
        return GRPOLossConfig(**same, **correction, **logit_transform_of(model_config))
    except ValueError as error:
        raise ConfigError(re.sub(r"\b(importance_sampling_(mode|clip))", r"vllm_\1", str(error))) from None


class Policy(nn.Module):
    """A causal LM whose forward returns the loss of a micro-batch.

    Args:
        model: a Hugging Face causal LM with ``base_model`` and output embeddings.
    """

    def __init__(self, model: Any, config: LearnerConfig):
        super().__init__()
        self.model = model
        self.loss_config = loss_config(config, model.config)
        self.impl = config.loss_impl
        self.offloads = config.activation_offloading
        self.aux_coef = aux_coefficient(model.config, config)
        follow_autocast(model)
        self.routers = Routers(model) if config.router_replay else None

    def forward(
        self,
        batch: MicroBatch,
        old_per_token_logps: torch.Tensor | None = None,  # (n,)
        ref_per_token_logps: torch.Tensor | None = None,  # (n,)
        num_items_in_batch: float | None = None,
        logps_only: bool = False,
        temperature: float | None = None,
        own: bool = False,
        expert_load: torch.Tensor | None = None,  # (layers, E)
        load_only: bool = False,
        top_k: int | None = None,
        **teacher: torch.Tensor,  # teacher_topk_ids and teacher_topk_logps (n, k)
    ) -> GRPOLossOutput | torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The loss of ``batch``; instead of it, with ``logps_only`` the (n,) log-probabilities, with ``load_only`` the
        (layers, E) load of the experts.

        Args:
            temperature: of those log-probabilities; None: the sampling temperature, over what the sampler kept.
            own: those of the model's whole logits, of sequences that are not padded: what all others must agree with.
            expert_load: of the whole step; with it the loss balances the experts.
            top_k: with ``logps_only`` the ids (n, k) of the likeliest tokens and their log-probabilities, instead of
                those of the batch's own.
        """
        if own:
            logits = self.model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.rows]
            logps = (logits.float() / (temperature or self.loss_config.temperature)).log_softmax(-1)
            return logps.gather(-1, batch.completion_ids[:, None])[:, 0]
        out = self._read(batch, routers=load_only or expert_load is not None)
        if load_only:
            return load_of(out.router_logits, batch.readers, self._experts_per_token)
        hidden = out.last_hidden_state.flatten(0, 1)[batch.rows]
        hidden, weight, bias = head_product(self.model.get_output_embeddings(), hidden)
        if logps_only:
            transform = {"lm_head_bias": bias} | self._transform(temperature)
            if top_k is not None:
                return linear_topk_log_softmax(hidden, weight, min(top_k, len(weight)), **transform)
            mask = batch.sampling_mask if temperature is None else None
            return linear_selective_log_softmax(
                hidden, weight, batch.completion_ids, sampling_mask=mask, impl=self.impl, **transform
            )
        loss = linear_grpo_loss(
            hidden,
            weight,
            batch.completion_ids,
            batch.advantages,
            lm_head_bias=bias,
            old_per_token_logps=old_per_token_logps,
            ref_per_token_logps=ref_per_token_logps,
            sampling_per_token_logps=batch.sampling_per_token_logps,
            sampling_mask=batch.sampling_mask,
            cu_seqlens=batch.cu_seqlens,
            # Every row has a gradient (``batching.contributing``), unless rows are ranked by their entropy.
            lengths=batch.lengths if self.loss_config.top_entropy_quantile == 1.0 else None,
            nll_weights=batch.nll_weights,
            prompt_lengths=batch.prompt_lengths,
            num_items_in_batch=num_items_in_batch,
            config=self._settings(batch),
            impl=self.impl,
            **teacher,
        )
        if expert_load is None:
            return loss
        aux = aux_loss(out.router_logits, batch.readers, expert_load, self._experts_per_token)
        # What the loss is multiplied with is no matter of the experts'; a filler counts for nothing anyway.
        weighted = loss.loss + self.aux_coef * aux / (batch.scale or 1.0)
        return replace(loss, loss=weighted, metrics=loss.metrics | {"aux_loss": aux.detach()})

    def _transform(self, temperature: float | None) -> dict[str, Any]:
        """From the head's product to logits."""
        settings = self.loss_config
        return {
            "temperature": settings.temperature if temperature is None else temperature,
            "logit_scale": settings.logit_scale,
            "final_logit_softcapping": settings.final_logit_softcapping,
        }

    @property
    def _experts_per_token(self) -> int:
        return text_config(self.model.config).num_experts_per_tok

    def _settings(self, batch: MicroBatch) -> GRPOLossConfig:
        """The loss's settings, with an entropy bonus that adds up to a mean over the step's tokens.

        The loss subtracts coef · (mean over this call's n_m tokens) and is then multiplied by ``batch.scale``, its
        share of the *loss's* denominator: coef · (n_m / n) / scale makes the sum over micro-batches the mean over n.
        """
        settings = self.loss_config
        if settings.entropy_coef == 0.0 or not batch.scale:
            return settings
        return replace(settings, entropy_coef=settings.entropy_coef * batch.token_share / batch.scale)

    def _read(self, batch: MicroBatch, routers: bool) -> Any:
        """What the base model returns: final hidden states, and with ``routers`` their logits in each layer."""
        if batch.layout is None:  # padded on the right: no real token sees what comes after it
            inputs = {"attention_mask": batch.attention_mask}
        else:
            inputs = {"position_ids": batch.position_ids, "packed_layout": batch.layout}
        if self.routers is not None:  # until the next call, for layers that are computed again
            routes = {} if batch.routes is None else {"given": batch.routes}
            self.routers.given = sent(routes, batch.input_ids.device).get("given")
        if routers:
            inputs["output_router_logits"] = True
        # What the checkpointed layers keep waits in the computer's memory; the loss behind them keeps no activations.
        with Offloaded() if self.offloads else nullcontext():
            return language_model(self.model)(input_ids=batch.input_ids, **inputs)
