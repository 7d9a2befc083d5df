"""Which figures the report has, in reading order: data only. ``drawing.py`` draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from igrpo.report.arms import Arm


@dataclass(frozen=True)
class Line:
    """One quantity. Colour says which arm; within an arm the style says which quantity."""

    metric: str
    label: str = ""
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    ``overlay``: the arms over one another. ``per_arm``: one set of axes per arm, several quantities in each.
    ``stack``: as ``per_arm``, quantities stacked from 0.
    """

    title: str
    unit: Literal["%", "tokens", "nats", "s", "GiB", "tokens/s", "samples/s", "ratio", ""]
    lines: tuple[Line, ...]
    kind: Literal["overlay", "per_arm", "stack"] = "overlay"
    log: bool = False
    zero: bool = False
    """The axis starts at 0: amounts of something, where half as high must mean half as much."""
    needs: str = ""
    """Only arms that log this metric are shown."""


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    text: str
    """What is drawn and what to look for, in one or two sentences."""
    panels: tuple[Panel, ...]
    wide: bool = False
    extra: bool = False
    """Of something that a run asks for: its absence is no gap."""


@dataclass(frozen=True)
class Section:
    title: str
    figures: tuple[Figure, ...]


def _one(name: str, title: str, text: str, metric: str, unit: str, **options) -> Figure:
    return Figure(name, title, text, (Panel("", unit, (Line(metric),), **options),))  # type: ignore[arg-type]


LEARNING = (
    _one("reward", "Reward", "Mean reward of the completions that are trained on. In iGRPO these have seen a draft, so "
         "compare arms by bare-prompt accuracy, not by this.", "reward", ""),
    _one("bare_accuracy", "Bare-prompt accuracy", "Held-out problems, one completion each, no draft: the way the model "
         "is used. This is the figure that counts.", "eval/accuracy", "%"),
    _one("sampled_accuracy", "Sampled accuracy, training problems", "On the bare prompt at the training temperature: "
         "the drafts of iGRPO beside the completions of GRPO.", "bare/accuracy", "%"),
    _one("length", "Completion length", "Mean tokens of the completions that are trained on.",
         "completions/mean_length", "tokens"),
)  # fmt: skip

STAGES = (
    Figure("stages", "Drafts, best draft, refinements", "Draft accuracy p, the best of N drafts, what independent "
           "drafts would give, 1−(1−p)ᴺ with p estimated per prompt from the same N, and the refinements.", (
        Panel("", "%", (
            Line("refinement/accuracy", "refinement"), Line("draft/best_accuracy", "best draft", "--"),
            Line("draft/best_accuracy_theory", "1−(1−p)ᴺ", ":"), Line("draft/accuracy", "draft (p)", "-."),
        ), "per_arm", needs="draft/accuracy"),), wide=True),
    Figure("copies", "What becomes of the draft", "Share of a refinement's 4-grams that its draft has (copy rate), and "
           "shares of refinements that repeat it whole, beat its reward, or fall below it.", (
        Panel("", "%", (
            Line("refinement/copy_rate", "copy rate"), Line("refinement/copies_draft", "same text", "--"),
            Line("refinement/better_than_draft", "better", "-."), Line("refinement/worse_than_draft", "worse", ":"),
        ), "per_arm"),), wide=True),
    Figure("extensions", "Extensions of the second stage", "Where they are on: groups without a right draft, which "
           "alone are refined, and how often that gives a right answer; drafts in sight that are right; refinements "
           "left out as copies; log-probability of refinements under the question alone less that behind the draft; "
           "groups with a right draft, which a teacher sees, and how far the policy is from it.", (
        Panel("groups refined", "%", (Line("refinement/refined"),), zero=True),
        Panel("of these right", "%", (Line("refinement/rescued"),), zero=True),
        Panel("shown drafts right", "%", (Line("draft/shown_accuracy"),), zero=True),
        Panel("left out as copies", "%", (Line("refinement/left_out_as_copies"),), zero=True),
        Panel("question less draft", "nats", (Line("bare/logp_gap"),)),
        Panel("groups with a teacher", "%", (Line("self_distillation/success_group_fraction"),), zero=True),
        Panel("divergence to it", "nats", (Line("self_distillation/distillation_loss"),), zero=True)),
        wide=True, extra=True),
    Figure("zero_variance", "Groups without a gradient", "Groups whose rewards are all equal have zero advantage: all "
           "right, all wrong, or equal in some other way. What is left above the areas trains.", (
        Panel("", "%", (Line("frac_all_right", "all right"), Line("frac_all_wrong", "all wrong"),
                        Line("frac_all_equal_else", "equal otherwise")), "stack", zero=True),), wide=True),
)  # fmt: skip

POLICY = (
    Figure("entropy", "Entropy", "Mean entropy of the policy over the trained tokens, and as sampled from the bare "
           "prompt: compare arms by that. A fast fall means that sampling stops exploring.", (
        Panel("trained tokens", "nats", (Line("entropy"),), zero=True),
        Panel("bare prompt", "nats", (Line("bare/entropy"),), zero=True)), wide=True),
    _one("grad_norm", "Gradient norm", "Before clipping.", "grad_norm", "", log=True),
    Figure("lengths", "Drafts and cut completions", "Mean draft length, and the shares cut off at "
           "max_completion_length.", (
        Panel("draft length", "tokens", (Line("draft/mean_length"),)),
        Panel("refinements cut", "%", (Line("completions/clipped_ratio"),), zero=True),
        Panel("drafts cut", "%", (Line("draft/clipped_ratio"),), zero=True)), wide=True),
    Figure("tools", "Tools", "Calls and turns per completion, the share of calls that failed, and of completions that "
           "a limit or a failure ended before a call was answered.", (
        Panel("calls", "", (Line("tools/call_frequency"),), zero=True),
        Panel("turns", "", (Line("tools/turns"),), zero=True),
        Panel("failed calls", "%", (Line("tools/failure_frequency"),), zero=True),
        Panel("ended early", "%", (Line("tools/ended_early"),), zero=True)), wide=True, extra=True),
    Figure("kl_clip", "KL and clipping", "KL to the reference model (logged when beta > 0), and shares of tokens whose "
           "ratio was clipped; 0 when each rollout batch is used for one update.", (
        Panel("KL", "nats", (Line("kl"),), zero=True),
        Panel("clipped low", "%", (Line("clip_ratio/low_mean"),), zero=True),
        Panel("clipped high", "%", (Line("clip_ratio/high_mean"),), zero=True)), wide=True),
    Figure("mismatch", "Sampler against trainer", "Log-probability of the same tokens in engine and learner: "
           "difference and importance ratio. Bfloat16 gives hundredths; a rise means stale or wrong weights.", (
        Panel("mean |difference|", "nats", (Line("sampling/sampling_logp_difference/mean"),), log=True),
        Panel("largest |difference|", "nats", (Line("sampling/sampling_logp_difference/max"),), log=True),
        Panel("mean importance ratio", "ratio", (Line("sampling/importance_sampling_ratio/mean"),))), wide=True),
    Figure("optimiser", "Optimiser", "Loss (in GRPO its level says little), learning rate, and steps left out because "
           "the gradient was not finite.", (
        Panel("loss", "", (Line("loss"),)), Panel("learning rate", "", (Line("learning_rate"),)),
        Panel("skipped steps", "", (Line("learner/skipped_steps"),), zero=True)), wide=True),
)  # fmt: skip

SPEED = (
    Figure("throughput", "Throughput", "Generated tokens and samples per second of rollout, and seconds per step.", (
        Panel("generated", "tokens/s", (Line("rollout/tokens_per_second"),), zero=True),
        Panel("drafts + refinements", "samples/s", (Line("rollout/samples_per_second"),), zero=True),
        Panel("step time", "s", (Line("step_time"),), zero=True)), wide=True),
    Figure("time_split", "Where a step's time goes", "Seconds of each step in the rollout (both stages and rewards), "
           "in the learner, and in the weight push.", (
        Panel("", "s", (Line("rollout/seconds", "rollout"), Line("time/learner", "learner"),
                        Line("sync/seconds", "weight push")), "stack", zero=True),), wide=True),
    _one("memory", "Peak memory", "Of the training process so far: the accelerator's where there is one, else resident "
         "memory.", "peak_memory_gib", "GiB", zero=True),
    _one("learner_tokens", "Learner tokens per step", "Positions that the learner computed, after packing, shared "
         "prompts and leaving out sequences with zero advantage.", "learner/unique_tokens", "tokens",
         zero=True),
    Figure("tokens", "Tokens sampled per step", "In each stage, and the share of prompt tokens that the prefix cache "
           "already had.", (
        Panel("drafts", "tokens", (Line("rollout/draft_tokens"),), zero=True),
        Panel("refinements", "tokens", (Line("rollout/refinement_tokens"),), zero=True),
        Panel("prefix cache hits", "%", (Line("rollout/prefix_cache_hit"),), zero=True)), wide=True),
)  # fmt: skip


def sections(arms: Sequence[Arm]) -> list[Section]:
    """The figures for these arms; rewards have one panel per reward function."""
    return [
        Section("Learning", (*LEARNING, *_reward_functions(arms))),
        Section("Two stages", STAGES),
        Section("Policy", POLICY),
        Section("Speed and memory", SPEED),
    ]


def _reward_functions(arms: Sequence[Arm]) -> tuple[Figure, ...]:
    names = sorted({
        metric.split("/")[1]
        for arm in arms for run in arm.runs for metric in run.metrics
        if metric.startswith("rewards/") and metric.endswith("/mean")
    })  # fmt: skip
    if len(names) < 2:  # one function is the reward itself
        return ()
    panels = tuple(Panel(name, "", (Line(f"rewards/{name}/mean"),)) for name in names[:6])
    text = "Mean of each reward function before its weight, over the trained completions."
    return (Figure("reward_functions", "Reward functions", text, panels, wide=True),)


def shown_arms(panel: Panel, arms: Sequence[Arm]) -> list[Arm]:
    """The arms that have something to show in this panel."""
    having = [arm for arm in arms if any(arm.has(line.metric) for line in panel.lines)]
    return [arm for arm in having if not panel.needs or arm.has(panel.needs)]


def drawable(figure: Figure, arms: Sequence[Arm]) -> Figure | None:
    """The figure with the panels that have data, or None."""
    kept = tuple(panel for panel in figure.panels if shown_arms(panel, arms))
    return Figure(figure.name, figure.title, figure.text, kept, figure.wide) if kept else None
