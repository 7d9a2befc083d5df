"""``python -m experiments.test_time matched-budget --seeds 0 1 2``: two stages at test time, beside the single shot.

The deployed model answers once, from the bare prompt. Here the same checkpoints also draft N times and refine one
draft, chosen by a rule that needs no reference answer, or by the oracle that does. Takes the finished runs of a plan
and writes one record per run into the plan's ``test-time`` folder; what is there is not repeated. ``--single_shot``
leaves the drafts out and asks for pass@k (folder ``pass-at-k``), sampled as the training run was judged, or at another
``--temperature`` (``pass-at-k-0.8``).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.plan import RESULTS, Plan, fingerprint, load_base, load_plan
from experiments.record import provenance, read_json, write_json
from experiments.summary import interval, sampling_error, share_variance, show
from igrpo.settings import ConfigError

SHOWN_K, PASS_AT_K = (1, 4, 16), "pass-at-k"
SAMPLES = 4
"""Single shots per problem; they serve the second stage as drafts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a plan or run that is not there, else that of the evaluation that failed."""
    args = parse(argv)
    try:
        plan = load_plan(args.plan)
        base = load_base(args.base, plan)
        for seed in args.seeds:
            for arm in args.arms or plan.arms:
                settings = plan.settings(arm, base) | {"seed": seed}
                run = args.runs / fingerprint(settings)
                kind = PASS_AT_K if args.single_shot else "test-time"
                kind += "" if args.temperature is None else f"-{args.temperature:g}"
                target = args.results / plan.name / kind / f"{arm}-seed{seed}.json"
                if target.is_file():
                    continue
                if not (run / "done").is_file():
                    raise ConfigError(
                        f"no finished run of {arm}, seed {seed}: python -m experiments {plan.name} first (another "
                        "--results for both commands where its record is there and its run is not)"
                    )
                if code := evaluate(run, target, plan.name, arm, settings, args):
                    return code
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.test_time", description=__doc__)
    parser.add_argument("plan")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--single_shot", action="store_true", help="no second stage: pass@k")
    parser.add_argument("--temperature", type=float, help="of single shots (default: the training run's evaluation's)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"answers per problem (default {SAMPLES})")
    parser.add_argument("--problems", type=int, help="only the first of the held-out problems (default: all)")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.temperature is not None and not args.single_shot:
        parser.error("--temperature is of single shots; add --single_shot")
    return args


def evaluation(run: Path, output: Path, settings: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """Arguments of `igrpo eval` for a run that was trained with ``settings``, its arm's."""
    command = [
        "eval", "--model", str(run), "--benchmarks", "held_out", "--n", str(args.samples), "--output_dir", str(output),
    ]  # fmt: skip
    if args.single_shot:
        temperature = settings["eval_temperature"] if args.temperature is None else args.temperature
        command += ["--temperature", f"{temperature:g}", "--top_p", "1.0"]
    else:
        command += ["--two_stage", "first,majority,oracle"]
    return command if args.problems is None else [*command, "--max_samples", str(args.problems)]


def evaluate(run: Path, target: Path, plan: str, arm: str, settings: dict[str, Any], args: argparse.Namespace) -> int:
    """`igrpo eval` of one run on its held-out problems; returns its exit code."""
    output, seed, problems = run.with_name(f"{run.name}-{target.parent.name}"), settings["seed"], args.problems
    command = evaluation(run, output, settings, args)
    code = subprocess.run([sys.executable, "-m", "igrpo", *command]).returncode
    if code:
        return code
    rows = read_json(output / "summary.json")["rows"]
    record = {
        "plan": plan,
        "arm": arm,
        "seed": seed,
        "command": f"python -m experiments.test_time {plan} --arms {arm} --seeds {seed}"
        + (f" --single_shot --samples {args.samples}" if args.single_shot else "")
        + ("" if args.temperature is None else f" --temperature {args.temperature:g}")
        + ("" if problems is None else f" --problems {problems}"),
        **provenance(),
        "samples": args.samples,
        "modes": {row["mode"]: mode_figures(row) for row in rows},
    }
    write_json(target, record)
    return 0


def mode_figures(row: dict[str, Any]) -> dict[str, Any]:
    found = row["benchmarks"]["held_out"]
    passes = {str(p["k"]): round(p["value"], 6) for p in found["pass_at_k"] if p["k"] in SHOWN_K}
    return {"accuracy": round(found["accuracy"]["value"], 6), "problems": found["problems"], "pass_at_k": passes}


def table(folder: Path, arms: Sequence[str]) -> list[str]:
    """Markdown lines: the command, then arms down, modes across, mean over seeds with its 95 % interval; empty without
    records."""
    records = [read_json(p) for p in sorted(folder.glob("*-seed*.json"))]
    if not records:
        return []
    modes = list(records[0]["modes"])
    command = re.sub(r" --arms \S+ --seeds \S+", "", records[0]["command"])
    lines = [f"A second stage at test time, on the same checkpoints (`{command}`):", ""]
    lines += [f"| arm | seeds | problems | {' | '.join(modes)} |", "|---" * (len(modes) + 3) + "|"]
    for arm in arms:
        own = [r for r in records if r["arm"] == arm]
        if own:
            found = [[(r["modes"][mode]["accuracy"], r["modes"][mode]["problems"]) for r in own] for mode in modes]
            noise = [sampling_error([share_variance(p, n) for p, n in seeds]) for seeds in found]
            cells = [show(interval([p for p, _ in s], error), 100) for s, error in zip(found, noise, strict=True)]
            problems = own[0]["modes"][modes[0]]["problems"]
            lines.append(f"| {arm} | {len(own)} | {problems} | {' | '.join(cells)} |")
    return lines


def pass_table(folder: Path, plan: Plan) -> list[str]:
    """The same for pass@k, with the largest k's difference from the baseline, paired by seed.

    A problem counts once, however often it was sampled: the least that the interval allows for errs on the wide side.
    """

    def noise(k: str, *arms: Sequence[dict[str, Any]]) -> float:
        return sampling_error(*([share_variance(s["pass_at_k"][k], s["problems"]) for s in arm] for arm in arms))

    records = [read_json(p) for p in sorted(folder.glob("*-seed*.json"))]
    if not records:
        return []
    by_arm = {arm: {r["seed"]: r["modes"]["single shot"] for r in records if r["arm"] == arm} for arm in plan.arms}
    ks = list(next(iter(records[0]["modes"].values()))["pass_at_k"])
    command = re.sub(r" --arms \S+ --seeds \S+", "", records[0]["command"])
    heads = ["arm", "seeds", "problems", *(f"pass@{k}" for k in ks), f"pass@{ks[-1]} minus baseline"]
    lines = [f"pass@k from the bare prompt (`{command}`):", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, own in by_arm.items():
        if own:
            base = by_arm[plan.baseline_of(arm)]
            found = list(own.values())
            cells = [show(interval([seed["pass_at_k"][k] for seed in found], noise(k, found)), 100) for k in ks]
            pairs = [(own[s], base[s]) for s in own if s in base]
            gaps = [a["pass_at_k"][ks[-1]] - b["pass_at_k"][ks[-1]] for a, b in pairs]
            least = noise(ks[-1], *zip(*pairs, strict=True)) if pairs and own is not base else 0.0
            cells.append(show(interval(gaps, least), 100))
            lines.append(f"| {arm} | {len(own)} | {found[0]['problems']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
