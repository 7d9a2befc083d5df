"""Mistakes found in other implementations of these losses, one regression test each."""

import math
from dataclasses import replace

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, grpo_loss, selective_log_softmax
from igrpo_kernels.losses import LOSSES
from tests.kernels.oracle import (
    IMPLS,
    LOSS_LEVELS,
    REQUIRED,
    boundary_inputs,
    full_config,
    linear_loss_and_grads,
    loss_and_grad,
    packed,
    random_head,
)

pytestmark = pytest.mark.parametrize("impl", IMPLS)


def test_sequence_gradient_couples_all_tokens_of_its_sequence(impl):
    """Moving one token's logits changes the gradient of its sequence mates (old versions elsewhere lost this)."""
    inputs = boundary_inputs(level="sequence")
    config = GRPOLossConfig(importance_sampling_level="sequence", beta=0.2, epsilon=0.9, epsilon_high=9.0)
    _, grad = loss_and_grad(inputs, config, impl=impl)
    old = inputs.old_per_token_logps.clone()
    old[2, 0] += 0.1
    _, moved = loss_and_grad(replace(inputs, old_per_token_logps=old), config, impl=impl)
    changed = (grad != moved).any(-1)
    assert changed[2, 1:5].all() and not changed[[0, 1, 3, 4, 5, 6, 7]].any()


def test_bias_corrected_kl_under_a_sequence_ratio(impl):
    """d(ratio·k3) has a part through the ratio, which belongs to every token of the sequence (wrong elsewhere once)."""
    inputs = boundary_inputs(level="sequence")
    config = GRPOLossConfig(importance_sampling_level="sequence", beta=0.2, epsilon=0.9, epsilon_high=9.0)
    out, grad = loss_and_grad(inputs, config, impl=impl)
    leaf = inputs.logits.clone().requires_grad_()
    logps = leaf.log_softmax(-1).gather(-1, inputs.completion_ids[..., None])[..., 0]
    mask, lengths = inputs.completion_mask.double(), inputs.completion_mask.sum(-1)
    ratio = ((logps - inputs.old_per_token_logps) * mask).sum(-1).div(lengths).exp()[:, None]
    x = inputs.ref_per_token_logps - logps
    per_token = -ratio * inputs.advantages[:, None] + 0.2 * ratio * (x.exp() - x - 1)
    loss = ((per_token * mask).sum(-1) / lengths).mean()
    torch.testing.assert_close(out.loss.detach(), loss.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(loss, leaf)[0])


def test_token_weights_stay_inside_the_sum_of_a_sequence_gradient(impl):
    """Each token's gradient is the ratio times the mean of the *weighted* advantages, not its own weight's share."""
    inputs = boundary_inputs(level="sequence")
    config = GRPOLossConfig(
        importance_sampling_level="sequence", epsilon=0.9, epsilon_high=9.0, importance_sampling_mode="token_mask"
    )
    _, grad = loss_and_grad(inputs, config, impl=impl)
    leaf = inputs.logits.clone().requires_grad_()
    logps = leaf.log_softmax(-1).gather(-1, inputs.completion_ids[..., None])[..., 0]
    mask, lengths = inputs.completion_mask.double(), inputs.completion_mask.sum(-1)
    ratio = ((logps - inputs.old_per_token_logps) * mask).sum(-1).div(lengths).exp()
    sampler = (inputs.old_per_token_logps - inputs.sampling_per_token_logps).exp()
    weight = (torch.where(sampler <= 3.0, sampler, 0.0) * mask).sum(-1) / lengths
    torch.testing.assert_close(grad, torch.autograd.grad(-(ratio * inputs.advantages * weight).mean(), leaf)[0])


def test_no_collective_hides_in_the_normaliser(impl, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a loss must not communicate")

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, fail)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    loss_and_grad(boundary_inputs(), GRPOLossConfig(loss_type="dapo"), impl=impl)


def test_only_dapo_cispo_and_vespo_divide_by_num_items_in_batch(impl):
    logits, ids = torch.randn(1, 2, 5, dtype=torch.float64), torch.tensor([[1, 4]])
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"):
        config = GRPOLossConfig(loss_type=loss_type, max_completion_length=8, epsilon_high=2.0)
        arguments = (logits, ids, torch.ones(1, dtype=torch.float64))
        losses = [grpo_loss(*arguments, config=config, impl=impl, num_items_in_batch=n).loss for n in (10, 20)]
        assert losses[0] != 0
        ratio = 2.0 if loss_type in ("dapo", "cispo", "vespo") else 1.0
        torch.testing.assert_close(losses[0], ratio * losses[1])


def test_the_high_clip_metric_is_measured_after_delta(impl):
    """As in TRL: with delta below 1 + epsilon_high nothing is left to clip, though the loss is bounded by delta."""
    inputs, config = boundary_inputs(B=4, T=8, V=11), GRPOLossConfig(delta=1.1)
    bounded, _ = loss_and_grad(inputs, config, impl=impl)
    plain, _ = loss_and_grad(inputs, GRPOLossConfig(), impl=impl)
    assert plain.metrics["clip_ratio/high_mean"] > 0 and bounded.metrics["clip_ratio/high_mean"] == 0
    assert bounded.loss != plain.loss


def test_the_tie_of_an_on_policy_step_keeps_the_whole_gradient(impl):
    """Ratio 1: both sides of the minimum are equal and each gives half. dl/dlogits = (onehot - p) / T."""
    logits = torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 4]])
    for temperature in (1.0, 0.5):
        config = GRPOLossConfig(temperature=temperature)
        out = grpo_loss(logits, ids, torch.tensor([3.0], dtype=torch.float64), config=config, impl=impl)
        onehot = torch.nn.functional.one_hot(ids, 5)
        expected = -3.0 / 2 / temperature * (onehot - (logits.detach() / temperature).softmax(-1))
        torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], expected)


def test_the_gradient_at_a_likely_target_is_not_the_rounded_probability_minus_one(impl):
    """1 - p = 1e-3: rounding p to bf16 before subtracting would give 0 or 0.004."""
    logits = torch.zeros(1, 1, 1001, dtype=torch.bfloat16)
    logits[..., 7] = 13.8125  # p = exp(13.8125) / (exp(13.8125) + 1000)
    logits.requires_grad_()
    grpo_loss(logits, torch.tensor([[7]]), torch.ones(1), impl=impl).loss.backward()
    expected = -(1 - logits.detach().double().softmax(-1)[0, 0, 7])
    assert abs(logits.grad[0, 0, 7].double() - expected) < 2**-8 * expected.abs()


def test_luspo_sums_only_unmasked_tokens(impl):
    inputs, config = boundary_inputs(level="sequence"), GRPOLossConfig("luspo", "sequence", epsilon=0.9)
    out, _ = loss_and_grad(inputs, config, impl=impl)
    lengths = inputs.completion_mask.sum(-1)
    ratio = (inputs.logits.log_softmax(-1).gather(-1, inputs.completion_ids[..., None])[..., 0]) - (
        inputs.old_per_token_logps
    )
    ratio = ((ratio * inputs.completion_mask).sum(-1) / lengths).exp().clamp(0.1, 1.9)
    torch.testing.assert_close(out.loss.detach(), -(ratio * inputs.advantages * lengths).mean())


def test_clip_metrics_use_strict_inequalities(impl):
    """On policy with epsilon = 0 every ratio sits exactly on both bounds: not clipped, and its gradient passes."""
    logits = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    ids, config = torch.zeros(1, 2, dtype=torch.long), GRPOLossConfig(epsilon=0.0)
    for advantage in (1.0, -1.0):
        out = grpo_loss(logits, ids, torch.tensor([advantage], dtype=torch.float64), config=config, impl=impl)
        assert out.metrics["clip_ratio/region_mean"] == 0.0
        expected = -advantage / 2 * (torch.tensor([1.0, 0.0, 0.0]) - logits.detach().softmax(-1))
        torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], expected)


def test_entropy_and_kl_are_those_of_the_tempered_distribution(impl):
    inputs = boundary_inputs()
    config = GRPOLossConfig(temperature=0.5, beta=0.1)
    out, _ = loss_and_grad(inputs, config, impl=impl)
    expected, _ = loss_and_grad(replace(inputs, logits=inputs.logits / 0.5), GRPOLossConfig(beta=0.1), impl=impl)
    torch.testing.assert_close(out.entropy, expected.entropy)
    torch.testing.assert_close(out.metrics["kl"], expected.metrics["kl"])


def test_vespo_counts_the_sampler_ratio_of_each_token_once(impl):
    inputs = boundary_inputs()
    config = GRPOLossConfig(loss_type="vespo", importance_sampling_mode="token_truncate")
    out, _ = loss_and_grad(inputs, config, impl=impl)
    # Folding the ratio into the old log-probs must give the same weights, as long as nothing is truncated.
    wide = replace(config, importance_sampling_clip_max=1e9)
    folded = replace(inputs, old_per_token_logps=inputs.sampling_per_token_logps)
    plain, _ = loss_and_grad(folded, GRPOLossConfig(loss_type="vespo"), impl=impl)
    corrected, _ = loss_and_grad(inputs, wide, impl=impl)
    torch.testing.assert_close(corrected.loss, plain.loss)
    assert out.loss.isfinite()


def test_inputs_are_never_modified(impl):
    inputs, config = boundary_inputs(), full_config()
    before = {name: value.clone() for name, value in vars(inputs).items() if value is not None}
    loss_and_grad(inputs, config, impl=impl)
    linear_loss_and_grads(*random_head(inputs), inputs, config, impl=impl)
    for name, value in before.items():
        torch.testing.assert_close(getattr(inputs, name), value, rtol=0, atol=0)


def test_results_are_deterministic(impl):
    inputs, config = packed(boundary_inputs()).to(torch.float32), full_config(level="sequence")
    runs = [loss_and_grad(inputs, config, impl=impl) for _ in range(3)]
    for out, grad in runs[1:]:
        torch.testing.assert_close((out.loss, grad), (runs[0][0].loss, runs[0][1]), rtol=0, atol=0)


def test_a_row_does_not_depend_on_the_other_rows(impl):
    """Batch invariance: the trainer's log-probs must not drift with the micro-batch size."""
    logits, ids = boundary_inputs().logits.float(), boundary_inputs().completion_ids
    whole = selective_log_softmax(logits, ids, return_entropy=True, impl=impl)
    for part in (slice(0, 1), slice(2, 7)):
        alone = selective_log_softmax(logits[part], ids[part], return_entropy=True, impl=impl)
        torch.testing.assert_close(alone, (whole[0][part], whole[1][part]), rtol=0, atol=0)


def test_a_zero_gradient_would_be_noticed(impl):
    """The inputs of these tests give most unmasked rows a gradient well above every tolerance used here."""
    for level in ("token", "sequence"):
        inputs = boundary_inputs(level=level)
        _, grad = loss_and_grad(inputs, GRPOLossConfig(importance_sampling_level=level), impl=impl)
        size = grad.abs().amax(-1)[inputs.completion_mask]
        assert (size > 1e-3 * grad.abs().max()).double().mean() > 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_a_weight_of_zero_takes_out_a_row_whatever_reference_and_old_policy_say(impl, level, value):
    """On the sequence level the old policy's numbers are part of the other tokens' ratio."""
    inputs = boundary_inputs(level=level)
    weights = torch.ones_like(inputs.completion_mask, dtype=torch.float64)
    weights[:, 3:5] = 0.0
    names = ["ref_per_token_logps"] + ["old_per_token_logps"] * (level == "token")
    poisoned = replace(inputs, **{k: getattr(inputs, k).masked_fill(weights == 0, value) for k in names})
    for options in ({}, {"kl_estimator": "k1"}, {"use_bias_correction_kl": False, "kl_tau": 0.1}):
        config = GRPOLossConfig("dapo", level, beta=0.1, **options)
        clean, dirty = (
            loss_and_grad(
                x, config, impl=impl, loss_weights=weights, sampling_per_token_logps=inputs.sampling_per_token_logps
            )
            for x in (inputs, poisoned)
        )
        torch.testing.assert_close((dirty[0].loss, dirty[1]), (clean[0].loss, clean[1]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_a_nan_in_the_old_log_probs_shows_in_the_gradient(impl, loss_type, level, advantage):
    """min and max of a kernel drop it: its token would get the gradient of a bound, under a loss of NaN."""
    delta = {"delta": 2.0} if "delta" in LOSSES[loss_type].term.settings else {}
    options = [{}, {**delta, "beta": 0.1, "importance_sampling_mode": "token_truncate"}]
    for option in options:
        config = GRPOLossConfig(loss_type, level, max_completion_length=3, **REQUIRED.get(loss_type, {}), **option)
        nans = []
        for name in ("torch", impl):
            logits = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
            old = torch.tensor([[float("nan"), -1.5], [-1.5, -1.5]])
            out = grpo_loss(
                logits * 1.0, torch.zeros(2, 2, dtype=torch.long), torch.full((2,), advantage), config=config,
                old_per_token_logps=old, sampling_per_token_logps=torch.full((2, 2), -1.5) if option else None,
                ref_per_token_logps=torch.full((2, 2), -1.5) if option else None, impl=name,
                prompt_lengths=torch.full((2,), 4) if loss_type == "prompt_mean" else None,
            )  # fmt: skip
            out.loss.backward()
            nans.append(logits.grad.isnan().all(-1).tolist())
        assert nans[1] == nans[0] and nans[0][1] == [False, False]
        if loss_type != "vespo":  # whose weight takes NaN for 0, as TRL's does
            assert out.loss.isnan() and nans[0][0][0]
