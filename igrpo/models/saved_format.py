"""A model's tensors as ``save_pretrained`` writes them: what an engine loads, and what a push must therefore bring.

A model in memory may differ from its folder: experts are fused, prefixes are left out, names are newer. transformers
keeps the rules of each architecture and undoes them when it saves. The same rules run here, a few tensors at a time:

    format = SavedFormat(model)            before adapters are put in or weights are divided
    format.keeps(name)                     a tied copy or a buffer without a place in the folder is not kept
    format.convert(named_tensors)          (module name, tensor) -> (folder's name, folder's tensor), as they come

A rule that makes several tensors of one, or one of several, waits for those it needs and for no others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from igrpo.settings import ConfigError

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class SavedFormat:
    """The rules for one model.

    Args:
        model: a ``PreTrainedModel`` as it was loaded; its tensors are looked at, not kept.

    Raises:
        ConfigError: the model shares weights in a way that ``save_pretrained`` refuses.
    """

    def __init__(self, model: Any):
        self._model = model
        renamings, converters = _undoing(model)
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        self._target: dict[str, str] = {}
        """Module name -> the folder's name, or the name that a rule's tensors have in common."""
        self._rules: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        """That common name -> the rule, and the tensors it takes in its own order, each with its pattern."""
        for name in sorted(_kept(model), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, reverse=True)
            self._target[name] = target
            if pattern is not None:
                self._rules.setdefault(target, (by_pattern[pattern], []))[1].append((name, pattern))
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._always_float32 = [re.compile(p.replace("*", ".*")) for p in model._keep_in_fp32_modules_strict or ()]

    def keeps(self, name: str) -> bool:
        """Whether the folder has this parameter or buffer."""
        return name in self._target

    def dtype(self, name: str, tensor: torch.Tensor, compute: torch.dtype) -> torch.dtype:
        """What ``name`` is written in where the model computes in ``compute``: a router's correction stays as it is."""
        if name not in self._parameters or not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if any(p.search(name) for p in self._always_float32) else compute

    def convert(self, named_tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """The folder's tensors, contiguous, from all that ``keeps`` accepts."""
        waiting: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, tensor in named_tensors:
            target = self._target[name]
            if target not in self._rules:
                yield target, tensor.contiguous()
                continue
            waiting[target][name] = tensor
            del tensor
            if len(waiting[target]) == len(self._rules[target][1]):
                for saved, made in self._apply(target, waiting.pop(target)):
                    yield saved, made.contiguous()

    def _apply(self, target: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        rule, parts = self._rules[target]
        rule = deepcopy(rule)  # it collects tensors
        for name, pattern in parts:
            rule.add_tensor(target, name, pattern, tensors.pop(name))
        made = rule.convert(target, model=self._model, config=self._model.config)
        for saved, tensor in made.items():
            yield saved, tensor[0] if isinstance(tensor, list) else tensor


def saved_tensors(model: Any, compute: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """What ``save_pretrained`` writes for a model that computes in ``compute``: names and tensors, one at a time."""
    saved = SavedFormat(model)
    kept = ((name, tensor.detach()) for name, tensor in tensors_of(model) if saved.keeps(name))
    return saved.convert((name, tensor.to(saved.dtype(name, tensor, compute))) for name, tensor in kept)


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _undoing(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """The rules that loading has used, turned round, last one first; of a model that was not loaded, its
    architecture's own, where a prefix that the folder may or may not have had is left as it is."""
    used = getattr(model, "_weight_conversions", None)
    if used is None:
        rules = get_model_conversion_mapping(model, add_legacy=False)
        used = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    undoing = [rule.reverse_transform() for rule in reversed(used)]
    return (
        [rule for rule in undoing if isinstance(rule, WeightRenaming)],
        [rule for rule in undoing if isinstance(rule, WeightConverter)],
    )


def _kept(model: Any) -> list[str]:
    state = model.state_dict()
    if any(isinstance(tensor, FakeTensor) for tensor in state.values()):  # a rehearsal's: no memory to compare
        with unset_fake_temporarily():
            state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
    # A model that was read in parts: which weights are one is seen in any part, without asking other processes.
    state = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    try:
        return list(remove_tied_weights_from_state_dict(state, model))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"model_name_or_path: {type(model).__name__} cannot be saved ({reason})") from error
