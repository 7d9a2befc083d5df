"""The schedule: which stage ran when, from ``timeline.jsonl``. Lane height is the number of requests in flight.

    python -m igrpo.report.timeline RUN [-o timeline.png] [--steps 3-5]

``igrpo report`` draws the last steps of every arm.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from igrpo.log_lines import read_records
from igrpo.report.arms import Arm
from igrpo.report.drawing import HEIGHT, WIDE, colour_of, styled, to_png
from igrpo.run.timeline import ROWS, Span, finished, read_spans

SHOWN_STEPS = 3
ENGINE_STAGES = ("draft", "refinement", "eval")
IDLE = "#e45756"


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
        _lanes(ax, spans, colour)
        title = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        ax.set_title(f"{label}, {title}" if len(arms) > 1 else title, loc="left", color=colour)
    return canvas, ("Which stage ran when, over the last steps. The height of a lane is the number of requests in "
                    "flight, odd steps dark, even ones light. Red: the engine waits.")  # fmt: skip


def _lanes(ax: Any, spans: Sequence[Span], colour: str) -> None:
    """One lane per stage, from the first span's start on; drafts sampled ahead have their own step's shade."""
    lanes = [stage for stage in ROWS if any(span.stage == stage for span in spans)]
    zero = min(span.start for span in spans)
    for y, stage in enumerate(lanes):
        own = [(s.start - zero, s.end - zero, s.step) for s in spans if s.stage == stage]
        times, counts = in_flight([(start, end) for start, end, _ in own])
        _, odd = in_flight([(start, end) for start, end, step in own if step % 2], times)
        most = max(1, *counts)  # requests that took no time were never in flight
        dark, top = ([y + 0.85 * c / most for c in some] for some in (odd, counts))
        ax.fill_between(times, y, dark, step="post", color=colour, alpha=0.85, linewidth=0)
        ax.fill_between(times, dark, top, step="post", color=colour, alpha=0.4, linewidth=0)
        ax.annotate(f"max {most}" if most > 1 else "", (1.0, y + 0.4), xycoords=("axes fraction", "data"),
                    xytext=(6, 0), textcoords="offset points", va="center", annotation_clip=False)  # fmt: skip
    for start, end in engine_idle(spans):
        ax.axvspan(start - zero, end - zero, color=IDLE, alpha=0.2, linewidth=0, zorder=0)
    ax.set_yticks([y + 0.4 for y in range(len(lanes))], lanes)
    ax.set_ylim(-0.1, len(lanes))
    ax.grid(visible=True, axis="x")
    ax.set_xlabel("seconds")


def engine_idle(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Stretches between the first and the last event in which the engine had nothing to do; spans by start."""
    idle, busy_until = [], min((span.start for span in spans), default=0.0)
    for span in spans:
        if span.stage in ENGINE_STAGES:
            if span.start > busy_until:
                idle.append((busy_until, span.start))
            busy_until = max(busy_until, span.end)
    last = max((span.end for span in spans), default=0.0)
    return [*idle, (busy_until, last)] if last > busy_until else idle


def in_flight(
    spans: Sequence[tuple[float, float]], times: Sequence[float] | None = None
) -> tuple[list[float], list[int]]:
    """Step function: how many spans are open from each time on; the times are those at which it changes, or ``times``,
    which must hold them."""
    changes: Counter[float] = Counter()
    for start, end in spans:
        changes[start] += 1
        changes[end] -= 1
    times = sorted(changes) if times is None else list(times)
    return times, list(accumulate(changes[t] for t in times))


def main(argv: Sequence[str] | None = None) -> int:
    """Draws one run's timeline. Exit codes: 0 done, 2 nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m igrpo.report.timeline", description="Draws the timeline of a run.")
    parser.add_argument("run", type=Path, help="folder of the run (output_dir)")
    parser.add_argument("-o", "--output", type=Path, help="picture to write; default: timeline.png in the folder")
    parser.add_argument("--steps", help="only these steps, as 3 or 3-5")
    args = parser.parse_args(argv)
    path = args.run / "timeline.jsonl"
    if not path.is_file():
        print(f"error: {path} is not there; give the output_dir of a run", file=sys.stderr)
        return 2
    spans = read_spans(path)
    if args.steps:
        low, _, high = args.steps.partition("-")
        spans = [span for span in spans if int(low) <= span.step <= int(high or low)]
    if not spans:
        print(f"error: {path} has no finished span of these steps", file=sys.stderr)
        return 2
    whole = max(span.end for span in spans) - spans[0].start
    share = sum(end - start for start, end in engine_idle(spans)) / max(whole, 1e-9)
    target = args.output or args.run / "timeline.png"
    with styled():
        canvas = Canvas(figsize=(WIDE, HEIGHT * 1.3))
        ax = canvas.subplots()
        _lanes(ax, spans, colour_of(0))
        ax.set_title(f"{args.run.name}: engine idle {share:.0%} of the time (red); odd steps dark, even steps light",
                     loc="left")  # fmt: skip
        to_png(canvas, target)
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
