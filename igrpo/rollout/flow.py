"""One problem on its way through the two stages, and which of its drafts the second stage sees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from igrpo.data_types import Problem, RolloutGroup, Scored
from igrpo.rollout.config import RolloutConfig
from igrpo.rollout.prompts import PromptParts


@dataclass(eq=False)
class Flow:
    """drafting -> drafted (all drafts scored, one chosen) -> refining -> done."""

    problem: Problem
    parts: PromptParts
    step: int
    name: str
    """Unique over the run; requests of the flow are called after it."""
    prompt_ids: tuple[int, ...]
    open_drafts: set[int] = field(default_factory=set)
    """Drafts that wait for a slot, are being sampled or being scored."""
    drafts: dict[int, Scored] = field(default_factory=dict)
    """By sampling index; aborted drafts are missing."""
    drafted: bool = False
    chosen: int | None = None
    """Index among the scored drafts in sampling order."""
    trimmed: bool = False
    refining: bool = False
    refinements: tuple[Scored, ...] | None = None

    @property
    def scored_drafts(self) -> tuple[Scored, ...]:
        return tuple(self.drafts[i] for i in sorted(self.drafts))

    @property
    def informative(self) -> bool:
        """Whether the refinements' rewards differ; a group whose rewards are all equal has no advantage."""
        return len({scored.reward for scored in self.refinements or ()}) > 1

    def group(self, advantages: tuple[float, ...], draft_advantages: tuple[float, ...] = ()) -> RolloutGroup:
        return RolloutGroup(
            problem=self.problem,
            drafts=self.scored_drafts,
            chosen=self.chosen,
            prompt_ids=self.prompt_ids,
            refinements=self.refinements or (),
            advantages=advantages,
            draft_trimmed=self.trimmed,
            draft_prompt_ids=self.parts.bare,
            draft_advantages=draft_advantages,
        )


def select_draft(drafts: Sequence[Scored], config: RolloutConfig, step: int, row: int) -> int | None:
    """Index of the draft to show; ties go to the first, which for i.i.d. drafts favours none.

    ``random`` draws from (seed, step, row), so that a resumed run draws the same.
    """
    if config.draft_selection == "none":
        return None
    if config.draft_selection == "random":
        return random.Random(f"{config.seed}/{step}/{row}").randrange(len(drafts))
    scores = [_selection_score(draft, config) for draft in drafts]
    wanted = max(scores) if config.draft_selection == "best" else min(scores)
    return scores.index(wanted)


def _selection_score(draft: Scored, config: RolloutConfig) -> tuple[float, float]:
    if config.draft_selection_score == "accuracy_first":
        return (draft.rewards.get("accuracy") or 0.0, draft.reward)
    return (draft.reward, 0.0)
