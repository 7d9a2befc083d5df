"""What a person sees while it trains: one live bar in a terminal, one plain line per step anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class LiveView:
    """Use as a context manager around the loop.

    Args:
        total: steps of the run.
        done: steps already done by the run that is resumed.
        silent: show nothing (all processes but the first).
    """

    def __init__(self, total: int, done: int = 0, silent: bool = False):
        self.total, self.done, self.silent = total, done, silent
        self.live = sys.stdout.isatty() and not silent
        self.started: float | None = None
        self.resumed_at = done
        self.problems = 0
        self.counts: dict[str, int] = {}
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TextColumn("[dim]{task.fields[stage]}[/dim]"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=Console(file=sys.stdout),
            disable=not self.live,
        )
        self.task = self.progress.add_task("steps", total=total, completed=done, figures="", stage="", eta="-:--:--")

    def __enter__(self) -> LiveView:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def begin_step(self, problems: int) -> None:
        if self.started is None:  # not earlier: an evaluation before the first step says nothing about steps
            self.started = time.monotonic()
        self.problems, self.counts = problems, {}
        self.stage("rollout")

    def rolled_out(self, stage: str) -> None:
        """One problem finished a stage of its rollout."""
        self.counts[stage] = self.counts.get(stage, 0) + 1
        self.stage("  ".join(f"{name} {count}/{self.problems}" for name, count in self.counts.items()))

    def stage(self, text: str) -> None:
        self.progress.update(self.task, stage=text)

    def end_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.done = step
        figures, eta = summary(metrics), self.eta()
        self.progress.update(self.task, completed=step, figures=figures, eta=eta, stage="")
        if not self.live and not self.silent:
            print(f"step {step}/{self.total}  {figures}  ETA {eta}", flush=True)

    def say(self, text: str) -> None:
        if self.silent:
            return
        if self.live:
            self.progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, flush=True)

    def eta(self) -> str:
        steps = self.done - self.resumed_at
        if steps <= 0 or self.started is None:
            return "-:--:--"
        seconds = (time.monotonic() - self.started) / steps * (self.total - self.done)
        return str(timedelta(seconds=round(seconds)))


def summary(metrics: Mapping[str, float]) -> str:
    """The figures beside the bar; those a run does not have are left out."""
    wanted = (
        ("reward", "reward", "{:.2f}"),
        ("draft/accuracy", "draft acc", "{:.0%}"),
        ("refinement/accuracy", "refinement acc", "{:.0%}"),
        ("rollout/tokens_per_second", "tok/s", "{:.0f}"),
        ("step_time", "s/step", "{:.1f}"),
    )
    return "  ".join(f"{name} {form.format(metrics[key])}" for key, name, form in wanted if key in metrics)
