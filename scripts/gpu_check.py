"""One visit to a GPU: builds, checks and times everything on this machine's CUDA device, in the order of what matters.

    python scripts/gpu_check.py                        at most --minutes (nine)
    python scripts/gpu_check.py -k linear              only the benchmarks that pytest's -k chooses
    python scripts/gpu_check.py --dry-run --output FILE       anywhere: the same order; tests are collected, benchmarks
                                                              run on toy shapes under Triton's interpreter

    build      the kernels, for this one architecture
    correct    `cuda` and `triton` on the boundary cases
    decide     the losses on the first shape, ours and the peers: what PROVEN_CUDA_CAPABILITIES asks for
    learner    two steps of a 1.5B model, its memory beside the rehearsal's
    rest       every other benchmark, until time is up

A stage that takes longer than its share is ended and the next one begins. The record (benchmarks/records.py, with two
more keys, `stages` and `learner`) is written after every row, so that whatever ends the visit leaves what was measured.
The exit status is 1 if a stage failed or was cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels/test_cuda_device.py", "tests/kernels/triton_kernels", "tests/learner/test_packed_attention.py")
FILES = ("bench_linear.py", "bench_logits.py", "bench_lengths.py", "bench_loop.py")
VARIANTS = ("token", "kl", "gspo", "entropy bonus", "frozen head")
CUT_OFF = 124
LEARNER = {"model": "Qwen/Qwen2.5-1.5B-Instruct", "token_budget": 16384}
REHEARSED_GIB = 30.84
"""Peak of that step: igrpo plan recipes/quickstart-gpu.yaml --hardware A100-80G --rehearse --token_budget 16384."""


@dataclass(frozen=True)
class Stage:
    """One process; rows that it writes into ``part`` come into the record at once."""

    name: str
    command: Sequence[str]
    seconds: float
    """Its share of the visit; what it leaves is everybody's."""
    part: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def run_stages(stages: Sequence[Stage], seconds: float, record: dict[str, Any], output: Path) -> int:
    """Runs them in turn for ``seconds`` together, the record on disk all the while; 1 if one failed."""
    began = time.monotonic()
    for stage in stages:
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            break
        report = {"name": stage.name, "command": " ".join(map(str, stage.command)), "exit_status": None}
        record["stages"].append(report)
        start = time.monotonic()
        process = subprocess.Popen(stage.command, cwd=ROOT, env=os.environ | stage.environment, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() - start < min(left, stage.seconds):
                time.sleep(0.2)
                take_rows(stage, record, output)
            ended = process.poll()
        finally:  # what it started would take the device's time and memory from the next stage
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report["exit_status"] = {None: CUT_OFF, 5: 0}.get(ended, ended)  # 5: -k chose nothing
        report["seconds"] = round(time.monotonic() - start, 1)
        take_rows(stage, record, output, last=True)
    record["seconds"] = round(time.monotonic() - began)
    save(record, output)
    return int(any(stage["exit_status"] for stage in record["stages"]))


def take_rows(stage: Stage, record: dict[str, Any], output: Path, last: bool = False) -> None:
    """What the stage has written since the last look, into the record on disk."""
    changed = stage.part is not None and stage.part.is_file() and stage.part.stat().st_size
    if changed:
        assert stage.part is not None
        try:
            found = json.loads(stage.part.read_text(encoding="utf-8"))
        except ValueError:  # it is being written
            return
        if "learner" in found:
            record["learner"] = found["learner"]
        parts = record["parts"]
        if parts.get(stage.name) == found.get("rows") and not last:
            return
        parts[stage.name] = found.get("rows", [])
    if changed or last:
        save(record, output)


def save(record: dict[str, Any], output: Path) -> None:
    """As a record: the parts' rows one after the other."""
    whole = {key: value for key, value in record.items() if key != "parts"}
    whole["rows"] = [row for rows in record["parts"].values() for row in rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(".writing")
    unfinished.write_text(json.dumps(whole, indent=1), encoding="utf-8")
    unfinished.replace(output)


def main() -> int:
    arguments = parse()
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stage ends as well
    if arguments.learner:
        return learner_step(arguments.learner, toy=arguments.dry_run)
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # for the child processes as well
    import torch

    from benchmarks import records

    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here; --dry-run shows what would run")
    record = records.environment("python scripts/gpu_check.py " + " ".join(sys.argv[1:])) | {
        "toy": arguments.dry_run, "load_average": [round(os.getloadavg()[0], 1)], "stages": [], "parts": {},
    }  # fmt: skip
    output = arguments.output or records.path_of(record)
    with tempfile.TemporaryDirectory() as folder:
        stages = plan(arguments, Path(folder))
        status = run_stages(stages, 60 * arguments.minutes, record, output)
    said = ", ".join(f"{s['name']} {s['exit_status']} in {s.get('seconds')} s" for s in record["stages"])
    print(f"wrote {output} after {record['seconds']} s: {said}")
    return status


def plan(arguments: argparse.Namespace, folder: Path) -> list[Stage]:
    """The stages of a visit, or with -k the one that the reader chose."""
    python = [sys.executable, "-m", "pytest"]
    toy = ["--toy"] if arguments.dry_run else []
    bench = [*toy, "--seconds", str(arguments.seconds)]
    files = [f"benchmarks/{name}" for name in FILES]

    def part(name: str) -> Path:
        return folder / f"{name}.json"

    if arguments.expression:
        chosen = [*python, *files, *bench, "-k", arguments.expression, "--output", str(part("rest"))]
        return [Stage("rest", chosen, 1e9, part("rest"))]
    decided = deciding_cases("toy" if arguments.dry_run else "cuda")
    collect = ["--collect-only", "-q"] if arguments.dry_run else ["-q", "-x"]
    here = [sys.executable, str(Path(__file__).resolve())]
    dry = ["--dry-run"] if arguments.dry_run else []
    without = [word for case in decided for word in ("--deselect", case)]
    made = [
        Stage(
            "build", [sys.executable, "setup.py", "build_ext", "--inplace"], 75, None, architecture(arguments.dry_run)
        ),
        Stage("correct", [*python, *TESTS, *collect], 60),
        Stage("decide", [*python, *decided, *bench, "--quick", "--output", str(part("decide"))], 180, part("decide")),
        Stage("learner", [*here, *dry, "--learner", str(part("learner"))], 90, part("learner")),
        Stage("rest", [*python, *files, *bench, *without, "--output", str(part("rest"))], 1e9, part("rest")),
    ]
    skipped = {"correct"} if arguments.skip_tests else set()
    skipped |= {"decide", "rest"} if arguments.skip_benchmarks else set()
    return [stage for stage in made if stage.name not in skipped | ({"build"} if arguments.dry_run else set())]


def architecture(dry: bool) -> dict[str, str]:
    """What setup.py needs to compile for this device alone, with the nvcc of the pinned list, or to fail."""
    if dry:
        return {}
    import torch
    from setup_env import own_nvcc

    major, minor = torch.cuda.get_device_capability()
    archs = f"{major}{minor}{'a' if major >= 9 else ''}"
    return own_nvcc() | {"IGRPO_BUILD_CUDA": "1", "IGRPO_REQUIRE_EXT": "1", "IGRPO_CUDA_ARCHS": archs}


def deciding_cases(kind: str) -> list[str]:
    """pytest's names of the losses' cases on their first shape, both ways to the loss after each other."""
    from benchmarks.shapes import cases_of

    cases = cases_of(kind)
    found = []
    for variant in VARIANTS:
        for file, op in (("bench_linear.py", "linear_grpo_loss"), ("bench_logits.py", "grpo_loss")):
            first = cases[op][0][0]
            if (first, variant) in cases[op]:
                name = f"{first.name}-{first.tokens}x{first.V}x{first.H}-{first.dtype_name}-{variant.replace(' ', '_')}"
                found.append(f"benchmarks/{file}::bench_loss[{name}]")
    return found


def learner_step(output: Path, toy: bool) -> int:
    """Two steps of the real learner on random weights; what they took goes to ``output``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from igrpo.config.train_config import TrainConfig
    from igrpo.learner.learner import Learner
    from igrpo.models.loading import prepared
    from igrpo.plan.models import TABLE
    from igrpo.plan.rehearsal import full_micro_batches

    sizes = dict(json.loads(TABLE.read_text(encoding="utf-8"))["models"][LEARNER["model"]])
    budget = 256 if toy else LEARNER["token_budget"]
    if toy:
        sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = TrainConfig(
        model_name_or_path=LEARNER["model"], dataset_name="none", bf16=not toy, token_budget=budget, use_cpu=toy,
        gradient_checkpointing=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes), dtype=torch.float32)
    learner = Learner(prepared(model, config), None, config, 0)
    learner.set_schedule(10)
    (samples,) = full_micro_batches(config, 1, budget // 8, budget // 16, budget)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        learner.train_on(samples)
        seconds.append(round(time.perf_counter() - start, 2))
    found = {"model": LEARNER["model"], "token_budget": budget, "seconds": seconds, "rehearsed_gib": REHEARSED_GIB}
    if not toy:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    output.write_text(json.dumps({"learner": found, "rows": []}), encoding="utf-8")
    print(found)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-benchmarks", action="store_true")
    parser.add_argument("-k", dest="expression", default="", help="pytest's -k: these benchmarks and nothing else")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of all stages together")
    parser.add_argument("--seconds", type=float, default=1.0, help="clock time per case")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.json")
    parser.add_argument("--learner", type=Path, metavar="FILE", help="only the learner's steps, in this process")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
