"""Settings of the data: which rows, in which columns, how many of them and in which order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from igrpo.settings import ConfigError
from igrpo.settings.kinds import LARGEST_COUNT, Count, CountOrZero, Interval, NamedPath, Text
from igrpo.settings.shared import BatchConfig, SeedConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig(BatchConfig, SeedConfig):
    # --- data
    dataset_name: NamedPath
    """A hub id, a local .jsonl/.parquet/.csv path, or `reasoning_gym:TASK[,TASK]` (generated, offline)."""
    dataset_config: str | None = None
    """Configuration name of a hub data set."""
    dataset_train_split: Text = "train"
    """Split to train on."""
    dataset_test_split: str | None = None
    """Split for the bare-prompt evaluation; without one, the last `eval_samples` rows of the data set are held out."""
    dataset_prompt_column: Text = "prompt"
    """Column with the question: a string, or a list of chat messages."""
    dataset_solution_column: Text = "solution"
    """Column with the reference answer, or a path into one, such as `reward_model.ground_truth`."""
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of the reasoning-gym task (`size`, `seed`, `min_terms`, …)."""
    max_train_samples: Count | None = None
    """Use only the first rows."""
    shuffle_dataset: bool = True
    """A new order each epoch, fixed by `seed`."""
    eval_samples: CountOrZero = 0
    """Bare prompts to evaluate before and after training (and every `eval_steps`); 0 = none."""
    num_train_epochs: Annotated[float, Interval(0.0, 1e9, above=True)] = 1.0
    """Passes over the data; used when `max_steps` is not set."""
    max_steps: Annotated[int, Interval(-1, LARGEST_COUNT)] = -1
    """Rollout batches to train on; -1: as `num_train_epochs` says."""

    def check(self) -> None:
        if self.max_steps == 0:
            raise ConfigError("max_steps: 0 does not work; write 1 or more, or -1 for num_train_epochs")
