"""What W&B, TensorBoard and the others of ``report_to`` are told beside the figures of each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from igrpo.settings.shared import OutputConfig

TEXT_ROWS = 32


@contextmanager
def tracked(accelerator: Any, config: OutputConfig) -> Iterator[None]:
    """Trackers that know the run's settings; closed at the end, so that nothing stays in buffers."""
    name = config.run_name or Path(config.output_dir).resolve().name
    settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(config).items()}
    options = {tracker: {"name": name} for tracker in ("wandb", "trackio") if tracker in config.trackers}
    accelerator.init_trackers("igrpo", config=settings, init_kwargs=options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def show_table(accelerator: Any, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """To the trackers that show tables, all rows with the same columns; to TensorBoard ``TEXT_ROWS`` as text."""
    for tracker in accelerator.trackers if rows else ():
        if tracker.name == "tensorboard":
            lines = ([*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows[:TEXT_ROWS]))
            cells = [[" ⏎ ".join(str(one).replace("|", "\\|").splitlines()) for one in line] for line in lines]
            tracker.tracker.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)
        elif tracker.name == "trackio":
            import pandas
            import trackio

            tracker.log({name: trackio.Table(dataframe=pandas.DataFrame(rows))}, step=step)
        elif hasattr(tracker, "log_table"):
            tracker.log_table(name, columns=[*rows[0]], data=[[*row.values()] for row in rows], step=step)
