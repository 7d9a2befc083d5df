"""Samples and scores: requests go to the engine; completions come back checked, decoded and with their rewards.

Rollouts (``rollout.py``) and evaluations (``igrpo/eval/sampling.py``) differ only in what they ask for next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from igrpo.data_types import Completion, Problem, Scored
from igrpo.engines import Engine, EngineError, Request, Result
from igrpo.rewards.workers.pool import PendingScores, RewardPool
from igrpo.rollout.prompts import PromptParts
from igrpo.rollout.turns import Turns
from igrpo.run.timeline import Timeline

POLL_SECONDS = 0.05
"""How long an idle engine waits for a tool before scores are looked at."""


@dataclass(eq=False)
class Call:
    """Completions of one problem that the reward functions see together: of one request or of several."""

    problem: Problem
    question: PromptParts
    requests: tuple[Request, ...]
    stage: str = "eval"
    step: int = 0
    owner: Any = None
    """Who waits for it."""
    sent_at: int | None = None
    """Version of the engine's weights then; None: not sent."""
    arrived: dict[str, Result] = field(default_factory=dict)


@dataclass
class Usage:
    """What the engine did."""

    decoded_tokens: int = 0
    prompt_tokens: int = 0
    """Read by the engine for them."""
    cached_tokens: int = 0
    """Of those, served from the prefix cache."""


class Pump:
    """One engine and one reward pool.

    Args:
        tokenizer: decodes completions for the reward functions.
        in_order: every score is waited for where it is first asked for, so that what is decoded beside what does not
            hang on how fast a score or a tool came back.
        turns: what goes on where a completion calls a tool; None: there is no environment.
        mixes: refinements may be of several versions of the weights.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: RewardPool,
        tokenizer: Any,
        timeline: Timeline | None,
        in_order: bool = False,
        turns: Turns | None = None,
        mixes: bool = False,
    ):
        self.turns, self.mixes = turns, mixes
        self.engine, self.rewards, self.tokenizer, self.in_order = engine, rewards, tokenizer, in_order
        self.timeline, self.usage = timeline or Timeline(None), Usage()
        self.running: dict[str, tuple[Call, Request]] = {}
        self.scoring: dict[Call, PendingScores] = {}
        self.in_flight = 0  # completions in the engine

    @property
    def waits(self) -> bool:
        """For a score or a tool."""
        return bool(self.scoring) or (self.turns is not None and self.turns.busy)

    def submit(self, call: Call, request: Request) -> None:
        call.sent_at = self.engine.version if call.sent_at is None else call.sent_at
        self.running[request.request_id] = (call, request)
        self.in_flight += request.n
        self.timeline.start(call.stage, call.step, request.request_id)
        self.engine.submit(request)

    def advance(self, may_wait: bool = True) -> Iterator[tuple[Call, tuple[Scored, ...]]]:
        """One step of the engine, then the calls whose scores are in, in the order in which their completions came.

        Raises:
            EngineError: the engine failed, read other ids than it was sent, or sampled a group from mixed weights.
        """
        for result in self.engine.poll():
            self._receive(result)
        if self.turns is not None:
            self._go_on(self.turns, may_wait)
        for call in list(self.scoring):
            if call not in self.scoring:  # aborted when a sibling's score came
                continue
            # An idle engine has nothing better to do than wait.
            idle = may_wait and not self.running and not (self.turns is not None and self.turns.busy)
            if self.scoring[call].done() or self.in_order or idle:
                scored = self.scoring.pop(call).result()
                self.timeline.end("reward", call.step, call.requests[0].request_id)
                yield call, scored

    def abort(self, calls: Collection[Call]) -> None:
        """Forgets these calls, wherever they are."""
        names = [name for name, (call, _) in self.running.items() if call in calls]
        self.engine.abort(names)
        if self.turns is not None:
            self.turns.abort(calls)
        for name in names:
            call, request = self.running.pop(name)
            self.in_flight -= request.n
            self.timeline.end(call.stage, call.step, name)
        for call in [call for call in self.scoring if call in calls]:
            del self.scoring[call]
            self.timeline.end("reward", call.step, call.requests[0].request_id)

    def _receive(self, result: Result) -> None:
        if result.request_id not in self.running:
            raise EngineError(f"the engine returned {result.request_id}, which is not running")
        call, request = self.running.pop(result.request_id)
        self.in_flight -= request.n
        _check(result, request, call, self.mixes)
        tokens = sum(map(len, result.token_ids))
        self.timeline.end(call.stage, call.step, result.request_id, tokens)
        self.usage.decoded_tokens += tokens
        self.usage.prompt_tokens += len(result.prompt_ids)
        self.usage.cached_tokens += result.cached_tokens
        if self.turns is not None and self.turns.is_turn(result.request_id):
            self.turns.go_on(result.request_id, *self._completions(result))
            return
        call.arrived[result.request_id] = result
        if len(call.arrived) < len(call.requests):
            return
        first = [(one, self._completions(call.arrived.pop(one.request_id))) for one in call.requests]
        if self.turns is not None:
            self.turns.begin(call, first)
        else:
            self._score(call, [completion for _, some in first for completion in some])

    def _go_on(self, turns: Turns, may_wait: bool) -> None:
        """Sends the turns that follow an answer, and scores what has had its last."""
        idle = may_wait and not self.running and not any(score.done() for score in self.scoring.values())
        turns.poll(POLL_SECONDS if idle else 0.0)
        while self.in_order and turns.busy:
            turns.poll(POLL_SECONDS)
        for call, request in turns.requests():
            self.submit(call, request)
        for call, completions in turns.completed():
            self._score(call, completions)

    def _score(self, call: Call, completions: list[Completion]) -> None:
        self.timeline.start("reward", call.step, call.requests[0].request_id)
        prompt, suffix = list(call.question.messages), call.question.prompt_suffix
        self.scoring[call] = self.rewards.submit(call.problem, completions, prompt, suffix)

    def _completions(self, result: Result) -> list[Completion]:
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in result.token_ids]
        kept, versions = result.kept or [None] * len(texts), result.versions or [()] * len(texts)
        said = (result.finish_reasons, kept, result.routes or [None] * len(texts), versions)
        outputs = zip(result.token_ids, result.logprobs, texts, *said, strict=True)
        return [
            Completion(ids, probs, text, why, runs[-1][0] if runs else result.version, sets, read, versions=runs)
            for ids, probs, text, why, sets, read, runs in outputs
        ]


def _check(result: Result, request: Request, call: Call, mixes: bool) -> None:
    row = call.problem.index
    if result.prompt_ids != request.prompt_ids:
        raise EngineError(
            f"row {row}: the engine read {len(result.prompt_ids)} prompt ids, not the {len(request.prompt_ids)} it was "
            "sent; rewards and learner would see another context"
        )
    if len(result.token_ids) != request.n:
        raise EngineError(f"row {row}: the engine returned {len(result.token_ids)} completions of {request.n}")
    for ids, kept in zip(result.token_ids, result.kept or (), strict=False):
        sets = list(kept.sets())
        wrong = [i for i, (token, one) in enumerate(zip(ids, sets, strict=False)) if token not in one]
        if wrong or len(sets) != len(ids):
            place = wrong[0] if wrong else min(len(ids), len(sets))
            raise EngineError(
                f"row {row}: the engine kept {len(sets)} sets of tokens for the {len(ids)} it sampled, and at position "
                f"{place} the sampled one is not among them"
            )
    for ids, runs in zip(result.token_ids, result.versions, strict=False):
        if runs and sum(count for _, count in runs) != len(ids):
            raise EngineError(f"row {row}: the engine sampled {len(ids)} tokens and names the weights of {runs}")
    if call.stage == "refinement" and result.version != call.sent_at and not mixes:
        raise EngineError(
            f"row {row}: weights went from version {call.sent_at} to {result.version} while its refinements were "
            "sampled; the group mixes two policies"
        )
