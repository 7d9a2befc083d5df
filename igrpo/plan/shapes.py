"""A model's sizes, from what its config says. Plain arithmetic: importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only model."""

    hidden_size: int
    intermediate_size: int
    """Width of the MLP that one token meets: of the experts it is sent to, all together, and of shared ones."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    layer_parameters: int
    """Of one decoder layer; of all experts where there are experts."""
    parameters: int
    """Of the whole model, a tied head counted once."""
    active_parameters: int
    """Those of them that one token meets."""
    experts: int = 0
    """E of a layer; 0: one MLP for all tokens."""
    experts_per_token: int = 0
    expert_parameters: int = 0
    """Of all experts that a token may be sent to, of all layers."""
    adapter_parameters: int | None = None
    """Of the run's adapters, where they were counted."""
    adapted_experts: int = 0
    """Parameters of experts that have one, of all layers."""

    @property
    def decoder_parameters(self) -> int:
        """Of all decoder layers."""
        return self.parameters - self.vocab_size * self.hidden_size * (1 if self.tied else 2) - self.hidden_size

    @property
    def attention_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """bf16 keys and values of every layer."""
        return 2 * 2 * self.num_layers * self.kv_size


@dataclass(frozen=True)
class Counted:
    """Parameters of a model that was built without its weights."""

    parameters: int
    layer: int
    """Of the largest decoder layer."""
    experts: int
    """Of all experts that a token may be sent to."""


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a layer of the model has several MLPs, of which a token meets some."""
    return _of(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") > 1


def _of(config: Mapping[str, Any], *names: str) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)


def model_shape(config: Mapping[str, Any], counted: Counted | None = None) -> ModelShape:
    """From the mapping in ``config.json`` (``AutoConfig.to_dict()`` is the same).

    Args:
        counted: where it is known; otherwise it is computed, exact for Llama, Qwen, Gemma and Mixtral models.
    """
    c = {**config, **(config.get("text_config") or {})}
    family = str(c.get("model_type", ""))
    hidden, layers, heads = c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"]
    kv_heads = c.get("num_key_value_heads") or heads
    head_dim = c.get("head_dim") or hidden // heads
    intermediate, vocab = c.get("intermediate_size") or 4 * hidden, c["vocab_size"]
    tied = bool(c.get("tie_word_embeddings", family.startswith("gemma")))
    q, kv = heads * head_dim, kv_heads * head_dim
    attention = hidden * q + 2 * hidden * kv + q * hidden
    if c.get("attention_bias", family == "qwen2"):
        attention += q + 2 * kv + (hidden if c.get("attention_bias") and family != "qwen2" else 0)
    if family.startswith(("qwen3", "gemma3")):  # norms of q and k
        attention += 2 * head_dim
    experts = has_experts(c) * _of(c, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = min(experts, _of(c, "num_experts_per_tok", "moe_k", "num_experts_per_token") or 1)
    width = c.get("moe_intermediate_size") or intermediate
    shared = _of(c, "shared_expert_intermediate_size", "shared_intermediate_size") or width * _of(
        c, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"
    )
    mlp = experts * (3 * hidden * width + hidden) + 3 * hidden * shared if experts else 3 * hidden * intermediate
    norms = (4 if family.startswith(("gemma2", "gemma3")) else 2) * hidden
    layer = attention + mlp + norms
    total = layers * layer + vocab * hidden * (1 if tied else 2) + hidden
    counted = counted or Counted(total, layer, layers * experts * 3 * hidden * width)
    idle = counted.experts * (experts - chosen) // experts if experts else 0
    return ModelShape(
        hidden_size=hidden,
        intermediate_size=chosen * width + shared if experts else intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tied=tied,
        layer_parameters=counted.layer,
        parameters=counted.parameters,
        active_parameters=counted.parameters - idle,
        experts=experts,
        experts_per_token=chosen if experts else 0,
        expert_parameters=counted.experts if experts else 0,
    )
