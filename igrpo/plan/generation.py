"""Seconds that sampling takes: continuous batching simulated step by step, for GRPO and for each two-stage scheduler.

Each engine decodes one token of every running sequence per step:

    step = max(weights / bandwidth, 2 * parameters * n / FLOP/s) + KV bytes of all contexts / bandwidth + overhead

and a new request first costs 2 * parameters * prompt tokens FLOP. Blocks of steps in which nobody finishes are taken at
once. Lengths are random, so each figure is a mean over trials with a fixed seed; of several engines the slowest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import NamedTuple

import numpy as np

BLOCK = 32
"""Decode steps that are taken at once at most."""
SIMULATED_ENGINES = 4
"""Of many equal engines, so many are simulated; the slowest of them stands for all."""


class Sequence_(NamedTuple):
    """One completion to decode."""

    stage: str
    prompt: int
    length: int
    context: int
    prefill: float
    """Prompt tokens it has to read itself; siblings share the prefix."""


@dataclass(frozen=True)
class EngineCost:
    """Rates of one engine (its tensor-parallel devices together)."""

    weight_bytes: float
    parameters: float
    kv_bytes_per_token: float
    bandwidth: float
    decode_flops: float
    prefill_flops: float
    overhead: float
    slots: int

    def step(self, n: int, context: float) -> float:
        weights = max(self.weight_bytes / self.bandwidth, 2 * self.parameters * n / self.decode_flops)
        return weights + self.kv_bytes_per_token * context / self.bandwidth + self.overhead

    def read(self, tokens: float) -> float:
        return 2 * self.parameters * tokens / self.prefill_flops


OnFinish = Callable[[Sequence_, float], Sequence[Sequence_]]


def decode(queue: Sequence[Sequence_], cost: EngineCost, on_finish: OnFinish = lambda sequence, now: ()) -> float:
    """Seconds until everything is decoded, first come first served; ``on_finish(sequence, now)`` may add more."""
    waiting, active = list(queue), []
    left, context = np.empty(0), np.empty(0)
    now, next_up = 0.0, 0
    while next_up < len(waiting) or active:
        admitted = waiting[next_up : next_up + cost.slots - len(active)]
        if admitted:
            next_up += len(admitted)
            active += admitted
            left = np.concatenate([left, [s.length for s in admitted]])
            context = np.concatenate([context, [s.context for s in admitted]])
            now += cost.read(sum(s.prefill for s in admitted))
        steps = min(left.min(), BLOCK)
        now += steps * cost.step(len(active), context.sum() + len(active) * steps / 2)
        left, context = left - steps, context + steps
        if left.min() <= 0:
            finished = [s for s, rest in zip(active, left, strict=True) if rest <= 0]
            keep = left > 0
            active = [s for s, stays in zip(active, keep, strict=True) if stays]
            left, context = left[keep], context[keep]
            for sequence in finished:
                waiting += on_finish(sequence, now)
    return now


@dataclass(frozen=True)
class Lengths:
    """Tokens of questions, drafts and refinements.

    Drawn from ``observed_…``, the lengths that a run had; otherwise log-normal with a mean for each problem, cut at the
    limit.
    """

    question: int
    mean: float
    limit: int
    template: int = 30
    """Tokens that the draft template adds."""
    sigma: float = 0.8
    sigma_between: float = 0.35
    """Spread of the mean from problem to problem."""
    observed_drafts: tuple[int, ...] = ()
    observed_refinements: tuple[int, ...] = ()

    def draw(self, rng: np.random.Generator, problems: int, n: int, stage: str = "draft") -> np.ndarray:
        """[problems, n]"""
        seen = self.observed_drafts if stage == "draft" else self.observed_refinements
        if seen:
            return rng.choice(np.array(seen), (problems, n))
        mean = rng.lognormal(np.log(self.mean) - self.sigma_between**2 / 2, self.sigma_between, (problems, 1))
        tokens = rng.lognormal(np.log(mean) - self.sigma**2 / 2, self.sigma, (problems, n))
        return np.clip(tokens, 1, self.limit).astype(int)


class Generation(NamedTuple):
    """Seconds of one step's sampling."""

    drafts: float
    """Until the last draft was in; refinements of other problems run before that where there is no barrier."""
    refinements: float
    """From then to the last refinement."""
    hidden: float = 0.0
    """Drafts of the next batch that were still to be decoded when the last refinement was in (lag 1)."""

    @property
    def total(self) -> float:
        return self.drafts + self.refinements


def generate(
    scheduler: str, problems: int, N: int, G: int, lengths: Lengths, cost: EngineCost, engines: int = 1, trials: int = 3
) -> Generation:
    """One step on ``engines`` equal engines that share ``problems``; N = 0 is GRPO with G completions."""
    share, simulated = -(-problems // engines), min(engines, SIMULATED_ENGINES)
    return _mean_slowest(scheduler, share, N, G, lengths, cost, simulated, trials)


@lru_cache(maxsize=4096)
def _mean_slowest(
    scheduler: str, share: int, N: int, G: int, lengths: Lengths, cost: EngineCost, simulated: int, trials: int
) -> Generation:
    rng = np.random.default_rng(0)
    means = []
    for _ in range(trials):
        runs = [_one_engine(scheduler, share, N, G, lengths, cost, rng) for _ in range(simulated)]
        means.append(max(runs, key=lambda run: run.total + run.hidden))
    return Generation(*(fmean(column) for column in zip(*means, strict=True)))


def _one_engine(
    scheduler: str, problems: int, N: int, G: int, lengths: Lengths, cost: EngineCost, rng: np.random.Generator
) -> Generation:
    question = lengths.question
    if not N:
        alone = lengths.draw(rng, problems, G, "refinement")
        queue = [Sequence_("refinement", i, int(t), question, question / G) for i, row in enumerate(alone) for t in row]
        return Generation(0.0, decode(queue, cost))
    drafted, refined = lengths.draw(rng, problems, N), lengths.draw(rng, problems, G, "refinement")
    # Any of the drafts may be the best one; what it was decoded for stays in the prefix cache up to the question.
    shown = drafted[np.arange(problems), rng.integers(0, N, problems)]
    drafts = [Sequence_("draft", i, int(t), question, question / N) for i, row in enumerate(drafted) for t in row]

    def refinements(i: int) -> list[Sequence_]:
        context = question + lengths.template + int(shown[i])
        prefill = (context - question) / G
        return [Sequence_("refinement", i, int(t), context, prefill) for t in refined[i]]

    everything = [s for i in range(problems) for s in refinements(i)]
    if scheduler == "barrier":
        return Generation(decode(drafts, cost), decode(everything, cost))
    last = {"draft": 0.0, "refinement": 0.0}
    open_drafts = [N] * problems

    def finished(sequence: Sequence_, now: float) -> Sequence[Sequence_]:
        last[sequence.stage] = now
        if sequence.stage == "draft" and scheduler == "streaming":
            open_drafts[sequence.prompt] -= 1
            return refinements(sequence.prompt) if not open_drafts[sequence.prompt] else ()
        return ()

    if scheduler == "streaming":
        total = decode(drafts, cost, finished)
        return Generation(last["draft"], total - last["draft"])
    total = decode(everything + drafts, cost, finished)  # the drafts are the next batch's
    return Generation(0.0, last["refinement"], total - last["refinement"])
