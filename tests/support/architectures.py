"""Tiny random models of every causal architecture that transformers and vLLM share."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 16, "n_group": 1, "topk_group": 1,
    "vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 8,
}  # fmt: skip
"""Each config takes what it knows of them."""
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma3": {"vision_config": VISION},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "layer_types": ["mamba", "attention"]},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"vision_config": VISION},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
}
NOT_BUILT = {
    "dbrx": "DbrxAttentionConfig has no rope_theta in transformers 5.19",
    "gemma3n": "its image encoder needs the timm package",
}

NOT_RUN = {
    "longcat_flash": "its two kinds of heads need sizes that are not tiny",
    "mimo_v2_flash": "its two kinds of heads need sizes that are not tiny",
}


def shared() -> dict[str, str]:
    """Model type -> class, of the causal language models that vLLM's registry names, too."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    registry = (Path(spec.origin).parent / "model_executor/models/registry.py").read_text(encoding="utf-8")
    known = set(re.findall(r'^    "(\w+)": \(', registry, re.MULTILINE))
    return {kind: name for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in known}


def tiny_config(kind: str, **others: Any) -> Any:
    made, own = CONFIG_MAPPING[kind], OWN.get(kind, {}) | others
    return made(**({"text_config": SIZES, **own} if "text_config" in made.sub_configs else SIZES | own))


def tiny_model(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
