"""The schedule: which stage ran when, from ``timeline.jsonl``. Lane height is the number of requests in flight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from igrpo.report.arms import Arm
from igrpo.report.drawing import HEIGHT, WIDE, colour_of
from igrpo.report.runs import read_lines

STAGES = ("draft", "refinement", "reward", "learner", "sync", "eval")
SHOWN_STEPS = 3
Span = tuple[str, float, float]
"""(stage, start, end) in seconds since the run's start."""


def last_spans(path: Path, notes: list[str]) -> tuple[list[int], list[Span]]:
    """Finished spans of the last few steps, streamed: the file of a long run is large."""
    recent: dict[int, list[Span]] = {}
    running: dict[tuple[Any, ...], float] = {}
    for event in read_lines(path, notes, required=False):
        stage, step, t = event.get("stage"), event.get("step"), event.get("t")
        if stage not in STAGES or not isinstance(step, int) or not isinstance(t, int | float):
            continue
        key = (stage, step, event.get("id"))
        if event.get("event") == "start":
            running[key] = t
        elif key in running:
            recent.setdefault(step, []).append((stage, running.pop(key), t))
            for old in sorted(recent)[:-SHOWN_STEPS]:
                del recent[old]
    steps = sorted(recent)
    return steps, sorted((span for step in steps for span in recent[step]), key=lambda span: span[1])


def draw_timeline(arms: Sequence[Arm], notes: list[str]) -> tuple[Canvas, str] | None:
    """One set of axes per arm (its first run with a timeline); None where no run has one."""
    found = []
    for i, arm in enumerate(arms):
        for run in arm.runs:
            steps, spans = last_spans(run.path / "timeline.jsonl", notes)
            if spans:
                found.append((arm.label, colour_of(i), steps, spans))
                break
    if not found:
        return None
    canvas = Canvas(figsize=(WIDE, HEIGHT * 0.95 * len(found)))
    for ax, (label, colour, steps, spans) in zip(
        canvas.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True
    ):
        lanes = [stage for stage in reversed(STAGES) if any(span[0] == stage for span in spans)]
        zero = spans[0][1]
        for y, stage in enumerate(lanes):
            times, counts = in_flight([(a - zero, b - zero) for name, a, b in spans if name == stage])
            most = max(counts)
            ax.fill_between(times, y, [y + 0.85 * c / most for c in counts], step="post", color=colour, alpha=0.7,
                            linewidth=0)  # fmt: skip
            ax.annotate(f"max {most}" if most > 1 else "", (1.0, y + 0.4), xycoords=("axes fraction", "data"),
                        xytext=(6, 0), textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
        ax.set_yticks([y + 0.4 for y in range(len(lanes))], lanes)
        ax.set_ylim(-0.1, len(lanes))
        ax.grid(visible=True, axis="x")
        ax.set_xlabel("seconds")
        title = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        ax.set_title(f"{label}, {title}" if len(arms) > 1 else title, loc="left", color=colour)
    return canvas, ("Which stage ran when, over the last steps. The height of a lane is the number of requests in "
                    "flight; a gap in draft and refinement is time in which the engine waits.")  # fmt: skip


def in_flight(spans: Sequence[tuple[float, float]]) -> tuple[list[float], list[int]]:
    """Step function: how many spans are open from each time on."""
    changes: dict[float, int] = {}
    for start, end in spans:
        changes[start] = changes.get(start, 0) + 1
        changes[end] = changes.get(end, 0) - 1
    times = sorted(changes)
    counts, open_now = [], 0
    for t in times:
        open_now += changes[t]
        counts.append(open_now)
    return times, counts
