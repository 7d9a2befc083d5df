"""Figures of one rollout, from its groups: pure functions, nothing is written here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isnan
from statistics import fmean, pstdev

from igrpo.data_types import RolloutGroup, Scored
from igrpo.rewards.functions import correctness_reward
from igrpo.rollout.config import RolloutConfig
from igrpo.rollout.copying import copy_rate
from igrpo.rollout.rollout import RolloutStats

Metrics = dict[str, float]


def rollout_metrics(groups: Sequence[RolloutGroup], stats: RolloutStats, config: RolloutConfig) -> Metrics:
    """What can be read off the groups."""
    name = correctness_reward(config)
    refinements = [s for g in groups for s in g.refinements]
    drafts = [s for g in groups for s in g.drafts]
    metrics: Metrics = {
        "reward": fmean(s.reward for s in refinements),
        "reward_std": fmean(pstdev([s.reward for s in g.refinements]) for g in groups),
        "refinement/accuracy": _mean_score(refinements, name),
        "frac_reward_zero_std": fmean(not g.contributes for g in groups),
        "advantage_abs": fmean(abs(a) for g in groups for a in g.advantages),
        "frac_all_right": fmean(not g.contributes and all(_right(g, name)) for g in groups),
        "frac_all_wrong": fmean(not g.contributes and not any(_right(g, name)) for g in groups),
        "rollout/seconds": stats.seconds,
        "rollout/draft_tokens": float(stats.draft_tokens),
        "rollout/refinement_tokens": float(stats.refinement_tokens),
        "rollout/tokens_per_second": stats.decoded_tokens / max(stats.decoding_seconds, 1e-9),
        "rollout/prefix_cache_hit": stats.cached_tokens / max(stats.prompt_tokens, 1),
        "rollout/samples_per_second": (len(drafts) + len(refinements)) / max(stats.seconds, 1e-9),
        "rollout/rollouts_per_prompt": (len(drafts) + len(refinements)) / len(groups),
        "bare/entropy": _sampled_entropy(drafts or refinements),
    }
    for function in refinements[0].rewards:
        scores = [s.rewards[function] for s in refinements]
        judged = [x for x in scores if x is not None]
        metrics[f"rewards/{function}/mean"] = fmean(judged) if judged else 0.0
        metrics[f"rewards/{function}/not_judged"] = float(len(scores) - len(judged))
    metrics |= _lengths("completions", refinements)
    if config.has_environment:
        metrics |= _tool_metrics([*drafts, *refinements])
    if drafts:
        metrics |= _draft_metrics(groups, drafts, config)
        metrics["draft/aborted"] = float(config.num_drafts * len(groups) - len(drafts))
    if config.policy_lag:
        metrics |= _staleness(groups, stats, config)
    if config.zero_variance == "resample":
        right = sum(all(_right(g, name)) for g in stats.discarded)
        metrics |= {
            "resample/replaced": float(len(stats.discarded)),
            "resample/replaced_all_right": float(right),
            "resample/left_uninformative": float(sum(not g.contributes for g in groups)),
        }
    return metrics


def _draft_metrics(groups: Sequence[RolloutGroup], drafts: Sequence[Scored], config: RolloutConfig) -> Metrics:
    name = correctness_reward(config)
    accuracy_P = [_mean_score(g.drafts, name) for g in groups]
    metrics: Metrics = {
        "draft/reward": fmean(s.reward for s in drafts),
        "draft/accuracy": fmean(accuracy_P),
        "draft/best_accuracy": fmean(max(_score(s, name) for s in g.drafts) for g in groups),
        # E[R(best)] = 1 - (1 - p)^N for a prompt whose drafts are right with probability p (proposition 3.1); p is
        # estimated from the same N drafts, which for small N overstates the spread between prompts.
        "draft/best_accuracy_theory": fmean(
            1 - (1 - min(p, 1.0)) ** len(g.drafts) for p, g in zip(accuracy_P, groups, strict=True)
        ),
        # Updates between the weights that sampled the drafts and those that sampled the refinements.
        "draft/policy_lag": fmean(
            g.refinements[0].completion.version - fmean(d.completion.version for d in g.drafts) for g in groups
        ),
    }
    metrics |= _lengths("draft", drafts)
    shown = [g for g in groups if g.chosen is not None]
    if shown:
        pairs = [(g.drafts[g.chosen], s) for g in shown for s in g.refinements]  # type: ignore[index]
        metrics |= {
            "draft/chosen_accuracy": fmean(_score(g.drafts[g.chosen], name) for g in shown),  # type: ignore[index]
            "draft/trimmed": fmean(g.draft_trimmed for g in shown),
            "refinement/better_than_draft": fmean(s.reward > d.reward for d, s in pairs),
            "refinement/worse_than_draft": fmean(s.reward < d.reward for d, s in pairs),
            "refinement/copies_draft": fmean(s.completion.token_ids == d.completion.token_ids for d, s in pairs),
            "refinement/copy_rate": fmean(
                copy_rate(d.completion.written_ids, s.completion.written_ids) for d, s in pairs
            ),
        }
    if config.show_drafts > 1 and shown:
        metrics["draft/shown"] = fmean(len(g.shown) for g in shown)
        metrics["draft/shown_accuracy"] = fmean(_score(g.drafts[i], name) for g in shown for i in g.shown)
    if config.refine_only == "dead":
        rescued = [_mean_score(g.refinements, name) for g in shown]
        metrics["refinement/refined"] = len(shown) / len(groups)
        metrics |= {"refinement/rescued": fmean(rescued)} if rescued else {}
    if config.distillation_weight:
        metrics["self_distillation/success_group_fraction"] = fmean(bool(g.demonstrations) for g in groups)
    if any(g.copies for g in shown):
        metrics["refinement/left_out_as_copies"] = fmean(copy for g in shown for copy in g.copies)
    return metrics


def _tool_metrics(scored: Sequence[Scored]) -> Metrics:
    found = [s.completion.trajectory for s in scored if s.completion.trajectory is not None]
    calls = sum(one.calls for one in found)
    turns = len(scored) - len(found) + sum((len(one.spans) + 1) // 2 for one in found)
    return {
        "tools/call_frequency": calls / len(scored),
        "tools/failure_frequency": sum(one.failures for one in found) / calls if calls else 0.0,
        "tools/turns": turns / len(scored),
        "tools/ended_early": sum(bool(one.ended) for one in found) / len(scored),
    }


def _staleness(groups: Sequence[RolloutGroup], stats: RolloutStats, config: RolloutConfig) -> Metrics:
    """Of the tokens that are trained on: updates between the weights that sampled them and those they train."""
    trained = [s.completion for g in groups for s in (*g.refinements, *(g.drafts if config.train_on_drafts else ()))]
    runs = [run for completion in trained for run in completion.runs]
    return {
        "staleness/mean": sum((stats.version - v) * n for v, n in runs) / max(sum(n for _, n in runs), 1),
        "staleness/max": float(max(stats.version - v for v, _ in runs)),
        "staleness/spanning": fmean(len(completion.runs) > 1 for completion in trained),
        "staleness/dropped": float(stats.dropped),
    }


def _sampled_entropy(scored: Sequence[Scored]) -> float:
    """Mean of -log p over sampled tokens: unbiased for the entropy of what they were sampled from, in nats."""
    written = [lp for s in scored for lp in s.completion.logprobs if not isnan(lp)]
    return -sum(written) / max(len(written), 1)


def _lengths(prefix: str, scored: Sequence[Scored]) -> Metrics:
    lengths = [len(s.completion.written_ids) for s in scored]
    return {
        f"{prefix}/mean_length": fmean(lengths),
        f"{prefix}/min_length": float(min(lengths)),
        f"{prefix}/max_length": float(max(lengths)),
        f"{prefix}/clipped_ratio": fmean(s.completion.truncated for s in scored),
    }


def _score(scored: Scored, name: str) -> float:
    return scored.rewards.get(name) or 0.0


def _right(group: RolloutGroup, name: str) -> list[bool]:
    return [_score(scored, name) >= 1 for scored in group.refinements]


def _mean_score(scored: Iterable[Scored], name: str) -> float:
    return fmean(_score(s, name) for s in scored)
