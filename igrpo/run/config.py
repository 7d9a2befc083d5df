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
    push_to_hub: bool = False
    """Upload the trained model with its card to the Hugging Face Hub at the end; the token is `HF_TOKEN` or a login."""
    hub_model_id: str | None = None
    """Repository of `push_to_hub`, as `OWNER/NAME`; null: one of yours with the folder's name."""
    hub_private_repo: bool | None = None
    """Make that repository private, if it is new; null: as your account makes them."""

    def check(self) -> None:
        if self.logging_steps == 0 or self.eval_steps == 0:
            key = "logging_steps" if self.logging_steps == 0 else "eval_steps"
            raise ConfigError(f"{key}: 0 does not work; write a number of steps, or a share of all below 1")
