"""Mixtures of experts: the load-balancing loss, with a gradient that does not depend on how a step was cut.

It is transformers' ``load_balancing_loss_func`` over the tokens of a whole optimiser step, of all processes:

    f_e = 1/N sum_l sum_t w_t [e is one of the k most likely experts of token t in layer l]    counts, no gradient
    P_e = 1/N sum_l sum_t w_t p_lte    p: softmax of the router's logits
    N   = number of layers with experts · sum_t w_t
    L   = E sum_e f_e P_e

f is a figure of the step, so it is counted before the first backward pass; given f, L is a sum over tokens, and a
micro-batch adds its own. t runs over what the sequences that are trained on read, each with its whole prompt: w_t is
the number of them that read t, which is computed once where they share it, times their weight.

transformers' product of all experts takes weights as they are. Under autocast it would compute in float32 what all
other layers, and the engine, compute in bfloat16; ``follow_autocast`` hands it weights that are cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from igrpo.learner.config import LearnerConfig
from igrpo.settings import ConfigError
from igrpo_kernels.model_logits import text_config

_GROUPED, _FOLLOWING = "grouped_mm", "igrpo_grouped_mm"
"""Names in transformers' registry of experts."""


def follow_autocast(model: Any) -> None:
    """In place; a model of bfloat16 weights stays as it is."""
    if model.config._experts_implementation == _GROUPED and model._can_set_experts_implementation():
        ExpertsInterface.register(_FOLLOWING, _following)
        model.set_experts_implementation(_FOLLOWING)


class _Cast:
    """A module whose weights are read in another dtype."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype):
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _following(experts: torch.nn.Module, hidden: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
    device = hidden.device.type
    cast = _Cast(experts, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else experts
    return ALL_EXPERTS_FUNCTIONS[_GROUPED](cast, hidden, *routed)


def aux_coefficient(model_config: Any, config: LearnerConfig) -> float:
    """Weight of the load-balancing loss: the setting, or what the model's config says; 0 for a model without experts.

    Args:
        model_config: of transformers.

    Raises:
        ConfigError: a weight for a model whose routers are not to be seen.
    """
    text, asked = text_config(model_config), config.router_aux_loss_coef
    if hasattr(text, "output_router_logits") and getattr(text, "num_experts_per_tok", None):
        return float((getattr(text, "router_aux_loss_coef", None) or 0.0) if asked is None else asked)
    return without_routers(model_config, config)


def without_routers(model_config: Any, config: LearnerConfig) -> float:
    """0, the only weight for a model of which no router's logits are to be had. Raises ConfigError for another."""
    if config.router_aux_loss_coef:
        raise ConfigError(
            f"router_aux_loss_coef: {config.router_aux_loss_coef} balances the load of experts, and this "
            f"{text_config(model_config).model_type} model has no router whose logits could be read; write null or 0"
        )
    return 0.0


def load_of(router_logits: Sequence[torch.Tensor], weights: torch.Tensor, k: int) -> torch.Tensor:
    """(layers, E) weighted tokens that chose each expert: N · f of one micro-batch, layer by layer.

    Args:
        router_logits: of each layer, (tokens, E).
        weights: (tokens,) w.
        k: experts per token.
    """
    if not router_logits:
        return weights.new_zeros(0)
    loads = []
    for logits in router_logits:
        chosen = logits.float().softmax(-1).topk(k, dim=-1).indices
        load = weights.new_zeros(logits.shape[-1])
        loads.append(load.index_add(0, chosen.flatten(), weights.repeat_interleave(k)))
    return torch.stack(loads)


def aux_loss(router_logits: Sequence[torch.Tensor], weights: torch.Tensor, load: torch.Tensor, k: int) -> torch.Tensor:
    """() this micro-batch's share of L.

    Args:
        load: (layers, E) of the whole step.
    """
    tokens = (load.sum() / k).clamp(min=1.0)  # N
    # No matrix products, which autocast would round.
    probs = torch.stack([(weights[:, None] * logits.float().softmax(-1)).sum(0) for logits in router_logits]).sum(0)
    return load.shape[-1] * (load.sum(0) / tokens * probs / tokens).sum()


def load_figures(load: torch.Tensor) -> dict[str, torch.Tensor]:
    """How evenly the step's tokens were spread, as means over the layers.

    Args:
        load: (layers, E) of the whole step.
    """
    shares = load / load.sum(-1, keepdim=True).clamp(min=1.0)
    return {
        "experts/busiest_share": shares.amax(-1).mean(),
        "experts/idle_share": (load == 0).float().mean(),
    }
