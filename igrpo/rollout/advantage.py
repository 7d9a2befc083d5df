"""Group-relative advantages."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def group_advantages(
    rewards_P_G: Sequence[Sequence[float]], scale: str = "group", batch: Sequence[Sequence[float]] | None = None
) -> list[tuple[float, ...]]:
    """A_j = (R_j - mean R) / std R over the group's G refinements; 0 when all are equal.

    The standard deviation is the sample one (divisor G - 1). Equality is tested on the rewards themselves: a float
    sum of equal numbers can leave a tiny deviation that the division would blow up to ±1.

    Args:
        rewards_P_G: one sequence of G rewards per prompt.
        scale: ``"group"``; ``"batch"`` divides by the deviation over all rewards; ``"none"`` only centres.
        batch: the groups whose rewards are "all rewards" where other processes have some of them; None: these.

    Returns:
        One tuple of G advantages per prompt.
    """
    everything = [r for rewards in (rewards_P_G if batch is None else batch) for r in rewards]
    batch_std = stdev(everything) if len(everything) > 1 else 0.0
    advantages = []
    for rewards in rewards_P_G:
        if max(rewards) == min(rewards):
            advantages.append((0.0,) * len(rewards))
            continue
        mean = fmean(rewards)
        divisor = {"group": stdev(rewards), "batch": batch_std, "none": 1.0}[scale]
        advantages.append(tuple((r - mean) / divisor for r in rewards))
    return advantages
