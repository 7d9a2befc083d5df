"""The small JSON records that are committed: one per finished run, to which the arms and seeds of plans point."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from igrpo.log_lines import read_records
from igrpo.rewards.grading.passages import extract_answer
from igrpo.run.folder import write_atomically

POINTERS = "runs.json"
"""In a plan's folder: arm -> seed -> name of the record. Equal settings are one run, whoever asks for them."""

SERIES = (
    "reward",
    "refinement/accuracy",
    "draft/accuracy",
    "draft/best_accuracy",
    "draft/best_accuracy_theory",
    "draft/chosen_accuracy",
    "frac_reward_zero_std",
    "frac_all_right",
    "frac_all_wrong",
    "refinement/copy_rate",
    "refinement/copies_draft",
    "refinement/better_than_draft",
    "refinement/worse_than_draft",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "bare/entropy",
    "kl",
    "step_time",
    "rollout/seconds",
)
"""Curves that are kept; null where a step has no such figure (no group had a gradient), no key where no step has."""


def load_records(folder: Path) -> list[dict[str, Any]]:
    """What a plan's folder points to, each record with its ``arm`` and ``seed``."""
    return [
        {"arm": arm, "seed": int(seed), **read_json(record_of(folder, run))}
        for arm, seeds in _pointers(folder).items()
        for seed, run in seeds.items()
    ]


def record_of(folder: Path, run: str) -> Path:
    """The record of a run that a plan's folder points to."""
    return folder.parent / "runs" / f"{run}.json"


def point(folder: Path, arm: str, seed: int, run: str) -> None:
    """Writes into a plan's folder which run stands for an arm and a seed."""
    pointers = _pointers(folder)
    seeds = pointers.get(arm, {}) | {str(seed): run}
    write_json(folder / POINTERS, pointers | {arm: dict(sorted(seeds.items(), key=lambda pair: int(pair[0])))})


def _pointers(folder: Path) -> dict[str, dict[str, str]]:
    return read_json(folder / POINTERS) if (folder / POINTERS).is_file() else {}


def make_record(folder: Path, command: str, settings: dict[str, Any], processes: int = 1) -> dict[str, Any]:
    """Everything the summary and the figures need, a few kilobytes.

    Args:
        command: the one that trained the run.
        settings: what the plan asked for, seed included; every other key had the default that it has at ``commit``.
    """
    notes: list[str] = []
    rows = list(read_records(folder / "metrics.jsonl", notes))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    steps = [row for row in rows if "reward" in row]
    equal = answer_equals_draft(folder, notes)
    for note in notes:  # a figure from a broken log must not look like any other
        print(f"warning: {note}", file=sys.stderr)
    return {
        "command": command,
        **provenance(),
        "settings": settings,
        "evaluations": evaluations(rows, steps, config["eval_samples"]),
        "series": {
            "step": [row["step"] for row in steps],
            **{name: [_short(row.get(name)) for row in steps] for name in SERIES if any(name in row for row in steps)},
        },
        "answer_equals_draft": equal,
        "totals": {
            "decoded_tokens": sum(decoded(row) for row in steps),
            "rollouts": sum(row["rollout/rollouts_per_prompt"] for row in steps) * _prompts(config) * processes,
            "step_seconds": _short(sum(row["step_time"] for row in steps)),
            "core_seconds": core_seconds(folder),
            "peak_memory_gib": _short(max(row["peak_memory_gib"] for row in steps)),
        },
    }


def evaluations(rows: Iterable[dict], steps: list[dict], samples: int) -> list[dict[str, Any]]:
    """Bare-prompt accuracy and reward, each with the tokens decoded for training until then."""
    found = []
    for row in rows:
        if "eval/accuracy" in row:
            done = [s for s in steps if s["step"] <= row["step"]]
            found.append(
                {
                    "step": row["step"],
                    "accuracy": _short(row["eval/accuracy"]),
                    "samples": samples,
                    "reward": _short(row["eval/reward"]),
                    "format": _short(row.get("eval/rewards/format")),
                    "decoded_tokens": sum(decoded(s) for s in done),
                }
            )
    return found


def decoded(row: dict[str, float]) -> int:
    """Tokens that the engine sampled in a step: drafts and completions alike."""
    return int(row["rollout/draft_tokens"] + row["rollout/refinement_tokens"])


def answer_equals_draft(folder: Path, notes: list[str]) -> float | None:
    """Share of refinements whose final answer is that of the draft they were shown; None where none is shown."""
    path, equal = folder / "completions.jsonl", []
    if not path.is_file():
        return None
    for group in read_records(path, notes):
        if group["chosen"] is None:
            continue
        shown = extract_answer(group["drafts"][group["chosen"]]["text"])
        equal += [shown is not None and extract_answer(r["text"]) == shown for r in group["refinements"]]
    return _short(fmean(equal)) if equal else None


def core_seconds(folder: Path) -> float | None:
    """None where a part of the run was killed before it could be counted."""
    seconds = float((folder / "core_seconds").read_text(encoding="utf-8"))
    return None if math.isnan(seconds) else seconds


def provenance() -> dict[str, Any]:
    import torch

    git = partial(subprocess.run, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
    if git(["git", "status", "--porcelain", "igrpo", "igrpo_kernels", "csrc"]).stdout:
        commit += " with changes"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"commit": commit, "machine": f"{where}, {platform.machine()}", "torch": torch.__version__}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """A line per setting, curve and figure, so that a change shows as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _lines(value) + "\n")


def _lines(value: Any, indent: str = "") -> str:
    flat = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or (indent and len(flat) <= 120):
        return flat
    if isinstance(value, list) and not any(isinstance(part, dict | list) for part in value):
        return flat
    inner = indent + " "
    if isinstance(value, list):
        rows, (opened, closed) = [_lines(part, inner) for part in value], "[]"
    else:
        rows, (opened, closed) = [f"{json.dumps(key)}: {_lines(part, inner)}" for key, part in value.items()], "{}"
    return opened + ",".join(f"\n{inner}{row}" for row in rows) + f"\n{indent}{closed}"


def _prompts(config: dict[str, Any]) -> int:
    completions = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
    return completions // config["num_generations"]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
