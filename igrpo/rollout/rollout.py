"""A step's rollout: one coroutine of ``algorithm.py`` per problem, driven over one engine.

No barrier stands between the stages: a draft is scored when it arrives, a problem's refinements go out the moment its
last draft is scored, and the engine's continuous batching fills the gaps. With ``draft_policy_lag: 1`` the next batch's
drafts are sampled beside this batch's refinements and under the learner step; they carry no gradient, so they may come
from the weights before. Refinements are always of the newest weights.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any, TypeVar

from igrpo.data_types import Completion, Problem, RolloutGroup, Scored, Trajectory
from igrpo.engines import Engine, Request, Sampling
from igrpo.rewards.functions import highest_reward
from igrpo.rewards.workers.pool import RewardPool
from igrpo.rollout.advantage import advantages_of
from igrpo.rollout.algorithm import Sample, two_stage
from igrpo.rollout.config import RolloutConfig
from igrpo.rollout.copying import copies_of
from igrpo.rollout.prompts import PromptBuilder
from igrpo.rollout.pump import Call, Pump, Usage
from igrpo.rollout.schedule import Flow, drafts_ahead, may_go_on, surplus, uninformative, unsent
from igrpo.rollout.turns import Turns
from igrpo.run.timeline import Timeline

OnEvent = Callable[[str], None]
"""Told ``"drafts"`` or ``"refinements"`` each time one problem of the step has finished that stage."""
T = TypeVar("T")
IDLE_SECONDS = 0.02
"""How long to wait for the learner before asking again whether a draft has been scored."""


@dataclass
class RolloutStats(Usage):
    """A step's rollout, and what the engine did since the rollout before: with drafts ahead, some of it is for the next
    step."""

    seconds: float = 0.0
    """From the first request to the last score of this step."""
    draft_tokens: int = 0
    refinement_tokens: int = 0
    discarded: list[RolloutGroup] = field(default_factory=list)
    """Groups without an advantage that substitutes replaced."""
    decoding_seconds: float = 0.0
    """Time for ``decoded_tokens``: ``seconds``, and with drafts ahead the learner step before it."""


class Rollout:
    """Runs the two stages, one batch of problems after the other.

    Args:
        tokenizer: decodes completions for the reward functions.
        timeline: told when each request and each score begins and ends.
        rank: this process's number; engines of several processes must not draw the same random numbers.
        gather: one object of each process, in rank order, at every process.
        turns: of completions that call tools; None: there is no environment.
    """

    def __init__(
        self,
        engine: Engine,
        rewards: RewardPool,
        prompts: PromptBuilder,
        tokenizer: Any,
        config: RolloutConfig,
        timeline: Timeline | None = None,
        rank: int = 0,
        gather: Callable[[Any], list[Any]] = lambda one: [one],
        turns: Turns | None = None,
    ):
        self.prompts, self.config, self.rank, self.gather = prompts, config, rank, gather
        self.pump = Pump(engine, rewards, tokenizer, timeline, in_order=config.full_determinism, turns=turns)
        self.sampling = Sampling(
            config.temperature, config.max_completion_length, config.top_p, config.top_k, config.min_p
        )
        self._enough = highest_reward(config) if config.early_stop_drafts else None
        self._flows: list[Flow] = []  # of the step that runs
        self._coming: list[Flow] = []  # of the step after it: drafts only
        self._restored: dict[int, list[dict[int, tuple[Scored, ...]]]] = {}
        self._counted_from = 0.0
        self._on_event: OnEvent = lambda stage: None

    def run(
        self,
        problems: Sequence[Problem],
        step: int,
        on_event: OnEvent = lambda stage: None,
        ahead: Sequence[Problem] = (),
        substitutes: Iterable[Problem] = (),
    ) -> tuple[list[RolloutGroup], RolloutStats]:
        """Groups in the order of ``problems``.

        Args:
            ahead: problems of the next step, whose drafts may begin now; the next ``run`` must be given these.
            substitutes: problems that replace those whose group has no advantage (``zero_variance: resample``).

        Raises:
            EngineError: the engine failed, read other ids than it was sent, or sampled a group from mixed weights.
        """
        start, substitutes, discarded = time.perf_counter(), iter(substitutes), []
        if not self._coming:
            self._counted_from = start
        self._on_event = on_event
        name = f"{self.config.seed}/{step}" + (f"/{self.rank}" if self.rank else "")
        self.pump.engine.seed(random.Random(name).getrandbits(31))
        self._flows, self._coming = self._coming, []
        if self._flows and [flow.problem.index for flow in self._flows] != [problem.index for problem in problems]:
            raise ValueError(f"step {step} was given other problems than those whose drafts were sampled ahead")
        self._flows = self._flows or [self._begin(problem, step, i) for i, problem in enumerate(problems)]
        self._restored.clear()  # what is left is other processes'; when such a row comes here, the weights are others
        self._submit(unsent(self._flows))
        self._coming = [self._begin(problem, step + 1, i) for i, problem in enumerate(ahead)]
        self._go_on()
        while any(flow.group is None for flow in self._flows):
            self._advance()
            self._go_on()
            if self.config.zero_variance == "resample":
                self._resample(substitutes, discarded)
        now, usage, self.pump.usage = time.perf_counter(), self.pump.usage, Usage()
        stats = RolloutStats(**vars(usage), seconds=now - start, discarded=discarded)
        stats.decoding_seconds, self._counted_from = now - self._counted_from, now
        groups = self._with_advantages([flow.group for flow in self._flows])
        for group in (*groups, *discarded):
            stats.draft_tokens += sum(len(s.completion.written_ids) for s in group.drafts)
            stats.refinement_tokens += sum(len(s.completion.written_ids) for s in group.refinements)
        return groups, stats

    def during(self, work: Callable[[], T]) -> T:
        """Runs ``work``, the learner step, in a thread while drafts of the next step are sampled; returns its result.

        The engine and the reward workers stay in this thread. Without drafts ahead ``work`` runs in this thread, too.
        """
        if not self._coming:
            return work()
        future: Future[T] = Future()

        def complete() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # handed to the thread that waits
                future.set_exception(error)

        Thread(target=complete, name="learner", daemon=True).start()
        while not future.done():
            busy = self.pump.running or any(unsent(self._coming))
            if busy or self.pump.waits:
                self._advance(may_wait=False)
            if not busy:
                wait([future], IDLE_SECONDS if self.pump.waits else None)
        return future.result()

    def finish_drafts(self) -> None:
        """Waits until every draft ahead is scored: for an evaluation, a checkpoint, or a push that must not be seen."""
        while not all(flow.ready for flow in self._coming):
            self._advance()

    def state_dict(self) -> list[dict[str, Any]]:
        """Drafts of the next step as plain data, finished first: ``{"row": …, "drafts": {index: …}}`` per problem.

        They are not trained on, so what was left to choose from is not kept.
        """
        self.finish_drafts()
        return [
            {"row": flow.problem.index, "drafts": {i: _plain(s) for i, (s,) in flow.scored.items()}}
            for flow in self._coming
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Takes saved drafts, of any process, for the next step; a problem that has none here gets new ones."""
        for record in state:
            drafts = {
                int(i): (Scored(_completion(saved["completion"]), saved["rewards"], saved["reward"]),)
                for i, saved in record["drafts"].items()
            }
            self._restored.setdefault(record["row"], []).append(drafts)

    # --- one flow

    def _begin(self, problem: Problem, step: int, position: int) -> Flow:
        # The name is the same when a resumed run comes here again: engines may derive a request's seed from it.
        flow = Flow(problem, step, f"{step}/{position}", two_stage(problem, step, self.prompts, self.config))
        self._wait_for(flow, flow.coroutine.send(None))
        if self.config.drafts_per_prompt and self._restored.get(problem.index):
            flow.open, flow.scored = {}, self._restored[problem.index].pop(0)
        return flow

    def _wait_for(self, flow: Flow, wanted: Sample) -> None:
        """A draft is a request of its own, scored as it arrives; the refinements are one, with one shared prompt."""
        name = f"{wanted.stage}/{flow.name}"
        named = [(f"{name}/{i}", 1) for i in range(wanted.n)] if wanted.stage == "draft" else [(name, wanted.n)]
        flow.stage, flow.scored = wanted.stage, {}
        for i, (name, n) in enumerate(named):
            request = Request(name, wanted.prompt_ids, n, self.sampling)
            flow.open[Call(flow.problem, wanted.question, (request,), wanted.stage, flow.step, flow)] = i

    def _resume(self, flow: Flow) -> None:
        """Gives the coroutine what it waited for; it asks for more, or returns its group."""
        scored = tuple(one for i in sorted(flow.scored) for one in flow.scored[i])
        try:
            self._wait_for(flow, flow.coroutine.send(scored))
        except StopIteration as end:
            flow.group = end.value

    # --- all flows

    def _go_on(self) -> None:
        for flow in may_go_on(self._flows, self.config):
            self._resume(flow)
            self._submit(unsent([flow]))

    def _advance(self, may_wait: bool = True) -> None:
        """One step of the engine, and the scores that are in."""
        self._submit(drafts_ahead(self._coming, self._flows, self.pump.in_flight, self.config))
        for call, scored in self.pump.advance(may_wait):
            flow = call.owner
            flow.scored[flow.open.pop(call)] = scored
            if aborted := surplus(flow, scored, self._enough):
                self.pump.abort(aborted)
                flow.open.clear()
            if flow.ready and flow not in self._coming:
                self._on_event(f"{flow.stage}s")

    def _submit(self, calls: Iterator[Call]) -> None:
        for call in calls:
            self.pump.submit(call, *call.requests)

    def _resample(self, substitutes: Iterator[Problem], discarded: list[RolloutGroup]) -> None:
        """Gives the places of uninformative groups to other problems, as long as there are any."""
        for place in uninformative(self._flows, self.config):
            problem = next(substitutes, None)
            if problem is None:
                return
            old = self._flows[place]
            discarded.append(old.group)
            self._flows[place] = self._begin(problem, old.step, len(self._flows) + len(discarded) - 1)
            self._submit(unsent([self._flows[place]]))
        self._go_on()

    def _with_advantages(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        config, drafts = self.config, [()] * len(groups)
        refined, drafted = ([getattr(group, name) for group in groups] for name in ("refinements", "drafts"))
        own = advantages_of(refined, config, config.advantage_estimator, self.gather, drafted)
        if config.train_on_drafts:
            drafts = advantages_of(drafted, config, config.estimator_of_drafts, self.gather)
        parts = zip(groups, own, drafts, strict=True)
        return [
            replace(group, advantages=a, draft_advantages=d, copies=copies_of(group, config)) for group, a, d in parts
        ]


def _plain(draft: Scored) -> dict[str, Any]:
    return dataclasses.asdict(replace(draft, completion=replace(draft.completion, kept=None)))


def _completion(saved: dict[str, Any]) -> Completion:
    trajectory = saved.get("trajectory")
    return Completion(**saved | {"kept": None, "trajectory": Trajectory(**trajectory) if trajectory else None})
