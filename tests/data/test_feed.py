"""Which process gets which problem: none twice, none left out, whatever each process uses of its substitutes."""

from __future__ import annotations

import random

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.data.feed import ProblemFeed
from igrpo.data.sources import ProblemSampler
from igrpo.data_types import Problem

PROBLEMS = [Problem(i, f"Q{i}", "0") for i in range(20)]


def feeds(processes: int, **settings) -> tuple[list[ProblemFeed], list[int]]:
    """One feed per process, and the list that stands for their gathering."""
    config = TrainConfig(model_name_or_path="m", dataset_name="d", num_generations=4, **settings)  # 2 prompts each
    used: list[int] = []
    return [
        ProblemFeed(PROBLEMS, ProblemSampler(20, 0, True), config, processes, rank, lambda one: list(used))
        for rank in range(processes)
    ], used


def rows(problems) -> list[int]:
    return [p.index for p in problems]


@pytest.mark.parametrize("lag", [{}, {"draft_policy_lag": 1}, {"policy_lag": 3}])
@pytest.mark.parametrize("processes", [1, 3])
def test_rows_used_are_the_samplers_in_order_whatever_was_used_of_the_substitutes(processes, lag):
    everyone, used = feeds(processes, zero_variance="resample", **lag)
    steps = sum(lag.values())
    rng, taken, ahead = random.Random(processes), [], []
    for step in range(1, 9):
        batches = [feed.take(left=8 - step) for feed in everyone]
        assert all(len(b.problems) == 2 and len(b.substitutes) == 4 for b in batches)
        if ahead:
            assert [rows(b.problems) for b in batches] == [some[:2] for some in ahead]
        ahead = [rows(b.ahead) for b in batches] if lag and step < 8 else []
        assert all(len(some) == 2 * min(steps, 8 - step) for some in ahead)
        used[:] = [rng.randint(0, 4) for _ in batches]
        taken += [r for b, n in zip(batches, used, strict=True) for r in rows([*b.problems, *b.substitutes[:n]])]
        for feed, n in zip(everyone, used, strict=True):
            feed.give_back(n)
        assert all(feed.epoch == (len(taken) - 1) // 20 for feed in everyone)
    order = ProblemSampler(20, 0, True).next_batch(len(taken))
    assert sorted(taken) == sorted(order)


def test_a_restart_takes_what_was_ahead_again_even_with_other_processes():
    everyone, _ = feeds(2, draft_policy_lag=1)
    first = [feed.take(left=1) for feed in everyone]
    state = everyone[0].state_dict(rows(p for some in zip(*(b.ahead for b in first), strict=True) for p in some))
    again, _ = feeds(1, draft_policy_lag=1)
    again[0].load_state_dict(state)
    rest = [again[0].take(left=7 - i) for i in range(8)]
    taken = [r for b in (*first, *rest) for r in rows(b.problems)]
    assert sorted(taken) == list(range(20))
