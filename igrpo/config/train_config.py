"""Every setting of a run: the rooms' sections in one flat, frozen dataclass with TRL / open-r1 key names.

``recipe.py`` fills it from YAML and the command line. Making one refuses what cannot work, naming the keys and what to
write instead, so that a bad setting ends a run before anything heavy is loaded. Each room's section refuses what
concerns the room; here is what concerns several.
"""

from __future__ import annotations

from dataclasses import dataclass

from igrpo.data.config import DataConfig
from igrpo.eval.config import EvalConfig
from igrpo.learner.config import LearnerConfig
from igrpo.rollout.config import RolloutConfig
from igrpo.run.config import RunConfig
from igrpo.settings import ConfigError

__all__ = ["ConfigError", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, EvalConfig, LearnerConfig, RolloutConfig, DataConfig):
    def check(self) -> None:
        if self.draft_policy_lag and self.full_determinism and self.use_peft and self.lora_dropout > 0:
            raise ConfigError(
                "full_determinism: with draft_policy_lag: 1 sampler and dropout draw from one generator at once; write "
                "lora_dropout: 0"
            )
        if self.eval_steps is not None and self.eval_samples == 0:
            raise ConfigError(
                "eval_steps is set but eval_samples is 0; set eval_samples to the number of prompts to use"
            )
