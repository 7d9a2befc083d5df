"""``python -m experiments.starting_points``: what the untrained model gets right from the bare prompt, task by task.

A task can show something where it starts between 10 % and 60 %: above, little is left to learn; below, most groups hold
no right answer and give no gradient. ``--data_dir`` adds GSM8K itself, from ``DIR/gsm8k/test.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.plan import BASE_CPU, FOLDER, RESULTS, load_base
from experiments.record import provenance, read_json, write_json

TASKS = FOLDER / "tasks.yaml"
RECORD = RESULTS / "starting-points.json"
USEFUL = (0.1, 0.6)
GSM8K = "gsm8k"
GSM8K_TOKENS = 128
"""Longer than the other answers may get: its solutions take several sentences."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: that of the evaluations."""
    args = parse(argv)
    base, tasks = load_base(args.base), yaml.safe_load(args.tasks.read_text(encoding="utf-8"))
    words = [f"--problems {args.problems}"] + (["--data_dir DIR"] if args.data_dir else [])
    record: dict[str, Any] = {
        "command": " ".join(["python -m experiments.starting_points", *words]),
        **provenance(),
        "model": args.model,
        "tasks": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [write_problems(folder / f"{i}.jsonl", task, args.problems) for i, task in enumerate(tasks.values())]
        found = evaluate(folder / "tasks", [str(f) for f in files], args, base["max_completion_length"])
        for i, task in enumerate(tasks):
            record["tasks"][task] = tasks[task] | found[str(i)]
        if args.data_dir:
            extra = ["--data_dir", str(args.data_dir)]
            found = evaluate(folder / GSM8K, [GSM8K], args, GSM8K_TOKENS, extra)
            record["tasks"]["GSM8K"] = {"dataset_name": "openai/gsm8k"} | found[GSM8K]
    write_json(args.output, record)
    print(f"wrote {args.output}")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.starting_points", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base", type=Path, default=BASE_CPU, help="recipe whose prompts and engine are taken")
    parser.add_argument("--tasks", type=Path, default=TASKS)
    parser.add_argument("--problems", type=int, default=200, help="per task")
    parser.add_argument("--data_dir", type=Path, help="folder with gsm8k/test.jsonl")
    parser.add_argument("--output", type=Path, default=RECORD)
    return parser.parse_args(argv)


def write_problems(path: Path, task: dict[str, Any], count: int) -> Path:
    """The task's first problems, as `igrpo eval` reads them from a file."""
    from igrpo.data.sources import load_problems

    problems = load_problems(
        task["dataset_name"],
        dataset_prompt_column="question",
        dataset_solution_column="answer",
        dataset_kwargs={"size": count, "seed": 7, **task.get("dataset_kwargs", {})},
    )
    lines = [json.dumps({"prompt": p.prompt, "solution": p.solution}) for p in problems]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def evaluate(
    output: Path, benchmarks: Sequence[str], args: argparse.Namespace, tokens: int, extra: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Benchmark -> accuracy with its interval over problems, one answer to each, sampled as the experiments do."""
    command = [
        sys.executable, "-m", "igrpo", "eval", "--model", args.model, "--config", str(args.base), "--n", "1",
        "--max_samples", str(args.problems), "--max_completion_length", str(tokens), "--output_dir", str(output),
        "--benchmarks", *benchmarks, *extra,
    ]  # fmt: skip
    if code := subprocess.run(command).returncode:
        raise SystemExit(f"exit code {code} of {shlex.join(command)}")
    (row,) = read_json(output / "summary.json")["rows"]
    return {
        name: {key: round(b["accuracy"][key], 4) for key in ("value", "low", "high")} | {"problems": b["problems"]}
        for name, b in row["benchmarks"].items()
    }


def table(record: dict[str, Any]) -> list[str]:
    """Markdown lines; in bold the tasks that start in the useful range."""
    lines = ["| task | reasoning-gym or hub name | right, % | 95 % interval | problems |", "|---|---|---|---|---|"]
    for task, f in record["tasks"].items():
        name = f"**{task}**" if USEFUL[0] <= f["value"] <= USEFUL[1] else task
        interval = f"{100 * f['low']:.1f}–{100 * f['high']:.1f}"
        lines.append(f"| {name} | `{f['dataset_name']}` | {100 * f['value']:.1f} | {interval} | {f['problems']} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
