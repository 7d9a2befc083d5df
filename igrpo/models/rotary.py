"""Rotary factors that transformers takes from the longest sequence of a call, pinned to what the engine uses.

LongRoPE (Phi-3) and dynamic NTK change every position's factors once a call holds a position beyond the length of
pre-training, so a sequence's log-probabilities would depend on what shares its micro-batch. vLLM decides once, by the
context it was started with: LongRoPE's long factors if that is beyond the length of pre-training, else the short ones;
NTK's own factors up to ``max_position_embeddings``, beyond which no run goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from igrpo_kernels.model_logits import text_config

_PINNED = "pinned"
"""A kind of factors that transformers never renews."""


def pin_rotary(model: Any, context: int | None) -> None:
    """Makes the factors those of an engine whose context is ``context`` tokens, whatever is computed together.

    None, for no engine: the factors follow the longest sequence of a call, and are not kept for the next one.
    """
    for module, layer_type, kind in _rotations(model):
        prefix = f"{layer_type}_" if layer_type else ""
        inv_freq = getattr(module, f"{prefix}original_inv_freq", None)
        if inv_freq is None or kind == _PINNED:
            continue
        if context is None:
            module.register_forward_pre_hook(_forget)
            continue
        if kind == "longrope":
            settings = module.config.rope_parameters
            short = (settings[layer_type] if layer_type else settings)["original_max_position_embeddings"]
            if context > short:
                make = ROPE_INIT_FUNCTIONS[kind]
                inv_freq, _ = make(module.config, inv_freq.device, seq_len=short + 1, layer_type=layer_type)
        module.register_buffer(f"{prefix}inv_freq", inv_freq.clone(), persistent=False)
        module.rope_type = {**module.rope_type, layer_type: _PINNED} if layer_type else _PINNED


def varies_with_length(model: Any, context: int | None) -> bool:
    """Whether the first positions' factors change with the last position of a call, anywhere below ``context`` or,
    without one, within and beyond the model's own limit."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None) or 1
    last = (context or 4 * limit) - 1
    return any(
        not torch.equal(_factors(module, layer_type, 1), _factors(module, layer_type, last))
        for module, layer_type, _ in _rotations(model)
    )


def _rotations(model: Any) -> Iterator[tuple[Any, str | None, str]]:
    """Modules that renew their factors in the forward pass, or did before they were pinned: the type of layer where
    these have factors of their own, and the kind of factors."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if isinstance(kind, str) and (kind in (_PINNED, "longrope") or "dynamic" in kind):
                yield module, layer_type, kind


def _forget(module: Any, inputs: Any) -> None:
    """Dynamic NTK goes on with the factors of the longest sequence it has ever met."""
    for name in [name for name, _ in module.named_buffers() if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        module.register_buffer(f"{prefix}inv_freq", getattr(module, name).clone(), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _factors(module: Any, layer_type: str | None, last: int) -> torch.Tensor:
    """Cosines and sines of positions 0 and 1 in a call that ends at ``last``."""
    prefix, options = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
    device = getattr(module, f"{prefix}inv_freq").device
    out = module(torch.zeros(1, 1, 1, device=device), torch.tensor([[0, 1, max(last, 1)]], device=device), **options)
    return torch.stack([part[:, :2].float() for part in out])
