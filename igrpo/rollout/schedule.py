"""Policies of the rollout, each by itself: ``rollout.py`` asks them around every step of the engine."""

from __future__ import annotations

from collections.abc import Collection, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace

from igrpo.data_types import Problem, RolloutGroup, Scored
from igrpo.rollout.advantage import advantages_of
from igrpo.rollout.algorithm import Sample
from igrpo.rollout.config import RolloutConfig
from igrpo.rollout.pump import Call


@dataclass(eq=False)
class Flow:
    """One problem in one step: its coroutine, what that waits for, and its group in the end."""

    problem: Problem
    step: int
    name: str
    """Unique over the run; requests are called after it."""
    coroutine: Coroutine[Sample, tuple[Scored, ...], RolloutGroup]
    asked: Sample
    """What that waits for."""
    replay: list[tuple[str, tuple[int, ...], tuple[Scored, ...]]] = field(default_factory=list)
    """Answers of an earlier run that are still to be given again: stage, prompt, completions."""
    answers: list[tuple[Sample, tuple[Scored, ...]]] = field(default_factory=list)
    """What the coroutine was given so far."""
    open: dict[Call, int] = field(default_factory=dict)
    """What is not scored yet, with its place in sampling order."""
    scored: dict[int, tuple[Scored, ...]] = field(default_factory=dict)
    group: RolloutGroup | None = None
    informs: bool | None = None
    """Whether any refinement of the group has an advantage; None: not asked."""

    @property
    def stage(self) -> str:
        return self.asked.stage

    @property
    def ready(self) -> bool:
        """The coroutine has what it waits for and can go on."""
        return self.group is None and not self.open

    @property
    def found(self) -> tuple[Scored, ...]:
        """What it waits for, as far as that is there."""
        return tuple(one for i in sorted(self.scored) for one in self.scored[i])


def may_go_on(flows: Sequence[Flow], config: RolloutConfig) -> list[Flow]:
    """``streaming``: every problem whose scores are in, at once. ``barrier``: to the refinements all go together."""
    held = config.rollout_schedule == "barrier" and any(flow.stage == "draft" and flow.open for flow in flows)
    return [flow for flow in flows if flow.ready and not (held and flow.stage == "draft")]


def in_free_slots(coming: Sequence[Flow], flows: Sequence[Flow], running: int, config: RolloutConfig) -> Iterator[Call]:
    """What may be sent now for ``coming``, which the step of ``flows`` does not wait for.

    It gets the slots of the engine that this step leaves free, its refinements to come included, so it never delays
    it; an engine that would be idle gets something in any case.
    """
    used = running + sum(config.num_generations for flow in flows if flow.stage == "draft")
    for call in unsent(coming):
        n = sum(request.n for request in call.requests)
        if used + n > config.slots and running:
            return
        yield call
        used, running = used + n, running + n


def due(flows: Sequence[Flow], n: int, config: RolloutConfig) -> Sequence[Flow]:
    """The ``n`` flows of a step, once all have their group: the next ones, or with ``policy_lag`` those that have
    theirs first, the ones with the oldest tokens before others; under ``full_determinism`` nothing hangs on time."""
    if config.full_determinism or not config.policy_lag:
        return flows[:n] if all(flow.group is not None for flow in flows[:n]) else ()
    finished = [flow for flow in flows if flow.group is not None]
    finished.sort(key=lambda flow: (flow.informs is False, oldest(flow, config)))
    return finished[:n] if len(finished) >= n else ()


def oldest(flow: Flow, config: RolloutConfig) -> int | None:
    """Version of the weights of the oldest token that it will train on; None while there is none."""
    trained = ("draft", "refinement") if config.train_on_drafts else ("refinement",)
    there = [s.completion.oldest for sample, scored in flow.answers if sample.stage in trained for s in scored]
    if flow.stage in trained:
        there += [s.completion.oldest for s in flow.found]
        there += [call.sent_at for call in flow.open if call.sent_at is not None]
    return min(there, default=None)


def unsent(flows: Sequence[Flow]) -> Iterator[Call]:
    return (call for flow in flows for call in flow.open if call.sent_at is None)


def surplus(flow: Flow, scored: Sequence[Scored], enough: float | None) -> Collection[Call]:
    """``early_stop_drafts``: a problem's other drafts do not count once one has the highest reward there is."""
    stop = enough is not None and flow.stage == "draft" and scored[0].reward >= enough
    return list(flow.open) if stop else ()


def uninformative(flows: Sequence[Flow], config: RolloutConfig) -> Iterator[int]:
    """``zero_variance: resample``: places of the groups without an advantage, for other problems to take.

    A group is asked alone, so the deviation of a batch cannot say whether it has one: it does not divide here.
    """
    for place, flow in enumerate(flows):
        if flow.group is not None and flow.informs is None:
            alone = config if config.scale_rewards != "batch" else replace(config, scale_rewards="none")
            drafts, refinements = flow.group.drafts, flow.group.refinements
            (own,) = advantages_of([refinements], alone, config.advantage_estimator, drafts_P_N=[drafts])
            flow.informs = any(own)
        if flow.informs is False:
            yield place
