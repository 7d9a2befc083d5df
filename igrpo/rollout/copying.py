"""How much of a draft a refinement repeats."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from igrpo.data_types import RolloutGroup
from igrpo.rollout.config import RolloutConfig

COPY_NGRAM = 4
"""Tokens per n-gram in the copy rate; shorter ones occur by chance."""


def copy_rate(draft: Sequence[int], refinement: Sequence[int]) -> float:
    """Share of the refinement's 4-grams that the draft contains; of its single tokens where it is shorter than 4."""
    n = COPY_NGRAM if len(refinement) >= COPY_NGRAM else 1
    known = {tuple(draft[i : i + n]) for i in range(len(draft) - n + 1)}
    grams = [tuple(refinement[i : i + n]) for i in range(len(refinement) - n + 1)]
    return fmean(gram in known for gram in grams) if grams else 0.0


def copies_of(group: RolloutGroup, config: RolloutConfig) -> tuple[bool, ...]:
    """[G] which refinements have ``refinement_copy_limit`` of their n-grams or more from one draft; empty: no limit."""
    if config.refinement_copy_limit is None or group.chosen is None:
        return ()
    drafts = [group.drafts[i].completion.written_ids for i in group.shown or (group.chosen,)]
    return tuple(
        max(copy_rate(draft, one.completion.written_ids) for draft in drafts) >= config.refinement_copy_limit
        for one in group.refinements
    )
