"""Two-stage rollouts: sample drafts, keep one by reward, sample refinements of question + draft.

    drafts d_1..d_N ~ pi(. | q)   ->   d^ = first argmax R(d_i)   ->   q' = template(q, d^)   ->   o_1..o_G ~ pi(. | q')

One flow per problem and no barrier between the stages: a draft is scored when it arrives, a problem's refinements go
out the moment its last draft is scored, and the engine's continuous batching fills the gaps. With
``draft_policy_lag: 1`` the next batch's drafts are sampled beside this batch's refinements and under the learner step;
they carry no gradient, so they may come from the weights before. Refinements are always of the newest weights.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, TypeVar

from igrpo.data_types import Completion, Problem, RolloutGroup, Scored
from igrpo.engines import Engine, EngineError, Request, Result, Sampling
from igrpo.rewards.functions import highest_reward
from igrpo.rewards.workers.pool import PendingScores, RewardPool
from igrpo.rollout.advantage import group_advantages
from igrpo.rollout.config import RolloutConfig
from igrpo.rollout.flow import Flow, select_draft
from igrpo.rollout.prompts import PromptBuilder
from igrpo.run.timeline import Timeline

OnEvent = Callable[[str], None]
"""Told ``"drafts"`` or ``"refinements"`` each time one problem of the step has finished that stage."""
T = TypeVar("T")
IDLE_SECONDS = 0.02
"""How long to wait for the learner before asking again whether a draft has been scored."""


@dataclass
class RolloutStats:
    """A step's rollout: the tokens of its groups, and what the engine did since the rollout before."""

    seconds: float = 0.0
    """From the first request to the last score of this step."""
    draft_tokens: int = 0
    refinement_tokens: int = 0
    decoded_tokens: int = 0
    """Came from the engine since the rollout before; with drafts ahead some of them belong to the next step."""
    prompt_tokens: int = 0
    """Read by the engine for them."""
    cached_tokens: int = 0
    """Of those, served from the prefix cache."""
    discarded: list[RolloutGroup] = field(default_factory=list)
    """Groups without an advantage that spare problems replaced."""
    decoding_seconds: float = 0.0
    """Time for ``decoded_tokens``: ``seconds``, and with drafts ahead the learner step before it."""


@dataclass(eq=False)
class _Sent:
    """A request of a flow, from its submission until it is scored."""

    flow: Flow
    draft: int | None
    """Sampling index of the draft; None: the flow's refinements."""
    request: Request
    version: int
    pending: PendingScores | None = None

    @property
    def stage(self) -> str:
        return "refinement" if self.draft is None else "draft"


class Rollout:
    """Runs the two stages, one batch of problems after the other.

    Args:
        tokenizer: decodes completions for the reward functions.
        timeline: told when each request and each score begins and ends.
        rank: this process's number; engines of several processes must not draw the same random numbers.
        gather: one object of each process, in rank order, at every process.
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
    ):
        self.rank, self.gather = rank, gather
        self.engine, self.rewards, self.prompts, self.tokenizer = engine, rewards, prompts, tokenizer
        self.config, self.timeline = config, timeline or Timeline(None)
        self.sampling = Sampling(
            config.temperature, config.max_completion_length, config.top_p, config.top_k, config.min_p
        )
        self._enough = highest_reward(config) if config.early_stop_drafts else None
        self._flows: list[Flow] = []  # of the step that runs
        self._ahead: list[Flow] = []  # of the step after it: drafts only
        self._held: deque[tuple[Flow, int]] = deque()  # drafts ahead that wait for a free slot of the engine
        self._running: dict[str, _Sent] = {}
        self._scoring: dict[str, _Sent] = {}
        self._restored: dict[int, list[dict[int, Scored]]] = {}
        self._stats, self._counted_from = RolloutStats(), 0.0
        self._on_event: OnEvent = lambda stage: None

    def run(
        self,
        problems: Sequence[Problem],
        step: int,
        on_event: OnEvent = lambda stage: None,
        ahead: Sequence[Problem] = (),
        spare: Iterable[Problem] = (),
    ) -> tuple[list[RolloutGroup], RolloutStats]:
        """Groups in the order of ``problems``.

        Args:
            ahead: problems of the next step, whose drafts may begin now; the next ``run`` must be given these.
            spare: problems that replace those whose group has no advantage (``zero_variance: resample``).

        Raises:
            EngineError: the engine failed, read other ids than it was sent, or sampled a group from mixed weights.
        """
        start = time.perf_counter()
        if not self._ahead:
            self._counted_from = start
        self._on_event = on_event
        self.engine.seed(_seed(self.config.seed, step, self.rank))
        self._flows = self._take_over(problems, step)
        self._ahead = [self._begin(problem, step + 1, i) for i, problem in enumerate(ahead)]
        self._held.extend((flow, i) for flow in self._ahead for i in sorted(flow.open_drafts))
        spares = iter(spare)
        self._refine_drafted()
        while any(flow.refinements is None for flow in self._flows):
            self._advance()
            self._refine_drafted()
            if self.config.zero_variance == "resample":
                self._replace_uninformative(spares, step)
        stats, self._stats = self._stats, RolloutStats()
        now = time.perf_counter()
        stats.seconds, stats.decoding_seconds, self._counted_from = now - start, now - self._counted_from, now
        groups = self._groups(self._flows)
        for group in (*groups, *stats.discarded):
            stats.draft_tokens += sum(len(s.completion.token_ids) for s in group.drafts)
            stats.refinement_tokens += sum(len(s.completion.token_ids) for s in group.refinements)
        return groups, stats

    def during(self, work: Callable[[], T]) -> T:
        """Runs ``work``, the learner step, in a thread while drafts of the next step are sampled; returns its result.

        The engine and the reward workers stay in this thread. Without drafts ahead ``work`` runs in this thread, too.
        """
        if not self._ahead:
            return work()
        future: Future[T] = Future()
        Thread(target=_complete, args=(future, work), name="learner", daemon=True).start()
        while not future.done():
            if self._running or self._held:
                self._advance(may_wait=False)
            elif self._scoring:
                self._advance(may_wait=False)
                wait([future], IDLE_SECONDS)
            else:
                wait([future])
        return future.result()

    def finish_drafts(self) -> None:
        """Waits until every draft ahead is scored: for an evaluation, a checkpoint, or a push that must not be seen."""
        while not all(flow.drafted for flow in self._ahead):
            self._advance()

    def state_dict(self) -> list[dict[str, Any]]:
        """Drafts of the next step as plain data, finished first: ``{"row": …, "drafts": {index: …}}`` per problem."""
        self.finish_drafts()
        return [
            {"row": flow.problem.index, "drafts": {i: dataclasses.asdict(s) for i, s in flow.drafts.items()}}
            for flow in self._ahead
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Takes saved drafts, of any process; a problem that has none here gets new ones."""
        for record in state:
            drafts = {int(i): _scored(saved) for i, saved in record["drafts"].items()}
            self._restored.setdefault(record["row"], []).append(drafts)

    # --- flows

    def _take_over(self, problems: Sequence[Problem], step: int) -> list[Flow]:
        """The flows that were drafted ahead, else new ones whose drafts go out now."""
        flows, self._ahead = self._ahead, []
        if flows and [flow.problem.index for flow in flows] != [problem.index for problem in problems]:
            raise ValueError(f"step {step} was given other problems than those whose drafts were sampled ahead")
        if not flows:
            flows = [self._begin(problem, step, i) for i, problem in enumerate(problems)]
            self._held.extend((flow, i) for flow in flows for i in sorted(flow.open_drafts))
        while self._held:
            self._submit_draft(*self._held.popleft())
        return flows

    def _begin(self, problem: Problem, step: int, position: int) -> Flow:
        parts = self.prompts.parts(problem)
        # The name is the same when a resumed run comes here again: engines may derive a request's seed from it.
        flow = Flow(problem, parts, step, f"{step}/{position}", prompt_ids=parts.bare)
        if self._restored.get(problem.index):
            flow.drafts = self._restored[problem.index].pop(0)
        else:
            flow.open_drafts = set(range(self.config.drafts_per_prompt))
        if not flow.open_drafts:
            self._choose(flow)
        return flow

    def _choose(self, flow: Flow) -> None:
        flow.drafted = True
        if not flow.drafts:
            return  # algorithm: grpo
        scored = flow.scored_drafts
        flow.chosen = select_draft(scored, self.config, flow.step, flow.problem.index)
        if flow.chosen is not None:
            flow.prompt_ids, flow.trimmed = self.prompts.with_draft(
                flow.parts, scored[flow.chosen].completion.token_ids
            )

    def _refine_drafted(self) -> None:
        """Refinements of every flow whose drafts are in; with ``barrier``, only once all flows' are."""
        if self.config.rollout_schedule == "barrier" and not all(flow.drafted for flow in self._flows):
            return
        for flow in self._flows:
            if flow.drafted and not flow.refining:
                flow.refining = True
                request = Request(
                    f"refinement/{flow.name}", flow.prompt_ids, self.config.num_generations, self.sampling
                )
                self._submit(_Sent(flow, None, request, self.engine.version))

    def _replace_uninformative(self, spares: Iterable[Problem], step: int) -> None:
        """Groups whose rewards are all equal make room for spare problems, as long as there are any."""
        for i, flow in enumerate(self._flows):
            if flow.refinements is None or flow.informative:
                continue
            problem = next(spares, None)  # type: ignore[call-overload]
            if problem is None:
                return
            self._stats.discarded.append(flow.group((0.0,) * len(flow.refinements)))
            self._flows[i] = fresh = self._begin(problem, step, len(self._flows) + len(self._stats.discarded) - 1)
            for draft in sorted(fresh.open_drafts):
                self._submit_draft(fresh, draft)
        self._refine_drafted()

    def _groups(self, flows: Sequence[Flow]) -> list[RolloutGroup]:
        advantages = self._advantages([[s.reward for s in flow.refinements or ()] for flow in flows])
        drafts: list[tuple[float, ...]] = [()] * len(flows)
        if self.config.train_on_drafts:
            drafts = self._advantages([[s.reward for s in flow.scored_drafts] for flow in flows])
        return [flow.group(a, d) for flow, a, d in zip(flows, advantages, drafts, strict=True)]

    def _advantages(self, rewards_P_G: list[list[float]]) -> list[tuple[float, ...]]:
        scale = self.config.scale_rewards
        batch = [group for part in self.gather(rewards_P_G) for group in part] if scale == "batch" else None
        return group_advantages(rewards_P_G, scale, batch)

    # --- requests

    def _advance(self, may_wait: bool = True) -> None:
        """One step of the engine; what it finished goes to the reward functions, and scores that are in are used."""
        self._fill_slots()
        for result in self.engine.poll():
            self._receive(result)
        for name in list(self._scoring):
            sent = self._scoring.get(name)
            if sent is None:  # aborted by a sibling's score
                continue
            # An idle engine has nothing better to do than wait; and with full determinism, what is decoded beside
            # what must not hang on how fast a score came back.
            must_wait = self.config.full_determinism or (may_wait and not self._running)
            if sent.pending.done() or must_wait:  # type: ignore[union-attr]
                del self._scoring[name]
                self._take(sent)

    def _fill_slots(self) -> None:
        """Drafts ahead get the slots that this step and its coming refinements leave free: they never delay it."""
        to_come = sum(self.config.num_generations for flow in self._flows if not flow.refining)
        used = to_come + sum(sent.request.n for sent in self._running.values())
        while self._held and (used < self.config.vllm_max_num_seqs or not self._running):
            self._submit_draft(*self._held.popleft())
            used += 1

    def _submit_draft(self, flow: Flow, i: int) -> None:
        request = Request(f"draft/{flow.name}/{i}", flow.parts.bare, 1, self.sampling)
        self._submit(_Sent(flow, i, request, self.engine.version))

    def _submit(self, sent: _Sent) -> None:
        self._running[sent.request.request_id] = sent
        self.timeline.start(sent.stage, sent.flow.step, sent.request.request_id)
        self.engine.submit(sent.request)

    def _receive(self, result: Result) -> None:
        sent = self._running.pop(result.request_id, None)
        if sent is None:
            raise EngineError(f"the engine returned {result.request_id}, which is not running")
        _check(result, sent)
        tokens = sum(map(len, result.token_ids))
        self.timeline.end(sent.stage, sent.flow.step, result.request_id, tokens)
        self._stats.decoded_tokens += tokens
        self._stats.prompt_tokens += len(result.prompt_ids)
        self._stats.cached_tokens += result.cached_tokens
        self.timeline.start("reward", sent.flow.step, result.request_id)
        parts, completions = sent.flow.parts, self._completions(result)
        sent.pending = self.rewards.submit(sent.flow.problem, completions, list(parts.messages), parts.prompt_suffix)
        self._scoring[result.request_id] = sent

    def _completions(self, result: Result) -> list[Completion]:
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in result.token_ids]
        outputs = zip(result.token_ids, result.logprobs, texts, result.finish_reasons, strict=True)
        return [Completion(ids, logprobs, text, reason, result.version) for ids, logprobs, text, reason in outputs]

    def _take(self, sent: _Sent) -> None:
        """Scores are in: refinements end the flow, the last draft leads to refinements."""
        scored, flow = sent.pending.result(), sent.flow  # type: ignore[union-attr]
        self.timeline.end("reward", flow.step, sent.request.request_id)
        if sent.draft is None:
            flow.refinements = scored
            self._on_event("refinements")
            return
        flow.drafts[sent.draft] = scored[0]
        flow.open_drafts.discard(sent.draft)
        if self._enough is not None and scored[0].reward >= self._enough:
            self._abort_drafts(flow)
        if not flow.open_drafts:
            self._choose(flow)
            if flow not in self._ahead:
                self._on_event("drafts")

    def _abort_drafts(self, flow: Flow) -> None:
        """No draft can be better than the one just scored: the others are not waited for, and do not count."""
        names = [name for name, sent in self._running.items() if sent.flow is flow]
        self.engine.abort(names)
        for name in names:
            self.timeline.end("draft", flow.step, name)
            del self._running[name]
        for name in [name for name, sent in self._scoring.items() if sent.flow is flow]:
            self.timeline.end("reward", flow.step, name)
            del self._scoring[name]
        self._held = deque((other, i) for other, i in self._held if other is not flow)
        flow.open_drafts.clear()


def _check(result: Result, sent: _Sent) -> None:
    row, request = sent.flow.problem.index, sent.request
    if result.prompt_ids != request.prompt_ids:
        raise EngineError(
            f"row {row}: the engine read {len(result.prompt_ids)} prompt ids, not the {len(request.prompt_ids)} it was "
            "sent; the learner would train on another context"
        )
    if len(result.token_ids) != request.n:
        raise EngineError(f"row {row}: the engine returned {len(result.token_ids)} completions of {request.n}")
    if sent.draft is None and result.version != sent.version:
        raise EngineError(
            f"row {row}: weights went from version {sent.version} to {result.version} while its refinements were "
            "sampled; the group mixes two policies"
        )


def _complete(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # handed to the thread that waits
        future.set_exception(error)


def _scored(saved: dict[str, Any]) -> Scored:
    return Scored(Completion(**saved["completion"]), saved["rewards"], saved["reward"])


def _seed(seed: int, step: int, rank: int) -> int:
    return random.Random(f"{seed}/{step}" + (f"/{rank}" if rank else "")).getrandbits(31)
