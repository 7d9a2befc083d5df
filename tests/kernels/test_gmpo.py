"""GMPO (arXiv 2507.20673): the geometric mean of a sequence's ratios, each clipped on one side, in log space."""

import math

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, grpo_loss
from tests.kernels.oracle import IMPLS, assert_close_to_truth, boundary_inputs, loss_and_grad, packed

CONFIG = GRPOLossConfig("gmpo", epsilon=0.2, epsilon_high=0.25)


def test_value_gradient_and_metrics_are_the_formulas():
    inputs = boundary_inputs()
    out, grad = loss_and_grad(inputs, CONFIG)
    logps = torch.log_softmax(inputs.logits, -1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1)
    loss, expected, clipped = 0.0, torch.zeros_like(grad), {-1: 0, 1: 0}
    for b, a in enumerate(inputs.advantages.tolist()):
        tokens = inputs.completion_mask[b].nonzero().flatten().tolist()
        ratios = [(logps - inputs.old_per_token_logps)[b, t].item() for t in tokens]
        kept = [min(d, 0.25) if a > 0 else max(d, -0.2) for d in ratios]
        value = -a * math.prod(math.exp(m) for m in kept) ** (1 / len(kept)) / 8
        loss += value
        for t, d, m in zip(tokens, ratios, kept, strict=True):
            clipped[int(math.copysign(1, a))] += d != m
            if d == m:
                p = torch.softmax(inputs.logits[b, t], -1)
                expected[b, t] = -value / len(kept) * p
                expected[b, t, inputs.completion_ids[b, t]] += value / len(kept)
    n = inputs.completion_mask.sum().item()
    assert min(clipped.values()) > 0.05 * n
    assert out.loss.item() == pytest.approx(loss)
    torch.testing.assert_close(grad, expected)
    assert out.metrics["clip_ratio/low_mean"].item() == pytest.approx(clipped[-1] / n)
    assert out.metrics["clip_ratio/high_mean"].item() == pytest.approx(clipped[1] / n)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_and_layout(impl):
    inputs = boundary_inputs()
    truth, true_grad = loss_and_grad(inputs, CONFIG)
    for some in (inputs, packed(inputs)):
        out, grad = loss_and_grad(some.to(torch.float32), CONFIG, impl=impl)
        assert_close_to_truth("loss", out.loss, truth.loss, rtol=2e-5)
        wanted = true_grad if some is inputs else true_grad[inputs.completion_mask]
        assert_close_to_truth("gradient", grad, wanted, rtol=2e-5)


def test_an_empty_sequence_gives_nothing():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    out = grpo_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.ones(2), completion_mask=mask, config=CONFIG)
    out.loss.backward()
    assert out.loss.item() == -0.5 and (logits.grad[1] == 0).all()


DROPPED = {
    "a sampler ratio of 0": {"importance_sampling_mode": "sequence_mask", "importance_sampling_clip_max": 2.0},
    "off-policy": {"off_policy_mask_threshold": 0.1},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", DROPPED)
def test_a_dropped_sequence_is_silent_though_its_ratio_overflows(impl, config):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, old = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[-100.0] * 3, [-1.5] * 3])
    sampling = torch.tensor([[-200.0 if "ratio" in config else 0.0] * 3, [-1.5] * 3])  # its own evidence to drop it
    out = grpo_loss(
        logits, ids, torch.tensor([-1.0, 1.0]), old_per_token_logps=old, sampling_per_token_logps=sampling, impl=impl,
        config=GRPOLossConfig("gmpo", **DROPPED[config]),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite() and (logits.grad[0] == 0).all()
    assert logits.grad.isfinite().all() and (logits.grad[1] != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_without_advantage_is_silent_beside_one_whose_ratio_overflows(impl):
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    old, advantages = torch.tensor([[-1000.0, -1.0]]), torch.tensor([[-1.0, 0.0]])
    ids = torch.zeros(1, 2, dtype=torch.long)
    out = grpo_loss(logits, ids, advantages, old_per_token_logps=old, config=CONFIG, impl=impl)
    out.loss.backward()
    assert out.loss.item() == math.inf and (logits.grad[0, 1] == 0).all()
