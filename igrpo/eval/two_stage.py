"""Two stages at test time, beside the single shot: drafts, one of them chosen, one refinement of it.

The single-shot completions of a problem serve as drafts: N of them, in sampling order, make one trial, so n completions
give n // N independent trials. In deployment no reference answer tells which draft is best, so the rules are:

* ``first``     any draft will do: the first. Reads no answer at all.
* ``majority``  the first draft with the answer that most of the N drafts give. Needs no reference answer.
* ``oracle``    the first right draft. It looks at the reference answer, so it bounds what choosing could gain and is no
                figure of a deployable system; every table says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from igrpo.rewards.grading.answers import read_reference
from igrpo.rewards.grading.passages import extract_answer

RULES = {
    "first": "two-stage, first draft",
    "majority": "two-stage, majority of {N} drafts",
    "oracle": "two-stage, ORACLE best of {N} drafts (uses the reference answer)",
}


def choose(rule: str, texts: Sequence[str], scores: Sequence[float]) -> int:
    """Index of the draft to refine; ties go to the first.

    Args:
        scores: of the judge; read by ``oracle`` alone.
    """
    if rule == "oracle":
        return list(scores).index(max(scores))
    votes = [vote_key(text) for text in texts]
    counts = Counter(vote for vote in votes if vote is not None)
    if rule == "first" or not counts:
        return 0
    return votes.index(max(counts, key=lambda vote: (counts[vote], -votes.index(vote))))


def vote_key(text: str) -> Any:
    """Equal for completions that give the same answer: equal numbers in any notation, else equal tidy text."""
    answer = extract_answer(text)
    if answer is None:
        return None
    read = read_reference(answer)
    return read.number.value if read.number is not None else read.normal


def chosen_drafts(record: dict[str, Any], rule: str, N: int, judge: str, prompt_suffix: str = "") -> list[int]:
    """Index of the chosen draft of each trial among the record's completions.

    Args:
        prompt_suffix: of ``PromptParts``: a draft whose thinking never ended has no vote.
    """
    completions, chosen = record["completions"], []
    for start in range(0, len(completions) - N + 1, N):
        trial = completions[start : start + N]
        scores = [draft["rewards"][judge] or 0.0 for draft in trial]
        chosen.append(start + choose(rule, [prompt_suffix + draft["text"] for draft in trial], scores))
    return chosen
