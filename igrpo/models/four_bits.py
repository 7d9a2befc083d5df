"""A frozen base in 4 bits (QLoRA): bitsandbytes keeps it, adapters train beside it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from igrpo.models.config import ModelConfig
from igrpo.settings import ConfigError

PACKAGE = "bitsandbytes"


def check_four_bits(settings: Any, config: ModelConfig, divides: bool) -> None:
    """
    Args:
        settings: the model's own config.
        divides: its weights are divided over processes.

    Raises:
        ConfigError: a base in 4 bits that cannot be had here.
    """
    method = getattr(settings, "quantization_config", None) or {}
    method = method.get("quant_method") if isinstance(method, dict) else method.quant_method
    if str(method) == PACKAGE:
        raise ConfigError(
            f"model_name_or_path: {config.model_name_or_path} is in 4 or 8 bits already, and the engine would read "
            "other weights than the learner; take the model it was made of, with load_in_4bit: true"
        )
    if not config.load_in_4bit:
        return
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(f"load_in_4bit: the {PACKAGE} package is not installed; pip install {PACKAGE}")
    if divides:
        raise ConfigError(
            "load_in_4bit: 4-bit weights are not divided over processes; start with `accelerate launch --multi_gpu`, "
            "or write false"
        )


def loading_options(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """For ``from_pretrained``; ``dtype`` is what the layers compute in. The head stays as it is."""
    if not config.load_in_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    kind, nested = config.bnb_4bit_quant_type, config.use_bnb_nested_quant
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=dtype
        )
    }


def as_own(model: Any) -> Any:
    """The model, which from now on is saved as any other: what it is saved from are plain weights (see ``plain``).

    Raises:
        ConfigError: its layers are turned round in 4 bits.
    """
    from transformers.pytorch_utils import Conv1D

    for layer in filter(in_four_bits, model.modules()):
        if layer.source_cls is Conv1D:
            raise ConfigError(f"load_in_4bit: the layers of {type(model).__name__} cannot be merged again; write false")
        # On some CPUs a pass without gradients would repack the weight in place, and gradients of it come out wrong.
        layer.support_avx512bf16_for_cpu = False
    model.hf_quantizer = None
    del model.config.quantization_config
    return model


def in_four_bits(layer: torch.nn.Module) -> bool:
    """Whether bitsandbytes keeps the weight of this layer."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """A weight as its layer multiplies by it: what is kept in 4 bits is unpacked, the rest is as it is."""
    state = getattr(tensor, "quant_state", None)
    if state is None:
        return tensor
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(tensor.detach(), state)
