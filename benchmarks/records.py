"""Records: one JSON file per kind of machine in benchmarks/results/, and the guard that compares a run with it.

A record has, at its top, `gpu` or `cpu`, `torch`, `triton`, `driver`, `commit`, `date`, `command`, the machine's load
while it ran, and `rows`. A row is one provider and pass of one case:

    op, pass (fwd, bwd, fwd+bwd, step, …), impl, provider, shape, tokens, vocab, hidden, dtype, variant
    time_ms (median), first_ms (the first turn, without kept memory), samples_ms, floor_ms, peak_extra_bytes,
    max_rel_error, note (why there is no figure)

The guard never compares times, only ratios within a run. For one of our implementations and each other provider x of
the same case, let r = median over rounds of log(ours / x), and dr its change against the record:

    noise of r        SE = 1.2533 · 1.4826 · MAD(log ratios) / sqrt(rounds), the standard error of a median
    noise of dr       sqrt(SE_now² + SE_then²)
    a ratio is lost   dr > max(ALLOWANCE, 4 · noise): more than both runs' scatter, and than what differs between runs
    we have lost      at least half of the ratios of a case are lost, or memory grew by more than MEMORY_ALLOWANCE

Two whole CPU runs of the same code, two hours apart with nothing else on the machine, but on a shared host, gave |dr|
of at most 9 % in half of the cases, 18 % in three quarters, 27 % in nine of ten and 41 % in 19 of 20, a third run 9,
18, 40 and 77 %: hence the CPU's allowance. The GPU's is assumed. A ratio that says 50 times faster is not judged: a
backward pass that has nothing left to do is all overhead.

One rival alone being faster or luckier than before is listed, but is no loss of ours.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "results"
RESULTS = Path(os.environ.get("IGRPO_BENCHMARK_RESULTS") or COMMITTED)
OURS = ("cuda", "triton", "cpu", "torch", "igrpo")
ALLOWANCE = {"cuda": 0.05, "cpu": 0.40}
MEMORY_ALLOWANCE = 0.02
"""Counted tensors do not scatter; the peaks of whole processes differed by at most 1.3 % between two runs."""
NEGLIGIBLE = 0.02
"""Both runs' ratio to a rival below this: not judged."""
CASE = ("op", "shape", "tokens", "vocab", "hidden", "dtype", "variant", "pass")


def environment(command: str) -> dict:
    """Machine, versions, commit, date: what a figure needs beside it to mean something."""
    import torch
    import triton

    cuda = torch.cuda.is_available()
    return {
        ("gpu" if cuda else "cpu"): torch.cuda.get_device_name() if cuda else cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
    }


def cpu_name() -> str:
    """Model and vector width, as far as the system tells."""
    import torch

    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def kind_of(record: dict) -> str:
    """File name without suffix: the same for machines whose ratios are comparable."""
    name = record.get("gpu") or f"{record['cpu']}-{record['threads']}-threads"
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def path_of(record: dict) -> Path:
    return RESULTS / f"{kind_of(record)}.json"


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def save(record: dict, path: Path) -> None:
    """One row per line, so that a diff shows which rows changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=2)
    rows = ",\n".join("    " + json.dumps(row) for row in record["rows"])
    path.write_text(f'{head[:-2]},\n  "rows": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


def merge(old: dict | None, new: dict) -> dict:
    """The new record, with the old one's rows of cases that this run did not measure; those keep their commit."""
    if old is None:
        return new
    held = {case_key(row) for row in new["rows"]}
    kept = [row for row in old["rows"] if case_key(row) not in held]
    if old["commit"] != new["commit"]:
        kept = [{"commit": old["commit"], **row} for row in kept]
    return new | {"rows": kept + new["rows"]}


def case_key(row: dict) -> tuple:
    return tuple(row[name] for name in CASE)


def by_case(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(case_key(row), []).append(row)
    return found


@dataclass(frozen=True)
class Change:
    """How one of our figures stands against one other provider, beside the record."""

    case: tuple
    ours: str
    other: str
    """Provider, or "memory" for our own peak."""
    then: float
    now: float
    """Ours divided by the other's: smaller is better."""
    lost: bool

    def __str__(self) -> str:
        return f"{self.ours} / {self.other}: {self.then:.3f} -> {self.now:.3f}"


def changes(now: Iterable[dict], then: Iterable[dict], allowance: float) -> list[Change]:
    """Every ratio that both runs have."""
    before = by_case(then)
    found = []
    for case, rows in by_case(now).items():
        old = {row["provider"]: row for row in before.get(case, [])}
        new = {row["provider"]: row for row in rows}
        for name, row in new.items():
            if row["impl"] not in OURS or name not in old:
                continue
            others = [other for other in new if other in old and new[other]["impl"] not in OURS]
            found += _ratios(case, name, others, new, old, allowance)
            peaks = old[name]["peak_extra_bytes"], row["peak_extra_bytes"]
            if all(peaks) and peaks[0] > 2**20:  # below a MiB it is a handful of small tensors
                growth = peaks[1] / peaks[0]
                found.append(Change(case, name, "memory", 1.0, growth, growth > 1 + MEMORY_ALLOWANCE))
    return found


def _ratios(case, name, others, new, old, allowance) -> list[Change]:
    found = []
    for other in others:
        runs = [_log_ratio(run[name], run[other]) for run in (old, new)]
        if None in runs:
            continue
        (then, se_then), (now, se_now) = runs
        negligible = max(now, then) < math.log(NEGLIGIBLE)
        lost = not negligible and now - then > max(math.log1p(allowance), 4 * math.hypot(se_then, se_now))
        found.append(Change(case, name, other, math.exp(then), math.exp(now), lost))
    return found


def _log_ratio(ours: dict, other: dict) -> tuple[float, float] | None:
    """Median of the rounds' log ratios and its standard error."""
    logs = [math.log(a / b) for a, b in zip(ours["samples_ms"], other["samples_ms"], strict=False) if a > 0 and b > 0]
    if not logs:
        return None
    middle = statistics.median(logs)
    deviation = statistics.median(abs(x - middle) for x in logs)
    return middle, 1.2533 * 1.4826 * deviation / math.sqrt(len(logs))


def losses(found: Iterable[Change]) -> dict[tuple, list[Change]]:
    """(case, our provider) -> its changes, where we have lost."""
    groups: dict[tuple, list[Change]] = {}
    for change in found:
        groups.setdefault((change.case, change.ours), []).append(change)
    lost = {}
    for key, group in groups.items():
        ratios = [c for c in group if c.other != "memory"]
        memory = [c for c in group if c.other == "memory" and c.lost]
        if memory or (ratios and 2 * sum(c.lost for c in ratios) >= len(ratios)):
            lost[key] = group
    return lost


def command_line() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return " ".join(words).replace("__main__.py", "pytest").replace("py.test", "pytest")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
