"""What a model's own code does between its last hidden states and its logits, and where its language model is."""

from typing import Any

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

HEADS_THAT_FOLLOW = {
    "cohere_compass", "gemma3n", "gemma4", "gemma4_unified", "granite4_vision", "hyperclovax_vision_v2",
    "inkling_mm_model", "muse_glimmer",
}  # fmt: skip
"""Composite models whose head does what their text config says. The others' leave it out: Gemma 3 beside images has no
cap, Aya Vision no multiplier, whatever is written there."""


def text_config(config: Any) -> Any:
    """The part of a Hugging Face config that describes the language model: of one that also sees or hears, the part
    with the vocabulary; else the config itself. What is read of a model's config is read from here."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def language_model(model: Any) -> Any:
    """The part of a Hugging Face causal LM that makes last hidden states of token ids: its base model, or of a model
    that also sees or hears, the decoder without its head."""
    part = model if text_config(model.config) is model.config else model.get_decoder()
    if part.get_output_embeddings() is None:
        return part
    base = part.base_model
    return part.model if base is part else base  # Llama 4 names its base model otherwise


def logit_transform_of(config: Any) -> dict[str, Any]:
    """`logit_scale` and `final_logit_softcapping` for this package's functions, whatever the architecture calls them.

    Args:
        config: a Hugging Face model config. Gemma, RecurrentGemma and xLSTM have a soft cap; Cohere, Falcon-H1 and
            others a multiplier; Granite, MiniCPM3 and Inkling a divisor, of which HyperCLOVA X makes a multiplier.
    """
    whole, config = config, text_config(config)
    if config is not whole and whole.model_type not in HEADS_THAT_FOLLOW:
        return {"logit_scale": 1.0, "final_logit_softcapping": None}
    scale, divisor, cap = (_first(config, names) for names in (MULTIPLIERS, DIVISORS, CAPS))
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return {"logit_scale": 1.0 if scale is None else float(scale), "final_logit_softcapping": cap}


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
