"""Whole programs that sample the next batch's drafts under the learner step: overlap, versions, resume, picture."""

from __future__ import annotations

import shutil
import time
from collections import Counter

import pytest

from igrpo.data.feed import ProblemFeed
from igrpo.data.sources import ProblemSampler
from igrpo.report import timeline
from igrpo.run.timeline import read_spans
from tests.rollout.test_rollout import PROBLEMS, make
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


def test_whole_groups_of_later_steps_are_sampled_by_vllm_while_the_learner_works(model, questions, tmp_path):
    """L = 2, and slots for so few that requests run through pushes."""
    folder = tmp_path / "run"
    run(words(
        model, questions, folder, policy_lag=2, full_determinism=False, max_steps=4, max_completion_length=60,
        vllm_max_num_seqs=8, num_iterations=4, temperature=0.7, eval_samples=4, save_steps=0,
    ))  # fmt: skip
    spans = read_spans(folder / "timeline.jsonl")
    learner = [span for span in spans if span.stage == "learner"]
    assert any(r.start < s.end and s.start < r.end for r in spans if r.stage == "refinement" for s in learner)
    logged, groups = steps(folder), records(folder, "completions.jsonl")
    assert max(r["staleness/max"] for r in logged) > 0 and all(r["staleness/max"] <= 2 for r in logged)
    assert any(r["staleness/spanning"] > 0 for r in logged)
    trained = [(group["step"], one) for group in groups for one in group["refinements"]]
    for step, one in trained:
        runs = one.get("versions") or [[one["version"], one["tokens"]]]
        assert sum(count for _, count in runs) == one["tokens"] and runs[-1][0] == one["version"]
        assert step - 1 - 2 <= runs[0][0] <= one["version"] <= step - 1
    assert any("versions" in one for _, one in trained)
    assert rows(folder) == Counter({row: 1 for row in rows(folder)}) and len(groups) == 8


@pytest.mark.parametrize("key", ["draft_policy_lag", "policy_lag"])
def test_a_resume_with_problems_ahead_is_exact(model, questions, tmp_path, key):
    """What was sampled ahead is in the checkpoint: with it, 3 steps = 2 steps + resume 1, bit for bit."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = {"use_vllm": False, key: 1, "zero_variance": "resample", "eval_samples": 4}
    run(words(model, questions, whole, **settings))
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    for name in ("metrics.jsonl", "completions.jsonl", "timeline.jsonl", "config.yaml"):
        shutil.copy(whole / name, resumed / name)
    run(words(model, questions, resumed, resume_from_checkpoint="last", **settings))
    assert untimed(steps(resumed)[-1]) == pytest.approx(untimed(steps(whole)[-1]), rel=1e-6)
    assert records(resumed, "completions.jsonl") == records(whole, "completions.jsonl")
    same_weights(whole / "checkpoint-3", resumed / "checkpoint-3")
    assert rows(whole) == Counter({row: 1 for row in rows(whole)})
    if key == "policy_lag":
        assert [r["staleness/max"] for r in steps(whole)] == [0.0, 1.0, 1.0]
        return
    assert steps(whole)[-1]["draft/policy_lag"] == 1.0
    # Refinements are on-policy: before its update the learner gives the sampler's log-probabilities.
    assert all(r["sampling/sampling_logp_difference/max"] < 1e-3 for r in steps(whole))


def test_a_group_that_became_too_old_begins_again_and_no_step_waits_for_it(monkeypatch):
    """L = 1: the row that is stuck would train with tokens two updates old; it is sampled anew, from the newest
    weights, and trained in the end."""
    rollout, engine = make(num_drafts=2, num_generations=2, policy_lag=1)
    monkeypatch.setattr("igrpo.rollout.rollout.IDLE_SECONDS", 0.001)
    engine.stuck = "Q1 "  # its refinements do not end
    window = [PROBLEMS[:2], PROBLEMS[2:4], PROBLEMS[4:], ()]
    trained, dropped = [], []
    for step in range(3):
        if step == 2:
            engine.stuck = None  # nothing else is left to train on
        engine.version = step
        groups, stats = rollout.run(window[step], step + 1, ahead=window[step + 1])
        trained.append([g.problem.index for g in groups])
        dropped.append(stats.dropped)
        rollout.during(lambda: time.sleep(0.02))
        assert all(step - 1 <= r.completion.oldest <= step for g in groups for r in g.refinements)
    assert 1 in trained[2] and sorted(row for some in trained for row in some) == list(range(6))
    assert dropped == [0, 0, 1] and any(name.startswith("refinement/1/1") for name in engine.aborted)
    assert not engine.waiting and not rollout._flows


def test_slots_of_siblings_that_have_ended_and_of_every_server_are_filled():
    settings = {"num_drafts": 1, "num_generations": 4, "policy_lag": 1, "vllm_max_num_seqs": 4}
    rollout, engine = make(**settings, per_device_train_batch_size=8)
    rollout.run(PROBLEMS[:2], 1, ahead=PROBLEMS[2:4])
    assert {request.n for request in engine.sent} == {1} and engine.most_sequences == 4
    rollout, engine = make(
        **settings, per_device_train_batch_size=8, vllm_mode="server", vllm_num_servers=3, vllm_enable_sleep_mode=False
    )
    assert rollout.config.slots == 12
    groups, _ = rollout.run(PROBLEMS[:2], 1, ahead=PROBLEMS[2:])
    assert engine.most_sequences > 4 and all(len(group.refinements) == 4 for group in groups)


def test_no_completion_that_two_processes_saved_is_trained_on_twice():
    """Five rows and a window of twelve: both processes have the same row ahead."""
    problems, settings = PROBLEMS[:5], {"num_drafts": 2, "num_generations": 2, "policy_lag": 2}

    def start(seed: int) -> list:
        made = []
        for rank in range(2):
            rollout, engine = make(seed + rank, **settings, per_device_train_batch_size=4)
            rollout.rank, engine.version, engine.next_id = rank, seed, 10_000 * (seed + rank)
            made.append((rollout, ProblemFeed(problems, ProblemSampler(5, 0, False), rollout.config, 2, rank)))
        return made

    first = start(0)
    for rollout, feed in first:
        batch = feed.take(left=9)
        rollout.run(batch.problems, 1, ahead=batch.ahead)
        rollout.pump.engine.version = 1
    begun = [one for some in zip(*(rollout.state_dict() for rollout, _ in first), strict=True) for one in some]
    saved = {s["completion"]["text"] for one in begun for *_, some in one["answers"] for s in some}
    taken = []
    for rollout, feed in start(2):
        rollout.pump.engine.version = 1
        feed.load_state_dict(first[0][1].state_dict([one["row"] for one in begun]))
        rollout.load_state_dict(begun, feed.processes)
        batch = feed.take(left=8)
        groups, _ = rollout.run(batch.problems, 2, ahead=batch.ahead)
        rollout.finish()
        groups += [flow.group for flow in rollout._flows]
        taken += [s.completion.text for group in groups for s in (*group.drafts, *group.refinements)]
    assert len(begun) == 8 and saved <= set(taken) and len(taken) == len(set(taken))
