"""LoRA through peft: adapters train beside frozen weights, the engine gets the merged weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from igrpo.config import ConfigError, TrainConfig

_BASE, _WRAPPED = ".base_layer", "base_model.model."


class Adapters:
    """Puts a LoRA adapter (W + alpha/r · B·A) beside the linear layers of ``model``, in place.

    Raises:
        ConfigError: peft is not installed, or no layer has a name in ``lora_target_modules``.
    """

    def __init__(self, model: Any, config: TrainConfig):
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ConfigError("use_peft: the peft package is not installed; pip install peft") from None
        settings = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules or "all-linear",
            task_type="CAUSAL_LM",
        )
        try:
            self.wrapper = get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(f"lora_target_modules: {str(error).partition(chr(10))[0]}") from None
        self.layers = {
            name.removeprefix(_WRAPPED): module
            for name, module in self.wrapper.named_modules()
            if hasattr(module, "lora_A") and hasattr(module, "base_layer")
        }

    def disabled(self) -> AbstractContextManager:
        """Inside, the model is the one that training began with."""
        return self.wrapper.disable_adapter()

    def merged(self, full_tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights under the names of a model without adapters; sums are taken in float32."""
        adapters: dict[str, dict[str, torch.Tensor]] = {}
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in full_tensors:
            layer, _, rest = name.partition(".lora_")
            if rest:
                parts = adapters.setdefault(layer, {})
                parts[rest[0]] = tensor
                if len(parts) == 2:
                    delta = parts["B"].float() @ parts["A"].float() * self.layers[layer].scaling["default"]
                    yield f"{layer}.weight", waiting.pop(layer).float() + delta
            elif name.endswith(f"{_BASE}.weight"):
                waiting[name.removesuffix(f"{_BASE}.weight")] = tensor
            else:
                yield name.replace(_BASE, ""), tensor

    def save(self, folder: Path, full_tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """The adapter alone, as peft writes it."""
        state = {f"{_WRAPPED}{name}": tensor for name, tensor in full_tensors if ".lora_" in name}
        self.wrapper.save_pretrained(folder, state_dict=state)
