"""Every process keeps all of the weights; several average their gradients (DDP)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch.nn.parallel import DistributedDataParallel

from igrpo.learner import state as learner_state
from igrpo.learner.config import LearnerConfig
from igrpo.learner.optimizer import build_optimizer
from igrpo.learner.placement import Placement
from igrpo.learner.policy import Policy
from igrpo.settings import ConfigError
from igrpo_kernels import GRPOLossOutput

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.bin"


class Whole(Placement):
    divides = False

    def __init__(self, policy: Policy, config: LearnerConfig, accelerator: Any, trains: bool = True):
        self.module = self._policy = policy.to(accelerator.device)
        self._accelerator = accelerator
        self._reread = config.load_in_4bit
        """The base is not saved: it comes from the model's folder, in 4 bits, which never change."""
        self._base = config.bnb_4bit_quant_type + (" with nested scales" if config.use_bnb_nested_quant else "")
        if trains:
            self.optimizer = build_optimizer(policy, config)
            if accelerator.num_processes > 1:  # gradients as views: no second copy of them
                self.module = DistributedDataParallel(policy, gradient_as_bucket_view=True)

    def __call__(self, *args: Any, exact: bool = False, **named: Any) -> GRPOLossOutput | torch.Tensor:
        with nullcontext() if exact else self._accelerator.autocast():
            return self.module(*args, **named)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients once per step, with its last micro-batch."""
        return nullcontext() if last else self._accelerator.no_sync(self.module)

    def save(self, state: Path) -> None:
        if self._accelerator.is_main_process:
            if self._reread:
                save_file(self._trained(), state / WEIGHTS, metadata={"base": self._base})
            else:
                save_model(self._policy, str(state / WEIGHTS))
            torch.save(self.optimizer.state_dict(), state / OPTIMIZER)

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self._policy.named_parameters() if p.requires_grad}

    def load(self, state: Path, trust: bool) -> None:
        missing, unexpected = load_model(self._policy, str(state / WEIGHTS), strict=not self._reread)
        if self._reread:
            if wrong := sorted({*unexpected, *self._trained().keys() & missing}):
                raise ConfigError(
                    f"resume_from_checkpoint: {state} has other adapters than this run ({wrong[0]}); write the "
                    "lora_target_modules that it was saved with"
                )
            with safe_open(state / WEIGHTS, framework="pt") as file:
                base = (file.metadata() or {}).get("base", self._base)
            if base != self._base:
                raise ConfigError(
                    f"resume_from_checkpoint: {state} was trained beside a base in {base}, and this one is in "
                    f"{self._base}; write the bnb_4bit_quant_type and use_bnb_nested_quant that it was saved with"
                )
        self.optimizer.load_state_dict(learner_state.read(state / OPTIMIZER, trust))
