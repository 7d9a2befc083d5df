"""Settings of the two stages: what the model is shown, how many drafts and refinements it writes, and when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from igrpo.engines.config import EngineConfig
from igrpo.environments.config import EnvironmentConfig
from igrpo.rewards.config import RewardConfig
from igrpo.rewards.functions import highest_reward
from igrpo.settings import ConfigError, shown
from igrpo.settings.kinds import Count, ShareAboveZero
from igrpo.settings.shared import BatchConfig, SamplingConfig, SeedConfig, WeightsConfig

DEFAULT_SYSTEM_PROMPT = (
    "You answer questions carefully. First think the problem through, then state the answer, in exactly this shape: "
    "<think>your reasoning</think><answer>your answer</answer>. If an earlier draft or other feedback is shown, use it "
    "as a hint and never as the truth: mend its mistakes, fill its gaps, make the reasoning stronger and clearer, and "
    "end with a strictly better answer. Do not repeat the draft word for word; where the feedback itself is wrong or "
    "incomplete, put it right and carry on."
)
DEFAULT_DRAFT_TEMPLATE = "\n\nAn earlier draft, which may be wrong:\n<draft>\n{draft}\n</draft>\nGive a better answer."
Estimator = Literal["grpo", "rloo", "maxrl", "pass_at_k"]
_RENDER_ARGUMENTS = {
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}  # fmt: skip
"""Arguments of a tokenizer's `apply_chat_template` that no template gets to see."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(EnvironmentConfig, SamplingConfig):
    """What the model is shown, in training and in evaluation."""

    # --- prompts
    system_prompt: str | None = DEFAULT_SYSTEM_PROMPT
    """System turn of both stages; null leaves it to the chat template."""
    few_shot_examples: list[dict] = field(default_factory=list)
    """Worked examples shown as earlier turns, each `{prompt: …, completion: …}`: a weak model copies the form."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template (`enable_thinking: false`)."""
    draft_template: str = DEFAULT_DRAFT_TEMPLATE
    """Text put after the question in Stage 2; `{draft}` stands for the draft's tokens."""
    draft_max_tokens: Count | None = None
    """Show at most so many tokens of the draft, its end; null: as many as the context allows."""
    draft_hide_answer: bool = False
    """Show the draft only up to its conclusion, so that its final answer cannot be copied (an extension)."""

    # --- stages
    algorithm: Literal["igrpo", "grpo"] = "igrpo"
    """`grpo` is the same program without Stage 1."""
    num_drafts: Count = 4
    """N: drafts per prompt (Stage 1, no gradient)."""
    draft_selection: Literal["best", "random", "worst", "none"] = "best"
    """Which draft Stage 2 sees; all but `best` are controls. `none` draws drafts but shows none."""
    show_drafts: Count = 1
    """K: so many drafts are shown, the best K with `draft_selection: best`, in the order in which they were sampled."""
    draft_separator: str = "\n</draft>\n<draft>\n"
    """Text between two shown drafts."""

    def check(self) -> None:
        if self.draft_template.count("{draft}") != 1:
            raise ConfigError("draft_template: write {draft} exactly once, where the draft goes")
        if self.show_drafts > self.num_drafts and self.shows_draft:
            raise ConfigError(
                f"show_drafts: {self.show_drafts} is more than num_drafts = {self.num_drafts}; write "
                f"{self.num_drafts} or less"
            )
        if taken := sorted(_RENDER_ARGUMENTS & self.chat_template_kwargs.keys()):
            raise ConfigError(f"chat_template_kwargs: {taken[0]} is set by the program itself; leave it out")
        for example in self.few_shot_examples:
            if set(example) != {"prompt", "completion"} or not all(isinstance(text, str) for text in example.values()):
                raise ConfigError(
                    f"few_shot_examples: {shown(example)} does not fit; write {{prompt: text, completion: text}}"
                )

    @property
    def drafts_per_prompt(self) -> int:
        return self.num_drafts if self.algorithm == "igrpo" else 0

    @property
    def shows_draft(self) -> bool:
        return self.algorithm == "igrpo" and self.draft_selection != "none"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(PromptsConfig, RewardConfig, EngineConfig, SamplingConfig, BatchConfig, SeedConfig, WeightsConfig):
    # --- rollout
    draft_selection_score: Literal["reward", "accuracy_first"] = "reward"
    """Rank drafts by the weighted reward, or by `accuracy` first and the reward second. Ties: the first draft."""
    early_stop_drafts: bool = False
    """Abort a problem's other drafts once one has `early_stop_reward`; aborted drafts do not count."""
    advantage_estimator: Estimator = "grpo"
    """What a completion is worth beside its siblings: `grpo`, `rloo`, `maxrl` or `pass_at_k`; docs/algorithm.md."""
    advantage_pass_k: Count = 2
    """`pass_at_k`: the best of how many completions is to get better."""
    draft_advantage_estimator: Estimator | None = None
    """That of the drafts with `train_on_drafts`; null: the same as `advantage_estimator`."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """With several rewards: normalise their weighted sum, or each by itself in its group and then the sum (GDPO)."""
    refine_only: Literal["all", "dead"] = "all"
    """`dead`: a problem with a right draft gets G more answers to the question alone in place of refinements."""
    refinement_baseline: Literal["refinements", "drafts"] = "refinements"
    """`grpo`: take off the mean reward of the refinements, or of the drafts, as RLTF-SD does."""
    refinement_copy_limit: ShareAboveZero | None = None
    """`refinement_context: bare`: leave out refinements with this share of their 4-grams, or more, from the draft."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """`grpo`: divide centred rewards by the group's or the batch's standard deviation, or not at all."""
    rollout_schedule: Literal["streaming", "barrier"] = "streaming"
    """`barrier` holds all refinements back until the last draft of the batch is scored; for comparison."""
    full_determinism: bool = False
    """Same seed, same run, bit for bit on the CPU: the engine waits for scores instead of running on."""

    @property
    def engine_sleeps(self) -> bool:
        """Whether an engine beside the learner on a GPU sleeps while that works."""
        asked = self.vllm_enable_sleep_mode
        return self.colocates and (not self.steps_ahead if asked is None else asked)

    def check(self) -> None:
        if self.draft_selection_score == "accuracy_first" and "accuracy" not in self.reward_funcs:
            raise ConfigError("draft_selection_score: accuracy_first needs `accuracy` in reward_funcs")
        if self.policy_lag and self.draft_policy_lag:
            raise ConfigError(
                f"draft_policy_lag: policy_lag: {self.policy_lag} samples drafts ahead, too; write draft_policy_lag: 0"
            )
        key = self.lag_key
        if self.steps_ahead and self.rollout_schedule == "barrier":
            raise ConfigError(
                f"rollout_schedule: barrier separates the stages that {key}: {self.steps_ahead} overlaps; drop one"
            )
        if self.steps_ahead and self.vllm_enable_sleep_mode and self.colocates:
            raise ConfigError(
                f"vllm_enable_sleep_mode: with {key}: {self.steps_ahead} the engine samples while the learner works; "
                f"write false, or {key}: 0"
            )
        if self.early_stop_drafts and self.draft_selection != "best":
            raise ConfigError(
                f"early_stop_drafts keeps the best draft; draft_selection: {self.draft_selection} does not"
            )
        if self.early_stop_drafts and highest_reward(self) is None:
            raise ConfigError(
                "early_stop_drafts: reward_funcs has functions of your own; write the highest reward there is as "
                "early_stop_reward"
            )
        self._check_advantages()
        self._check_refinements()
        if not self.train_on_drafts:
            return
        if self.algorithm != "igrpo" or self.num_drafts < 2:
            raise ConfigError("train_on_drafts needs a group of drafts: algorithm: igrpo and num_drafts: 2 or more")
        if self.early_stop_drafts:
            raise ConfigError("train_on_drafts: aborted drafts leave a biased group; switch early_stop_drafts off")
        if self.draft_policy_lag:
            raise ConfigError(
                "train_on_drafts: what is trained on must come from the newest weights; draft_policy_lag: 0"
            )

    def _check_refinements(self) -> None:
        if self.refinement_context != "draft" and not self.shows_draft:
            raise ConfigError(
                f"refinement_context: {self.refinement_context} is for refinements that saw a draft; write algorithm: "
                "igrpo and a draft_selection other than none, or refinement_context: draft"
            )
        if self.refine_only == "dead" and not self.shows_draft:
            raise ConfigError(
                "refine_only: dead shows a draft of the other problems; write algorithm: igrpo and a draft_selection "
                "other than none"
            )
        if self.distillation_weight and not self.shows_draft:
            raise ConfigError(
                "distillation_weight: the teacher is the policy that sees a right draft; write algorithm: igrpo and a "
                "draft_selection other than none, or distillation_weight: 0"
            )
        behind_drafts = self.refinement_context == "draft" and self.refine_only == "all" and not self.train_on_drafts
        if self.distillation_weight and behind_drafts:
            raise ConfigError(
                "distillation_weight: nothing is trained behind the question alone, which a teacher is for; write "
                "train_on_drafts: true, refine_only: dead or refinement_context: bare, or distillation_weight: 0"
            )
        if self.refinement_baseline == "refinements":
            return
        if not self.drafts_per_prompt:
            raise ConfigError("refinement_baseline: drafts needs drafts; write algorithm: igrpo")
        if self.early_stop_drafts:
            raise ConfigError("refinement_baseline: aborted drafts leave a biased mean; switch early_stop_drafts off")
        if self.advantage_estimator != "grpo" or self.multi_objective_aggregation != "sum_then_normalize":
            raise ConfigError(
                "refinement_baseline: drafts is a baseline of advantage_estimator: grpo with sum_then_normalize; drop "
                "one of them"
            )
        if self.scale_rewards == "group":
            raise ConfigError(
                "refinement_baseline: drafts gives a group of equal rewards an advantage, which its own deviation "
                "cannot divide; write scale_rewards: none or batch"
            )

    def _check_advantages(self) -> None:
        estimators = {"advantage_estimator": (self.advantage_estimator, "num_generations", self.num_generations)}
        if self.draft_advantage_estimator is not None and not self.train_on_drafts:
            raise ConfigError("draft_advantage_estimator: no draft is trained on; write train_on_drafts: true")
        if self.train_on_drafts:
            name = "draft_advantage_estimator" if self.draft_advantage_estimator else "advantage_estimator with drafts"
            estimators[name] = (self.estimator_of_drafts, "num_drafts", self.num_drafts)
        for key, (estimator, size, count) in estimators.items():
            if estimator != "grpo" and self.multi_objective_aggregation == "normalize_then_sum":
                raise ConfigError(
                    f"multi_objective_aggregation: normalize_then_sum is {key}: grpo for each reward; drop one of them"
                )
            if estimator == "pass_at_k" and self.advantage_pass_k > count:
                raise ConfigError(
                    f"advantage_pass_k: {self.advantage_pass_k} is more than {size} = {count}; write {count} or less"
                )
            if estimator == "maxrl" and (name := self._may_be_negative()):
                raise ConfigError(
                    f"{key}: maxrl divides by the mean reward, and {name} gives rewards below 0; leave that out, or "
                    "write grpo"
                )

    @property
    def estimator_of_drafts(self) -> Estimator:
        return self.draft_advantage_estimator or self.advantage_estimator

    def _may_be_negative(self) -> str | None:
        """A reward function, by name, or a key that can make a reward negative."""
        if min(self.reward_weights or [0.0]) < 0:
            return "reward_weights"
        if (self.reward_error_value or 0.0) < 0:
            return "reward_error_value"
        wrong = self.cosine_min_value_wrong, self.cosine_max_value_wrong
        below = {name for name in ("soft_overlong_punishment", "repetition_penalty", "length")}
        below |= {"cosine"} if min(wrong) < 0 else set()
        return next((name for name in self.reward_funcs if name in below), None)
