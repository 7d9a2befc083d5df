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


LARGEST_RANK = 512
"""Of adapters that vLLM serves."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, EvalConfig, LearnerConfig, RolloutConfig, DataConfig):
    def check(self) -> None:
        if self.load_in_4bit and not self.use_peft:
            raise ConfigError("load_in_4bit: weights in 4 bits cannot be trained; write use_peft: true, or false")
        if self.sends_adapter and self.use_vllm and self.lora_r > LARGEST_RANK:
            raise ConfigError(
                f"lora_sync: vLLM takes adapters up to rank {LARGEST_RANK}, and lora_r is {self.lora_r}; write merged"
            )
        if self.steps_ahead and self.full_determinism and self.use_peft and self.lora_dropout > 0:
            raise ConfigError(
                f"full_determinism: with {self.lag_key}: {self.steps_ahead} sampler and dropout draw from one "
                "generator at once; write lora_dropout: 0"
            )
        if self.policy_lag:
            self._check_stale()
        if self.distillation_weight and self.replays_sampling:
            (key, value), *_ = self.truncates.items()
            raise ConfigError(
                f"distillation_weight: a teacher is compared over the whole vocabulary, and {key}: {value} leaves a "
                f"part of it; write {key}: {1.0 if key == 'top_p' else 0}, or distillation_weight: 0"
            )
        if self.eval_steps is not None and self.eval_samples == 0:
            raise ConfigError(
                "eval_steps is set but eval_samples is 0; set eval_samples to the number of prompts to use"
            )

    def _check_stale(self) -> None:
        if not (self.vllm_importance_sampling_correction or self.bypass_mode):
            raise ConfigError(
                f"policy_lag: {self.policy_lag} trains on tokens of older weights, which the loss must be told; write "
                "vllm_importance_sampling_correction: true, or policy_lag: 0"
            )
        if self.refinement_context != "draft" and self.bare_importance_ratio == "bare":
            raise ConfigError(
                f"policy_lag: {self.policy_lag} trains on tokens of older weights, and nothing corrects for that with "
                "bare_importance_ratio: bare; write bare_importance_ratio: behaviour, or policy_lag: 0"
            )

    @property
    def reads_sampler(self) -> dict[str, str]:
        """Keys by which the loss compares learner and sampler -> what switches them off."""
        if not self.holds_sampler:
            return {}
        found = {
            "vllm_importance_sampling_correction": (self.vllm_importance_sampling_correction, "false"),
            "off_policy_mask_threshold": (self.off_policy_mask_threshold is not None, "null"),
            "rollout_rs": (self.rollout_rs is not None, "null"),
            "kl_tau": (self.kl_tau > 0, "0"),
            "bypass_mode": (self.bypass_mode, "false"),
        }
        return {key: off for key, (on, off) in found.items() if on}

    @property
    def holds_sampler(self) -> bool:
        """Whether any completion is trained on behind the prompt it was sampled behind, or held against its sampler."""
        of_refinements = self.refinement_context != "bare" or self.bare_importance_ratio != "bare"
        return of_refinements or self.train_on_drafts or self.refine_only != "all"

    @property
    def replays_sampling(self) -> bool:
        """Whether the loss is over what the sampler kept, which the engine must then say."""
        return bool(self.truncates and self.reads_sampler)

    def check_sampler(self, why_not: str | None) -> None:
        """
        Args:
            why_not: the engine cannot say what its sampler kept; None: it can.

        Raises:
            ConfigError: the loss would compare log-probabilities over what was kept with some over all tokens, whose
                ratio comes to nothing within a hundred tokens.
        """
        way = (
            "bound what is kept (top_k: 64), so that any engine can say it, or take one that can without (use_vllm: "
            "false, or vLLM on a GPU in the trainer's process)"
        )
        if self.refinement_context != "draft":
            why_not, way = "refinements are trained behind another prompt than sampled", "refinement_context: draft"
        if why_not is None or not self.replays_sampling:
            return
        (key, value), *_ = self.truncates.items()
        whole = ", ".join(f"{name}: {1.0 if name == 'top_p' else 0}" for name in self.truncates)
        off = ", ".join(f"{name}: {value}" for name, value in self.reads_sampler.items())
        raise ConfigError(
            f"{key}: {value} cannot be trained with here: {why_not}, and {' and '.join(self.reads_sampler)} would "
            f"compare log-probabilities of what was kept with those of the whole vocabulary; write {whole}, or "
            f"{off}, or {way}"
        )

    def check_replay(self, why_not: str | None) -> None:
        """
        Args:
            why_not: the engine cannot say which experts it chose; None: it can.

        Raises:
            ConfigError: the learner would choose other ones in silence.
        """
        if self.has_environment:
            why_not = "what an environment says between turns is read by no sampler's routers"
        if self.refinement_context == "bare" and not self.train_on_drafts:
            why_not = "refinements are trained behind another prompt than sampled"
        if self.router_replay and why_not is not None:
            raise ConfigError(
                f"router_replay: the engine's experts are not to be had here: {why_not}; write false "
                "(sampling/sampling_logp_difference/mean then shows what other experts do to log-probabilities), or "
                "take use_vllm: false, or vLLM on a GPU in the trainer's process"
            )
