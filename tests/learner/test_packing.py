"""Planning micro-batches: nothing lost, no limit broken, little repeated, the load even over processes."""

from __future__ import annotations

import math
import random
import time
from collections import Counter

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import TrainingSample
from igrpo.learner.packing import Limits, pack, pad, prefix_groups, raw_tokens, unique_tokens


def sample(prompt: tuple[int, ...], completion: int, tag: int = 0) -> TrainingSample:
    return TrainingSample(prompt, (tag,) * completion, (0.0,) * completion, 1.0)


def step(prompts: int, group: int, prompt_length: int, mean: int, cap: int, seed: int = 0) -> list[TrainingSample]:
    """Long-tailed lengths with the given mean, as completions have."""
    rng = random.Random(seed)
    sigma = 0.6

    def length() -> int:
        return min(cap, max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))

    made = []
    for p in range(prompts):
        context = (p,) * (prompt_length + length())
        made += [sample(context, length(), j) for j in range(group)]
    return made


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("limits", [Limits(tokens=300), Limits(tokens=5000), Limits(completions=3), Limits(tokens=1)])
@pytest.mark.parametrize("processes", [1, 3])
def test_every_sample_is_in_one_micro_batch_and_no_limit_is_broken(limits, shared, processes):
    samples = step(prompts=7, group=4, prompt_length=20, mean=60, cap=200)
    bins = pack(samples, limits, shared=shared, processes=processes)
    packed = [s for contents in bins for group in contents for s in group.samples]
    assert Counter(packed) == Counter(samples)
    assert all(s.prompt_ids == group.prompt_ids for contents in bins for group in contents for s in group.samples)
    for contents in bins:
        completions = sum(len(group.samples) for group in contents)
        assert completions <= limits.completions
        assert unique_tokens(contents) <= limits.tokens or completions == 1
        if shared:
            assert len({group.prompt_ids for group in contents}) == len(contents)
    assert [unique_tokens(b) for b in bins] == sorted(map(unique_tokens, bins), reverse=True)


def test_the_loads_do_not_hang_on_the_order_of_the_samples():
    samples = step(prompts=5, group=4, prompt_length=20, mean=60, cap=200)
    loads = {
        tuple(map(unique_tokens, pack(random.Random(i).sample(samples, 20), Limits(tokens=600)))) for i in range(4)
    }
    assert len(loads) == 1


def test_the_batch_size_keeps_its_meaning():
    config = TrainConfig(model_name_or_path="m", dataset_name="d", per_device_train_batch_size=8, num_generations=4)
    bins = pack(step(6, 4, 20, 60, 200), Limits.of(config))
    assert [sum(len(group.samples) for group in contents) for contents in bins] == [8, 8, 8]
    assert all(len(contents) == 2 for contents in bins)  # whole groups, so that no prompt is computed twice
    assert Limits.of(TrainConfig(model_name_or_path="m", dataset_name="d", token_budget=77)) == Limits(tokens=77)


def test_a_group_that_exceeds_the_budget_repeats_its_prompt():
    samples = [sample((1,) * 10, n, n) for n in (31, 21, 11, 6)]
    assert [unique_tokens(b) for b in pack(samples, Limits(tokens=75))] == [75]
    two = pack(samples, Limits(tokens=50))
    assert [unique_tokens(b) for b in two] == [50, 35] and sum(map(raw_tokens, two)) == 109
    assert [unique_tokens(b) for b in pack(samples, Limits(tokens=20))] == [40, 30, 20, 15]


def test_equal_prompts_of_different_groups_are_one():
    assert len(prefix_groups([sample((1, 2), 3), sample((1, 2), 4), sample((1,), 3)])) == 2
    assert len(prefix_groups([sample((1, 2), 3), sample((1, 2), 4)], shared=False)) == 2


def test_the_papers_lengths_cost_half():
    """1k prompt, drafts and refinements of 700 tokens in the mean, G = 4, on 8 processes."""
    samples = step(prompts=256, group=4, prompt_length=1024, mean=700, cap=4096)
    bins = pack(samples, Limits(tokens=16_384), processes=8)
    unique, raw = sum(map(unique_tokens, bins)), sum(map(raw_tokens, bins))
    assert raw > 256 * 4 * 2300
    assert unique / raw <= 0.55
    loads = [sum(map(unique_tokens, bins[r::8])) for r in range(8)]
    assert len(bins) % 8 == 0 and max(loads) / min(loads) < 1.02
    # What padding every sequence to the longest one would compute.
    longest = max(len(s.prompt_ids) + len(s.completion_ids) for s in samples)
    assert unique < 0.3 * longest * len(samples)


def test_a_large_step_of_long_completions_is_planned_at_once():
    """Near one piece per micro-batch the number to start from was far too low, and the plan took 20 to 50 seconds."""
    rng = random.Random(1)
    samples = [sample((i // 8,) * 100, rng.randint(200, 2000)) for i in range(1024)]
    start = time.perf_counter()
    bins = pack(samples, Limits(tokens=2048))
    assert time.perf_counter() - start < 2
    assert len(bins) == 665


def test_where_padding_must_be_it_counts_and_similar_lengths_share():
    samples = [sample((1,), n) for n in (2, 9, 3, 8)]
    by_budget = pad(samples, Limits(tokens=20))
    assert [[len(g.samples[0].completion_ids) for g in contents] for contents in by_budget] == [[9, 8], [3, 2]]
    assert [len(contents) for contents in pad(samples, Limits(tokens=19))] == [1, 2, 1]
    assert [len(contents) for contents in pad(samples, Limits(completions=3))] == [3, 1]


def test_fewer_sequences_than_processes():
    bins = pack([sample((1,), 5)], Limits(tokens=100), processes=4)
    assert len(bins) == 1 and bins[0][0].samples == (sample((1,), 5),)
