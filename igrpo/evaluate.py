"""Accuracy on the bare prompt: how the model is deployed, and the figure that counts."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from igrpo.config import TrainConfig
from igrpo.engines import Engine, Request, Sampling
from igrpo.metrics import judge
from igrpo.prompts import PromptBuilder
from igrpo.reward_pool import PendingScores, RewardPool
from igrpo.types import Completion, Problem


def evaluate(
    engine: Engine,
    rewards: RewardPool,
    prompts: PromptBuilder,
    tokenizer: Any,
    problems: Sequence[Problem],
    config: TrainConfig,
) -> dict[str, float]:
    """One single-shot completion per problem, no draft.

    Returns:
        ``eval/accuracy``, ``eval/reward``, one ``eval/rewards/<name>`` per function, ``eval/clipped_ratio``.
    """
    sampling = Sampling(config.eval_temperature, config.max_completion_length)
    engine.seed(config.seed)
    parts = [prompts.parts(problem) for problem in problems]
    for i, part in enumerate(parts):
        engine.submit(Request(f"eval/{i}", part.bare, 1, sampling))
    pending: dict[int, PendingScores] = {}
    while len(pending) < len(problems):
        for result in engine.poll():
            i = int(result.request_id.partition("/")[2])
            text = tokenizer.decode(result.token_ids[0], skip_special_tokens=True)
            completion = Completion(
                result.token_ids[0], result.logprobs[0], text, result.finish_reasons[0], result.version
            )
            pending[i] = rewards.submit(problems[i], [completion], list(parts[i].messages))
    scored = [pending[i].result()[0] for i in range(len(problems))]
    figures = {f"eval/rewards/{name}": fmean(s.rewards[name] or 0.0 for s in scored) for name in scored[0].rewards}
    return {
        "eval/accuracy": fmean(s.rewards[judge(config)] or 0.0 for s in scored),
        "eval/reward": fmean(s.reward for s in scored),
        "eval/clipped_ratio": fmean(s.completion.truncated for s in scored),
        **figures,
    }
