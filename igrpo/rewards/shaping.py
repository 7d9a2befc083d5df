"""Rewards for the shape of an answer, under open-r1's names: short pure functions, lengths in tokens.

    cosine              Yeo et al. (arXiv 2502.03373), C.1: right and short is best; wrong may cost less when long
    repetition_penalty  the same, C.2: the share of n-grams that repeat another
    length              Kimi k1.5 (arXiv 2501.12599), 2.3.3: short against the other answers to the question
    tag_count           a quarter for each of the four tags of `format`
    reasoning_steps     a third for each mark of a step, at most 1

Lengths and n-grams are counted in tokens, as the papers and TRL do; open-r1 itself counts characters and words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from igrpo.rewards.functions import TAGS, accuracy
from igrpo.rewards.grading.passages import CompletionText, completion_text, whole_texts

STEP_MARK = re.compile(r"(?m)\bStep \d{1,9}:|^[^\S\n]*(?:\d{1,9}\.|[-*])\s|\b(?:First|Second|Third|Next|Finally),")


def cosine(
    completions: Sequence[CompletionText],
    solution: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    prompts: Sequence[Any] | None = None,
    prompt_suffix: Sequence[str] | None = None,
    *,
    cosine_min_value_wrong: float,
    cosine_max_value_wrong: float,
    cosine_min_value_correct: float,
    cosine_max_value_correct: float,
    cosine_max_len: int | None,
    max_completion_length: int,
    grader: str = "igrpo",
    **_: Any,
) -> list[float | None]:
    """From a to b along half a cosine, over n = 0 … L tokens, and b beyond: b + (a - b)·(1 + cos(πn/L))/2.

    Right answers: a = ``cosine_max_value_correct``, b = ``cosine_min_value_correct``. Wrong ones:
    a = ``cosine_min_value_wrong``, b = ``cosine_max_value_wrong``. L = ``cosine_max_len`` or ``max_completion_length``.
    None where the reference cannot be read.
    """
    ends = {
        1.0: (cosine_max_value_correct, cosine_min_value_correct),
        0.0: (cosine_min_value_wrong, cosine_max_value_wrong),
    }
    longest = cosine_max_len or max_completion_length
    scores: list[float | None] = []
    judged = accuracy(completions, solution, prompts, prompt_suffix, grader)
    for right, ids in zip(judged, completion_ids, strict=True):
        if right is None:
            scores.append(None)
            continue
        short, long = ends[right]
        share = (1.0 + math.cos(math.pi * min(len(ids) / longest, 1.0))) / 2.0
        scores.append(long + (short - long) * share)
    return scores


def repetition_penalty(
    completion_ids: Sequence[Sequence[int]], repetition_n_grams: int, repetition_max_penalty: float, **_: Any
) -> list[float]:
    """``repetition_max_penalty``·(1 - different n-grams / all n-grams); 0 without any."""
    scores = []
    for ids in completion_ids:
        grams = [tuple(ids[i : i + repetition_n_grams]) for i in range(len(ids) - repetition_n_grams + 1)]
        repeated = 1.0 - len(set(grams)) / len(grams) if grams else 0.0
        scores.append(repetition_max_penalty * repeated)
    return scores


def length(
    completions: Sequence[CompletionText],
    solution: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    prompts: Sequence[Any] | None = None,
    prompt_suffix: Sequence[str] | None = None,
    grader: str = "igrpo",
    **_: Any,
) -> list[float | None]:
    """λ for a right answer and min(0, λ) for a wrong one, λ = 1/2 - (n - n_min) / (n_max - n_min).

    n_min and n_max are over the answers of one call, which are those to one question; all of a length: 0.
    """
    sizes = [len(ids) for ids in completion_ids]
    spread = max(sizes) - min(sizes)
    scores: list[float | None] = []
    judged = accuracy(completions, solution, prompts, prompt_suffix, grader)
    for right, size in zip(judged, sizes, strict=True):
        gain = 0.5 - (size - min(sizes)) / spread if spread else 0.0
        scores.append(None if right is None else gain if right else min(gain, 0.0))
    return scores


def tag_count(
    completions: Sequence[CompletionText], prompt_suffix: Sequence[str] | None = None, **_: Any
) -> list[float]:
    """A quarter for each of ``<think>``, ``</think>``, ``<answer>`` and ``</answer>`` that is there exactly once, be it
    at the prompt's end."""
    texts = whole_texts(completions, prompt_suffix)
    return [sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS) for text in texts]


def reasoning_steps(completions: Sequence[CompletionText], **_: Any) -> list[float]:
    """A third for each "Step 1:", numbered or bulleted line, or "First,", "Next,", "Finally,"; at most 1."""
    return [min(len(STEP_MARK.findall(completion_text(completion))) / 3.0, 1.0) for completion in completions]
