"""DPPO (arXiv 2602.04879), dppo_tv and dppo_kl: the formula a second time, on thresholds that split the tokens."""

from dataclasses import replace

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss
from tests.kernels.oracle import IMPLS, assert_close_to_truth, boundary_inputs, loss_and_grad, packed

THRESHOLDS = {"dppo_tv": (1e-3, 2e-3), "dppo_kl": (1e-4, 2e-4)}
CONFIGS = {name: GRPOLossConfig(name, epsilon=e, epsilon_high=h, delta=1.2) for name, (e, h) in THRESHOLDS.items()}
cases = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def coefficients(logps, old, advantages, config):
    """-dL/dlogp of each token, and whether it is inside: plain arithmetic on Python floats."""
    found = []
    for p, mu, a in zip(logps.exp().tolist(), old.exp().tolist(), advantages.tolist(), strict=True):
        distance = p - mu
        if config.loss_type == "dppo_kl":
            two_way = torch.distributions.Bernoulli
            q = [two_way(torch.tensor(x, dtype=torch.float64)) for x in (mu, p)]
            distance = torch.distributions.kl_divergence(*q).item() * (1.0 if p > mu else -1.0)
        inside = distance <= config.epsilon_high if a > 0 else distance >= -config.epsilon
        found.append(a * min(p / mu, config.delta or float("inf")) if inside or a == 0 else 0.0)
    return torch.tensor(found, dtype=torch.float64)


def parts(inputs):
    logps = torch.log_softmax(inputs.logits, -1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1)
    advantages = inputs.advantages[:, None].expand_as(logps)
    return [x[inputs.completion_mask] for x in (logps, inputs.old_per_token_logps, advantages)]


@cases
def test_value_gradient_and_metrics_are_the_formulas(config):
    inputs = boundary_inputs()
    logps, old, advantages = parts(inputs)
    expected = coefficients(logps, old, advantages, config)
    left = expected == 0
    shares = {s: (left & (advantages.sign() == s)).double().mean().item() for s in (-1, 1)}
    assert min(*shares.values(), (~left).double().mean()) > 0.05, shares
    assert (expected.abs() == 1.2 * advantages.abs()).double().mean() > 0.05
    out, grad = loss_and_grad(inputs, config, num_items_in_batch=100)
    torch.testing.assert_close(out.loss, -(expected * logps).sum() / 100)
    p = torch.log_softmax(inputs.logits, -1).exp()[inputs.completion_mask]
    one_hot = torch.nn.functional.one_hot(inputs.completion_ids, 37)[inputs.completion_mask]
    torch.testing.assert_close(grad[inputs.completion_mask], -expected[:, None] / 100 * (one_hot - p))
    for name, share in (("low", shares[-1]), ("high", shares[1]), ("region", shares[-1] + shares[1])):
        assert out.metrics[f"clip_ratio/{name}_mean"].item() == pytest.approx(share)


@pytest.mark.parametrize("impl", IMPLS)
@cases
def test_every_implementation_and_layout(config, impl):
    full = replace(config, beta=0.1, entropy_coef=0.02, importance_sampling_mode="token_truncate")
    for seed in (0, 1):
        inputs = boundary_inputs(seed=seed)
        truth, true_grad = loss_and_grad(inputs, full)
        for some in (inputs, packed(inputs)):
            out, grad = loss_and_grad(some.to(torch.float32), full, impl=impl)
            wanted = true_grad if some is inputs else true_grad[inputs.completion_mask]
            assert_close_to_truth("loss", out.loss, truth.loss, rtol=2e-5)
            assert_close_to_truth("gradient", grad, wanted, rtol=2e-5)
            for name, value in truth.metrics.items():
                assert_close_to_truth(name, out.metrics[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@cases
def test_a_threshold_belongs_to_the_region_and_the_old_policy_to_its_middle(config, impl):
    """p = 1/2 against mu = 1/4: exact in every dtype, so is their distance."""
    logits = torch.zeros(2, 1, 2, requires_grad=True)
    ids, old = torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), 0.25).log()
    distance = 0.25 if config.loss_type == "dppo_tv" else 0.25 * 0.5**2 / 0.5  # of the second only the order counts
    for epsilon_high, inside in ((distance * 4, True), (distance / 4, False)):
        wide = replace(config, epsilon_high=epsilon_high, delta=None)
        out = grpo_loss(logits, ids, torch.tensor([1.0, -1.0]), old_per_token_logps=old, config=wide, impl=impl)
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert (grad[0] != 0).all() == inside and (grad[1] != 0).all()  # the second moved with its advantage's sign
    on_policy = grpo_loss(logits, ids, torch.tensor([1.0, -1.0]), config=replace(config, epsilon=0.0), impl=impl)
    (grad,) = torch.autograd.grad(on_policy.loss, logits)
    torch.testing.assert_close(grad, torch.tensor([[[-0.25, 0.25]], [[0.25, -0.25]]]))
    if config.loss_type == "dppo_tv":
        exact = replace(config, epsilon_high=0.25, delta=None)
        old = torch.tensor([[0.25]], dtype=torch.float64).log()
        row = logits.detach()[:1].double().requires_grad_()
        out = grpo_loss(row, ids[:1], torch.ones(1).double(), old_per_token_logps=old, config=exact, impl="torch")
        assert out.loss.item() == pytest.approx(-2.0 * torch.tensor(0.5).log().item())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("logp", [0.0, -1e-9, -104.0])
def test_certain_and_impossible_tokens_are_never_nan(logp, impl):
    logits = torch.tensor([[[0.0, -200.0]], [[-200.0, 0.0]]], requires_grad=True)  # p = 1, p = 0
    ids, old = torch.zeros(2, 1, dtype=torch.long), torch.full((2, 1), logp)
    for config in CONFIGS.values():
        for sign in (1.0, -1.0):
            advantages = torch.full((2,), sign)
            out = grpo_loss(logits, ids, advantages, old_per_token_logps=old, config=config, impl=impl)
            assert out.loss.isfinite() and torch.autograd.grad(out.loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@cases
def test_from_hidden_states(config, impl):
    inputs = boundary_inputs()
    hidden = torch.randn(8, 24, 6, generator=torch.Generator().manual_seed(3)).double().requires_grad_()
    weight = torch.randn(37, 6, generator=torch.Generator().manual_seed(4)).double().requires_grad_()
    logits = (hidden @ weight.T).detach().requires_grad_()
    old = torch.log_softmax(logits, -1).gather(-1, inputs.completion_ids[..., None]).squeeze(-1).detach()
    keywords = {
        "completion_mask": inputs.completion_mask, "config": config,
        "old_per_token_logps": old + inputs.old_per_token_logps - inputs.sampling_per_token_logps,
    }  # fmt: skip
    truth = grpo_loss(logits, inputs.completion_ids, inputs.advantages, impl="torch", **keywords)
    truth.loss.backward()
    leaves = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    keywords["old_per_token_logps"] = keywords["old_per_token_logps"].float()
    out = linear_grpo_loss(*leaves, inputs.completion_ids, inputs.advantages.float(), impl=impl, **keywords)
    out.loss.backward()
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=2e-5)
    assert_close_to_truth("dW", leaves[1].grad, torch.einsum("btv,bth->vh", logits.grad, hidden), rtol=5e-5)


def test_what_they_cannot_be_combined_with():
    for name in CONFIGS:
        with pytest.raises(ValueError, match=f"importance_sampling_level='sequence' .*loss_type='{name}'"):
            GRPOLossConfig(name, "sequence")
        with pytest.raises(ValueError, match="dual_clip"):
            GRPOLossConfig(name, dual_clip=3.0)
