"""What a person sees while it trains: a live view in a terminal, plain lines under nohup, in CI and in pipes."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from igrpo.terminal import printable

HEARTBEAT_SECONDS = 60.0
"""Plain lines come at least this often: a log that stands still must mean that the run does."""
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_POINTS = 24
STAGES = ("drafts", "refinements", "learner")
TRENDS = (
    ("reward", "reward", "{:.2f}"),
    ("draft/accuracy", "draft accuracy", "{:.0%}"),
    ("refinement/accuracy", "refinement accuracy", "{:.0%}"),
    ("eval/accuracy", "bare-prompt accuracy", "{:.1%}"),
)
FIGURES = (
    ("rollout/tokens_per_second", "{:.0f} tok/s"),
    ("step_time", "{:.1f} s/step"),
    ("peak_memory_gib", "{:.1f} GiB peak"),
)


class LiveView:
    """Use as a context manager around the loop.

    Args:
        total: steps of the run.
        done: steps already done by the run that is resumed.
        silent: show nothing (all processes but the first).
    """

    def __init__(self, total: int, done: int = 0, silent: bool = False):
        self.total, self.done, self.silent = total, done, silent
        self.live = not silent and sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
        self.started: float | None = None
        self.resumed_at = done
        self.problems = 0
        self.counts: dict[str, tuple[int, int]] = {}
        """Of the step, by stage: how many are done, of how many."""
        self.doing = ""
        self.history: dict[str, list[float]] = {}
        self._bars = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
        )
        self._steps = Progress(
            TextColumn("step       "),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
        )
        self._step = self._steps.add_task("steps", total=total, completed=done, eta="-:--:--")
        self._bar = {name: self._bars.add_task(name, total=None, visible=False) for name in STAGES}
        self._live = Live(console=Console(file=sys.stdout), refresh_per_second=4, get_renderable=self._picture)
        self._closed = threading.Event()
        self._spoke = time.monotonic()

    def __enter__(self) -> LiveView:
        if self.live:
            self._live.start()
        elif not self.silent:
            threading.Thread(target=self._heartbeat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self.live:
            self._live.stop()

    def begin_step(self, problems: int) -> None:
        if self.started is None:  # not earlier: an evaluation before the first step says nothing about steps
            self.started = time.monotonic()
        self.problems, self.counts = problems, {}
        for name in STAGES:
            self._bars.update(self._bar[name], visible=False, completed=0)
        self.stage("rollout")

    def rolled_out(self, stage: str) -> None:
        """One problem finished a stage of its rollout."""
        self._count(stage, min(self.counts.get(stage, (0, 0))[0] + 1, self.problems), self.problems)

    def learned(self, done: int, total: int) -> None:
        """The learner has finished so many of its micro-batches."""
        self._count("learner", done, total)

    def stage(self, text: str) -> None:
        self.doing = text

    def end_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.done = step
        self.note(metrics)
        eta = self.eta()
        self._steps.update(self._step, completed=step, eta=eta)
        self.doing = ""
        if not self.live:
            self.say(f"step {step}/{self.total}  {summary(metrics)}  ETA {eta}")

    def note(self, metrics: Mapping[str, float]) -> None:
        """Figures for the trends; of a step, or of an evaluation."""
        for key in (*(key for key, _, _ in TRENDS), *(key for key, _ in FIGURES)):
            if key in metrics:
                self.history.setdefault(key, []).append(metrics[key])

    def say(self, text: str) -> None:
        if self.silent:
            return
        text = printable(text, lines=True)
        self._spoke = time.monotonic()
        if self.live:
            self._live.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def eta(self) -> str:
        steps = self.done - self.resumed_at
        if steps <= 0 or self.started is None:
            return "-:--:--"
        seconds = (time.monotonic() - self.started) / steps * (self.total - self.done)
        return str(timedelta(seconds=round(seconds)))

    def _count(self, name: str, done: int, total: int) -> None:
        self.counts[name] = done, total
        if name in self._bar:
            self._bars.update(self._bar[name], visible=True, completed=done, total=total)

    def _heartbeat(self) -> None:
        while not self._closed.wait(min(1.0, HEARTBEAT_SECONDS / 4)):
            if time.monotonic() - self._spoke >= HEARTBEAT_SECONDS:
                at = "  ".join(f"{name} {done}/{total}" for name, (done, total) in self.counts.items())
                self.say(f"step {self.done + 1}/{self.total}  {self.doing or 'working'}  {at}".rstrip())

    def _picture(self) -> Group:
        trends = Table.grid(padding=(0, 2))
        for key, name, form in TRENDS:
            values = self.history.get(key)
            if values:
                trends.add_row(name, Text(sparkline(values), style="cyan"), form.format(values[-1]))
        latest = [form.format(self.history[key][-1]) for key, form in FIGURES if key in self.history]
        return Group(self._steps, self._bars, trends, Text("  ".join([*latest, self.doing]), style="dim"))


def sparkline(values: Sequence[float], width: int = SPARK_POINTS) -> str:
    """The last values as blocks, lowest to highest; a flat line where they are all equal or no numbers."""
    last = [v for v in values if v == v and abs(v) != float("inf")][-width:]
    if not last:
        return ""
    low, high = min(last), max(last)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((v - low) * scale)] for v in last)


def summary(metrics: Mapping[str, float]) -> str:
    """The figures of one plain line; those a run does not have are left out."""
    wanted = (
        ("reward", "reward", "{:.2f}"),
        ("draft/accuracy", "draft acc", "{:.0%}"),
        ("refinement/accuracy", "refinement acc", "{:.0%}"),
        ("rollout/tokens_per_second", "tok/s", "{:.0f}"),
        ("step_time", "s/step", "{:.1f}"),
        ("peak_memory_gib", "GiB", "{:.1f}"),
    )
    return "  ".join(f"{name} {form.format(metrics[key])}" for key, name, form in wanted if key in metrics)
