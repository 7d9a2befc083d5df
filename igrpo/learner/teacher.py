"""The teacher of ``distillation_weight``: an average of the weights over the steps, and what a teacher says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from igrpo.learner.batching import MicroBatch
from igrpo.learner.copies import Away, put_away
from igrpo.learner.placement import Placement
from igrpo.learner.policy import Policy
from igrpo.settings import ConfigError

FOLDER = "teacher"
"""In a checkpoint's state."""


class Average:
    """After each optimiser step  theta' <- (1 - r) theta' + r theta,  of what trains: with adapters, of these alone.

    Every process keeps what it keeps of the weights themselves, in float32, and the policy takes them for as long as
    it teaches: no second model lies in memory.

    Args:
        rate: r, of 0 to 1.

    Raises:
        ConfigError: weights lie where they cannot be exchanged.
    """

    def __init__(self, policy: Policy, placement: Placement, rate: float):
        self._policy, self._placement, self._rate = policy, placement, rate
        if not placement.local_parameters():
            raise ConfigError(
                "teacher_model_kind: ema needs weights that can be written where they lie, and DeepSpeed keeps other "
                "copies of them; write base, or take recipes/accelerate/fsdp2.yaml"
            )
        self.weights = {name: p.detach().clone() for name, p in self._trained()}

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Inside, the policy has these weights; afterwards its own, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def follow(self) -> None:
        """After a step of the optimiser."""
        for name, p in self._trained():
            _local(self.weights[name]).lerp_(_local(p), self._rate)

    def save(self, state: Path) -> None:
        """Every process must ask for it."""
        self._placement.write(self.weights, state / FOLDER)

    def load(self, state: Path) -> None:
        """
        Raises:
            ConfigError: the checkpoint has none.
        """
        if not (state / FOLDER).is_dir():
            raise ConfigError(
                f"resume_from_checkpoint: {state} has no average of the weights, which teacher_model_kind: ema goes "
                "on from; write the teacher_model_kind that it was saved with"
            )
        self._placement.read(self.weights, state / FOLDER)

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        self._placement.settle()  # gathered weights would not be these
        return ((name, p) for name, p in self._policy.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self._trained():
            own, other = _local(p), _local(self.weights[name])
            before = own.clone()
            own.copy_(other)
            other.copy_(before)


def topk_rows(micro: MicroBatch, top: tuple[torch.Tensor, torch.Tensor] | None) -> dict[str, Away]:
    """The teacher's top k of each token, (n, k), in the computer's memory, which has room for those of a whole step.

    Args:
        top: ids and log-probabilities (taught tokens, k) of each; None: nothing is taught.
    """
    if top is None or micro.taught is None:
        ids = torch.full((len(micro.completion_ids), 1), -1, dtype=torch.int32, device=micro.completion_ids.device)
        logps = torch.zeros_like(ids, dtype=torch.float32)
    else:
        # A token's row in ``top``; for a boolean index the host would wait.
        row = (micro.taught.cumsum(0) - 1).clamp(min=0)
        ids = torch.where(micro.taught[:, None], top[0].int()[row], -1)
        logps = torch.where(micro.taught[:, None], top[1].float()[row], 0.0)
    return {"teacher_topk_ids": put_away(ids), "teacher_topk_logps": put_away(logps)}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
