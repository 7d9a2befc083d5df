"""An adapter on its way to vLLM beside one base: the folder that vLLM reads, and what its workers then hold.

Files are those that peft writes. One adapter is ever loaded, under one name and number, replaced in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from igrpo.engines.weight_folder import not_written
from igrpo.engines.weights import fingerprint

NAME, NUMBER = "adapter", 1


def write_adapter(factors: Mapping[str, torch.Tensor], adapter: Mapping[str, Any], version: int, target: Path) -> None:
    """
    Args:
        adapter: what ``adapter_config.json`` says of it.

    Raises:
        EngineError: there is no room, or the folder is gone.
    """
    try:
        target.mkdir()
        save_file(dict(factors), target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(dict(adapter)), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise not_written(version, target, error) from error


def as_loaded(factors: Mapping[str, torch.Tensor], adapter: Mapping[str, Any]) -> dict[str, str]:
    """Name -> marks of the factor as vLLM keeps it, the scale multiplied into B."""
    scale = adapter["lora_alpha"] / adapter["r"]
    scaled = (".lora_B.", ".lora_embedding_B")
    return {n: _marks(t * scale if any(part in n for part in scaled) else t) for n, t in factors.items()}


def loaded(worker: Any) -> list[str]:
    """Marks of each factor that this worker of vLLM holds."""
    adapter = worker.model_runner.lora_manager._adapter_manager.get_adapter(NUMBER)
    found = []
    for layer in adapter.loras.values():
        for factor in (layer.lora_a, layer.lora_b):
            found += [_marks(t) for t in (factor if isinstance(factor, list) else [factor]) if t is not None]
    return found


def not_there(expected: Mapping[str, str], workers: list[list[str]]) -> list[str]:
    """Names of ``as_loaded`` that one of the workers lacks."""
    return [name for name, marks in expected.items() if not all(marks in held for held in map(set, workers))]


def _marks(tensor: torch.Tensor) -> str:
    """Shape, dtype and bits, as text: it travels as JSON."""
    return f"{tuple(tensor.shape)} {tensor.dtype} {int(fingerprint(tensor.contiguous()))}"
