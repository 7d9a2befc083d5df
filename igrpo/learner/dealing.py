"""What a sample carries beside its tokens goes to the process that trains it, and to no other.

All processes plan a step from all samples, for which tokens are enough. The experts of a token are a hundred times as
many bytes, and the tokens that a sampler kept may be.
"""

from __future__ import annotations

import pickle
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import distributed

from igrpo.data_types import Kept, TrainingSample
from igrpo.learner.packing import Bin, PrefixGroup


def light(sample: TrainingSample) -> TrainingSample:
    """Says that there is something, and leaves it behind."""
    kept, routes = sample.kept, sample.routes
    return replace(
        sample,
        kept=None if kept is None else Kept(b"", b""),
        routes=None if routes is None else replace(routes, ids=b""),
    )


def deal(
    bins: Sequence[Bin], everyone: Sequence[TrainingSample], own: Sequence[TrainingSample], processes: Any
) -> list[Bin]:
    """This process's micro-batches with all that their samples carry: of rank r in P processes, ``bins[r::P]``.

    Args:
        bins: of light samples, the same at every process.
        everyone: those of all processes, in the order of the processes; the very ones that are in ``bins``.
        own: this process's, whole.
        processes: accelerate's, which knows this one's number and device.
    """
    rank, count, device = processes.process_index, processes.num_processes, processes.device
    if count == 1 or all(s.kept is None and s.routes is None for s in everyone):
        return list(bins[rank::count])
    place = {id(s): i for i, s in enumerate(everyone)}
    ends = list(accumulate(_exchanged([len(own)] * count, device)))
    wanted = [[place[id(s)] for one in bins[r::count] for g in one for s in g.samples] for r in range(count)]
    first = ends[rank] - len(own)
    mine = [[own[i - first] for i in some if first <= i < ends[rank]] for some in wanted]
    told = [iter(some) for some in _exchanged([[(s.kept, s.routes) for s in some] for some in mine], device)]

    def whole(sample: TrainingSample) -> TrainingSample:
        kept, routes = next(told[bisect(ends, place[id(sample)])])
        return replace(sample, kept=kept, routes=routes)

    return [
        tuple(PrefixGroup(group.prompt_ids, tuple(map(whole, group.samples))) for group in contents)
        for contents in bins[rank::count]
    ]


def collected(one: Any) -> list[Any]:
    """One plain object of each process, in the order of the processes, at the first; nothing at the others."""
    if not distributed.is_initialized():
        return [one]
    made = [None] * distributed.get_world_size() if distributed.get_rank() == 0 else None
    distributed.gather_object(one, made)
    return made or []


def _exchanged(parts: Sequence[Any], device: torch.device) -> list[Any]:
    """What each process has for this one. ``parts``: what this one has for each."""
    written = [torch.frombuffer(bytearray(pickle.dumps(part)), dtype=torch.uint8) for part in parts]
    sizes = torch.tensor([len(one) for one in written], device=device)
    coming = torch.empty_like(sizes)
    distributed.all_to_all_single(coming, sizes)
    received = torch.empty(int(coming.sum()), dtype=torch.uint8, device=device)
    distributed.all_to_all_single(received, torch.cat(written).to(device), coming.tolist(), sizes.tolist())
    return [pickle.loads(one.numpy().tobytes()) for one in received.cpu().split(coming.tolist())]
