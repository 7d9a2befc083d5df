"""Weights to the engine, and whether they arrived: after each push both sides read the same probe tokens.

The learner reads them first, before a sleeping engine is woken: where that fills the GPU, awake, the learner has no
room for a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any

import torch

from igrpo.engines.base import TRIAL_VERSION, EngineError, NoRoomError
from igrpo.engines.config import EngineConfig
from igrpo.settings import ConfigError

PROBE_TOKENS = 64
"""Tokens on which engine and learner are compared."""
LEAST_LIMIT = 0.02
"""Nats per token that rounding alone may make, however little a trial has moved."""


class WeightSync:
    """Between one learner and its engine.

    Args:
        probe_ids: ids of a prompt, of which the first ``PROBE_TOKENS`` are read.
    """

    def __init__(self, engine: Any, learner: Any, probe_ids: Sequence[int], config: EngineConfig):
        self.engine, self.learner = engine, learner
        self.probe = probe_ids[:PROBE_TOKENS]
        self.tolerance = config.probe_tolerance
        self.alone = config.sends_adapter
        self.frozen = self.alone or config.load_in_4bit
        """Whether only adapters ever change."""
        self.unlike = config.load_in_4bit and not self.alone
        """Whether the folder's weights are others than the learner's: it rounded them, and sends them so."""
        self._tensors = learner.adapter_tensors if self.alone else learner.named_tensors
        self._bytes = 0

    def source(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a push brings (see ``WeightSource``)."""
        sent = 0
        for name, tensor in self._tensors():
            sent += tensor.nbytes
            yield name, tensor
        self._bytes = sent

    def push(self, version: int) -> dict[str, float]:
        """Pushes and compares. An engine that does not hold what it was sent is replaced and sent it again, once.

        Raises:
            EngineError: the push failed, or the engine's log-probabilities are not those of the pushed weights.
        """
        self.learner.placement.drop_gradients()  # the step is over, and the engine wants their room
        self.engine.sleep()
        own = self.learner.score(self.probe)
        figures = self.engine.push_weights(self.source, version)
        gap = self._gap(own)
        if not gap <= self.tolerance:
            self.engine.restart()
            figures = self.engine.push_weights(self.source, version)
            gap = self._gap(own)
        if not gap <= self.tolerance:
            raise EngineError(
                f"after pushing version {version}, engine and learner differ by {gap:.3f} nats per token on the probe "
                f"(weight_sync_tolerance: {self.tolerance:g}); the engine does not hold these weights"
            )
        figures["sync/mib"] = self._bytes / 2**20
        return {**figures, "sync/version": float(version), "sync/probe_logp_gap": gap}

    def prove(self, version: int) -> None:
        """Before the first step: engine and learner compute the same from the same folder, and still do when every
        weight has changed. An engine that keeps some of its old weights would be found out only after many small steps.

        The engine holds the trial's weights afterwards and wants a push.

        Args:
            version: of the learner's weights; they are the folder's where the engine has the same version.

        Raises:
            ConfigError: they do not; the architecture is named.
            NoRoomError: the engine found none to wake in.
        """
        noise = self.tolerance / 3
        # Of all: nobody reads a server before the first process has taken it over, which aborts whatever runs there.
        same = all(self.learner.gather(self.engine.version == version and not self.unlike))
        theirs = self.engine.score(self.probe) if same else None
        self.engine.sleep()
        before = self.learner.score(self.probe)
        if theirs is not None:
            noise = self._over_processes(theirs, before)
            if not noise <= self.tolerance:
                raise self._refused(
                    f"computes differently in the engine: its log-probabilities of the same weights are {noise:.2f} "
                    f"nats per token from the learner's (weight_sync_tolerance: {self.tolerance:g})"
                )
        with disturbed(self.learner, self.frozen):
            own = self.learner.score(self.probe)
            moved = self._over_processes(before, own)
            try:
                self.engine.push_weights(self.source, TRIAL_VERSION)
            except NoRoomError:
                raise
            except EngineError as error:
                raise self._refused(f"cannot be pushed to the engine ({error})") from error
            gap = self._gap(own)
        if not gap <= min(self.tolerance, max(moved / 10, 3 * noise, LEAST_LIMIT)):
            raise self._refused(
                f"does not reach the engine whole: after a trial push, which moved the learner's log-probabilities by "
                f"{moved:.2f} nats per token, the engine's are {gap:.2f} from them"
            )

    def _gap(self, own: Sequence[float]) -> float:
        # Nobody reads a server before the first process has fed it: weights that were refused, by this trainer or one
        # before it, stand there under the same version.
        self.learner.gather(None)
        return self._over_processes(self.engine.score(self.probe), own)

    def _over_processes(self, ours: Sequence[float], theirs: Sequence[float]) -> float:
        """Mean |difference| over the probe's tokens (nats), and over the processes: all of them must come to the same
        decision."""
        gap = fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        return self.learner.over_processes({"gap": gap})["gap"]

    def _refused(self, why: str) -> ConfigError:
        name = type(self.learner.unwrapped).__name__
        if self.alone:
            return ConfigError(f"lora_sync: an adapter of {name} {why}; write merged")
        return ConfigError(f"model_name_or_path: {name} {why}; write use_vllm: false, or take another model")


@contextmanager
def disturbed(learner: Any, adapters: bool = False) -> Iterator[None]:
    """Inside, every weight of the learner is a few percent off, or of the adapters the second factor, which begins as
    zeros, is another; afterwards all are bit for bit what they were."""
    undo = (_raise_adapters if adapters else _flip)(learner)
    try:
        yield
    finally:
        undo()


@torch.no_grad()
def _flip(learner: Any) -> Callable[[], object]:
    """Turns over the bit of each element's fraction that is worth 1/8: twice is nothing at all."""
    for tensor in learner.placement.local_parameters():
        bits = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
        tensor.view(bits).bitwise_xor_(round(2**-3 / torch.finfo(tensor.dtype).eps))
    return partial(_flip, learner)


@torch.no_grad()
def _raise_adapters(learner: Any) -> Callable[[], object]:
    """Adds 2^-5 to every element, whether it is zero or was trained."""
    names = [name for name, _ in learner.placement.module.named_parameters()]
    named = zip(names, learner.placement.local_parameters(), strict=False)  # ZeRO-3 gives none
    kept = [(t, t.clone()) for name, t in named if ".lora_B." in name or ".lora_embedding_B." in name]
    for tensor, _ in kept:
        tensor.add_(2.0**-5)
    return partial(_put_back, kept)


@torch.no_grad()
def _put_back(kept: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for tensor, before in kept:
        tensor.copy_(before)
