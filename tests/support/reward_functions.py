"""Reward functions that tests name as ``tests.support.reward_functions:NAME``, as a user names theirs."""

from __future__ import annotations

import time


def low_bytes(completions, **_) -> list[float]:
    """Share of characters below 'n': varies from sample to sample even for a random model."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch < "n" for ch in text) / max(len(text), 1) for text in texts]


def hangs_on_solution_13(completions, solution, **_) -> list[float]:
    if solution[0] == "13":
        time.sleep(3600)
    return [0.0] * len(completions)


def raises_on_solution_14(completions, solution, **_) -> list[float]:
    if solution[0] == "14":
        raise ZeroDivisionError("a user's bug")
    return [0.0] * len(completions)


def lacks_a_column(completions, nowhere=None, **_) -> list[float]:
    return [float(nowhere[0]["key"])] * len(completions)


def starts_low(completions, **_) -> list[float]:
    """Right or wrong, about even for a random model."""
    return [float(text[:1] < "n") for text in (c if isinstance(c, str) else c[-1]["content"] for c in completions)]


def saw(completions, prompt_suffix) -> list[float]:
    """How many characters of an answer the prompt had already written."""
    return [float(len(suffix)) for suffix in prompt_suffix]


def wants_level(completions, level, *, weight=1.0, **_):
    return [weight * number for number in level]


def wants_levle(completions, levle):
    return levle


def wants_some(prompts, completions, completion_ids, some):
    return some


def wants_solution(solution, prompt_suffix):
    return [float(len(one)) for one in solution]


def wants_position(completions, /):
    return [0.0] * len(completions)
