"""What a model's own code does to its logits, read from its config."""

from typing import Any

MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transform_of(config: Any) -> dict[str, Any]:
    """`logit_scale` and `final_logit_softcapping` for this package's functions, whatever the architecture calls them.

    Args:
        config: a Hugging Face model config. Gemma, RecurrentGemma and xLSTM have a soft cap; Cohere, Falcon-H1 and
            others a multiplier; Granite and MiniCPM3 a divisor, of which HyperCLOVA X makes a multiplier.
    """
    scale, cap = _first(config, MULTIPLIERS), _first(config, CAPS)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return {"logit_scale": 1.0 if scale is None else float(scale), "final_logit_softcapping": cap}


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
