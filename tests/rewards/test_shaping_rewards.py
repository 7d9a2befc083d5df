"""open-r1's rewards for the shape of an answer: against TRL's where TRL has one, else against the paper's formula."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from igrpo.config.recipe import build_config
from igrpo.config.train_config import TrainConfig
from igrpo.rewards.functions import RUN_CODE, TRLS, highest_reward, load_reward_functions
from igrpo.rewards.shaping import length, reasoning_steps, tag_count
from igrpo.settings import ConfigError

CONFIG = TrainConfig(model_name_or_path="m", dataset_name="d")
ANSWERS = [[{"role": "assistant", "content": rf"so \boxed{{{number}}}"}] for number in (7, 8)]


def call(name: str, *, solution: str = "$7$", **settings: Any) -> Any:
    config = replace(CONFIG, reward_funcs=[name], **settings)
    (function,) = load_reward_functions(config.reward_funcs, config)
    columns = {"solution": [solution, solution], "prompts": ["", ""], "completions": ANSWERS}
    return lambda ids: function.load()(completion_ids=ids, **columns)


@pytest.mark.parametrize("tokens", [0, 1, 40, 99, 100, 250])
def test_cosine_is_trls_and_stays_beyond_its_longest(tokens):
    from trl.rewards import get_cosine_scaled_reward

    ends = {"min_value_wrong": -0.9, "max_value_wrong": -0.4, "min_value_correct": 0.3, "max_value_correct": 1.1}
    ids = [[1] * tokens] * 2
    theirs = get_cosine_scaled_reward(100, **ends)(ANSWERS, ["$7$"] * 2, ids)
    ours = call("cosine", cosine_max_len=100, **{f"cosine_{name}": value for name, value in ends.items()})
    assert ours(ids) == pytest.approx(theirs)
    assert theirs[0] >= 0.3 and theirs[1] <= -0.4


def test_cosine_by_default_ends_at_the_longest_completion_and_leaves_unreadable_references_out():
    assert call("cosine", max_completion_length=64)([[1] * 64, []]) == pytest.approx([0.5, 0.0])
    assert call("cosine", max_completion_length=64)([[], [1] * 64]) == pytest.approx([1.0, -0.5])
    assert call("cosine", solution="")([[], []]) == [None, None]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_repetition_penalty_is_trls(size):
    from trl.rewards import get_repetition_penalty_reward

    random = Random(size)
    ids = [[random.randrange(4) for _ in range(n)] for n in (0, 1, 2, 3, 9, 40)]
    (function,) = load_reward_functions(
        ["repetition_penalty"], replace(CONFIG, repetition_n_grams=size, repetition_max_penalty=-0.7)
    )
    ours = function.load()(completion_ids=ids, prompts=[""] * 6)
    assert ours == pytest.approx(get_repetition_penalty_reward(size, -0.7)(completion_ids=ids))
    assert size == 7 or min(ours) < -0.1


def test_length_is_kimis():
    """1/2 for the shortest right answer, -1/2 for the longest; a wrong one gains nothing by being short."""
    texts = [r"\boxed{7}", r"\boxed{7}", r"\boxed{8}", r"\boxed{8}", r"\boxed{7}"]
    ids = [[1] * n for n in (10, 30, 10, 30, 20)]
    assert length(texts, ["$7$"] * 5, ids) == [0.5, -0.5, 0.0, -0.5, 0.0]
    assert length(texts[:3], ["$7$"] * 3, [[1, 1]] * 3) == [0.0, 0.0, 0.0]
    assert length(texts[:1], [""], [[1]]) == [None]


def test_tags_and_steps_are_counted():
    texts = ["<think>a</think><answer>b</answer>", "<think>a<think></think>", "", "<answer>b</answer> <answer>"]
    assert tag_count(texts) == [1.0, 0.25, 0.0, 0.25]
    steps = [
        "Step 1: a\nStep 2: b\nStep 3: c\nStep 4: d",
        "First, a. Next, b.",
        "- a",
        "1. a\n 2. b",
        "3.5 * 2 is 7 - 0",
    ]
    assert reasoning_steps(steps) == pytest.approx([1.0, 2 / 3, 1 / 3, 2 / 3, 0.0])


def test_the_highest_reward_knows_the_settings_of_cosine():
    config = replace(CONFIG, reward_funcs=["cosine", "length", "repetition_penalty"], cosine_max_value_correct=2.0)
    assert highest_reward(config) == 2.5


def test_trls_names_are_trls_functions_and_a_dotted_path_is_one():
    import trl.rewards

    for name in TRLS:
        (function,) = load_reward_functions([name])
        assert function.load() is getattr(trl.rewards, name) and function.name == name
    (function,) = load_reward_functions(["igrpo.rewards.shaping.tag_count"])
    assert function.load() is tag_count


@pytest.mark.parametrize("name", RUN_CODE)
def test_rewards_that_run_programs_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"'{name}' runs programs .* no sandbox here"):
        load_reward_functions([name])


@pytest.mark.parametrize(
    ("key", "value"), [("repetition_max_penalty", 0.5), ("repetition_n_grams", 0), ("cosine_max_len", 0)]
)
def test_settings_that_cannot_be_meant(key, value):
    with pytest.raises(ConfigError, match=key):
        build_config({"model_name_or_path": "m", "dataset_name": "d", key: value})
