"""The schedule: which stage ran when, from ``timeline.jsonl``. Lane height is the number of requests in flight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from igrpo.log_lines import read_records
from igrpo.report.arms import Arm
from igrpo.report.drawing import HEIGHT, WIDE, colour_of
from igrpo.run.timeline import ROWS, Span, finished

SHOWN_STEPS = 3


def last_spans(path: Path, notes: list[str]) -> tuple[list[int], list[Span]]:
    """Finished spans of the last few steps, streamed: the file of a long run is large."""
    recent: dict[int, list[Span]] = {}
    for span in finished(read_records(path, notes)):
        recent.setdefault(span.step, []).append(span)
        for old in sorted(recent)[:-SHOWN_STEPS]:
            del recent[old]
    steps = sorted(recent)
    return steps, sorted((span for step in steps for span in recent[step]), key=lambda span: span.start)


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
        lanes = [stage for stage in ROWS if any(span.stage == stage for span in spans)]
        zero = spans[0].start
        for y, stage in enumerate(lanes):
            times, counts = in_flight([(s.start - zero, s.end - zero) for s in spans if s.stage == stage])
            most = max(1, *counts)  # requests that took no time were never in flight
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
