"""``python -m experiments.starting_points``: what the untrained model gets right from the bare prompt, task by task.

A task can show something where it starts between 10 % and 60 %: above, little is left to learn; below, most groups hold
no right answer and give no gradient. ``--data_dir`` adds GSM8K itself, from ``DIR/gsm8k/test.jsonl``. ``--with_draft``
adds what it gets right beside one of its own answers: where that is no more, a second stage has nothing to begin with.
``--score`` names a reward function with partial credit, whose mean is said, too.

    python -m experiments.starting_points --with_draft --model runs/lab --base experiments/base-lab.yaml --n 16 \
        --tasks experiments/tasks-lab.yaml --problems 500 --output experiments/results/starting-points-lab.json
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
MODEL = "smollm2-135m"
USEFUL = (0.1, 0.6)
GSM8K = "gsm8k"
GSM8K_TOKENS = 128
"""Longer than the other answers may get: its solutions take several sentences."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: that of the evaluations."""
    args = parse(argv)
    base, tasks = load_base(args.base), yaml.safe_load(args.tasks.read_text(encoding="utf-8"))
    words = ["--with_draft"] if args.with_draft else []
    words += [f"--n {args.n}"] if args.n > 1 else []
    words += [f"--score {args.score}"] if args.score else []
    named = {key: str(getattr(args, key)) for key in ("model", "base", "tasks", "output")}
    words += [f"--{key} {name}" for key, name in named.items() if name != MODEL and not Path(name).is_absolute()]
    words += [f"--problems {args.problems}"] + (["--data_dir DIR"] if args.data_dir else [])
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
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--base", type=Path, default=BASE_CPU, help="recipe whose prompts and engine are taken")
    parser.add_argument("--tasks", type=Path, default=TASKS)
    parser.add_argument("--problems", type=int, default=200, help="per task")
    parser.add_argument("--n", type=int, default=1, help="answers per problem")
    parser.add_argument("--with_draft", action="store_true", help="also beside a draft, each answer with its own")
    parser.add_argument("--score", help="a reward function beside accuracy")
    parser.add_argument("--data_dir", type=Path, help="folder with gsm8k/test.jsonl")
    parser.add_argument("--output", type=Path, default=RECORD)
    return parser.parse_args(argv)


def write_problems(path: Path, task: dict[str, Any], count: int) -> Path:
    """The task's first problems, as `igrpo eval` reads them from a file."""
    from igrpo.data.sources import load_problems

    if Path(task["dataset_name"]).is_file():
        problems = load_problems(task["dataset_name"], max_samples=count)
    else:
        problems = load_problems(
            task["dataset_name"],
            dataset_prompt_column="question",
            dataset_solution_column="answer",
            dataset_kwargs={"size": count, "seed": 7, **task.get("dataset_kwargs", {})},
        )
    lines = [json.dumps({**p.columns, "prompt": p.prompt, "solution": p.solution}) for p in problems]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def evaluate(
    output: Path, benchmarks: Sequence[str], args: argparse.Namespace, tokens: int, extra: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Benchmark -> accuracy with its interval over problems, also ``with_draft``; at the temperature of the base's
    evaluation, with top_p 0.95 unless that is 1."""
    temperature = load_base(args.base).get("eval_temperature", 0.6)
    extra = [*extra, "--temperature", str(temperature), *(["--top_p", "1.0"] if temperature == 1 else [])]
    if args.score:
        extra += ["--reward_funcs", json.dumps(["accuracy", args.score])]
    if args.with_draft:
        extra += ["--two_stage", "first", "--num_drafts", "1"]
    command = [
        sys.executable, "-m", "igrpo", "eval", "--model", args.model, "--config", str(args.base), "--n", str(args.n),
        "--max_samples", str(args.problems), "--max_completion_length", str(tokens), "--output_dir", str(output),
        "--benchmarks", *benchmarks, *extra,
    ]  # fmt: skip
    if code := subprocess.run(command).returncode:
        raise SystemExit(f"exit code {code} of {shlex.join(command)}")
    bare, *staged = ({name: _figures(b, args.score) for name, b in row["benchmarks"].items()}
                     for row in read_json(output / "summary.json")["rows"])  # fmt: skip
    return {name: f | ({"with_draft": staged[0][name]} if staged else {}) for name, f in bare.items()}


def _figures(benchmark: dict[str, Any], score: str | None) -> dict[str, Any]:
    figures = {key: round(benchmark["accuracy"][key], 5) for key in ("value", "low", "high")}
    figures |= {"score": round(benchmark["rewards"][score.rpartition(":")[2]], 5)} if score else {}
    return figures | {"problems": benchmark["problems"]}


def table(record: dict[str, Any]) -> list[str]:
    """Markdown lines; in bold the tasks that start in the useful range."""
    drafts, scores = (any(key in f for f in record["tasks"].values()) for key in ("with_draft", "score"))
    heads = ["task", "reasoning-gym or hub name", "right, %", "95 % interval", *(["score"] if scores else [])]
    heads += ["with a draft, %", *(["score"] if scores else [])] if drafts else []
    lines = [f"| {' | '.join([*heads, 'problems'])} |", "|---" * (len(heads) + 1) + "|"]
    for task, f in record["tasks"].items():
        name = f"**{task}**" if USEFUL[0] <= f["value"] <= USEFUL[1] else task
        cells = [name, f"`{f['dataset_name']}`", f"{100 * f['value']:.1f}", _interval(f)]
        cells += [f"{f['score']:.2f}"] if scores else []
        if drafts:
            beside = f["with_draft"]
            cells.append(f"{100 * beside['value']:.2f} ({_interval(beside)})")
            cells += [f"{beside['score']:.2f}"] if scores else []
        lines.append(f"| {' | '.join(cells)} | {f['problems']} |")
    return lines


def _interval(figures: dict[str, Any]) -> str:
    """Where no problem was ever answered right, or all were, up to what one in twenty such sets would hide."""
    hidden = 1 - 0.05 ** (1 / figures["problems"]) if "problems" in figures else 0.0
    if figures["value"] == 0:
        figures = figures | {"high": hidden}
    if figures["value"] == 1:
        figures = figures | {"low": 1 - hidden}
    return f"{100 * figures['low']:.1f}–{100 * figures['high']:.1f}"


if __name__ == "__main__":
    sys.exit(main())
