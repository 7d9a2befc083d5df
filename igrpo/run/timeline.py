"""When every request, score, learner step and weight push began and ended: ``timeline.jsonl``.

One JSON object per event: ``{"t": seconds since the run began, "step": k, "stage": "draft" | "refinement" | "reward" |
"learner" | "sync" | "eval", "event": "start" | "end", "id": "…", "tokens": n}``. A draft sampled ahead carries the step
it is for. ``igrpo.report.timeline`` draws it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo.log_lines import number_of, read_records

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


def _last_time(path: Path) -> float:
    return max((e["t"] for e in read_records(path, []) if number_of(e.get("t")) is not None), default=0.0)
