"""Settings of what a run writes and goes on from."""

from __future__ import annotations

from dataclasses import dataclass

from igrpo.settings import ConfigError
from igrpo.settings.kinds import Count, PathText, Steps
from igrpo.settings.shared import OutputConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(OutputConfig):
    # --- run
    save_steps: Steps = 100
    """Checkpoint every so many steps, or below 1 every such share of all steps, and at the end; 0 = only at the end."""
    save_total_limit: Count | None = 2
    """Keep the newest so many checkpoints; null: all."""
    resume_from_checkpoint: PathText | None = None
    """`last`, or the path of a checkpoint folder."""
    logging_steps: Steps = 1
    """Write metrics every so many steps, or below 1 every such share of all steps."""
    eval_steps: Steps | None = None
    """Also evaluate every so many steps, or below 1 every such share of all steps."""
    log_completions: bool = True
    """Write every draft and refinement to `completions.jsonl`."""

    def check(self) -> None:
        if self.logging_steps == 0 or self.eval_steps == 0:
            key = "logging_steps" if self.logging_steps == 0 else "eval_steps"
            raise ConfigError(f"{key}: 0 does not work; write a number of steps, or a share of all below 1")
