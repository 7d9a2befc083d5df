"""LoRA through peft: adapters train beside frozen weights, the engine gets the merged weights.

A layer with an adapter computes W·x + s·B·A·x and is sent as W + s·B·A. What is not sent as it was computed is refused
by name, by running this code once on the model without its weights (``models.skeleton``).
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from igrpo.learner.config import LearnerConfig
from igrpo.models.four_bits import in_four_bits
from igrpo.settings import ConfigError

_BASE, _WRAPPED, _ADAPTER = ".base_layer", "base_model.model.", "default"
_ALL = "all-linear"
_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate")
"""Layers of one expert in checkpoints; where transformers keeps all experts in one tensor, peft adapts that."""


class Adapters:
    """Puts a LoRA adapter (W + alpha/r · B·A) beside layers of ``model``, in place.

    Raises:
        ConfigError: peft is not installed, ``lora_target_modules`` names a layer that is not there, or one whose merged
            weight would not be what was trained.
    """

    def __init__(self, model: Any, config: LearnerConfig):
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise ConfigError("use_peft: the peft package is not installed; pip install peft") from None
        modules, parameters = targets(model, config.lora_target_modules)
        settings = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=modules,
            target_parameters=parameters or None,
            exclude_modules=_unlike_linear(model) or None if isinstance(modules, str) else None,
            task_type="CAUSAL_LM",
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="peft")  # of what is refused or seen to here
                self.wrapper = get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(_refusal(str(error), config)) from None
        self.layers = {
            name.removeprefix(_WRAPPED): module
            for name, module in self.wrapper.named_modules()
            if hasattr(module, "lora_A") and hasattr(module, "base_layer")
        }
        named, local = config.model_name_or_path, Path(config.model_name_or_path).expanduser()
        self.base = local.resolve().name if local.is_dir() else named
        self._reached: set[str] = set()
        _check(model, self.layers)

    def disabled(self) -> AbstractContextManager:
        """Inside, the model is the one that training began with."""
        return self.wrapper.disable_adapter()

    def merged(self, full_tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights under the names of a model without adapters; sums are taken in float32."""
        adapted = {self._weight(name): name for name in self.layers}
        factors: dict[str, dict[str, torch.Tensor]] = {}
        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in full_tensors:
            layer, _, rest = name.partition(".lora_")
            if not rest:
                name = plain_name(name)
                if name in adapted:
                    waiting[name] = tensor
                else:
                    yield name, tensor
                continue
            pair = factors.setdefault(layer, {})
            pair[rest.removeprefix("embedding_")[0]] = tensor.float()
            if len(pair) == 2:
                name = self._weight(layer)
                yield name, waiting.pop(name).float() + _delta(self.layers[layer], **factors.pop(layer))

    def untrained(self) -> list[str]:
        """Layers whose adapter the first gradient of this process did not reach (a step without samples has none): some
        models read a weight without calling its layer. Empty before and after that step."""
        if self._reached:
            return []
        named = ((name.removeprefix(_WRAPPED), p) for name, p in self.wrapper.named_parameters())
        self._reached = {name.partition(".lora_")[0] for name, p in named if ".lora_" in name and p.grad is not None}
        return sorted(plain_name(name) for name in self.layers if name not in self._reached) if self._reached else []

    def fused_experts(self) -> list[str]:
        """Layers that keep all experts in one tensor."""
        return [plain_name(name) for name, layer in self.layers.items() if hasattr(layer, "parameter_name")]

    def _weight(self, layer: str) -> str:
        """Name of the weight that an adapter changes."""
        return f"{plain_name(layer)}.{getattr(self.layers[layer], 'parameter_name', 'weight')}"

    def described(self, vllm: bool = True) -> dict[str, Any]:
        """As ``adapter_config.json`` says it, for an engine that keeps the base and gets the adapter alone.

        Args:
            vllm: it is vLLM.

        Raises:
            ConfigError: experts in one tensor, whose adapters such an engine lays out otherwise, or vLLM and the head:
                it reads a prompt's log-probabilities with the adapters of other requests' tokens.
        """
        head = self.wrapper.get_base_model().get_output_embeddings()
        for name in (name for name, layer in self.layers.items() if vllm and layer is head):
            raise ConfigError(
                f"lora_sync: beside other requests vLLM reads no log-probabilities of a prompt where "
                f"{plain_name(name)} has an adapter; leave it out of lora_target_modules, or write merged"
            )
        for name in self.fused_experts():
            raise ConfigError(f"lora_sync: {name} holds fused experts, whose adapters travel merged only; write merged")
        config = self.wrapper.peft_config[_ADAPTER]
        return {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.r, "lora_alpha": config.lora_alpha,
            "target_modules": sorted(plain_name(name) for name in self.layers), "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": config.fan_in_fan_out,
        }  # fmt: skip

    def save(self, folder: Path, full_tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """The adapter alone, as peft writes it; a base that is a folder of this machine is called by its name."""
        state = {f"{_WRAPPED}{name}": tensor for name, tensor in full_tensors if ".lora_" in name}
        self.wrapper.peft_config[_ADAPTER].base_model_name_or_path = self.base
        # The base model's embedding is no part of it, though peft would add it beside an adapted one.
        self.wrapper.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def sent_name(name: str) -> str:
    """That a factor has in peft's files."""
    return _WRAPPED + plain_name(name).replace(f".{_ADAPTER}", "")


def plain_name(name: str) -> str:
    """The name that a weight has in a model without adapters."""
    return name.replace(_BASE, "")


def head_product(head: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Hidden states (n, H'), weight (V, H') and bias (V,) whose product are the logits of ``head``.

    Beside an adapter, x·Wᵀ + s·(x·Aᵀ)·Bᵀ is one product of [x, s·x·Aᵀ] (n, H + r) and [W, B] (V, H + r), so the fused
    loss trains the adapter, dropout included.
    """
    base = getattr(head, "base_layer", head)
    if base is head or head.disable_adapters:
        return hidden, base.weight, base.bias
    down, up = head.lora_A[_ADAPTER], head.lora_B[_ADAPTER]
    low = down(head.lora_dropout[_ADAPTER](hidden.to(down.weight.dtype))) * head.scaling[_ADAPTER]
    weight = torch.cat([base.weight, up.weight.to(base.weight.dtype)], dim=1)
    return torch.cat([hidden, low.to(hidden.dtype)], dim=1), weight, base.bias


def targets(model: Any, entries: list[str] | None) -> tuple[str | list[str], list[str]]:
    """What peft is told: ``target_modules`` and ``target_parameters``.

    An entry is a layer's name or the end of it, ``all-linear``, or a regular expression for whole names.

    Raises:
        ConfigError: an entry that no layer has, or an expression that is none.
    """
    entries = entries or [_ALL]
    modules = [name for name, _ in model.named_modules() if name]
    weights = [name for name, p in model.named_parameters() if p.ndim > 1]
    fused = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.ndim > 2}
    modules += [f"{experts}.{part}" for experts in fused for part in _EXPERTS]
    patterns, parameters = [], []
    for entry in entries:
        pattern = _pattern(model, entry)
        if any(map(pattern.fullmatch, modules)):
            patterns.append(pattern.pattern)
        elif any(map(pattern.fullmatch, weights)):
            parameters.append(entry)
        else:
            known = ", ".join(sorted({m.rpartition(".")[2] for m in _linear(model)}))
            raise ConfigError(
                f"lora_target_modules: no layer is called {entry}; write {_ALL}, or names such as {known}"
            )
    if len(entries) == 1 and entries[0].lower() == _ALL:
        return _ALL, []
    if not any(map(_is_pattern, entries)):
        return [entry for entry in entries if entry not in parameters], parameters
    return "|".join(f"(?:{pattern})" for pattern in patterns), parameters


def _is_pattern(entry: str) -> bool:
    return entry.lower() == _ALL or bool(set(entry) & set("\\*+?[](){}|^$"))


def _pattern(model: Any, entry: str) -> re.Pattern[str]:
    if entry.lower() == _ALL:
        experts = rf".*\.experts\.(?:{'|'.join(_EXPERTS)})"
        return re.compile("|".join([*map(re.escape, _linear(model)), experts]))
    if not _is_pattern(entry):
        return re.compile(rf"(?:.*\.)?{re.escape(entry)}")
    try:
        return re.compile(entry)
    except re.error as error:
        raise ConfigError(f"lora_target_modules: {entry} is no regular expression ({error})") from None


def _linear(model: Any) -> list[str]:
    """Names of the linear layers but the head."""
    from transformers.pytorch_utils import Conv1D

    left_out = {*_unlike_linear(model)}
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    return [name for name in linear if name not in left_out]


def _unlike_linear(model: Any) -> list[str]:
    """Names of layers that are linear ones by their class but answer otherwise, as Llama 4's router does."""
    return [n for n, m in model.named_modules() if _is_unlike(m)]


def _is_unlike(layer: torch.nn.Module) -> bool:
    kind = torch.nn.Linear
    return isinstance(layer, kind) and type(layer).forward is not kind.forward and not in_four_bits(layer)


def _refusal(text: str, config: LearnerConfig) -> str:
    if "lora_dropout" in text:
        return (
            f"lora_dropout: {config.lora_dropout} cannot be had beside the fused experts that lora_target_modules "
            "chooses; write 0, or layers without them, such as [q_proj, k_proj, v_proj, o_proj]"
        )
    first = text.partition("\n")[0]
    if first.startswith("Target module "):
        kind = first.removeprefix("Target module ").partition("(")[0]
        return f"lora_target_modules: a {kind} can have no adapter; write names of linear layers and embeddings only"
    return f"lora_target_modules: {first}"


def _check(model: Any, layers: dict[str, Any]) -> None:
    """Refuses layers that cannot be merged into what was trained."""
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.lora.layer import ParamWrapper

    tied = _tied(model)
    for name, layer in layers.items():
        plain, base = plain_name(name), layer.get_base_layer()
        if base in tied:
            raise ConfigError(
                f"lora_target_modules: {plain} shares its weight with another layer (tie_word_embeddings), and an "
                "adapter would make them two; leave it out"
            )
        known = in_four_bits(base) or type(layer) in (Linear, Embedding, ParamWrapper)
        if not known or _is_unlike(base):
            raise ConfigError(f"lora_target_modules: {plain} ({type(base).__name__}) cannot be merged; leave it out")
        takes = list(inspect.signature(type(base).forward).parameters)
        if type(layer) is Embedding and len(takes) > 2:  # OPT's positions: not called with the ids that peft looks up
            raise ConfigError(
                f"lora_target_modules: {plain} is a {type(base).__name__}, which peft would read at the wrong rows; "
                "leave it out"
            )


def _tied(model: Any) -> set[Any]:
    """Modules whose weight another one has too."""
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter) and not hasattr(module, "base_layer"):
            owners.setdefault(id(weight), []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def _delta(layer: Any, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """What the adapter adds to the weight: s·B·A, in the weight's own layout.

    A and B are (r, in) and (out, r); of E fused experts (E·r, in) and (out, r·E), peft's order.
    """
    from peft.tuners.lora import Embedding

    scale, experts = layer.scaling[_ADAPTER], getattr(layer, "num_experts", 1)
    if experts > 1:
        down, up = A.view(experts, -1, A.shape[-1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1)
        delta = up @ down * scale  # (E, out, in)
        return delta if layer._did_swap_in_out_features else delta.transpose(1, 2)
    delta = B @ A * scale
    return delta.t() if isinstance(layer, Embedding) or layer.fan_in_fan_out else delta
