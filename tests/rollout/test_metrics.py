"""Figures of a rollout, by hand."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Problem, RolloutGroup, Scored
from igrpo.learner.metrics import over_processes
from igrpo.rollout.copying import copies_of, copy_rate
from igrpo.rollout.metrics import rollout_metrics
from igrpo.rollout.rollout import RolloutStats


def scored(accuracy, ids=(5, 6), fmt=1.0, reason="stop") -> Scored:
    rewards = {"accuracy": accuracy, "format": fmt}
    return Scored(Completion(ids, (-0.1,) * len(ids), "t", reason, 0), rewards, (accuracy or 0.0) + fmt)


def group(drafts, chosen, refinements, advantages) -> RolloutGroup:
    return RolloutGroup(Problem(0, "q", "a"), drafts, chosen, (1,), refinements, advantages)


CONFIG = TrainConfig(model_name_or_path="m", dataset_name="d")
STATS = RolloutStats(
    seconds=2.0,
    decoding_seconds=2.0,
    decoded_tokens=40,
    draft_tokens=30,
    refinement_tokens=10,
    prompt_tokens=100,
    cached_tokens=25,
)


def test_two_groups_by_hand():
    mixed = group((scored(1.0), scored(0.0)), 0, (scored(0.0, (5, 6)), scored(1.0, (7,), reason="length")), (-0.7, 0.7))
    right = group((scored(0.0), scored(0.0)), 0, (scored(1.0), scored(1.0)), (0.0, 0.0))
    m = rollout_metrics([mixed, right], STATS, CONFIG)
    assert m["draft/accuracy"] == pytest.approx(0.25)
    assert m["draft/best_accuracy"] == pytest.approx(0.5)
    assert m["draft/best_accuracy_theory"] == pytest.approx(((1 - 0.5**2) + 0.0) / 2)
    assert m["refinement/accuracy"] == pytest.approx(0.75)
    assert m["reward"] == pytest.approx((1 + 2 + 2 + 2) / 4)
    assert (m["frac_reward_zero_std"], m["frac_all_right"], m["frac_all_wrong"]) == (0.5, 0.5, 0.0)
    assert m["advantage_abs"] == pytest.approx(0.35)
    assert m["completions/clipped_ratio"] == 0.25 and m["completions/mean_length"] == pytest.approx(7 / 4)
    # Draft rewards are 2 and 1: the first group's pairs are worse (1 < 2) and equal, the second's both better.
    assert (m["refinement/better_than_draft"], m["refinement/worse_than_draft"]) == (0.5, 0.25)
    assert m["refinement/copies_draft"] == 0.75
    assert (m["rollout/tokens_per_second"], m["rollout/prefix_cache_hit"]) == (20.0, 0.25)
    assert m["rollout/rollouts_per_prompt"] == 4.0


def test_entropy_of_the_bare_prompt_is_that_of_drafts_or_else_of_refinements_without_what_tools_said():
    def made(*logprobs):
        return replace(scored(1.0), completion=Completion((5,) * len(logprobs), logprobs, "", "stop", 0))

    drafts, refinements = (made(-1.0, nan, -3.0), made(-2.0)), (made(-0.5), made(-0.25))
    assert rollout_metrics([group(drafts, 0, refinements, (0.0, 0.0))], STATS, CONFIG)["bare/entropy"] == 2.0
    assert rollout_metrics([group((), None, refinements, (0.0, 0.0))], STATS, CONFIG)["bare/entropy"] == 0.375


def test_scores_a_function_could_not_give_are_counted_apart():
    one = group((), None, (scored(None), scored(1.0)), (-0.7, 0.7))
    m = rollout_metrics([one], STATS, CONFIG)
    assert m["rewards/accuracy/mean"] == 1.0 and m["rewards/accuracy/not_judged"] == 1.0
    assert "draft/accuracy" not in m


def test_copy_rate():
    assert copy_rate((1, 2, 3, 4, 5), (1, 2, 3, 4, 9)) == 0.5
    assert copy_rate((1, 2, 3, 4), (1, 2, 3, 4)) == 1.0
    assert copy_rate((1, 2, 3), (3, 9)) == 0.5
    assert copy_rate((), (1, 2, 3, 4)) == 0.0


def test_what_became_of_groups_without_a_right_draft():
    config = replace(CONFIG, refine_only="dead")
    dead = group((scored(0.0), scored(0.0)), 1, (scored(1.0), scored(0.0)), (0.7, -0.7))
    live = group((scored(1.0), scored(0.0)), None, (scored(1.0), scored(1.0)), (0.0, 0.0))
    m = rollout_metrics([dead, live, live], STATS, config)
    assert (m["refinement/refined"], m["refinement/rescued"]) == (pytest.approx(1 / 3), 0.5)
    m = rollout_metrics([live], STATS, config)
    assert m["refinement/refined"] == 0.0 and "refinement/rescued" not in m


def test_several_shown_drafts():
    config = replace(CONFIG, show_drafts=2, refinement_context="bare", refinement_copy_limit=1.0)
    drafts = (scored(1.0, (1, 2, 3, 4)), scored(0.0, (9, 9)), scored(0.0, (5, 6, 7, 8)))
    made = replace(group(drafts, 0, (scored(0.0, (5, 6, 7, 8)), scored(1.0, (9, 9))), (0.7, -0.7)), shown=(0, 2))
    assert copies_of(made, config) == (True, False), "of any draft that was shown, of no other"
    m = rollout_metrics([made], STATS, config)
    assert (m["draft/shown"], m["draft/shown_accuracy"], m["draft/chosen_accuracy"]) == (2.0, 0.5, 1.0)


def test_copies_of_the_draft_are_left_out_from_a_limit_on():
    draft, half, whole = scored(1.0, (1, 2, 3, 4, 5)), scored(1.0, (1, 2, 3, 4, 9)), scored(0.0, (2, 3, 4, 5))
    made = group((scored(0.0, (9,)), draft), 1, (half, whole, scored(1.0, (7, 8))), (0.0,) * 3)
    assert copies_of(made, CONFIG) == ()
    settings = {"refinement_context": "bare", "model_name_or_path": "m", "dataset_name": "d"}
    limits = {limit: copies_of(made, TrainConfig(refinement_copy_limit=limit, **settings)) for limit in (0.5, 0.6, 1.0)}
    assert limits == {0.5: (True, True, False), 0.6: (False, True, False), 1.0: (False, True, False)}
    m = rollout_metrics([replace(made, copies=limits[0.5])], STATS, CONFIG)
    assert m["refinement/left_out_as_copies"] == pytest.approx(2 / 3)
    assert "refinement/left_out_as_copies" not in rollout_metrics([made], STATS, CONFIG)
    taught = replace(CONFIG, train_on_drafts=True, distillation_weight=0.5)
    m = rollout_metrics([made, replace(made, demonstrations=(1,))], STATS, taught)
    assert m["self_distillation/success_group_fraction"] == 0.5


def test_figures_of_several_processes_become_the_runs():
    """Counts were once averaged too, so a run on 8 GPUs logged an eighth of its tokens."""
    one = {
        "rollout/draft_tokens": 100.0, "rollout/tokens_per_second": 50.0, "rollout/rollouts_per_prompt": 8.0,
        "rewards/my.module:f/timeouts": 1.0, "rewards/accuracy/not_judged": 0.0, "resample/replaced": 2.0,
        "completions/max_length": 90.0, "completions/min_length": 3.0, "peak_memory_gib": 10.0, "reward": 1.0,
        "sampling/sampling_logp_difference/max": 0.5, "clip_ratio/low_min": 0.25, "clip_ratio/high_max": 0.5,
        "sync/tensors_compared": 12.0,
    }  # fmt: skip
    two = {
        "rollout/draft_tokens": 140.0, "rollout/tokens_per_second": 70.0, "rollout/rollouts_per_prompt": 8.0,
        "rewards/my.module:f/timeouts": 0.0, "rewards/accuracy/not_judged": 4.0, "resample/replaced": 0.0,
        "completions/max_length": 80.0, "completions/min_length": 5.0, "peak_memory_gib": 12.0, "reward": 0.5,
        "sampling/sampling_logp_difference/max": 0.7, "clip_ratio/low_min": 0.0, "clip_ratio/high_max": 0.125,
        "entropy": 2.0, "sync/tensors_compared": 0.0,
    }  # fmt: skip
    assert over_processes([one, two]) == {
        "rollout/draft_tokens": 240.0, "rollout/tokens_per_second": 120.0, "rollout/rollouts_per_prompt": 8.0,
        "rewards/my.module:f/timeouts": 1.0, "rewards/accuracy/not_judged": 4.0, "resample/replaced": 2.0,
        "completions/max_length": 90.0, "completions/min_length": 3.0, "peak_memory_gib": 12.0, "reward": 0.75,
        "sampling/sampling_logp_difference/max": 0.7, "clip_ratio/low_min": 0.0, "clip_ratio/high_max": 0.5,
        "entropy": 2.0, "sync/tensors_compared": 12.0,
    }  # fmt: skip
