"""What the loop asks of an engine: token ids in, token ids and their log-probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from igrpo.data_types import Kept, Routes, Runs

if TYPE_CHECKING:  # a server's supervisor imports this package and needs no torch
    import torch

WeightSource = Callable[[], "Iterable[tuple[str, torch.Tensor]]"]
"""Gives all weights under their checkpoint names, and gives them again when it is called again: a push that failed is
repeated. Where the weights are sharded the call is a collective, so every process of the learner makes it."""

UNKNOWN_VERSION = -1
"""Version of an engine of whose weights nobody can tell: one that slept, or a server that ran before this trainer came.
It must be pushed to before it samples."""

TRIAL_VERSION = -2
"""Version of weights that nobody samples from: pushed once before the first step to see that pushes arrive."""


class EngineError(RuntimeError):
    """The engine cannot go on: it died, or it does not hold the weights it was given."""


class NoRoomError(EngineError):
    """What has slept finds no room beside the learner: neither the engine nor the model is to blame."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; ``temperature`` 0 is greedy."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        """Whether tokens are left out before one is drawn."""
        return self.temperature > 0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)


@dataclass(frozen=True, slots=True)
class Request:
    """``n`` completions of one prompt.

    Example: ``Request("refinement/3/7", prompt_ids=(1, 5, 9), n=4, sampling=Sampling(0.7, 512))``
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    n: int
    sampling: Sampling


def request_seed(run: int, sampler: int, request_id: str) -> int:
    """A seed of its own for each request: what it samples hangs neither on what runs beside it nor on a retry.

    vLLM adds 0, 1, … n - 1 to it for the n completions.

    Args:
        run: seed of the run and the process.
        sampler: of the last ``Engine.seed``.
    """
    return int.from_bytes(hashlib.blake2b(f"{run}/{sampler}/{request_id}".encode(), digest_size=7).digest())


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request: ``n`` outputs in sampling order."""

    request_id: str
    prompt_ids: tuple[int, ...]
    """[P] the ids the engine read, as it reports them: the loop compares them with what it sent."""
    token_ids: tuple[tuple[int, ...], ...]
    """[n][T] sampled ids, the end-of-sequence token included."""
    logprobs: tuple[tuple[float, ...], ...]
    """[n][T] log-probability of each sampled id after temperature (and top-p, top-k, min-p), nats."""
    finish_reasons: tuple[str, ...]
    """[n] ``"stop"`` or ``"length"``."""
    version: int
    """Weights that sampled the n outputs; the newer ones, where weights were pushed while it ran."""
    cached_tokens: int
    """Prompt tokens served from the prefix cache."""
    kept: tuple[Kept, ...] | None = None
    """[n] what top-p, top-k and min-p left to choose from; of engines that were started with ``masks``."""
    versions: tuple[Runs, ...] = ()
    """[n] weights of each token, where weights were pushed while it ran; where an engine cannot tell them apart, those
    of the first for all. Empty: ``version``."""
    routes: tuple[Routes, ...] | None = None
    """[n] experts of prompt and completion; of engines that were started with ``routes``."""


class Engine(Protocol):
    """Requests go in with ``submit`` and come out of ``poll``, in the order they finish.

    An engine mends itself: a sampler that died, hangs or does not hold its weights is replaced, gets the weights of
    ``version`` again, and its unfinished requests start over from their prompts. So every request that is not aborted
    comes out exactly once, whole. EngineError means that this is no longer possible.
    """

    version: int
    """Version of the weights it holds, 0 being those of the model's path; UNKNOWN_VERSION after a sleep, and
    until the first push where nobody can tell."""

    def submit(self, request: Request) -> None:
        """``request_id`` is unique among the requests in flight; it may come again later."""
        ...

    def poll(self) -> list[Result]:
        """Requests that finished since the last call. Does one step of the work, or waits a few milliseconds for it."""
        ...

    def abort(self, request_ids: Collection[str]) -> None:
        """Forgets these requests, running or finished: none of them comes out of ``poll``. Unknown ids are ignored."""
        ...

    def seed(self, seed: int) -> None:
        """Restarts the sampler's random numbers."""
        ...

    def sleep(self) -> bool:
        """Leaves its memory to the learner where it can and nothing runs; then it has forgotten its weights, wants a
        push next, and is awake again after it."""
        ...

    def push_weights(self, source: WeightSource, version: int) -> dict[str, float]:
        """Replaces all weights and forgets every cached prefix; requests that run go on under the new weights.

        Returns figures for the log. Raises EngineError if any tensor did not arrive.
        """
        ...

    def restart(self) -> None:
        """A new sampler in place of one that cannot be trusted; it wants a push next."""
        ...

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each id after the first, given those before it, at temperature 1 (nats)."""
        ...

    def close(self) -> None: ...
