"""Samples completions of fixed prompts and scores them; the evaluation during training is its simplest use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from igrpo.data_types import Completion, Message, Problem, Scored
from igrpo.engines import Engine, EngineError, Request, Result, Sampling
from igrpo.eval.config import EvalConfig
from igrpo.rewards.workers.pool import PendingScores, RewardPool
from igrpo.rollout.metrics import judge
from igrpo.rollout.prompts import PromptBuilder


@dataclass(frozen=True, slots=True)
class Task:
    """One problem and the prompts to sample for it.

    Example: ``Task(problem, messages=({"role": "user", "content": "3+4?"},), prompts=((1, 9, 8),), n=64)``
    """

    problem: Problem
    messages: tuple[Message, ...]
    """The conversation as reward functions see it."""
    prompts: tuple[tuple[int, ...], ...]
    """[R][P] token ids of each prompt."""
    n: int
    """Completions of each prompt."""
    prompt_suffix: str = ""
    """Of ``PromptParts``."""


@dataclass
class _Open:
    task: Task
    results: list[Result | None] = field(default_factory=list)
    scores: PendingScores | None = None


def bare_task(problem: Problem, prompts: PromptBuilder, n: int) -> Task:
    """One shot from the question alone: how the model is deployed."""
    parts = prompts.parts(problem)
    return Task(problem, parts.messages, (parts.bare,), n, parts.prompt_suffix)


def sample(
    engine: Engine, rewards: RewardPool, tokenizer: Any, tasks: Sequence[Task], sampling: Sampling, window: int
) -> Iterator[tuple[int, tuple[Scored, ...]]]:
    """Yields ``(index of the task, [R * n] scored completions)`` as tasks finish, prompts in order. Requests are named
    by the problem's row, from which servers make their seeds; rows must differ.

    What the engine is asked for, and when, depends on its own answers alone and never on how fast scores come back: the
    same engine seed gives the same completions wherever the engine itself repeats.

    Args:
        window: Completions in the engine at once; it is topped up as they finish, so that no barrier idles it.

    Raises:
        EngineError: the engine read other ids than it was sent.
    """
    index = {task.problem.index: i for i, task in enumerate(tasks)}
    waiting = [(i, r) for i, task in enumerate(tasks) for r in range(len(task.prompts))][::-1]
    opened: dict[int, _Open] = {}
    in_flight = 0
    while waiting or opened:
        while waiting and (not in_flight or in_flight + tasks[waiting[-1][0]].n <= window):
            i, r = waiting.pop()
            opened.setdefault(i, _Open(tasks[i], [None] * len(tasks[i].prompts)))
            name = f"{tasks[i].problem.index}/{r}"
            engine.submit(Request(name, tasks[i].prompts[r], tasks[i].n, sampling))
            in_flight += tasks[i].n
        for result in engine.poll() if in_flight else ():
            row, r = map(int, result.request_id.split("/"))
            i = index[row]
            in_flight -= opened[i].task.n
            _receive(opened[i], r, result, rewards, tokenizer)
        for i in [i for i, state in opened.items() if state.scores and (not in_flight or state.scores.done())]:
            yield i, opened.pop(i).scores.result()  # type: ignore[union-attr]


def _receive(state: _Open, r: int, result: Result, rewards: RewardPool, tokenizer: Any) -> None:
    task = state.task
    if result.prompt_ids != task.prompts[r]:
        raise EngineError(
            f"row {task.problem.index}: the engine read {len(result.prompt_ids)} prompt ids, not the "
            f"{len(task.prompts[r])} it was sent"
        )
    state.results[r] = result
    if None in state.results:
        return
    completions = [
        Completion(ids, logprobs, tokenizer.decode(ids, skip_special_tokens=True), reason, one.version)
        for one in state.results
        if one is not None
        for ids, logprobs, reason in zip(one.token_ids, one.logprobs, one.finish_reasons, strict=True)
    ]
    state.scores = rewards.submit(task.problem, completions, list(task.messages), task.prompt_suffix)


def window(config: EvalConfig) -> int:
    """Completions to keep in the engine: vLLM queues what it cannot run yet, Hugging Face batches all it is given."""
    return config.vllm_max_num_seqs * (2 if config.use_vllm else 1)


def evaluate(
    engine: Engine,
    rewards: RewardPool,
    prompts: PromptBuilder,
    tokenizer: Any,
    problems: Sequence[Problem],
    config: EvalConfig,
    gather: Callable[[Any], list[Any]] = lambda one: [one],
) -> dict[str, float]:
    """One single-shot completion per problem, no draft: the figure that training is judged by.

    Args:
        problems: this process's share.
        gather: one object of each process at every process.

    Returns:
        ``eval/accuracy``, ``eval/reward``, one ``eval/rewards/<name>`` per function, ``eval/clipped_ratio``.
    """
    engine.seed(config.seed)
    sampling = Sampling(config.eval_temperature, config.max_completion_length)
    tasks = [bare_task(problem, prompts, 1) for problem in problems]
    own = [
        (s.rewards, s.reward, s.completion.truncated)
        for _, (s,) in sample(engine, rewards, tokenizer, tasks, sampling, window(config))
    ]
    scores, totals, cut = zip(*(row for part in gather(own) for row in part), strict=True)
    figures = {name: fmean(one[name] or 0.0 for one in scores) for name in scores[0]}
    return {
        "eval/accuracy": figures[judge(config)],
        "eval/reward": fmean(totals),
        "eval/clipped_ratio": fmean(cut),
        **{f"eval/rewards/{name}": figure for name, figure in figures.items()},
    }
