"""Whole training steps at a budget of eight completions per prompt: GRPO, and iGRPO under each schedule.

    python -m benchmarks.rollouts                                a tiny random model, real vLLM, this machine
    python -m benchmarks.rollouts --config recipes/openmath-nemotron-7b.yaml --steps 20    real sizes
    python -m benchmarks.rollouts --resources runs/grpo runs/igrpo      the paper's table, with our column

Each schedule is one `igrpo train` of its own; the figures are medians over its steps after the first two, from its
metrics.jsonl. ``rollout_schedules.py`` compares the same schedules on given lengths, step by step in one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.records import ROOT

GRPO = {"algorithm": "grpo", "num_generations": 8}
IGRPO = {"algorithm": "igrpo", "num_drafts": 4, "num_generations": 4}
SCHEDULES: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "igrpo barrier": {**IGRPO, "rollout_schedule": "barrier"},
    "igrpo streaming": IGRPO,
    "igrpo streaming + lag 1": {**IGRPO, "draft_policy_lag": 1},
    "igrpo policy_lag 1": {**IGRPO, "policy_lag": 1},
    "igrpo policy_lag 2": {**IGRPO, "policy_lag": 2},
}
TRL = "trl, grpo, our engine"
WARM_UP = 2
PAPER = {"grpo": (54.9286, 0.41, 83.3), "igrpo": (54.9349, 0.34, 94.1)}
"""Peak memory GB, samples/s, GPU-hours: DeepSeek-R1-Distill-Qwen-7B on MATH, 16 A100, completions of up to 2,048."""


@dataclass(frozen=True)
class Sizes:
    """One run per schedule; `prompts` per step, whatever the group size."""

    steps: int = 7
    prompts: int = 4
    longest: int = 160


def tiny_settings(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """A random model whose answers end at random, so that lengths have a tail; problems and rewards to go with it."""
    from tests.support.tiny import save_tiny

    model = save_tiny(folder / "model")
    ends = {"eos_token_id": [1, *range(10, 16)]}  # 7 of 288 tokens: about 40 tokens per answer, some four times that
    (folder / "model" / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    data = folder / "problems.jsonl"
    lines = [json.dumps({"prompt": f"What is {i} + {i}?", "solution": str(2 * i)}) for i in range(64)]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "model_name_or_path": model, "dataset_name": str(data), "temperature": 1.0,
        "max_completion_length": sizes.longest, "reward_funcs": ["benchmarks.rewards:even_length"],
        "gradient_checkpointing": False, "bf16": False, "eval_samples": 0, "seed": 1, "learning_rate": 1e-6,
    }  # fmt: skip


def run_schedule(name: str, settings: dict[str, Any], sizes: Sizes, folder: Path, config: str | None) -> list[dict]:
    """The steps' metrics of one run.

    Raises:
        RuntimeError: the run failed, with the end of what it said.
    """
    options = {**settings, **SCHEDULES[name]}
    options |= {
        "per_device_train_batch_size": sizes.prompts * options["num_generations"], "gradient_accumulation_steps": 1,
        "max_steps": sizes.steps, "save_steps": 0, "logging_steps": 1, "log_completions": False,
        "output_dir": str(folder / name.replace(" ", "-")),
    }  # fmt: skip
    command = ["igrpo.train", *(["--config", config] if config else [])]
    for key, value in options.items():
        command += [f"--{key}", text_of(value)]
    run_module(name, command)
    return steps_of(Path(options["output_dir"]))


def run_trl(settings: dict[str, Any], sizes: Sizes, folder: Path) -> list[dict]:
    """The steps' metrics of TRL's trainer on the same sampler."""
    output = folder / "trl.json"
    command = ["benchmarks.trl_loop", "--steps", str(sizes.steps), "--prompts", str(sizes.prompts)]
    run_module(TRL, [*command, "--output", str(output), json.dumps(settings)])
    return json.loads(output.read_text(encoding="utf-8"))


def trl_rows(settings: dict[str, Any], sizes: Sizes, folder: Path, shape: str) -> list[dict]:
    """A failure of TRL's loop is a line in the table; ours go on."""
    try:
        return rows(TRL, run_trl(settings, sizes, folder), shape)
    except RuntimeError as error:
        note = f"failed ({str(error).strip().splitlines()[-1][:120]})"
        return [
            {"op": "training_step", "pass": "step", "impl": "trl", "provider": TRL, "shape": shape, "tokens": None,
             "vocab": None, "hidden": None, "dtype": "", "variant": "budget 8", "time_ms": None, "floor_ms": None,
             "peak_extra_bytes": None, "max_rel_error": None, "note": note, "samples_ms": []}
        ]  # fmt: skip


def run_module(name: str, command: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr or done.stdout)[-1500:]}")


def text_of(value: Any) -> str:
    """As the command line wants it."""
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def steps_of(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "step_time" in row]


def rows(name: str, steps: Sequence[dict], shape: str) -> list[dict]:
    """Rollout and whole step as record rows; samples are drafts and refinements alike, the budget of both methods.

    How many tokens they came to differs from run to run, so it is no part of what the case is (`records.CASE`).
    """
    used, impl = steps[WARM_UP:], "trl" if name == TRL else "igrpo"

    def row(op: str, seconds: str) -> dict:
        tokens = statistics.fmean(s["rollout/draft_tokens"] + s["rollout/refinement_tokens"] for s in used)
        samples = statistics.fmean(s["rollout/samples_per_second"] * s["rollout/seconds"] for s in used)
        return {
            "op": op, "pass": "step", "impl": impl, "provider": name, "shape": shape, "tokens": None,
            "vocab": None, "hidden": None, "dtype": "", "variant": "budget 8", "samples": round(samples),
            "decoded_tokens": round(tokens),
            "time_ms": round(1e3 * statistics.median(s[seconds] for s in used), 2), "floor_ms": None,
            "peak_extra_bytes": round(max(s["peak_memory_gib"] for s in steps) * 2**30), "max_rel_error": None,
            "note": "", "samples_ms": [round(1e3 * s[seconds], 2) for s in used],
        }  # fmt: skip

    return [row("rollout", "rollout/seconds"), row("training_step", "step_time")]


def measure(sizes: Sizes, config: str | None = None, overrides: dict[str, Any] | None = None) -> list[dict]:
    """Every schedule, one after the other."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = (overrides or {}) if config else tiny_settings(folder, sizes)
        shape = Path(config).stem if config else f"tiny model, {sizes.prompts} prompts, up to {sizes.longest} tokens"
        for schedule in SCHEDULES:
            found += rows(schedule, run_schedule(schedule, settings, sizes, folder, config), shape)
        if not config and importlib.util.find_spec("trl") is not None:
            found += trl_rows(settings, sizes, folder, shape)
    return sorted(found, key=lambda row: row["op"])


def resources(grpo: Path, igrpo: Path) -> Iterable[str]:
    """The paper's resource table (its appendix D) beside two runs of ours, as Markdown."""
    ours = {name: totals(steps_of(run)) for name, run in (("grpo", grpo), ("igrpo", igrpo))}
    yield "| | peak memory, GB | samples/s | device-hours |"
    yield "|---|---|---|---|"
    for title, table in (("paper", PAPER), ("ours", ours)):
        for name, (memory, rate, hours) in table.items():
            yield f"| {name}, {title} | {memory:.2f} | {rate:.3g} | {hours:.3g} |"
        change = [b / a - 1 for a, b in zip(table["grpo"], table["igrpo"], strict=True)]
        yield f"| iGRPO against GRPO, {title} | {change[0]:+.1%} | {change[1]:+.1%} | {change[2]:+.1%} |"


def totals(steps: Sequence[dict]) -> tuple[float, float, float]:
    """Peak memory in GB, samples per second of the run, device-hours (of cores, where there is no GPU).

    A sample is a problem with everything drawn for it: with that reading the paper's rates and hours both come to the
    7,500 problems of its epoch.
    """
    seconds = sum(step["step_time"] for step in steps)
    problems = sum(
        step["rollout/samples_per_second"] * step["rollout/seconds"] / step["rollout/rollouts_per_prompt"]
        for step in steps
    )
    memory = max(step["peak_memory_gib"] for step in steps) * 2**30 / 1e9
    return memory, problems / seconds, steps[-1].get("gpu_hours", steps[-1].get("core_hours"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a recipe; default: a tiny random model")
    parser.add_argument("--steps", type=int, default=Sizes.steps)
    parser.add_argument("--prompts", type=int, default=Sizes.prompts)
    parser.add_argument("--longest", type=int, default=Sizes.longest, help="max_completion_length of the tiny model")
    parser.add_argument("--resources", nargs=2, type=Path, metavar=("GRPO_RUN", "IGRPO_RUN"))
    arguments = parser.parse_args(argv)
    if arguments.resources:
        print("\n".join(resources(*arguments.resources)))
        return 0
    from benchmarks import loop_tables

    found = measure(Sizes(arguments.steps, arguments.prompts, arguments.longest), arguments.config)
    print("\n".join(loop_tables.section(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
