"""Samples completions of fixed prompts and scores them; the evaluation during training is its simplest use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from igrpo.data_types import Problem, Scored
from igrpo.engines import Engine, Request, Sampling
from igrpo.eval.config import EvalConfig
from igrpo.rewards.workers.pool import RewardPool
from igrpo.rollout.metrics import correctness_reward
from igrpo.rollout.prompts import PromptBuilder, PromptParts
from igrpo.rollout.pump import Call, Pump
from igrpo.rollout.turns import Turns


def task(
    problem: Problem, question: PromptParts, prompts: Sequence[tuple[int, ...]], n: int, sampling: Sampling
) -> Call:
    """``n`` completions of each of a problem's prompts, in their order, all scored together."""
    named = [(f"{problem.index}/{r}", prompt_ids) for r, prompt_ids in enumerate(prompts)]
    return Call(problem, question, tuple(Request(name, prompt_ids, n, sampling) for name, prompt_ids in named))


def bare_task(problem: Problem, prompts: PromptBuilder, n: int, sampling: Sampling) -> Call:
    """One shot from the question alone: how the model is deployed."""
    question = prompts.parts(problem)
    return task(problem, question, [question.bare], n, sampling)


def sample(
    engine: Engine,
    rewards: RewardPool,
    tokenizer: Any,
    tasks: Sequence[Call],
    window: int,
    turns: Turns | None = None,
) -> Iterator[tuple[Problem, tuple[Scored, ...]]]:
    """Yields each problem with its scored completions as they finish. Requests are named by the problem's row, from
    which requests get their seeds; rows must differ.

    What the engine is asked for, and when, depends on its own answers alone and never on how fast scores come back: the
    same engine seed gives the same completions wherever the engine itself repeats.

    Args:
        turns: of completions that call tools; None: there is no environment.
        window: Completions in the engine at once; it is topped up as they finish, so that no barrier idles it.

    Raises:
        EngineError: the engine failed, or read other ids than it was sent.
    """
    pump = Pump(engine, rewards, tokenizer, None, in_order=turns is not None, turns=turns)
    waiting = deque((call, request) for call in tasks for request in call.requests)
    while waiting or pump.running or pump.waits:
        while waiting and (not pump.running or pump.in_flight + waiting[0][1].n <= window):
            pump.submit(*waiting.popleft())
        for call, scored in pump.advance():
            yield call.problem, scored


def window(config: EvalConfig) -> int:
    """Completions to keep in the engines: vLLM queues what it cannot run yet, Hugging Face batches all it is given."""
    return config.slots * (2 if config.use_vllm else 1)


def evaluate(
    engine: Engine,
    rewards: RewardPool,
    prompts: PromptBuilder,
    tokenizer: Any,
    problems: Sequence[Problem],
    config: EvalConfig,
    gather: Callable[[Any], list[Any]] = lambda one: [one],
    turns: Turns | None = None,
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
    tasks = [bare_task(problem, prompts, 1, sampling) for problem in problems]
    own = [
        (s.rewards, s.reward, s.completion.truncated)
        for _, (s,) in sample(engine, rewards, tokenizer, tasks, window(config), turns)
    ]
    scores, totals, cut = zip(*(row for part in gather(own) for row in part), strict=True)
    figures = {name: fmean(one[name] or 0.0 for one in scores) for name in scores[0]}
    return {
        "eval/accuracy": figures[correctness_reward(config)],
        "eval/reward": fmean(totals),
        "eval/clipped_ratio": fmean(cut),
        **{f"eval/rewards/{name}": figure for name, figure in figures.items()},
    }
