"""Whole programs that sample the next batch's drafts under the learner step: overlap, versions, resume, picture."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest

from igrpo.report import timeline
from igrpo.run.timeline import read_spans
from tests.support.training import records, run, same_weights, steps, untimed, words


def rows(folder) -> Counter:
    return Counter(group["row"] for group in records(folder, "completions.jsonl"))


def test_drafts_of_the_next_step_are_sampled_by_vllm_while_the_learner_works(model, questions, tmp_path):
    folder = tmp_path / "run"
    # Eight slots for eight refinements: the drafts of the next step begin as those end, and outlast the weight push.
    run(words(
        model, questions, folder, draft_policy_lag=1, full_determinism=False, max_steps=4, max_completion_length=60,
        vllm_max_num_seqs=8, num_iterations=8, temperature=0.7, eval_samples=4, eval_steps=2,
    ))  # fmt: skip
    spans = read_spans(folder / "timeline.jsonl")
    learner = {span.step: span for span in spans if span.stage == "learner"}
    drafts = [span for span in spans if span.stage == "draft"]
    assert set(learner) == {1, 2, 3, 4} and len(drafts) == 4 * 2 * 3
    for step in (2, 3, 4):
        own = [span for span in drafts if span.step == step]
        before = learner[step - 1]
        assert all(span.start < before.end for span in own)  # begun beside the step before
    # The engine decodes while the learner's thread computes: drafts end inside learner steps.
    inside = [d for d in drafts if any(s.start < d.end < s.end for s in learner.values())]
    assert inside, "no draft was finished during a learner step"
    assert {d.step for d in inside} <= {2, 3, 4}
    logged = steps(folder)
    assert logged[0]["draft/policy_lag"] == 0.0
    assert all(0.0 <= r["draft/policy_lag"] <= 1.0 for r in logged) and logged[-1]["draft/policy_lag"] > 0.0
    assert all(r["rollout/rollouts_per_prompt"] == 7.0 for r in logged)
    assert rows(folder) == Counter({row: 1 for row in rows(folder)}) and len(rows(folder)) == 8

    assert timeline.main([str(folder)]) == 0
    picture = (folder / "timeline.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert timeline.main([str(tmp_path)]) == 2


def test_a_resume_between_drafts_and_refinements_is_exact(model, questions, tmp_path):
    """The drafts sampled ahead are in the checkpoint: with them, 3 steps = 2 steps + resume 1, bit for bit."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"use_vllm": False, "draft_policy_lag": 1, "zero_variance": "resample", "eval_samples": 4}
    run(words(model, questions, whole, **settings))
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    for name in ("metrics.jsonl", "completions.jsonl", "timeline.jsonl", "config.yaml"):
        shutil.copy(whole / name, resumed / name)
    run(words(model, questions, resumed, resume_from_checkpoint="last", **settings))
    assert untimed(steps(resumed)[-1]) == pytest.approx(untimed(steps(whole)[-1]), rel=1e-6)
    assert records(resumed, "completions.jsonl") == records(whole, "completions.jsonl")
    same_weights(whole / "checkpoint-3", resumed / "checkpoint-3")
    assert steps(whole)[-1]["draft/policy_lag"] == 1.0
    # Refinements are on-policy: before its update the learner gives the sampler's log-probabilities.
    assert all(r["sampling/sampling_logp_difference/max"] < 1e-3 for r in steps(whole))
