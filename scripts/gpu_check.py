"""Tests and times everything on this machine's CUDA device and writes one JSON record.

    python scripts/gpu_check.py                        tests, then every benchmark; at most --minutes
    python scripts/gpu_check.py --skip-tests -k linear        some of the benchmarks
    python scripts/gpu_check.py --dry-run --output FILE       anywhere: the tests are collected, the benchmarks run on
                                                              toy shapes under Triton's interpreter

Each benchmark file runs in a process of its own, so that a kernel that breaks the device's context spoils one file and
not the record. After --minutes no new case begins; what was measured until then is written. The record has the
schema of benchmarks/records.py and one more key, `tests`. The exit status is 1 if a test or a benchmark failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels", "tests/learner/test_packed_attention.py")
FILES = ("bench_logits.py", "bench_linear.py", "bench_lengths.py", "bench_loop.py")
TEST_SHARE = 0.4
"""Of the time limit, at most, for the tests."""


def main() -> int:
    arguments = parse()
    sys.path.insert(0, str(ROOT))
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # for the child processes as well
    import torch

    from benchmarks import records

    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here; --dry-run shows what would run")
    start = time.monotonic()
    tests = None if arguments.skip_tests else run_tests(arguments)
    record = records.environment("python scripts/gpu_check.py " + " ".join(sys.argv[1:])) | {
        "toy": arguments.dry_run, "load_average": [round(os.getloadavg()[0], 1)],
        "tests": {"command": " ".join(["pytest", *TESTS]), "exit_status": tests, "collected_only": arguments.dry_run},
        "exit_status": {}, "rows": [],
    }  # fmt: skip
    for name in FILES if not arguments.skip_benchmarks else ():
        minutes = arguments.minutes - (time.monotonic() - start) / 60
        status, rows = run_benchmarks(name, max(minutes, 0.0), arguments)
        record["exit_status"][name] = status
        record["rows"] += rows
    record["load_average"].append(round(os.getloadavg()[0], 1))
    record["seconds"] = round(time.monotonic() - start)
    output = arguments.output or records.path_of(record)
    records.save(record, output)
    print(
        f"wrote {output}: {len(record['rows'])} rows in {record['seconds']} s, tests {tests}, {record['exit_status']}"
    )
    return int(bool(tests) or any(record["exit_status"].values()))


def before(output: Path, arguments: argparse.Namespace) -> dict | None:
    """The record that a run of some of the benchmarks adds to."""
    from benchmarks import records

    return records.load(output) if output.is_file() and not arguments.dry_run else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-benchmarks", action="store_true")
    parser.add_argument("-k", dest="expression", default="", help="pytest's -k, for the benchmarks")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of tests and benchmarks together")
    parser.add_argument("--seconds", type=float, default=1.0, help="clock time per case")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.json")
    return parser.parse_args()


def run_tests(arguments: argparse.Namespace) -> int:
    """Exit status of the tests, 124 where they ran out of time; the dry run collects them only."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        *TESTS,
        *(["--collect-only", "-q"] if arguments.dry_run else []),
    ]
    output = subprocess.DEVNULL if arguments.dry_run else None
    try:
        return subprocess.run(command, cwd=ROOT, stdout=output, timeout=60 * TEST_SHARE * arguments.minutes).returncode
    except subprocess.TimeoutExpired:
        print("the tests ran out of time", file=sys.stderr)
        return 124


def run_benchmarks(name: str, minutes: float, arguments: argparse.Namespace) -> tuple[int, list[dict]]:
    """Exit status and rows of one file; 0 rows if its process died before it wrote any."""
    from benchmarks import records

    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [
            sys.executable, "-m", "pytest", f"benchmarks/{name}", "--output", str(part), "--minutes", f"{minutes:.2f}",
            "--seconds", str(arguments.seconds), *(["--toy"] if arguments.dry_run else []),
            *(["-k", arguments.expression] if arguments.expression else []),
        ]  # fmt: skip
        status = subprocess.run(command, cwd=ROOT).returncode
        rows = records.load(part)["rows"] if part.is_file() else []
    return (0 if status == 5 else status), rows  # 5: -k chose nothing in this file


if __name__ == "__main__":
    sys.exit(main())
