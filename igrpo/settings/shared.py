"""Settings that several rooms read: their sections inherit these."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from igrpo.settings import ConfigError, shown
from igrpo.settings.kinds import (
    LARGEST_COUNT,
    Count,
    CountOrZero,
    Interval,
    Mark,
    NamedPath,
    Positive,
    Share,
    ShareAboveZero,
)
from igrpo.settings.section import Section

TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",), "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",), "aim": ("aim",), "clearml": ("clearml",), "dvclive": ("dvclive",),
    "swanlab": ("swanlab",),
}  # fmt: skip
"""Names for ``report_to`` (accelerate's), each with the packages of which one must be installed."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Section):
    # --- weights
    model_revision: Annotated[str | None, Mark.ONLY_IF_ASKED] = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: Annotated[bool, Mark.ONLY_IF_ASKED] = False
    """Allow model code from the hub to run."""
    bf16: bool = True
    """Compute in bfloat16; the master weights and the optimiser stay float32."""
    use_cpu: bool = False
    """Stay on the CPU even where a GPU is present."""
    use_peft: bool = False
    """Train LoRA adapters beside frozen weights; the KL reference is then the model without them."""
    load_in_4bit: Annotated[bool, Mark.ONLY_IF_ASKED] = False
    """With `use_peft`: keep the frozen weights of linear layers in 4 bits (QLoRA, through bitsandbytes)."""


@dataclass(frozen=True, kw_only=True)
class SeedConfig(Section):
    # --- randomness
    seed: Annotated[int, Interval(0, 2**32 - 1)] = 42
    """Seed of the data order, the sampling and the draft controls."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Section):
    # --- sampling
    temperature: Positive = 0.7
    """Sampling temperature of both stages; the learner divides its logits by the same number."""
    top_p: ShareAboveZero = 1.0
    """Nucleus sampling; below 1.0 training wants a `top_k` beside it, or a certain engine (docs/engines.md)."""
    top_k: CountOrZero = 0
    """Top-k sampling; 0 = off. See `top_p`."""
    min_p: Share = 0.0
    """Minimum-probability sampling; 0 = off. See `top_p`."""
    max_completion_length: Count = 512
    """Longest draft or refinement, in tokens, with what tools say between its turns."""

    @property
    def truncates(self) -> dict[str, Any]:
        """Keys that leave tokens out before one is drawn, with their values."""
        values = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        return {key: value for key, value in values.items() if value != (1.0 if key == "top_p" else 0)}


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Section):
    # --- batches
    per_device_train_batch_size: Count = 8
    """Completions (not prompts) per micro-batch and process, as in TRL."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimiser step; completions per step = batch size x this x processes."""
    num_generations: Count = 4
    """G: refinements per prompt, the group that is trained on."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """All-equal rewards: `keep` the group in the denominators, as TRL, `drop` it, or `resample` next prompts."""
    dynamic_sampling_max_gen_batches: Annotated[int, Interval(2, LARGEST_COUNT)] = 3
    """`resample` tries at most so many batches' worth of prompts per step."""
    draft_policy_lag: Literal[0, 1] = 0
    """1: the next batch's drafts are sampled beside this batch's refinements and learner step, one update behind."""
    policy_lag: CountOrZero = 0
    """L: later steps' problems are sampled beside the learner, drafts and refinements; each token trained on is of
    weights at most so many updates old."""
    train_on_drafts: bool = False
    """Drafts get a GRPO update too, as a group of their own under the bare prompt (an extension of the algorithm)."""
    refinement_context: Literal["draft", "bare", "both"] = "draft"
    """What refinements are trained behind: the prompt with the draft, the question alone, or both, half of each."""
    distillation_weight: Share = 0.0
    """SDPO: (1 - this) x loss + this x divergence to the policy that sees a right draft, of what is trained behind the
    question alone."""

    def check(self) -> None:
        if self.num_generations < 2:
            raise ConfigError("num_generations: a group of 1 has no group-relative advantage; write 2 or more")
        if self.completions_per_step % self.num_generations:
            raise ConfigError(
                f"per_device_train_batch_size x gradient_accumulation_steps = {self.completions_per_step} completions "
                f"do not divide into groups of num_generations = {self.num_generations}; make one a multiple of the "
                "other"
            )

    @property
    def steps_ahead(self) -> int:
        """Steps of problems that are sampled before theirs begins."""
        return self.policy_lag or self.draft_policy_lag

    @property
    def lag_key(self) -> str:
        return "policy_lag" if self.policy_lag else "draft_policy_lag"

    @property
    def completions_per_step(self) -> int:
        """Per process: refinements in one rollout batch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        """Per process: problems in one rollout batch."""
        return self.completions_per_step // self.num_generations


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section):
    # --- output
    output_dir: NamedPath = "runs/default"
    """Folder of the run: config, metrics, completions, checkpoints."""
    report_to: str = "none"
    """Trackers, comma-separated: none, tensorboard, wandb, trackio, …; `metrics.jsonl` is written in any case."""
    run_name: str | None = None
    """Name shown by the trackers; null: the folder's name."""

    def check(self) -> None:
        for name in self.trackers:
            if name not in TRACKERS:
                raise ConfigError(
                    f"report_to: there is no tracker {shown(name)}; write none, or some of {', '.join(TRACKERS)}"
                )

    @property
    def trackers(self) -> list[str]:
        """The names in ``report_to``; empty for none."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [name for name in names if name not in ("", "none")]


def check_trackers(names: list[str]) -> None:
    """Whether the trackers of ``report_to`` are installed on this machine; accelerate would leave them out in silence.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            raise ConfigError(
                f"report_to: {name} is not installed; pip install {TRACKERS[name][0]}, or write none "
                "(metrics.jsonl is always written)"
            )
