"""Settings of an evaluation: all that says what the model is shown, how it samples and how answers are scored."""

from __future__ import annotations

from dataclasses import dataclass

from igrpo.engines.config import EngineConfig
from igrpo.models.config import ModelConfig
from igrpo.rewards.config import RewardConfig
from igrpo.rollout.config import PromptsConfig
from igrpo.settings.kinds import NotNegative
from igrpo.settings.shared import SamplingConfig, SeedConfig, WeightsConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig(PromptsConfig, RewardConfig, EngineConfig, ModelConfig, SamplingConfig, SeedConfig, WeightsConfig):
    """`igrpo eval` takes each of these keys from the run, unless a ``Mark`` at the key says otherwise."""

    # --- evaluation
    eval_temperature: NotNegative = 0.0
    """Temperature of the evaluation; 0 = greedy."""
