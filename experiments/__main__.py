"""``python -m experiments controls --seeds 0 1 2``: run what is missing, then summarise and draw everything there is.

Interrupt it at any time: the same command goes on where it stopped, finished runs are never repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.figures import draw_plan
from experiments.plan import RESULTS, Plan, fingerprint, load_base, load_plan
from experiments.record import make_record, point, record_of, write_json
from experiments.summary import summarise
from igrpo.run.folder import checkpoints, write_atomically
from igrpo.settings import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a plan that cannot work, else the code of the training run that failed."""
    args = parse(argv)
    try:
        for name in args.plans:
            plan = load_plan(name)
            base = load_base(args.base, plan)
            for arm in args.arms or plan.arms:
                if arm not in plan.arms:
                    raise ConfigError(f"{name} has no arm {arm!r}; it has {', '.join(plan.arms)}")
            # Seeds outside, arms inside: an experiment cut short still compares whole seeds.
            for seed in args.seeds:
                for arm in args.arms or plan.arms:
                    code = run_one(plan, arm, seed, base, args)
                    if code:
                        return code
            path = summarise(args.results / name, plan)
            print("\n".join(f"wrote {p}" for p in (path, *draw_plan(path.parent, plan))))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("plans", nargs="+", help="names of files in experiments/plans")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="only these arms")
    parser.add_argument("--base", type=Path, help="base recipe (default: the plan's, for two CPU cores)")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), help="where run folders go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where records and summaries go")
    parser.add_argument("--launch", default=f"{sys.executable} -m igrpo.train", help="program that trains")
    parser.add_argument("--processes", type=int, default=1, help="learner processes that --launch starts")
    return parser.parse_args(argv)


def run_one(plan: Plan, arm: str, seed: int, base: dict, args: argparse.Namespace) -> int:
    """Trains one arm with one seed unless its record is there; returns the exit code of the training."""
    settings = plan.settings(arm, base, args.processes) | {"seed": seed}
    name = fingerprint(settings)
    folder, target = args.runs / name, record_of(args.results / plan.name, name)
    if not target.is_file() and not (folder / "done").is_file():
        print(f"{plan.name}: {arm}, seed {seed} -> {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        options = settings | {"output_dir": str(folder)}
        spent, before = folder / "core_seconds", 0.0
        if checkpoints(folder):
            options["resume_from_checkpoint"] = "last"
            before = float(spent.read_text(encoding="utf-8")) if spent.is_file() else math.nan
        recipe = folder.with_suffix(".yaml")
        write_atomically(recipe, json.dumps(options))
        write_atomically(spent, "nan\n")  # stands if this process is killed: what the run has cost is then unknown
        code, seconds = run_counted([*args.launch.split(), "--config", str(recipe)])
        write_atomically(spent, f"{before + seconds:.1f}\n")
        if code:
            print(f"error: {plan.name}/{arm} seed {seed} ended with exit code {code}; its folder is {folder}, and the "
                  "same command goes on from there", file=sys.stderr)  # fmt: skip
            return code
        (folder / "done").touch()
        drop_optimizer(folder)
    if not target.is_file():
        command = f"python -m experiments {plan.name} --arms {arm} --seeds {seed}"
        write_json(target, make_record(folder, command, settings, args.processes))
    point(args.results / plan.name, arm, seed, name)
    return 0


def drop_optimizer(folder: Path) -> None:
    """More than half of a finished run's bytes, of no use to an evaluation; thirty runs of them fill a small disk."""
    for path in folder.glob("checkpoint-*/state/optimizer*"):
        path.unlink()


def run_counted(command: list[str]) -> tuple[int, float]:
    """Exit code of a program, and the CPU seconds that it and its children used: a busy machine changes them little.

    Ctrl-C and SIGTERM go on to the program, which saves and leaves; in a group of its own it gets them once.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = subprocess.Popen(command, process_group=0)
    handed_on = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, _: program.send_signal(number)) for number in handed_on]
    try:
        code = program.wait()
    finally:
        for number, handler in zip(handed_on, previous, strict=True):
            signal.signal(number, handler)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return code, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
