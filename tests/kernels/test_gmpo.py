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
