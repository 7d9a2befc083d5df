"""Advantages: what each completion of a group is worth beside its siblings.

R_i the rewards of one group of n completions, mean and std (the sample one, divisor n - 1) theirs:

    grpo       (R_i - mean) / std                                                       2402.03300; `scale_rewards`
    rloo       R_i - mean of the others = (R_i - mean) · n / (n - 1)                    2402.14740
    maxrl      (R_i - mean) / mean, 0 where nothing is right; rewards of 0 or more      2602.02710
    pass_at_k  k · mean over the k-subsets I with i of (max R_I - max R_(I without i))  2505.15201, eq. 33, times n;
               for k = 1 that is rloo

With `refinement_baseline: drafts`, `grpo` takes the mean reward of the drafts off (RLTF-SD, 2602.02482) and divides by
the batch's deviation or by nothing: a group of equal rewards that its drafts did not have has an advantage.

`rloo` and `pass_at_k` are unbiased: (1/n) sum_i A_i grad log pi(o_i) has the gradient of E[R] and of E[max of k] as its
mean. A completion that no reward function could judge (None) has no part in its group and advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from statistics import fmean, stdev
from typing import Any

from igrpo.data_types import Scored
from igrpo.rollout.config import RolloutConfig
from igrpo.settings import ConfigError

Rewards = Sequence[float | None]


def advantages_of(
    scored_P_G: Sequence[Sequence[Scored]],
    config: RolloutConfig,
    estimator: str,
    gather: Callable[[Any], list[Any]] = lambda one: [one],
    drafts_P_N: Sequence[Sequence[Scored]] | None = None,
) -> list[tuple[float, ...]]:
    """One tuple of advantages per group, as ``config`` says.

    Args:
        drafts_P_N: of the refinements in ``scored_P_G``, for ``refinement_baseline: drafts``.
        gather: one object of each process, at every process: deviations over the batch span all of them.

    Raises:
        ConfigError: ``maxrl`` was given a reward below 0.
    """
    if config.multi_objective_aggregation == "normalize_then_sum":
        return _normalized_then_summed(scored_P_G, config.reward_weights, gather)
    rewards_P_G = [[reward_of(one) for one in scored] for scored in scored_P_G]
    batched = estimator == "grpo" and config.scale_rewards == "batch"
    batch = [group for part in gather(rewards_P_G) for group in part] if batched else None
    if drafts_P_N is not None and config.refinement_baseline == "drafts":
        baselines = [_mean_of_judged([reward_of(one) for one in drafts]) for drafts in drafts_P_N]
        return _against(baselines, rewards_P_G, _deviation(rewards_P_G if batch is None else batch) if batched else 1.0)
    return group_advantages(rewards_P_G, config.scale_rewards, batch, estimator, config.advantage_pass_k)


def reward_of(scored: Scored) -> float | None:
    """The weighted reward; None where no function could judge."""
    return None if all(score is None for score in scored.rewards.values()) else scored.reward


def group_advantages(
    rewards_P_G: Sequence[Rewards],
    scale: str = "group",
    batch: Sequence[Rewards] | None = None,
    estimator: str = "grpo",
    pass_k: int = 1,
) -> list[tuple[float, ...]]:
    """One tuple of G advantages per prompt, by the equations of this module; 0 where a group's rewards are all equal.

    Equality is tested on the rewards themselves: a float sum of equal numbers can leave a tiny deviation that the
    division would blow up to ±1.

    Args:
        rewards_P_G: one sequence of G rewards per prompt.
        scale: of ``grpo``: ``"group"``; ``"batch"`` divides by the deviation over all rewards; ``"none"`` only centres.
        batch: the groups whose rewards are "all rewards" where other processes have some of them; None: these.
        pass_k: k of ``pass_at_k``.
    """
    divisor = _deviation(rewards_P_G if batch is None else batch) if scale == "batch" else 1.0

    def of_group(judged: list[float]) -> Sequence[float]:
        if estimator == "grpo":
            return _centred(judged, stdev(judged) if scale == "group" else divisor)
        if estimator == "rloo" or (estimator == "pass_at_k" and pass_k == 1):
            return _centred(judged, 1 - 1 / len(judged))
        if estimator == "maxrl":
            if min(judged) < 0:
                raise ConfigError(
                    f"advantage_estimator: maxrl divides by a group's mean reward, and one of its rewards is "
                    f"{min(judged):g}; leave out rewards below 0, or write grpo"
                )
            return _centred(judged, fmean(judged))
        return _marginal_maxima(judged, pass_k)

    return [_among_judged(rewards, of_group) for rewards in rewards_P_G]


def _deviation(rewards_P_G: Sequence[Rewards]) -> float:
    everything = [r for rewards in rewards_P_G for r in rewards if r is not None]
    return stdev(everything) if len(everything) > 1 else 0.0


def _mean_of_judged(rewards: Rewards) -> float | None:
    judged = [r for r in rewards if r is not None]
    return fmean(judged) if judged else None


def _against(
    baselines: Sequence[float | None], rewards_P_G: Sequence[Rewards], divisor: float
) -> list[tuple[float, ...]]:
    """(R - the drafts' mean) / divisor; 0 where no draft could be judged, or nothing in the batch differs."""

    def one(reward: float | None, baseline: float | None) -> float:
        return 0.0 if reward is None or baseline is None or not divisor else (reward - baseline) / divisor

    return [tuple(one(r, b) for r in rewards) for rewards, b in zip(rewards_P_G, baselines, strict=True)]


def _among_judged(rewards: Rewards, of_group: Callable[[list[float]], Sequence[float]]) -> tuple[float, ...]:
    judged = [r for r in rewards if r is not None]
    if not judged or max(judged) == min(judged):
        return (0.0,) * len(rewards)
    found = iter(of_group(judged))
    return tuple(0.0 if r is None else next(found) for r in rewards)


def _centred(rewards: Sequence[float], divisor: float) -> list[float]:
    mean = fmean(rewards)
    return [(r - mean) / divisor for r in rewards]


def _marginal_maxima(rewards: Sequence[float], k: int) -> list[float]:
    """What each reward adds to the best of k, in the mean over the k - 1 that stand beside it.

    Sorted upwards, the best of those k - 1 is number j in C(j, k - 2) of all C(n - 1, k - 1) cases, for j below i.
    """
    n = len(rewards)
    if k > n:  # some could not be judged: the best of all that are left
        k = n
    order = sorted(range(n), key=rewards.__getitem__)
    made = [0.0] * n
    for place, i in enumerate(order):
        gains = (comb(j, k - 2) * (rewards[i] - rewards[order[j]]) for j in range(k - 2, place))
        made[i] = k * sum(gains) / comb(n - 1, k - 1)
    return made


def _normalized_then_summed(
    scored_P_G: Sequence[Sequence[Scored]], weights: Sequence[float] | None, gather: Callable[[Any], list[Any]]
) -> list[tuple[float, ...]]:
    """GDPO (2601.05242): (r_k - mean) / std in the group for each reward function k, their weighted sum, divided by its
    standard deviation over the batch. The mean over the batch, which GDPO takes off, is 0: it is 0 in each group."""
    summed_P_G: list[list[float | None]] = []
    for scored in scored_P_G:
        total = [0.0] * len(scored)
        for k, name in enumerate(scored[0].rewards if scored else ()):
            (part,) = group_advantages([[one.rewards[name] for one in scored]])
            total = [t + (weights[k] if weights else 1.0) * a for t, a in zip(total, part, strict=True)]
        summed_P_G.append([None if reward_of(one) is None else t for one, t in zip(scored, total, strict=True)])
    divisor = _deviation([group for part in gather(summed_P_G) for group in part])
    return [tuple(a / divisor if a and divisor else 0.0 for a in group) for group in summed_P_G]
