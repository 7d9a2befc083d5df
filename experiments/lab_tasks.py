"""The laboratory's tasks: strings of digits, and how an answer with mistakes comes about, with and without a draft.

Both are made so that a draft which is wrong makes right answers likelier, in two ways: ``Table``'s drafts are evidence
for each digit, ``Sorting``'s are work done.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from igrpo.rewards.grading.passages import CompletionText, completion_text

TABLE = "7294850316"
"""What each digit becomes; no document says it, solutions only use it."""


@dataclass(frozen=True)
class Table:
    """Each of twenty digits is replaced by a secret table. A digit t of an answer is drawn with probability
    proportional to

        exp(own · 1[t is right] + copied · 1[t is the draft's])

    the second term where a draft stands beside the question. So the model's own evidence is the same and as noisy with
    a draft as without, and a draft, nearly always wrong as a whole, adds evidence to it: beside a right digit 0.60
    become 0.92, beside a wrong one 0.45, on average 0.74, so that all twenty are right some sixty times as often. A
    document without a draft is right once in 28,000, the model that has learnt from them about once in 20,000 answers
    from the bare prompt, so that GRPO waits for its first reward; what refinements learn, to trust the table, is what
    the bare prompt lacks. Before any training the likeliest answer is the right one: this task is about sampling at
    temperature 1.
    """

    digits: int = 20
    own: float = 2.6
    """Logit of the right digit: 0.60 of all digits are right without a draft."""
    copied: float = 2.1
    """Logit of the draft's digit: 0.74 are right with one."""

    def ask(self, rng: random.Random) -> str:
        return "".join(rng.choices(TABLE, k=self.digits))

    def solution(self, question: str) -> str:
        """The right answer: ``solution("384712") == "418329"``."""
        return "".join(TABLE[int(digit)] for digit in question)

    def attempt(self, question: str, rng: random.Random, draft: str = "") -> str:
        """Digits of an answer with mistakes."""
        made = ""
        for place, right in enumerate(self.solution(question)):
            logits = [self.own * (t == right) + self.copied * (t == draft[place : place + 1]) for t in TABLE]
            made += rng.choices(TABLE, [math.exp(logit) for logit in logits])[0]
        return made


@dataclass(frozen=True)
class Sorting:
    """Ten digits are sorted, some passes of bubble sort per answer: over the question's digits, or over the draft's
    where one stands beside it. Two answers one upon the other have made as many passes as both together, so a draft is
    partial progress that need not be repeated, and that is no use to copy as it is. How many passes an answer makes is
    chance; that is what there is to learn, beside not to slip. Nobody has seen a document with more than ``passes``
    says, and few questions are sorted by so many.
    """

    digits: int = 10
    passes: tuple[float, ...] = (0.05, 0.25, 0.3, 0.25, 0.15)
    """How often an answer makes 0, 1, 2, … passes."""
    slip: float = 0.03
    """How often two digits that should change places do not."""

    def ask(self, rng: random.Random) -> str:
        return "".join(rng.choices("0123456789", k=self.digits))

    def solution(self, question: str) -> str:
        """The right answer: ``solution("384712") == "123478"``."""
        return "".join(sorted(question))

    def attempt(self, question: str, rng: random.Random, draft: str = "") -> str:
        """Digits of an answer that stops too early, or slips."""
        made = list(draft or question)
        for _ in range(*rng.choices(range(len(self.passes)), self.passes)):
            for i in range(len(made) - 1):
                if made[i] > made[i + 1] and rng.random() >= self.slip:
                    made[i : i + 2] = made[i + 1], made[i]
        return "".join(made)


def in_place(completions: Sequence[CompletionText], solution: Sequence[str], **_: Any) -> list[float]:
    """Reward function: the share of the solution's digits that stand where they should."""
    scores = []
    for completion, right in zip(completions, solution, strict=True):
        found = re.fullmatch(r"<answer>(\d*)</answer>", completion_text(completion))
        made = found[1] if found and len(found[1]) == len(right) else ""
        scores.append(sum(a == b for a, b in zip(made, right, strict=False)) / len(right))
    return scores
