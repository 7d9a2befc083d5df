"""The order of problems: every row once an epoch, the same wherever and whenever it is asked for."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from igrpo.data.sources import ProblemSampler


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("rows", "batch"), [(10, 3), (7, 7), (5, 12), (1, 4), (100, 16)])
def test_each_epoch_visits_every_row_once(rows, batch, shuffle):
    sampler = ProblemSampler(rows, seed=1, shuffle=shuffle)
    drawn = [row for _ in range(3 * rows) for row in sampler.next_batch(batch)]
    assert len(drawn) == 3 * rows * batch
    for epoch in range(len(drawn) // rows):
        assert Counter(drawn[epoch * rows : (epoch + 1) * rows]) == Counter(range(rows))


def test_epochs_and_seeds_differ_but_repeat():
    def first_epochs(seed):
        sampler = ProblemSampler(50, seed, shuffle=True)
        return [sampler.next_batch(50) for _ in range(2)]

    assert first_epochs(1) == first_epochs(1)
    orders = [*first_epochs(1), *first_epochs(2), list(range(50))]
    assert len({tuple(order) for order in orders}) == 5
    assert ProblemSampler(50, 1, shuffle=False).next_batch(50) == list(range(50))


def test_the_order_is_the_same_on_every_machine():
    assert ProblemSampler(8, seed=42, shuffle=True).next_batch(8) == [1, 2, 5, 7, 6, 0, 3, 4]


def test_epoch_counts_the_epochs_begun():
    sampler = ProblemSampler(4, 0, True)
    epochs = []
    for _ in range(5):
        sampler.next_batch(3)
        epochs.append(sampler.epoch)
    assert epochs == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 9])
def test_resuming_continues_exactly(taken):
    straight = ProblemSampler(10, 3, True)
    for _ in range(taken):
        straight.next_batch(3)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = ProblemSampler(10, 3, True)
    resumed.next_batch(8)
    resumed.load_state_dict(state)
    assert [resumed.next_batch(3) for _ in range(20)] == [straight.next_batch(3) for _ in range(20)]


@pytest.mark.parametrize("other", [{"num_problems": 11}, {"seed": 4}, {"shuffle": False}])
def test_a_state_of_another_order_is_refused(other):
    state = ProblemSampler(10, 3, True).state_dict()
    with pytest.raises(ValueError, match=f"trained with {next(iter(other))}="):
        ProblemSampler(**{"num_problems": 10, "seed": 3, "shuffle": True, **other}).load_state_dict(state)


def test_an_empty_set_cannot_be_sampled():
    with pytest.raises(ValueError, match="nothing to sample"):
        ProblemSampler(0, 0, True)
