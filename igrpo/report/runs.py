"""A run folder as figures need it. Whatever is broken or missing becomes a note for the reader, never an exception."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from igrpo.log_lines import number_of, read_records, step_of, whole_characters
from igrpo.settings import ConfigError, shown
from igrpo.settings.section import check_value
from igrpo.settings.yaml_text import load_yaml

Series = list[tuple[float, float]]
"""(step, value) pairs, steps ascending, values finite."""

DERIVED = {
    "time/learner": ("step_time", "rollout/seconds", "sync/seconds"),
    "frac_all_equal_else": ("frac_reward_zero_std", "frac_all_right", "frac_all_wrong"),
}
"""First minus those of the others that are logged; never below 0 (stages may overlap)."""
RENAMED = {"learner/tokens": "learner/raw_tokens", "learner/padded_tokens": "learner/unique_tokens"}
"""Keys that older runs logged -> what the same figure is called now."""
SAMPLED_ON_BARE_PROMPT = "bare/accuracy"


@dataclass(frozen=True)
class Run:
    """One run folder.

    Example: ``Run(Path("runs/a"), {"seed": 1}, {"reward": [(1, 0.5), (2, 0.6)]}, [])``
    """

    path: Path
    config: dict[str, Any]
    """``config.yaml`` as written; empty where it is missing."""
    metrics: dict[str, Series]
    notes: list[str] = field(default_factory=list)
    """What a reader must know: files that are missing or cut, values that are no numbers."""

    @property
    def name(self) -> str:
        return whole_characters(self.path.resolve().name)

    @cached_property
    def steps(self) -> int:
        return int(max((points[-1][0] for points in self.metrics.values() if points), default=0))

    def series(self, metric: str) -> Series:
        return self.metrics.get(metric, [])

    def last(self, metric: str) -> float | None:
        points = self.series(metric)
        return points[-1][1] if points else None


def read_run(folder: Path) -> Run:
    """Reads what is there.

    Raises:
        FileNotFoundError: the folder has neither metrics nor completions: it is no run.
    """
    if not (folder / "metrics.jsonl").is_file() and not (folder / "completions.jsonl").is_file():
        raise FileNotFoundError(f"{folder}: no metrics.jsonl and no completions.jsonl; give the output_dir of a run")
    notes: list[str] = []
    if not (folder / "metrics.jsonl").exists():
        notes.append("metrics.jsonl is missing")
    records = list(read_records(folder / "metrics.jsonl", notes))
    metrics = _metrics(records, notes)
    for name, (whole, *parts) in DERIVED.items():
        if whole in metrics and parts[0] in metrics:
            columns = [dict(metrics.get(part, [])) for part in parts]
            metrics[name] = [(s, max(0.0, v - sum(c.get(s, 0.0) for c in columns))) for s, v in metrics[whole]]
    # With Stage 1 the drafts answer the bare prompt, without it the trained completions do: the same question to both.
    for source in ("refinement/accuracy", "draft/accuracy"):
        if source in metrics:
            metrics[SAMPLED_ON_BARE_PROMPT] = metrics[source]
    if not metrics:
        notes.append("metrics.jsonl holds no figures, so nothing is drawn for this run")
    return Run(folder, _config(folder / "config.yaml", notes), metrics, notes)


def _metrics(records: list[dict[str, Any]], notes: list[str]) -> dict[str, Series]:
    """One series per key; of several lines of one step the last counts."""
    columns: dict[str, dict[float, float]] = {}
    not_finite: dict[str, list[float]] = {}
    without_step = 0
    for record in records:
        step = step_of(record)
        if step is None:
            without_step += 1
            continue
        for key, value in record.items():
            if key == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if (number := number_of(value)) is not None:
                columns.setdefault(RENAMED.get(key, key), {})[step] = float(number)
            else:
                not_finite.setdefault(key, []).append(step)
    if without_step:
        notes.append(f"metrics.jsonl: {without_step} lines have no step and were left out")
    for key, steps in not_finite.items():
        notes.append(f"{key} is no finite number at {len(steps)} steps, first at step {steps[0]:g}: gaps in its line")
    return {key: sorted(column.items()) for key, column in columns.items()}


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("config.yaml is missing, so this run stands for itself and its settings are not shown")
        return {}
    try:
        values = load_yaml(path.read_text(encoding="utf-8", errors="replace"), "config.yaml")
    except (ConfigError, OSError) as error:
        notes.append(f"config.yaml cannot be read ({error})")
        return {}
    settings = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        try:
            check_value(shown(key), value)
        except ConfigError as error:
            notes.append(f"config.yaml: {error}")
        else:
            settings[str(key)] = value
    return settings
