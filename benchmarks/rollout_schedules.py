"""Wall-clock of a whole step under each rollout schedule: GRPO, two stages with a barrier, streamed, drafts one step
ahead, whole groups one and two steps ahead.

    python -m benchmarks.rollout_schedules [--rounds 5] [--output record.json] [--timelines FOLDER]

Everything is the loop's own (vLLM, reward processes, learner, weight push); only the lengths are given, so that they
have a heavy tail and every arm decodes the same ones: completion j of problem i in step k gets a log-normal number of
tokens fixed by (k, i, j), and no token ends it earlier. Budget: 8 completions per problem in every arm. Arms take turns
in one process; a figure is the median over rounds, and only ratios mean anything on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rollouts import SCHEDULES
from experiments.record import write_json

PROMPTS, BUDGET, SLOTS = 16, 8, 128
MEAN_TOKENS, SIGMA, MAX_TOKENS = 40.0, 1.0, 400


def length(step: int, problem: int, completion: int) -> int:
    """Log-normal with mean MEAN_TOKENS; the longest of 128 is about eight times the mean."""
    drawn = random.Random(f"{step}/{problem}/{completion}").lognormvariate(0.0, SIGMA)
    return min(MAX_TOKENS, max(4, round(MEAN_TOKENS * drawn / 2.718281828 ** (SIGMA**2 / 2))))


class GivenLengths:
    """The engine behind it, with each completion's length given; a request of n becomes n requests of one."""

    def __init__(self, engine: Any):
        self.engine = engine
        self.num_generations = 0  # of the arm that runs
        self.parts: dict[str, list[Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, request: Any) -> None:
        stage, step, position, *number = request.request_id.split("/")
        first = int(number[0]) if number else 0
        first += BUDGET - self.num_generations if stage == "refinement" else 0
        self.parts[request.request_id] = [None] * request.n
        for j in range(request.n):
            tokens = length(int(step), int(position), first + j)
            sampling = replace(request.sampling, max_tokens=tokens)
            self.engine.submit(replace(request, request_id=f"{request.request_id}#{j}", n=1, sampling=sampling))

    def abort(self, request_ids: Collection[str]) -> None:
        parts = {name: len(self.parts.pop(name, ())) for name in request_ids}
        self.engine.abort([f"{name}#{j}" for name, n in parts.items() for j in range(n)])

    def poll(self) -> list[Any]:
        whole = []
        for result in self.engine.poll():
            name, _, j = result.request_id.partition("#")
            parts = self.parts[name]
            parts[int(j)] = result
            if None not in parts:
                whole.append(_joined(name, self.parts.pop(name)))
        return whole


def _joined(name: str, parts: list[Any]) -> Any:
    return replace(
        parts[0],
        request_id=name,
        token_ids=tuple(p.token_ids[0] for p in parts),
        logprobs=tuple(p.logprobs[0] for p in parts),
        finish_reasons=tuple(p.finish_reasons[0] for p in parts),
        cached_tokens=sum(p.cached_tokens for p in parts),
        version=max(p.version for p in parts),
        versions=tuple(p.versions[0] if p.versions else ((p.version, len(p.token_ids[0])),) for p in parts),
    )


@dataclass
class Arm:
    """Seconds of each measured step, whole and by part."""

    step: list[float] = field(default_factory=list)
    rollout: list[float] = field(default_factory=list)
    learner: list[float] = field(default_factory=list)
    push: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Bench:
    """The parts of a run on a tiny random model, shared by all arms."""

    def __init__(self, folder: Path):
        from igrpo.config.train_config import TrainConfig
        from igrpo.engines import start_engine
        from igrpo.learner.learner import Learner
        from igrpo.models.loading import load_policy, load_tokenizer
        from igrpo.rewards.functions import load_reward_functions
        from igrpo.rewards.workers.pool import RewardPool
        from igrpo.rollout.prompts import PromptBuilder

        save_model(folder / "model")
        self.base = TrainConfig(
            model_name_or_path=str(folder / "model"), dataset_name="given", use_cpu=True, bf16=False,
            system_prompt=None, draft_template=" [{draft}]", reward_funcs=["benchmarks.rewards:low_letters"],
            gradient_checkpointing=False, max_completion_length=MAX_TOKENS, temperature=1.0,
            vllm_max_num_seqs=SLOTS, per_device_train_batch_size=PROMPTS * BUDGET, output_dir=str(folder / "run"),
        )  # fmt: skip
        self.tokenizer = load_tokenizer(self.base.model_name_or_path, self.base)
        self.prompts = PromptBuilder(self.tokenizer, self.base)
        never = (len(self.tokenizer) + 1,)
        context = 3 * MAX_TOKENS
        self.engine = GivenLengths(start_engine(self.base.model_name_or_path, self.base, context, never, seed=0))
        self.learner = Learner(
            load_policy(self.base.model_name_or_path, self.base), None, self.base, self.tokenizer.pad_token_id
        )
        self.learner.set_schedule(100_000)
        self.rewards = RewardPool(load_reward_functions(self.base.reward_funcs))
        self.version = 0

    def run_arm(
        self, settings: dict[str, Any], first: int, steps: int, into: Arm, timeline: Path | None = None
    ) -> None:
        """Step ``first`` warms the schedule up, with ``policy_lag: L`` L steps before it, too; ``steps`` are measured.

        With problems ahead the first measured step finishes what the warm-up began, and the last begins some that are
        dropped unmeasured: each measured step carries one batch's work.
        """
        from igrpo.data_types import Problem
        from igrpo.learner.batching import training_samples
        from igrpo.rollout.rollout import Rollout
        from igrpo.run.timeline import Timeline

        generations = self.engine.num_generations = settings["num_generations"]
        config = replace(self.base, **settings, per_device_train_batch_size=PROMPTS * generations)
        rollout = Rollout(self.engine, self.rewards, self.prompts, self.tokenizer, config, Timeline(timeline))
        problems = [Problem(i, f"What is {i} + {i}?", "0") for i in range(PROMPTS)]
        ahead = problems * config.steps_ahead
        for step in range(first - config.policy_lag, first + steps + 1):
            start = time.perf_counter()
            groups, stats = rollout.run(problems, step, ahead=ahead)
            rolled_out = time.perf_counter()
            samples = training_samples(groups, config)
            with rollout.pump.timeline.span("learner", step):
                rollout.during(lambda samples=samples: self.learner.train_on(samples))
            learnt = time.perf_counter()
            self.version += 1
            with rollout.pump.timeline.span("sync", step):
                self.engine.push_weights(self.learner.named_tensors, self.version)
            end = time.perf_counter()
            if step > first:
                into.step.append(end - start)
                into.rollout.append(rolled_out - start)
                into.learner.append(learnt - rolled_out)
                into.push.append(end - learnt)
                into.tokens.append(stats.draft_tokens + stats.refinement_tokens)
        rollout.finish()
        rollout.pump.timeline.flush()

    def close(self) -> None:
        self.rewards.close()
        self.engine.close()


def save_model(folder: Path) -> None:
    """The tests' random model, with room for the longest lengths; so small that the longest request counts most."""
    from tests.support.tiny import save_tiny

    save_tiny(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}), encoding="utf-8")


def measure(rounds: int, steps: int, timelines: Path | None = None) -> dict[str, Arm]:
    """Arms in turn, ``rounds`` times ``steps`` steps each, after one unmeasured round."""
    arms = {name: Arm() for name in SCHEDULES}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        try:
            for settings in SCHEDULES.values():
                bench.run_arm(settings, 1, 1, Arm())
            for i in range(rounds):
                for name, settings in SCHEDULES.items():
                    last = timelines is not None and i == rounds - 1
                    path = timelines / f"{name.replace(' ', '-')}.jsonl" if last else None  # type: ignore[operator]
                    bench.run_arm(settings, 1 + i * (steps + 1), steps, arms[name], path)
        finally:
            bench.close()
    return arms


def table(arms: dict[str, Arm]) -> str:
    base = median(arms["grpo"].step)
    lines = [f"{'median seconds of a step':32} {'whole':>7} {'rollout':>8} {'learner':>8} {'push':>6} {'vs GRPO':>8}"]
    for name, arm in arms.items():
        whole, rollout, learner, push = (median(getattr(arm, part)) for part in ("step", "rollout", "learner", "push"))
        lines.append(f"{name:32} {whole:7.2f} {rollout:8.2f} {learner:8.2f} {push:6.2f} {whole / base:8.3f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout_schedules")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured steps per arm and round")
    parser.add_argument("--output", type=Path, help="write the record here, as JSON")
    parser.add_argument("--timelines", type=Path, help="write each arm's timeline of the last round into this folder")
    args = parser.parse_args(argv)
    if args.timelines:
        args.timelines.mkdir(parents=True, exist_ok=True)
    arms = measure(args.rounds, args.steps, args.timelines)
    print(table(arms))
    if args.output:
        shape = {"prompts": PROMPTS, "budget": BUDGET, "mean_tokens": MEAN_TOKENS, "sigma": SIGMA, "max": MAX_TOKENS}
        rounded = {
            name: {part: [round(s, 4) for s in seconds] for part, seconds in asdict(arm).items()}
            for name, arm in arms.items()
        }
        write_json(args.output, {"shape": shape, "arms": rounded})
    return 0


if __name__ == "__main__":
    sys.exit(main())
