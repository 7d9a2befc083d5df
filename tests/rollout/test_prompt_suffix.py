"""Chat templates that open ``<think>`` themselves: the prompt says so, and every reward that reads tags is told."""

from __future__ import annotations

import copy

import pytest
from transformers import AddedToken

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Problem
from igrpo.rewards.functions import load_reward_functions
from igrpo.rewards.workers.pool import RewardPool
from igrpo.rollout.prompts import PromptBuilder
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer

PROBLEM = Problem(0, "What is 3 + 4? Write <think>", "7")
REWARDS = [
    "accuracy",
    "format",
    "tag_count",
    "think_format_reward",
    "length",
    "cosine",
    "tests.support.reward_functions:saw",
]
CONFIG = TrainConfig(model_name_or_path="m", dataset_name="d", reward_funcs=REWARDS, max_completion_length=8)


def parts(opening: str, tokenizer=None):
    tokenizer = copy.deepcopy(tokenizer or tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>{%", f"<|assistant|>{opening}{{%")
    return PromptBuilder(tokenizer, CONFIG).parts(PROBLEM)


@pytest.mark.parametrize(
    "opening", ["", "<think>", "<think>\n", "\n<think>\n\n</think>\n\n", "<think>\n</think><answer>", "<answer>"]
)
def test_the_prompt_says_which_tags_it_ends_with(opening):
    assert parts(opening).prompt_suffix == opening.lstrip()


def test_tags_that_no_completion_shows_are_not_told():
    """``<think>`` as a special token is left out of a completion's text, and so is the end of it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)])
    assert parts("<think>\n", tokenizer).prompt_suffix == ""


@pytest.fixture(scope="module")
def pool():
    with RewardPool(load_reward_functions(REWARDS, CONFIG)) as pool:
        yield pool


@pytest.mark.parametrize("conversation", [True, False])
def test_rewards_read_the_tags_of_prompt_and_completion_as_one(pool, conversation):
    built = parts("<think>\n")
    prompt = list(built.messages) if conversation else PROBLEM.prompt
    texts = ["3 + 4</think><answer>7</answer>", "<think>3 + 4</think><answer>7</answer>", "it is 7", r"\boxed{7}"]
    ids = (1, 2)
    completions = [Completion(ids, (0.0,) * len(ids), text, "stop", 0) for text in texts]

    def column(name: str, suffix: str) -> list[float | None]:
        return [s.rewards[name] for s in pool.submit(PROBLEM, completions, prompt, suffix).result()]

    suffix = built.prompt_suffix
    assert column("format", suffix) == [1.0, 0.0, 0.0, 0.0] and column("format", "") == [0.0, 1.0, 0.0, 0.0]
    assert column("tag_count", suffix) == [1.0, 0.75, 0.25, 0.25]
    assert column("think_format_reward", suffix) == [1.0, 0.0, 0.0, 0.0]
    assert column("accuracy", suffix) == [1.0, 1.0, 0.0, 0.0], "thinking that never ended has no answer"
    assert column("accuracy", "") == [1.0] * 4
    assert [s > 0 for s in column("cosine", suffix)] == [True, True, False, False]
    assert column("saw", suffix) == [8.0] * 4 and column("saw", "") == [0.0] * 4
