"""Which experts a model's routers choose, noted where it samples and given again where it learns.

Every router of transformers takes the k largest of its scores by ``torch.topk`` and makes its weights of what that
returns. So the choice is exchanged there: the k largest become those that were given, with the scores that they have
now, and each architecture goes on with them in its own way; gradients reach the router through the scores.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from igrpo.settings import ConfigError
from igrpo_kernels.model_logits import language_model, text_config

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configs call their number."""
OWN = -1
"""Instead of an expert: the router chooses itself."""


class Routers:
    """Of one model, which is hooked once.

    Raises:
        ConfigError: a model without routers that are known.
    """

    def __init__(self, model: Any):
        part = language_model(model)
        kind = getattr((getattr(part, "_can_record_outputs", None) or {}).get("router_logits"), "target_class", None)
        settings = text_config(model.config)
        self.k: int = getattr(settings, "num_experts_per_tok", None) or 0
        self.experts: int = max(getattr(settings, name, None) or 0 for name in EXPERTS)
        """At least so many stand to choose from: LongCat's routers also have experts that do nothing."""
        self._unknown = f"router_replay: no router of {type(model).__name__} is known to choose; write false"
        # Of a plain layer (Jamba's) the choice is made outside.
        known = kind is not None and kind is not torch.nn.Linear
        found = [(name, m) for name, m in part.named_modules() if known and isinstance(m, kind)]
        if not found or not self.k:
            raise ConfigError(self._unknown)
        self.layers: int = settings.num_hidden_layers
        self.given: torch.Tensor | None = None
        """(tokens, layers, k) for the next forward pass, and while it is computed again; ``OWN`` where none is."""
        self.noted: dict[int, list[torch.Tensor]] | None = None
        """Layer -> (tokens, k) of each forward pass, where it is wanted."""
        self._open: list[_Choice] = []
        for name, module in found:
            numbers = re.findall(r"\.(\d+)\.", name)
            module.register_forward_pre_hook(self._enter(int(numbers[0])))
            module.register_forward_hook(self._leave, always_call=True)

    def note(self) -> None:
        """Forgets what was noted, and begins again."""
        self.noted = defaultdict(list)

    def of_rows(self, rows: int) -> torch.Tensor:
        """(rows, tokens, layers, k) int16 on the CPU: what was noted of ``rows`` sequences of one length.

        Raises:
            ConfigError: nothing was: the routers choose in a way of their own (PhiMoE's).
        """
        if not self.noted:
            raise ConfigError(self._unknown)
        noted = {i: torch.cat([x.view(rows, -1, self.k) for x in some], 1) for i, some in self.noted.items()}
        experts = torch.full((*next(iter(noted.values())).shape[:2], self.layers, self.k), OWN, dtype=torch.int16)
        for layer, chosen in noted.items():
            experts[:, :, layer] = chosen.to("cpu", torch.int16)
        return experts

    def _enter(self, layer: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            self._open.append(_Choice(self, layer))
            self._open[-1].__enter__()

        return hook

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        self._open.pop().__exit__(None, None, None)


class _Choice(TorchFunctionMode):
    def __init__(self, routers: Routers, layer: int):
        super().__init__()
        self._routers, self._layer = routers, layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return out
        # DeepSeek's also ranks groups of experts, and the best of each group.
        ranked, k = args[0], self._routers.k
        if ranked.ndim != 2 or ranked.shape[1] < self._routers.experts or out.indices.shape[1] != k:
            return out
        chosen, given = out.indices, self._routers.given
        if given is not None:
            wanted = given[:, self._layer].to(chosen.dtype)
            chosen = torch.where(wanted == OWN, chosen, wanted)
            out = torch.return_types.topk((args[0].gather(1, chosen), chosen))
        if self._routers.noted is not None:
            self._routers.noted[self._layer].append(chosen)
        return out
