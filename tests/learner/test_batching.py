"""Samples into micro-batches: rows point where the tokens are predicted, denominators add up for any split."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Problem, RolloutGroup, Scored, TrainingSample
from igrpo.learner.batching import Denominators, MicroBatch, contributing, count, micro_batch, training_samples
from igrpo.learner.config import LearnerConfig
from igrpo.learner.copies import joined, parted
from igrpo.learner.packing import prefix_groups
from igrpo_kernels import GRPOLossConfig


def config(**settings) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_name="d", **settings)


def test_the_losses_defaults_are_those_of_the_kernels():
    learner = {f.name: f.default for f in fields(LearnerConfig)}
    shared = {f.name: f.default for f in fields(GRPOLossConfig) if f.name in learner}
    shared.pop("temperature")  # the paper's, 0.7; and a run always has a length
    assert shared.pop("max_completion_length") is None and len(shared) > 20
    assert shared == {name: learner[name] for name in shared}


def sample(prompt: int, completion: int, advantage: float = 1.0, masked: bool = False) -> TrainingSample:
    ids = tuple(range(100, 100 + completion))
    return TrainingSample(tuple(range(prompt)), ids, tuple(-0.1 * i for i in ids), advantage, masked)


def group(rewards, advantages, lengths, reasons=None, drafts=()) -> RolloutGroup:
    reasons = reasons or ["stop"] * len(lengths)
    scored = tuple(
        Scored(Completion((7,) * n, (-0.5,) * n, "x", reason, 0), {"accuracy": r}, r)
        for r, n, reason in zip(rewards, lengths, reasons, strict=True)
    )
    return RolloutGroup(Problem(0, "q", "a"), drafts, None, (1, 2, 3), scored, tuple(advantages))


def batch_of(samples, totals=None, loss_type="grpo", shared=True, **options) -> MicroBatch:
    return micro_batch(tuple(prefix_groups(samples, shared)), totals or count(samples), loss_type, **options)


def test_rows_are_the_positions_before_each_completion_token():
    batch = batch_of([sample(3, 2, 1.5), sample(1, 4, -0.5)], pad_token_id=0)
    assert batch.input_ids.tolist() == [[0, 1, 2, 100, 101], [0, 100, 101, 102, 103]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1] * 5]
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.rows + 1], batch.completion_ids)
    assert batch.rows.tolist() == [2, 3, 5, 6, 7, 8]
    assert batch.cu_seqlens.tolist() == [0, 2, 6]
    assert batch.advantages.tolist() == [1.5, -0.5]
    assert batch.sampling_per_token_logps[2:].tolist() == pytest.approx([-10.0, -10.1, -10.2, -10.3])


def test_padding_is_masked():
    batch = batch_of([sample(2, 1), sample(4, 3)], pad_token_id=9)
    assert batch.input_ids[0].tolist() == [0, 1, 100, 9, 9, 9, 9]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_a_shared_prompt_is_there_once_and_positions_go_on_from_it():
    batch = batch_of([sample(3, 3, 1.0), sample(2, 2, 2.0), sample(3, 1, 3.0), sample(3, 2, 4.0)])
    #                                     prompt   100 101  –   100       prompt 100
    assert batch.input_ids.tolist() == [[0, 1, 2, 100, 101, 100, 0, 1, 100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert batch.layout.lengths == (3, 2, 1, 3) and batch.layout.parents == (None, 0, 0, None)
    # A completion's first token is predicted by the prompt's last position, which all of its group share.
    assert batch.rows.tolist() == [2, 3, 4, 2, 2, 5, 7, 8]
    assert batch.completion_ids.tolist() == [100, 101, 102, 100, 100, 101, 100, 101]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 8] and batch.advantages.tolist() == [1.0, 3.0, 4.0, 2.0]
    assert batch.attention_mask is None


def test_without_sharing_every_sequence_is_one_run():
    batch = batch_of([sample(3, 3), sample(3, 1)], shared=False)
    assert batch.input_ids.tolist() == [[0, 1, 2, 100, 101, 0, 1, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.layout.lengths == (5, 3) and batch.layout.parents == (None, None)
    assert batch.rows.tolist() == [2, 3, 4, 7]


@pytest.mark.parametrize(("loss_type", "share"), [("grpo", 2 / 8), ("dr_grpo", 2 / 8), ("bnpo", 5 / 40), ("dapo", 1.0)])
def test_shares_of_the_steps_denominator(loss_type, share):
    batch = batch_of([sample(1, 2), sample(1, 3)], Denominators(8, 40), loss_type)
    assert batch.scale == pytest.approx(share)


def test_zero_advantages_are_skipped_only_where_that_is_exact():
    samples = [sample(1, 2, 0.0), sample(1, 2, 1.0), sample(1, 2, 1.0, masked=True), sample(1, 0, 1.0)]
    assert contributing(samples, config()) == [samples[1]]
    assert contributing(samples, config(beta=0.1)) == samples[:2]
    for keys in ({"entropy_coef": 0.1}, {"kl_tau": 0.1}, {"loss_type": "dro", "dro_beta": 1.0}, {"loss_type": "kl_cov"},
                 {"loss_type": "clip_cov"}):  # fmt: skip
        assert contributing(samples, config(**keys)) == samples[:2], keys
    good = [replace(s, positive=True) for s in samples]
    assert contributing(good, config(positive_example_nll_weight=0.1)) == good[:2]
    assert contributing(samples, config(positive_example_nll_weight=0.1)) == [samples[1]]


def test_all_sequences_stay_in_the_denominators():
    samples = [sample(1, 2, 0.0), sample(1, 3, 1.0), sample(1, 4, 1.0, masked=True)]
    assert count(samples) == Denominators(sequences=3.0, tokens=5.0)


def test_many_tensors_travel_as_one_and_come_out_as_they_were():
    tensors = {
        "ids": torch.arange(7), "empty": torch.zeros(0, 3), "flags": torch.tensor([True, False, True]),
        "one": torch.tensor(2.5), "table": torch.randn(3, 5).half(), "columns": torch.randn(4, 6).t(),
    }  # fmt: skip
    buffer = joined(tensors)
    for name, there in parted(buffer, tensors).items():
        assert there.dtype == tensors[name].dtype and torch.equal(there, tensors[name]), name
        assert (there.data_ptr() - buffer.data_ptr()) % 16 == 0 and there.is_contiguous()


def test_only_refinements_become_samples():
    draft = Scored(Completion((5,), (-1.0,), "d", "stop", 0), {"accuracy": 1.0}, 1.0)
    flat = group([1, 1], [0.0, 0.0], [2, 2])
    mixed = group([1, 0], [0.7, -0.7], [2, 3], ["stop", "length"], drafts=(draft,))
    kept = training_samples([flat, mixed], config())
    assert [(s.advantage, s.masked, s.completion_ids) for s in kept] == [
        (0.0, False, (7, 7)), (0.0, False, (7, 7)), (0.7, False, (7, 7)), (-0.7, False, (7, 7, 7)),
    ]  # fmt: skip
    assert all(s.prompt_ids == (1, 2, 3) for s in kept)
    assert [(s.positive, s.prompt_length, s.opens_prompt) for s in kept] == [
        (True, 4, True), (True, 4, False), (True, 5, True), (False, 5, False),
    ]  # fmt: skip
    assert count(kept) == Denominators(4.0, 9.0, 2.0, 6.0)
    assert len(training_samples([flat, mixed], config(zero_variance="drop"))) == 2
    masked = training_samples([mixed], config(mask_truncated_completions=True))
    assert [s.prompt_length for s in masked] == [2, 2]
    assert [s.masked for s in masked] == [False, True]


def test_drafts_become_samples_of_their_own_group_when_asked_for():
    drafts = group([1, 0], [0.5, -0.5], [2, 3]).refinements
    whole = replace(
        group([1, 0], [0.7, -0.7], [4, 5], drafts=drafts), draft_prompt_ids=(1,), draft_advantages=(0.5, -0.5)
    )
    samples = training_samples([whole], config(train_on_drafts=True))
    assert [(s.prompt_ids, len(s.completion_ids), s.advantage) for s in samples] == [
        ((1, 2, 3), 4, 0.7), ((1, 2, 3), 5, -0.7), ((1,), 2, 0.5), ((1,), 3, -0.5),
    ]  # fmt: skip
    assert [g.prompt_ids for g in prefix_groups(samples)] == [(1, 2, 3), (1,)]
    assert len(training_samples([whole], config())) == 2
    equal = replace(whole, draft_advantages=(0.0, 0.0))  # each group counts, or not, by itself
    assert len(training_samples([equal], config(train_on_drafts=True, zero_variance="drop"))) == 2


@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_what_tools_said_is_read_and_never_trained_on(pad_token_id):
    """Of 2 + 3 + 1 tokens the policy wrote three: they alone are predicted, counted and held against the sampler."""
    turns = replace(sample(3, 6, 2.0), spans=(2, 3, 1), sampling_logprobs=(-0.1, -0.2, *[float("nan")] * 3, -0.3))
    other, bare = sample(3, 2), replace(turns, behaviour_logprobs=turns.sampling_logprobs)
    batch = batch_of([turns, other, bare], pad_token_id=pad_token_id, positive_nll_weight=0.5)
    assert batch.completion_ids.tolist() == [100, 101, 105, 100, 101, 100, 101, 105]
    assert batch.lengths == (3, 2, 3) and batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    first = batch.rows[:3].tolist()
    assert batch.input_ids.flatten()[first].tolist() == [2, 100, 104]  # what stands before each
    assert not batch.sampling_per_token_logps.isnan().any() and batch.own_tokens == 5
    assert batch.behaviour_per_token_logps[5:].tolist() == pytest.approx([-0.1, -0.2, -0.3])
    if pad_token_id is None:
        assert batch.input_ids.shape == (1, 3 + 5 + 1 + 5)  # the tools' tokens are there to be read
    totals = count([turns, other])
    assert totals.tokens == 5 and totals.sequences == 2
