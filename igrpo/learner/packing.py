"""Samples into micro-batches by what they cost: no padding, a shared prompt once, the same load for every process.

Sequences stand one after the other in one long row. Completions of the same prompt form a ``PrefixGroup``: the prompt
is there once, and each completion reads it (``packed_attention.py``). Planning is plain Python on lengths; every
process plans the whole step from the same samples and takes its share.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from igrpo.data_types import TrainingSample
from igrpo.learner.config import LearnerConfig


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """One prompt, and the completions that go on from it."""

    prompt_ids: tuple[int, ...]
    samples: tuple[TrainingSample, ...]

    @property
    def tokens(self) -> int:
        """Tokens the learner computes: a completion's last one predicts nothing and is never an input."""
        return len(self.prompt_ids) + sum(len(s.completion_ids) - 1 for s in self.samples)

    @property
    def raw_tokens(self) -> int:
        """Tokens of the same sequences apart from each other."""
        return sum(len(s.prompt_ids) + len(s.completion_ids) for s in self.samples)


Bin = tuple[PrefixGroup, ...]
"""One micro-batch."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one micro-batch may hold. One sequence longer than ``tokens`` still gets a micro-batch of its own."""

    tokens: float = math.inf
    completions: float = math.inf

    def hold(self, tokens: int, completions: int) -> bool:
        return completions <= self.completions and (tokens <= self.tokens or completions == 1)

    @classmethod
    def of(cls, config: LearnerConfig) -> Limits:
        if config.token_budget is not None:
            return cls(tokens=config.token_budget)
        return cls(completions=config.per_device_train_batch_size)


def pack(samples: Sequence[TrainingSample], limits: Limits, *, shared: bool = True, processes: int = 1) -> list[Bin]:
    """Micro-batches of a whole step, largest first; process r takes ``bins[r::processes]``.

    The fewest micro-batches that the limits allow, rounded up to a multiple of the processes, filled so that the
    largest is small: the largest piece goes to the emptiest micro-batch that still holds it.

    Args:
        shared: completions of the same prompt share it; otherwise each has its own copy.
        processes: that work side by side. With fewer pieces than processes, some get no micro-batch.
    """
    pieces = [piece for group in prefix_groups(samples, shared) for piece in _split(group, limits)]
    pieces.sort(key=lambda piece: piece.tokens, reverse=True)
    fewest = max(
        sum(p.tokens for p in pieces) / limits.tokens,
        sum(len(p.samples) for p in pieces) / limits.completions,
        sum(p.tokens > limits.tokens / 2 for p in pieces),  # no two of them go together
    )
    count = math.ceil(max(fewest, 1) / processes) * processes
    while (bins := _fill(pieces, count, limits)) is None:
        count += processes
    # Pieces of one group that met again share their prompt again.
    merged = (prefix_groups([s for piece in contents for s in piece.samples], shared) for contents in bins if contents)
    return sorted(map(tuple, merged), key=unique_tokens, reverse=True)


def pad(samples: Sequence[TrainingSample], limits: Limits) -> list[Bin]:
    """Micro-batches for models that cannot be packed: similar lengths together, and padding counts as tokens."""

    def length(s: TrainingSample) -> int:
        return len(s.prompt_ids) + len(s.completion_ids)

    bins: list[list[TrainingSample]] = []
    for s in sorted(samples, key=length, reverse=True):
        if bins and limits.hold(length(bins[-1][0]) * (len(bins[-1]) + 1), len(bins[-1]) + 1):
            bins[-1].append(s)
        else:
            bins.append([s])
    return [tuple(prefix_groups(contents, shared=False)) for contents in bins]


def prefix_groups(samples: Sequence[TrainingSample], shared: bool = True) -> list[PrefixGroup]:
    """Samples by equal prompts, in order of first appearance; each by itself when nothing is to be shared."""
    if not shared:
        return [PrefixGroup(s.prompt_ids, (s,)) for s in samples]
    by_prompt: dict[tuple[int, ...], list[TrainingSample]] = {}
    for s in samples:
        by_prompt.setdefault(s.prompt_ids, []).append(s)
    return [PrefixGroup(prompt_ids, tuple(members)) for prompt_ids, members in by_prompt.items()]


def unique_tokens(contents: Bin) -> int:
    return sum(group.tokens for group in contents)


def padded_tokens(contents: Bin) -> int:
    samples = [s for group in contents for s in group.samples]
    return len(samples) * max(len(s.prompt_ids) + len(s.completion_ids) for s in samples)


def raw_tokens(contents: Bin) -> int:
    return sum(group.raw_tokens for group in contents)


def _split(group: PrefixGroup, limits: Limits) -> list[PrefixGroup]:
    """The group in as few pieces as fit a micro-batch; each repeats the prompt."""
    pieces: list[list[TrainingSample]] = []
    for s in sorted(group.samples, key=lambda s: len(s.completion_ids), reverse=True):
        for piece in pieces:
            grown = PrefixGroup(group.prompt_ids, (*piece, s))
            if limits.hold(grown.tokens, len(grown.samples)):
                piece.append(s)
                break
        else:
            pieces.append([s])
    return [PrefixGroup(group.prompt_ids, tuple(piece)) for piece in pieces]


def _fill(pieces: Sequence[PrefixGroup], count: int, limits: Limits) -> list[list[PrefixGroup]] | None:
    """``pieces``, largest first, over ``count`` micro-batches; None if they do not fit."""
    bins: list[list[PrefixGroup]] = [[] for _ in range(count)]
    completions = [0] * count
    emptiest_first = [(0, i) for i in range(count)]  # (tokens, micro-batch): a heap
    for piece in pieces:
        too_full = []
        while emptiest_first:
            tokens, i = heapq.heappop(emptiest_first)
            if limits.hold(tokens + piece.tokens, completions[i] + len(piece.samples)):
                break
            too_full.append((tokens, i))
        else:
            return None
        bins[i].append(piece)
        completions[i] += len(piece.samples)
        for state in (*too_full, (tokens + piece.tokens, i)):
            heapq.heappush(emptiest_first, state)
    return bins
