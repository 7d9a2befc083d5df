"""What the learner asks of weights that lie whole in every process, or divided over all of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.tensor import DTensor

from igrpo.learner.adapters import Adapters
from igrpo.learner.config import LearnerConfig
from igrpo.learner.policy import Policy
from igrpo_kernels import GRPOLossOutput

TENSORS = "model.safetensors"


class Placement(ABC):
    """A ``Policy`` with its gradients and its optimiser, placed over the processes.

    Args:
        policy: whole, in every process.
        accelerator: of accelerate; it knows the processes and how they were launched.
        trains: whether there is an optimiser; a reference is only read.
    """

    divides: ClassVar[bool]
    """Whether a process keeps a part of each weight only. Then reading one whole is a collective, and a weight is cast
    when it is gathered, so that nothing can be computed in another precision."""
    least_micro_batches: ClassVar[int] = 0
    """Without which a step cannot be taken."""

    optimizer: Any = None
    module: torch.nn.Module
    """What is told whether it trains."""

    @abstractmethod
    def __init__(self, policy: Policy, config: LearnerConfig, accelerator: Any, trains: bool = True): ...

    @staticmethod
    def divider(config: LearnerConfig) -> Callable[[torch.nn.Module], None] | None:
        """What divides a model that has shapes alone, so that this process reads its parts only; None: it reads all."""
        return None

    @staticmethod  # noqa: B027 (most have nothing to say)
    def check_adapters(adapters: Adapters) -> None:
        """Refuses adapters that cannot be placed.

        Raises:
            ConfigError: says whose, and what to write instead.
        """

    @abstractmethod
    def __call__(self, *args: Any, exact: bool = False, **named: Any) -> GRPOLossOutput | torch.Tensor:
        """The policy's answer, computed in the run's precision; with ``exact`` in the weights' where they lie whole."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout."""
        training = self.module.training
        self.module.eval()
        try:
            yield
        finally:
            self.module.train(training)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward pass of one micro-batch, the step's ``last`` one or another."""
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds to the gradients, which the processes average."""
        loss.backward()

    def clip(self, max_norm: float) -> torch.Tensor:
        """The gradient's norm () before it was clipped, which the host has not waited for."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        for p in trained:  # a step without contributing samples is a step with a zero gradient
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return self.whole(torch.nn.utils.clip_grad_norm_(trained, max_norm))

    def step(self, norm: float) -> None:
        """Steps. What a broken gradient did could not be taken back, so with a ``norm`` that is not finite it does
        nothing."""
        if math.isfinite(norm):
            self.optimizer.step()

    def settle(self) -> None:  # noqa: B027
        """Drops gathered weights that a pass has left. Gradients stay: a source of weights is read in the midst of a
        step, too, where an engine beside the learner is mended."""

    def drop_gradients(self) -> None:
        """Before a step, and after it for an engine that wants their room."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def whole(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All of a parameter or buffer, in ``dtype`` if given; every process must ask for it, after ``settle``."""
        return tensor.detach().to(dtype or tensor.dtype)

    def local_parameters(self) -> list[torch.Tensor]:
        """This process's part of each weight, where it lies; none where copies would part from each other."""
        self.settle()
        return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in self.module.parameters()]

    def write(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes tensors that lie as the weights do, here whole in every process; every process must ask for it."""
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / TENSORS)

    def read(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        """What ``write`` wrote, in place."""
        there = load_file(folder / TENSORS)
        for name, tensor in tensors.items():
            tensor.copy_(there[name])

    @abstractmethod
    def save(self, state: Path) -> None:
        """Writes weights and optimiser into the folder ``state``; every process must ask for it."""

    @abstractmethod
    def load(self, state: Path, trust: bool) -> None:
        """Reads what ``save`` wrote.

        Args:
            trust: also read what may run code when it is loaded.

        Raises:
            ConfigError: it may, and nobody said that it can be trusted.
        """
