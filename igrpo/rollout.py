"""Two-stage rollouts: sample drafts, keep one by reward, sample refinements of question + draft.

One flow per problem and no barrier between the stages: a problem's refinements are submitted the moment its drafts are
scored, and the engine's continuous batching fills the gaps.

    drafts d_1..d_N ~ pi(. | q)   ->   d^ = first argmax R(d_i)   ->   q' = template(q, d^)   ->   o_1..o_G ~ pi(. | q')
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from igrpo.advantage import group_advantages
from igrpo.config import TrainConfig
from igrpo.engines import Engine, EngineError, Request, Result, Sampling
from igrpo.prompts import PromptBuilder, PromptParts
from igrpo.reward_pool import PendingScores, RewardPool
from igrpo.types import Completion, Problem, RolloutGroup, Scored

OnEvent = Callable[[str], None]
"""Told ``"drafts"`` or ``"refinements"`` each time one problem has finished that stage."""


@dataclass
class RolloutStats:
    """What the engine did in one rollout."""

    seconds: float = 0.0
    draft_tokens: int = 0
    refinement_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafts_done_at: float = 0.0
    """Seconds until the last draft was scored; refinements of other problems run before that."""


@dataclass
class _Flow:
    """One problem on its way; each field is filled once."""

    problem: Problem
    parts: PromptParts
    prompt_ids: tuple[int, ...]
    drafts: tuple[Scored, ...] = ()
    chosen: int | None = None
    trimmed: bool = False
    refinements: tuple[Scored, ...] | None = None
    pending: PendingScores | None = field(default=None, repr=False)


class Rollout:
    """Runs the two stages for a batch of problems.

    Args:
        tokenizer: decodes completions for the reward functions.
    """

    def __init__(
        self, engine: Engine, rewards: RewardPool, prompts: PromptBuilder, tokenizer: Any, config: TrainConfig
    ):
        self.engine, self.rewards, self.prompts, self.tokenizer = engine, rewards, prompts, tokenizer
        self.config = config
        self._in_flight = 0
        self.sampling = Sampling(
            config.temperature, config.max_completion_length, config.top_p, config.top_k, config.min_p
        )

    def run(
        self, problems: Sequence[Problem], step: int, on_event: OnEvent = lambda stage: None
    ) -> tuple[list[RolloutGroup], RolloutStats]:
        """Groups in the order of ``problems``.

        Raises:
            EngineError: the engine read other ids than it was sent, or finished none of the running requests.
        """
        stats, start = RolloutStats(), time.perf_counter()
        self.engine.seed(_seed(self.config.seed, step))
        flows = [self._start(problem, i) for i, problem in enumerate(problems)]
        while any(flow.refinements is None for flow in flows):
            for result in self.engine.poll():
                self._receive(result, flows, stats)
            for i, flow in enumerate(flows):
                self._advance(i, flow, step, stats, on_event, start)
        advantages = group_advantages(
            [[scored.reward for scored in flow.refinements or ()] for flow in flows], self.config.scale_rewards
        )
        stats.seconds = time.perf_counter() - start
        return [self._group(flow, a) for flow, a in zip(flows, advantages, strict=True)], stats

    def _start(self, problem: Problem, i: int) -> _Flow:
        parts = self.prompts.parts(problem)
        flow = _Flow(problem, parts, prompt_ids=parts.bare)
        if self.config.drafts_per_prompt:
            self._submit(Request(f"drafts/{i}", parts.bare, self.config.num_drafts, self.sampling))
        else:
            self._submit_refinements(i, flow)
        return flow

    def _submit_refinements(self, i: int, flow: _Flow) -> None:
        self._submit(Request(f"refinements/{i}", flow.prompt_ids, self.config.num_generations, self.sampling))

    def _submit(self, request: Request) -> None:
        self.engine.submit(request)
        self._in_flight += 1

    def _receive(self, result: Result, flows: list[_Flow], stats: RolloutStats) -> None:
        self._in_flight -= 1
        stage, _, index = result.request_id.partition("/")
        flow = flows[int(index)]
        sent = flow.parts.bare if stage == "drafts" else flow.prompt_ids
        if result.prompt_ids != sent:
            raise EngineError(
                f"row {flow.problem.index}: the engine read {len(result.prompt_ids)} prompt ids, not the {len(sent)} "
                "it was sent; the learner would train on another context"
            )
        tokens = sum(map(len, result.token_ids))
        if stage == "drafts":
            stats.draft_tokens += tokens
        else:
            stats.refinement_tokens += tokens
        stats.prompt_tokens += len(result.prompt_ids)
        stats.cached_tokens += result.cached_tokens
        flow.pending = self.rewards.submit(flow.problem, self._completions(result), list(flow.parts.messages))

    def _completions(self, result: Result) -> list[Completion]:
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in result.token_ids]
        outputs = zip(result.token_ids, result.logprobs, texts, result.finish_reasons, strict=True)
        return [Completion(ids, logprobs, text, reason, result.version) for ids, logprobs, text, reason in outputs]

    def _advance(self, i: int, flow: _Flow, step: int, stats: RolloutStats, on_event: OnEvent, start: float) -> None:
        """Takes scores that are ready: drafts lead to refinements, refinements end the flow."""
        if flow.pending is None or not (flow.pending.done() or self._must_wait()):
            return
        scored, flow.pending = flow.pending.result(), None
        if flow.drafts or not self.config.drafts_per_prompt:
            flow.refinements = scored
            on_event("refinements")
            return
        flow.drafts = scored
        stats.drafts_done_at = time.perf_counter() - start
        on_event("drafts")
        flow.chosen = select_draft(scored, self.config, step, flow.problem.index)
        if flow.chosen is not None:
            ids = scored[flow.chosen].completion.token_ids
            flow.prompt_ids, flow.trimmed = self.prompts.with_draft(flow.parts, ids)
        self._submit_refinements(i, flow)

    def _must_wait(self) -> bool:
        # An idle engine has nothing better to do; and with full determinism, what is decoded beside what must not
        # hang on how fast a score came back.
        return self._in_flight == 0 or self.config.full_determinism

    def _group(self, flow: _Flow, advantages: tuple[float, ...]) -> RolloutGroup:
        return RolloutGroup(
            problem=flow.problem,
            drafts=flow.drafts,
            chosen=flow.chosen,
            prompt_ids=flow.prompt_ids,
            refinements=flow.refinements or (),
            advantages=advantages,
            draft_trimmed=flow.trimmed,
        )


def select_draft(drafts: Sequence[Scored], config: TrainConfig, step: int, row: int) -> int | None:
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


def _selection_score(draft: Scored, config: TrainConfig) -> tuple[float, float]:
    if config.draft_selection_score == "accuracy_first":
        return (draft.rewards.get("accuracy") or 0.0, draft.reward)
    return (draft.reward, 0.0)


def _seed(seed: int, step: int) -> int:
    return random.Random(f"{seed}/{step}").getrandbits(31)
