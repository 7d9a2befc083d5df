"""What an evaluation says: figures per benchmark, the table (rows = models, columns = benchmarks)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from igrpo.eval.pass_at_k import Estimate, average, bootstrap, pass_at_k
from igrpo.report.benchmarks import Row, names, row_label
from igrpo.run.folder import write_atomically
from igrpo.run.output_folder import free_name

logger = logging.getLogger(__name__)


def figures(records: Sequence[dict[str, Any]], seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of one benchmark from its records, and the resampled means of its avg@n.

    Problems whose reference answer cannot be read count nowhere but in ``not_judged``.
    """
    judged = [r for r in records if r["correct"] is not None]
    if not judged:
        raise ValueError("no problem could be judged: the reference answers cannot be read")
    n = len(judged[0]["completions"])
    completions = [c for r in records for c in r["completions"]]
    (score,), drawn = bootstrap(np.array([[r["score"]] for r in judged]), seed)
    passes, _ = bootstrap(pass_at_k([r["correct"] for r in judged], n), seed)
    rewards = {name: fmean(c["rewards"][name] or 0.0 for c in completions) for name in completions[0]["rewards"]}
    result = {
        "n": n,
        "problems": len(judged),
        "not_judged": len(records) - len(judged),
        "accuracy": score._asdict(),
        "pass_at_k": [{"k": k, **p._asdict()} for k, p in enumerate(passes, start=1)],
        "truncated": fmean(c["finish_reason"] == "length" for c in completions),
        "mean_tokens": fmean(c["tokens"] for c in completions),
        "rewards": rewards,
    }
    if "draft_score" in records[0]:
        result["chosen_draft_accuracy"] = fmean(r["draft_score"] for r in judged)
    return result, drawn


def make_row(name: str, mode: str, by_benchmark: dict[str, Sequence[dict[str, Any]]], seed: int) -> Row:
    found, columns = {}, []
    for i, (benchmark, records) in enumerate(by_benchmark.items()):
        found[benchmark], drawn = figures(records, seed + i)
        columns.append(drawn)
    mean = average(columns, [f["accuracy"]["value"] for f in found.values()])
    return {"model": name, "mode": mode, "benchmarks": found, "average": mean._asdict()}


def merge(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The folder's summary with these rows added; a row of the same model and mode is replaced where it stands."""
    path = folder / "summary.json"
    merged = {(r["model"], r["mode"]): r for r in _read(path)}
    merged |= {(r["model"], r["mode"]): r for r in rows}
    write_atomically(path, json.dumps({"rows": list(merged.values())}, indent=2, ensure_ascii=False) + "\n")
    return list(merged.values())


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, RecursionError, KeyError, TypeError):
        kept = free_name(path.with_name(f"{path.name}.broken"))
        path.rename(kept)
        logger.warning("%s cannot be read; it is kept as %s", path, kept.name)
        return []


def table(rows: Sequence[Row]) -> str:
    """Markdown: avg@n in per cent with the 95 % interval in brackets; Avg where a row has every benchmark."""
    benchmarks = names(rows)
    lines = [["model", "n", *benchmarks, "Avg"], ["---", "--:", *("--:" for _ in benchmarks), "--:"]]
    for row in rows:
        found = row["benchmarks"]
        cells = [percent(Estimate(**found[b]["accuracy"])) if b in found else "–" for b in benchmarks]
        mean = percent(Estimate(**row["average"])) if len(found) == len(benchmarks) else "–"
        n = ", ".join(dict.fromkeys(str(f["n"]) for f in found.values()))
        lines.append([row_label(row), n, *cells, mean])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pass_table(rows: Sequence[Row]) -> str:
    """pass@k at powers of two and at n, one line per row and benchmark."""
    ns = {f["n"] for row in rows for f in row["benchmarks"].values()}
    ks = sorted(ns | {2**i for n in ns for i in range(n.bit_length())})
    lines = [["model", "benchmark", *(f"pass@{k}" for k in ks)], ["---", "---", *("--:" for _ in ks)]]
    for row in rows:
        for benchmark, f in row["benchmarks"].items():
            values = {p["k"]: p["value"] for p in f["pass_at_k"]}
            cells = (f"{100 * values[k]:.1f}" if k in values else "–" for k in ks)
            lines.append([row_label(row), benchmark, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:.1f}"
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
