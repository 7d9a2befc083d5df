"""A step's rollout: one coroutine of ``algorithm.py`` per problem, driven over one engine.

No barrier stands between the stages: a draft is scored when it arrives, a problem's refinements go out the moment its
last draft is scored, and the engine's continuous batching fills the gaps.

Later steps' problems may be sampled beside this step's and under the learner step. With ``draft_policy_lag: 1`` those
are the next step's drafts: they carry no gradient and may come from the weights before, while refinements are of the
newest. With ``policy_lag: L`` they are whole groups, L steps ahead, whose tokens say which weights they are of.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Thread
from typing import Any, TypeVar

from igrpo.data_types import Completion, Kept, Problem, RolloutGroup, Routes, Scored, Trajectory
from igrpo.engines import Engine, Request, Sampling
from igrpo.rewards.functions import highest_reward
from igrpo.rewards.workers.pool import RewardPool
from igrpo.rollout.advantage import advantages_of
from igrpo.rollout.algorithm import Sample, two_stage
from igrpo.rollout.config import RolloutConfig
from igrpo.rollout.copying import copies_of
from igrpo.rollout.prompts import PromptBuilder
from igrpo.rollout.pump import Call, Pump, Usage
from igrpo.rollout.schedule import Flow, due, in_free_slots, may_go_on, oldest, surplus, uninformative, unsent
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
    dropped: int = 0
    """Groups that became too old to be trained on (``policy_lag``), and began again."""
    version: int = 0
    """Of the weights that train on the groups."""
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
        mixes = config.policy_lag > 0
        self.pump = Pump(engine, rewards, tokenizer, timeline, config.full_determinism, turns=turns, mixes=mixes)
        self.sampling = Sampling(
            config.temperature, config.max_completion_length, config.top_p, config.top_k, config.min_p
        )
        self._enough = highest_reward(config) if config.early_stop_drafts else None
        self._flows: list[Flow] = []
        """Of the step that runs and of those ahead, in order."""
        self._step = 0
        """How many of them the engine is sent whatever it has to do: all of a step that waits for each of its own."""
        self._spare = count()
        """Numbers for what begins beside the step's own problems."""
        self._restored: dict[int, list[dict[str, Any]]] = {}
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
        """The groups of as many problems: with ``policy_lag`` those that come first, else those of ``problems``.

        Args:
            ahead: problems of the next steps, which may begin now; the next ``run`` must be given these.
            substitutes: problems that replace those whose group has no advantage (``zero_variance: resample``).

        Raises:
            EngineError: the engine failed, read other ids than it was sent, or sampled a group from mixed weights.
        """
        start, substitutes, discarded = time.perf_counter(), iter(substitutes), []
        if not self._flows:
            self._counted_from = start
        self._on_event, n = on_event, len(problems)
        name = f"{self.config.seed}/{step}" + (f"/{self.rank}" if self.rank else "")
        self.pump.engine.seed(random.Random(name).getrandbits(31))
        dropped = self._fill([*problems, *ahead], step, n)
        while True:
            if self.config.zero_variance == "resample":
                self._resample(substitutes, discarded, step)
            if chosen := due(self._flows, n, self.config):
                break
            self._advance()
            self._go_on()
        self._flows, self._step, self._on_event = [f for f in self._flows if f not in chosen], 0, lambda stage: None
        now, usage, self.pump.usage = time.perf_counter(), self.pump.usage, Usage()
        stats = RolloutStats(**vars(usage), seconds=now - start, discarded=discarded, dropped=dropped)
        stats.decoding_seconds, self._counted_from = now - self._counted_from, now
        stats.version = self.pump.engine.version
        groups = self._with_advantages([flow.group for flow in chosen])
        for group in (*groups, *discarded):
            stats.draft_tokens += sum(len(s.completion.written_ids) for s in group.drafts)
            stats.refinement_tokens += sum(len(s.completion.written_ids) for s in group.refinements)
        return groups, stats

    def during(self, work: Callable[[], T]) -> T:
        """Runs ``work``, the learner step, in a thread while the next steps' problems are sampled; returns its result.

        The engine and the reward workers stay in this thread. Without problems ahead ``work`` runs in it, too.
        """
        if not self._flows:
            return work()
        future: Future[T] = Future()

        def complete() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # handed to the thread that waits
                future.set_exception(error)

        Thread(target=complete, name="learner", daemon=True).start()
        while not future.done():
            if self._busy or self.pump.waits:
                self._advance(may_wait=False)
                self._go_on()
            if not self._busy:
                wait([future], IDLE_SECONDS if self.pump.waits else None)
        return future.result()

    def finish(self) -> None:
        """Waits until all that may be sampled ahead is scored: for an evaluation, a checkpoint, or a push that must not
        be seen."""
        self._go_on()
        while any(flow.open for flow in self._flows):
            self._advance()
            self._go_on()

    def state_dict(self) -> list[dict[str, Any]]:
        """What was sampled ahead as plain data, finished first: the answers that each problem's coroutine got."""
        self.finish()
        kept = ("refinement", "draft") if self.config.train_on_drafts else ("refinement",)
        return [
            {
                "row": flow.problem.index,
                "step": flow.step,
                "answers": [
                    (sample.stage, sample.prompt_ids, [_plain(s, sample.stage in kept) for s in scored])
                    for sample, scored in (*flow.answers, *([] if flow.group else [(flow.asked, flow.found)]))
                ],
            }
            for flow in self._flows
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]], processes: int = 1) -> None:
        """Takes this process's share of what all have saved, dealt as the feed deals their rows: answers for problems
        of the next ``run``; one that has none begins anew."""
        for record in state[self.rank :: processes]:
            self._restored.setdefault(record["row"], []).append(record)

    # --- one flow

    def _begin(self, problem: Problem, step: int, position: int) -> Flow:
        # The name is the same when a resumed run comes here again: engines may derive a request's seed from it.
        saved, name = self._restored.get(problem.index), f"{step}/{position}"
        record = saved.pop(0) if saved else {}
        step = record.get("step", step)
        coroutine = two_stage(problem, step, self.prompts, self.config)
        flow = Flow(problem, step, name, coroutine, coroutine.send(None))
        flow.replay = [
            (s, tuple(ids), tuple(map(_scored, all_of_them))) for s, ids, all_of_them in record.get("answers", ())
        ]
        self._wait_for(flow, flow.asked)
        return flow

    def _wait_for(self, flow: Flow, wanted: Sample) -> None:
        """A draft is a request of its own, scored as it arrives. The refinements are one, with one shared prompt; with
        ``policy_lag`` one each, so that each frees its slot when it ends."""
        flow.asked, flow.scored = wanted, {}
        if flow.replay and wanted.n:
            stage, prompt_ids, scored = flow.replay.pop(0)
            if (stage, prompt_ids) == (wanted.stage, wanted.prompt_ids):
                flow.scored[0] = scored
                return
        flow.replay.clear()  # another algorithm, or another prompt: nothing after this fits
        name = f"{wanted.stage}/{flow.name}"
        alone, drafts = [(f"{name}/{i}", 1) for i in range(wanted.n)], wanted.stage == "draft"
        named = alone if drafts or self.config.policy_lag else [(name, wanted.n)]
        requests = [Request(name, wanted.prompt_ids, n, self.sampling) for name, n in named]
        for i, some in enumerate([(one,) for one in requests] if drafts else [tuple(requests)]):
            flow.open[Call(flow.problem, wanted.question, some, wanted.stage, flow.step, flow)] = i

    def _resume(self, flow: Flow) -> None:
        """Gives the coroutine what it waited for; it asks for more, or returns its group."""
        flow.answers.append((flow.asked, flow.found))
        try:
            self._wait_for(flow, flow.coroutine.send(flow.found))
        except StopIteration as end:
            flow.group = end.value

    # --- all flows

    def _fill(self, problems: Sequence[Problem], step: int, n: int) -> int:
        """Begins those of this step's ``n`` problems and the ones ahead that have not begun, and those once more whose
        oldest token to train on is too old; returns how many."""
        known, dropped, lag = len(self._flows), 0, self.config.policy_lag
        if not lag and [flow.problem.index for flow in self._flows] != [p.index for p in problems[:known]]:
            raise ValueError(f"step {step} was given other problems than those whose drafts were sampled ahead")
        self._flows += [self._begin(problems[i], step + i // n, i % n) for i in range(known, len(problems))]
        self._restored.clear()  # what is left was further ahead; when such a row comes, the weights are others
        self._step, self._spare = 0 if lag else n, count(n)
        self._submit(unsent(self._flows[: self._step]))
        self._go_on()
        for place, flow in enumerate(self._flows):
            born = oldest(flow, self.config)
            if born is not None and born < self.pump.engine.version - lag:
                self.pump.abort(list(flow.open))
                self._flows[place] = self._begin(flow.problem, step, next(self._spare))
                dropped += 1
        self._submit(unsent(self._flows[: self._step]))
        return dropped

    @property
    def _busy(self) -> bool:
        return bool(self.pump.running) or any(unsent(self._flows))

    def _go_on(self) -> None:
        """Under ``policy_lag`` every problem goes on when it can, else those of the step that runs."""
        moving = self._flows if self.config.policy_lag else self._flows[: self._step]
        while ready := may_go_on(moving, self.config):
            for flow in ready:
                self._resume(flow)
        self._submit(unsent(self._flows[: self._step]))

    def _advance(self, may_wait: bool = True) -> None:
        """One step of the engine, and the scores that are in."""
        now, coming = self._flows[: self._step], self._flows[self._step :]
        self._submit(in_free_slots(coming, now, self.pump.in_flight, self.config))
        for call, scored in self.pump.advance(may_wait):
            flow = call.owner
            flow.scored[flow.open.pop(call)] = scored
            if aborted := surplus(flow, scored, self._enough):
                self.pump.abort(aborted)
                flow.open.clear()
            if flow.ready and (self.config.policy_lag or flow in now):
                self._on_event(f"{flow.stage}s")

    def _submit(self, calls: Iterator[Call]) -> None:
        for call in calls:
            for request in call.requests:
                self.pump.submit(call, request)

    def _resample(self, substitutes: Iterator[Problem], discarded: list[RolloutGroup], step: int) -> None:
        """Gives the places of uninformative groups to other problems, as long as there are any."""
        for place in uninformative(self._flows, self.config):
            problem = next(substitutes, None)
            if problem is None:
                return
            discarded.append(self._flows[place].group)
            self._flows[place] = self._begin(problem, step, next(self._spare))
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


def _plain(scored: Scored, trained: bool) -> dict[str, Any]:
    """What was left to choose from, and the experts, are kept of what is trained on."""
    completion = scored.completion if trained else replace(scored.completion, kept=None, routes=None)
    return dataclasses.asdict(replace(scored, completion=completion))


def _scored(plain: dict[str, Any]) -> Scored:
    completion = dict(plain["completion"])
    for name, kind in (("kept", Kept), ("routes", Routes), ("trajectory", Trajectory)):
        if completion.get(name) is not None:
            completion[name] = kind(**completion[name])
    return Scored(Completion(**completion), plain["rewards"], plain["reward"])
