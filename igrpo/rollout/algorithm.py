"""Two-stage GRPO on one page: ``two_stage``, a coroutine that runs once per problem and step.

    drafts d_1..d_N ~ pi(. | q)   ->   d^ = first argmax R(d_i)   ->   q' = template(q, d^)   ->   o_1..o_G ~ pi(. | q')

While a problem waits for completions and their rewards, the others have the engine. The coroutine knows neither the
engine nor the reward functions: ``rollout.py`` answers each ``await``, and ``schedule.py`` says when.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

from igrpo.data_types import Problem, RolloutGroup, Scored
from igrpo.rewards.functions import correctness_reward
from igrpo.rollout.config import RolloutConfig
from igrpo.rollout.prompts import PromptBuilder, PromptParts


@dataclass(frozen=True, slots=True)
class Sample:
    """``n`` completions of a prompt: awaiting it gives them in sampling order, each with its rewards.

    Of drafts those are missing that were aborted (``early_stop_drafts``).
    """

    stage: Literal["draft", "refinement"]
    question: PromptParts
    prompt_ids: tuple[int, ...]
    n: int

    def __await__(self) -> Generator[Sample, tuple[Scored, ...], tuple[Scored, ...]]:
        return (yield self)


async def two_stage(problem: Problem, step: int, prompts: PromptBuilder, config: RolloutConfig) -> RolloutGroup:
    """The group of one problem, but for its advantages: a step's groups get those together (``advantage.py``).

    ``algorithm: grpo`` is N = 0: there is no draft to choose, and the refinements answer the question alone.
    """
    question = prompts.parts(problem)
    drafts = await Sample("draft", question, question.bare, config.drafts_per_prompt)
    best = select_draft(drafts, config, step, problem.index)
    if config.refine_only == "dead" and solved(drafts, config):
        best = None
    shown = select_more(drafts, best, config, step, problem.index)
    prompt_ids, trimmed = question.bare, False
    if shown:
        some = [drafts[i].completion for i in shown]
        ids, spans = (one.token_ids for one in some), [one.spans for one in some]
        prompt_ids, trimmed = prompts.with_draft(question, *ids, spans=spans)
    refinements = await Sample("refinement", question, prompt_ids, config.num_generations)
    unknown, right = (0.0,) * len(refinements), ()
    if config.distillation_weight:
        right = demonstrations(drafts, select_draft(drafts, config, step, problem.index), config)
    shows = [drafts[i].completion for i in right]
    taught = tuple(prompts.with_draft(question, one.token_ids, spans=[one.spans])[0] for one in shows)
    return RolloutGroup(
        problem, drafts, best, prompt_ids, refinements, unknown, trimmed, question.bare, shown=shown,
        demonstrations=right, teacher_prompts=taught,
    )  # fmt: skip


def solved(drafts: Sequence[Scored], config: RolloutConfig) -> bool:
    """Whether any draft is right."""
    return bool(demonstrations(drafts, None, config))


def demonstrations(drafts: Sequence[Scored], chosen: int | None, config: RolloutConfig) -> tuple[int, ...]:
    """Two right drafts at most, the chosen one before others, which come in sampling order."""
    name = correctness_reward(config)
    right = [i for i, draft in enumerate(drafts) if (draft.rewards.get(name) or 0.0) >= 1]
    return tuple(sorted(right, key=lambda i: i != chosen)[:2])


def select_draft(drafts: Sequence[Scored], config: RolloutConfig, step: int, row: int) -> int | None:
    """Index of the draft to show, if any; ``random`` draws from (seed, step, row), so a resumed run draws the same."""
    return choose(_scores(drafts, config), config.draft_selection, f"{config.seed}/{step}/{row}")


def select_more(
    drafts: Sequence[Scored], chosen: int | None, config: RolloutConfig, step: int, row: int
) -> tuple[int, ...]:
    """``show_drafts`` drafts in sampling order, the chosen one among them; fewer where siblings were aborted."""
    if chosen is None:
        return ()
    others, scores = [i for i in range(len(drafts)) if i != chosen], _scores(drafts, config)
    if config.draft_selection == "random":
        random.Random(f"{config.seed}/{step}/{row}/more").shuffle(others)
    else:  # stable: ties go to the first
        others.sort(key=scores.__getitem__, reverse=config.draft_selection == "best")
    return tuple(sorted([chosen, *others[: config.show_drafts - 1]]))


def _scores(drafts: Sequence[Scored], config: RolloutConfig) -> list[tuple[float, ...]]:
    if config.draft_selection_score == "accuracy_first":
        return [(draft.rewards.get("accuracy") or 0.0, draft.reward) for draft in drafts]
    return [(draft.reward,) for draft in drafts]


def choose(scores: Sequence[tuple[float, ...] | None], selection: str, seed: str) -> int | None:
    """Index of the best, the worst or a random one of the scores; ties go to the first, which for i.i.d. drafts favours
    none. A score of None could not be judged and is chosen by chance alone, or where no other is there."""
    if selection == "none" or not scores:
        return None
    if selection == "random":
        return random.Random(seed).randrange(len(scores))
    judged = [score for score in scores if score is not None]
    return scores.index(max(judged) if selection == "best" else min(judged)) if judged else 0
