"""Which runs belong together: those that differ only in the seed are one arm, drawn as mean and spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from igrpo.log_lines import whole_characters
from igrpo.report.runs import Run, Series

SAME_ARM = frozenset({"seed", "output_dir", "run_name", "resume_from_checkpoint", "report_to"})
"""Keys that may differ inside an arm."""


@dataclass(frozen=True)
class Band:
    """Mean over the runs of an arm and its standard deviation; ``spread`` is None for a single run."""

    mean: Series
    spread: list[float] | None


@dataclass(frozen=True)
class Arm:
    """Runs with the same settings and different seeds."""

    label: str
    runs: tuple[Run, ...]

    def band(self, metric: str) -> Band:
        """Over the steps that every run of the arm has, so that no step is an average of fewer seeds."""
        columns = [dict(run.series(metric)) for run in self.runs if run.series(metric)]
        if not columns:
            return Band([], None)
        steps = sorted(set.intersection(*(set(column) for column in columns)))
        values = [[column[step] for column in columns] for step in steps]
        mean = [(step, fmean(v)) for step, v in zip(steps, values, strict=True)]
        return Band(mean, [stdev(v) for v in values] if len(columns) > 1 else None)

    def has(self, metric: str) -> bool:
        return any(run.series(metric) for run in self.runs)


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order in which their first run was named."""
    groups: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        key = repr(sorted((k, repr(v)) for k, v in run.config.items() if k not in SAME_ARM)) if run.config else f"{i}"
        groups.setdefault(key, []).append(run)
    members = list(groups.values())
    return [Arm(label, tuple(group)) for label, group in zip(_labels(members), members, strict=True)]


def config_diff(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Keys whose values differ -> one value per run; ``…`` where a run does not have the key."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    table = {key: [run.config.get(key, ...) for run in runs] for key in keys}
    return {key: row for key, row in table.items() if any(value != row[0] for value in row)}


def _labels(groups: list[list[Run]]) -> list[str]:
    """The fewest differing settings that tell the arms apart, else the folders' names."""
    first = [group[0] for group in groups]
    if len(first) == 1:
        return [_short(first[0].config.get("algorithm", first[0].name))]
    differing = sorted((key for key in config_diff(first) if key not in SAME_ARM), key=lambda key: key != "algorithm")
    if all(run.config for run in first):
        few = [differing[:count] for count in range(1, min(len(differing), 3) + 1)]
        for keys in (*few, *([key] for key in differing)):
            labels = [_describe(run, keys) for run in first]
            if len(set(labels)) == len(labels):
                return labels
    names = [run.name for run in first]
    return names if len(set(names)) == len(names) else [whole_characters(str(run.path)) for run in first]


def _describe(run: Run, keys: Sequence[str]) -> str:
    values = [(key, run.config.get(key)) for key in keys]
    return ", ".join(_short(v) if key == "algorithm" else f"{key} {_short(v)}" for key, v in values)


def _short(value: Any) -> str:
    text = whole_characters(str(value))
    return text if len(text) <= 32 else text[:31] + "…"
