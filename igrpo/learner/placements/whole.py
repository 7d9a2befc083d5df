"""Every process keeps all of the weights; several average their gradients (DDP)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_file, save_model
from torch.nn.parallel import DistributedDataParallel

from igrpo.learner import state as learner_state
from igrpo.learner.config import LearnerConfig
from igrpo.learner.optimizer import build_optimizer
from igrpo.learner.placement import Placement
from igrpo.learner.policy import Policy
from igrpo_kernels import GRPOLossOutput

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.bin"


class Whole(Placement):
    divides = False

    def __init__(self, policy: Policy, config: LearnerConfig, accelerator: Any, trains: bool = True):
        self.module = self._policy = policy.to(accelerator.device)
        self._accelerator = accelerator
        self._reread = config.load_in_4bit
        """The base is not saved: it comes from the model's folder, in 4 bits, which never change."""
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
                trained = {name: p.detach() for name, p in self._policy.named_parameters() if p.requires_grad}
                save_file(trained, state / WEIGHTS)
            else:
                save_model(self._policy, str(state / WEIGHTS))
            torch.save(self.optimizer.state_dict(), state / OPTIMIZER)

    def load(self, state: Path, trust: bool) -> None:
        load_model(self._policy, str(state / WEIGHTS), strict=not self._reread)
        self.optimizer.load_state_dict(learner_state.read(state / OPTIMIZER, trust))
