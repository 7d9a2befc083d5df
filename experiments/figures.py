"""The pictures of an experiment: where its arms ended, and how they got there. Drawn from the committed records alone.

Each file carries a digest of the records it was drawn from, by which a test knows that it is current.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import PercentFormatter

from experiments.plan import Plan
from experiments.record import load_records
from experiments.summary import answer_variance, interval, outcome, sampling_error
from igrpo.report.arms import Arm
from igrpo.report.catalogue import Figure, Line, Panel, drawable
from igrpo.report.drawing import MUTED, WIDE, colour_of, draw, styled
from igrpo.report.runs import Run
from igrpo.report.svg import save

COURSE = Figure(
    "course", "How the arms got there", "", (
        Panel("bare-prompt accuracy", "%", (Line("eval/accuracy"),)),
        Panel("bare-prompt format", "%", (Line("eval/format"),)),
        Panel("groups without a gradient", "%", (Line("frac_reward_zero_std"),), zero=True),
        Panel("refinements' 4-grams copied from the draft", "%", (Line("refinement/copy_rate"),), zero=True),
        Panel("accuracy of the draft that is shown", "%", (Line("draft/chosen_accuracy"),)),
        Panel("entropy of what is trained", "nats", (Line("entropy"),), zero=True),
        Panel("entropy on the bare prompt", "nats", (Line("bare/entropy"),), zero=True),
    ), wide=True,
)  # fmt: skip
OUTCOMES = (
    ("accuracy", "bare-prompt accuracy after training"),
    ("format", "answers in the asked format"),
    ("reward", "bare-prompt reward: what was trained for"),
)


def draw_plan(folder: Path, plan: Plan) -> list[Path]:
    """Writes ``outcome.svg`` and ``course.svg`` beside the records; returns their paths."""
    records = load_records(folder)
    arms = {arm: found for arm in plan.arms if (found := [r for r in records if r["arm"] == arm])}
    with styled():
        canvases = {"outcome": draw_outcome(arms, plan.baseline), "course": draw_course(arms)}
        paths = [folder / f"{name}.svg" for name in canvases]
        for canvas, path in zip(canvases.values(), paths, strict=True):
            save(canvas, path, digest(records), facecolor="white")
    return paths


def digest(records: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()[:32]


def draw_outcome(arms: dict[str, list[dict]], baseline: str) -> Canvas:
    """One row per arm: a faint dot per seed, the mean with its 95 % interval; dashed: the baseline's mean."""
    canvas = Canvas(figsize=(WIDE, 0.7 + 0.36 * len(arms)))
    axes = canvas.subplots(1, len(OUTCOMES), sharey=True)
    for ax, (key, title) in zip(axes, OUTCOMES, strict=True):
        for row, (arm, records) in enumerate(arms.items()):
            values = [outcome(r, key) for r in records]
            figure = interval(values, sampling_error([answer_variance(r, key) for r in records]))
            if figure is None:
                continue
            colour = colour_of(row)
            ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0)
            ax.errorbar(figure["mean"], row, xerr=figure["half_width"], fmt="o", color=colour, markersize=7, capsize=3)
            if arm == baseline:
                ax.axvline(figure["mean"], color=MUTED, linestyle="--", linewidth=0.9, zorder=0)
        ax.set_title(title, loc="left")
        ax.set_yticks(range(len(arms)), [f"{arm} ({len(rs)})" for arm, rs in arms.items()])
        if key != "reward":
            low, high = ax.get_xlim()  # an interval of few seeds may reach beyond what a share can be
            ax.set_xlim(max(low, -0.02), min(high, 1.02))
            ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.grid(axis="x")
    axes[0].invert_yaxis()
    return canvas


def draw_course(arms: dict[str, list[dict]]) -> Canvas:
    """The report's own curves: mean over seeds, shaded by their standard deviation."""
    shown = [Arm(name, tuple(as_run(record) for record in records)) for name, records in arms.items()]
    return draw(drawable(COURSE, shown) or COURSE, shown)


def as_run(record: dict[str, Any]) -> Run:
    """A record as the report sees a run folder."""
    curves = dict(record["series"])
    steps = curves.pop("step")
    metrics = {
        name: [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
        for name, values in curves.items()
    }
    for key in ("accuracy", "format"):
        metrics[f"eval/{key}"] = [(e["step"], e[key]) for e in record["evaluations"] if e[key] is not None]
    return Run(Path(record["arm"]), record["settings"], metrics)
