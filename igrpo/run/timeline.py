"""When every request, score, learner step and weight push began and ended: ``timeline.jsonl``, and a picture of it.

    python -m igrpo.run.timeline RUN [-o timeline.png] [--steps 3-5]

One JSON object per event: ``{"t": seconds since the run began, "step": k, "stage": "draft" | "refinement" | "reward" |
"learner" | "sync" | "eval", "event": "start" | "end", "id": "…", "tokens": n}``. A draft sampled ahead carries the step
it is for. Only ``draw`` needs a plotting library; ``igrpo report`` draws its own picture from ``finished``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo.log_lines import number_of, read_records

ENGINE_STAGES = ("draft", "refinement", "eval")
COLORS = {
    "draft": "#4c78a8", "refinement": "#f58518", "reward": "#9d9d9d", "learner": "#54a24b", "sync": "#b279a2",
    "eval": "#72b7b2",
}  # fmt: skip
ROWS = ("sync", "eval", "learner", "reward", "refinement", "draft")
"""From the bottom of the picture to its top."""


class Timeline:
    """Collects events and appends them to a file when told to.

    Args:
        path: the file; None records nothing (every process but the first). A resumed run goes on from its last time.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._lines: list[str] = []
        self._zero = time.perf_counter() - (_last_time(path) if path is not None else 0.0)

    def start(self, stage: str, step: int, name: str) -> None:
        self._note(stage, step, name, "start", 0)

    def end(self, stage: str, step: int, name: str, tokens: int = 0) -> None:
        self._note(stage, step, name, "end", tokens)

    @contextmanager
    def span(self, stage: str, step: int) -> Iterator[None]:
        self.start(stage, step, f"{stage}/{step}")
        try:
            yield
        finally:
            self.end(stage, step, f"{stage}/{step}")

    def flush(self) -> None:
        if self.path is not None and self._lines:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(self._lines)
            self._lines.clear()

    def _note(self, stage: str, step: int, name: str, event: str, tokens: int) -> None:
        if self.path is not None:
            t = round(time.perf_counter() - self._zero, 6)
            record = {"t": t, "step": step, "stage": stage, "event": event, "id": name, "tokens": tokens}
            self._lines.append(json.dumps(record) + "\n")


@dataclass(frozen=True, slots=True)
class Span:
    """Example: ``Span("draft", step=3, name="draft/3/17/0", start=12.5, end=14.0, tokens=211)``"""

    stage: str
    step: int
    name: str
    start: float
    end: float
    tokens: int


def read_spans(path: Path) -> list[Span]:
    """Finished spans by their start; what a killed run left open, and a line cut by the kill, is left out."""
    return sorted(finished(read_records(path, [])), key=lambda span: span.start)


def finished(events: Iterable[dict[str, Any]]) -> Iterator[Span]:
    """Spans as they end; an event without its keys, or of an unknown stage, is left out."""
    running: dict[tuple[str, int, str], float] = {}
    for e in events:
        stage, step, name, t = e.get("stage"), e.get("step"), e.get("id"), e.get("t")
        if stage not in ROWS or not isinstance(step, int) or not isinstance(name, str):
            continue
        if number_of(step) is None or number_of(t) is None:
            continue
        if e.get("event") == "start":
            running[stage, step, name] = t
        elif (stage, step, name) in running:
            tokens = e.get("tokens", 0)
            begun = running.pop((stage, step, name))
            yield Span(stage, step, name, begun, t, tokens if isinstance(tokens, int) else 0)


def engine_idle(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Stretches between the first and the last event in which the engine had nothing to do."""
    idle, busy_until = [], min((span.start for span in spans), default=0.0)
    for span in spans:
        if span.stage in ENGINE_STAGES:
            if span.start > busy_until:
                idle.append((busy_until, span.start))
            busy_until = max(busy_until, span.end)
    last = max((span.end for span in spans), default=0.0)
    return [*idle, (busy_until, last)] if last > busy_until else idle


def in_flight(spans: Iterable[Span], stage: str, times: Sequence[float]) -> list[float]:
    """Tokens held by the stage's running requests at each time, each growing evenly from its start to its end."""
    chosen = [span for span in spans if span.stage == stage]
    return [
        sum(s.tokens * (t - s.start) / max(s.end - s.start, 1e-9) for s in chosen if s.start <= t < s.end)
        for t in times
    ]


def draw(spans: Sequence[Span], target: Path, title: str) -> None:
    """One row of bars per stage (requests stacked in lanes), tokens in flight below, engine idle shaded in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, tokens) = pyplot.subplots(
        2, 1, figsize=(14, 8), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    rows = [row for row in ROWS if any(span.stage == row for span in spans)]
    for y, row in enumerate(rows):
        lanes = _lanes([span for span in spans if span.stage == row])
        for i, lane in enumerate(lanes):
            height = 0.8 / len(lanes)
            bars.broken_barh(
                [(span.start, max(span.end - span.start, 1e-3)) for span in lane],
                (y - 0.4 + i * height, height * 0.9),
                facecolors=COLORS[row],
                # Neighbouring steps in two shades, so that drafts sampled ahead stand out.
                alpha=[1.0 if span.step % 2 else 0.55 for span in lane],
            )
    bars.set_yticks(range(len(rows)), rows)
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    times = [first + (last - first) * i / 600 for i in range(601)]
    stages = ("refinement", "draft")
    tokens.stackplot(times, [in_flight(spans, stage, times) for stage in stages], colors=[COLORS[s] for s in stages])
    tokens.set_ylabel("tokens in flight")
    tokens.set_xlabel("seconds since the run began")
    idle = engine_idle(spans)
    for axis in (bars, tokens):
        for start, end in idle:
            axis.axvspan(start, end, color="#e45756", alpha=0.2, linewidth=0, zorder=0)
    share = sum(end - start for start, end in idle) / max(last - first, 1e-9)
    bars.set_title(f"{title}: engine idle {share:.0%} of the time (red); odd steps dark, even steps light")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans into as few rows as do not overlap."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.start):
        free = next((lane for lane in lanes if lane[-1].end <= span.start), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _last_time(path: Path) -> float:
    return max((e["t"] for e in read_records(path, []) if number_of(e.get("t")) is not None), default=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws a run's timeline. Exit codes: 0 done, 2 nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m igrpo.run.timeline", description="Draws the timeline of a run.")
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
    target = args.output or args.run / "timeline.png"
    draw(spans, target, args.run.name)
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
