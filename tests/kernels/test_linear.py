"""The fused linear loss: the numbers of materialised logits, one chunk of them at a time, and no wasted matmul."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from igrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_selective_log_softmax, reference
from igrpo_kernels.types import LogitTransform
from tests.kernels.oracle import (
    LOSS_LEVELS,
    assert_close_to_truth,
    boundary_inputs,
    full_config,
    linear_loss_and_grads,
    packed,
    random_head,
)

H, V = 8, 37  # of `random_head` and `boundary_inputs`
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "scale": {"logit_scale": 1.7},
    "softcap": {"final_logit_softcapping": 3.0},
    "all": {"temperature": 0.6, "logit_scale": 1.7, "final_logit_softcapping": 3.0},
}


class OperatorLog(TorchDispatchMode):
    """Records every ATen operator with the tensors it read and wrote."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.calls.append((func.overloadpacket.__name__, [x for x in args if isinstance(x, torch.Tensor)], outputs))
        return out

    def matmuls(self):
        """(rows, columns, inner size, dtype) of every matrix product, in order."""
        found = []
        for name, inputs, outputs in self.calls:
            if name in ("mm", "addmm", "addmm_"):
                a = inputs[0] if name == "mm" else inputs[1]
                found.append((*outputs[0].shape, a.shape[1], a.dtype))
        return found


def on_policy_boundary(inputs, head, config):
    """Inputs whose old, reference and sampling log-probs surround the ones this head produces."""
    hidden, weight, bias = (None if x is None else x.detach().double() for x in head)
    logps = linear_selective_log_softmax(
        hidden,
        weight,
        inputs.completion_ids,
        lm_head_bias=bias,
        temperature=config.temperature,
        logit_scale=config.logit_scale,
        final_logit_softcapping=config.final_logit_softcapping,
    )
    generator = torch.Generator().manual_seed(9)
    old, ref, sampling = (logps - 0.3 * torch.randn(logps.shape, generator=generator).double() for _ in range(3))
    return replace(inputs, old_per_token_logps=old, ref_per_token_logps=ref, sampling_per_token_logps=sampling)


def materialised(head, inputs, config, **keywords):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in head]
    logits = torch.nn.functional.linear(*leaves)
    out = grpo_loss(
        logits, inputs.completion_ids, inputs.advantages, config=config, **inputs.keywords(config), **keywords
    )
    out.loss.backward()
    return out, [None if x is None else x.grad for x in leaves]


def smooth_config(loss_type="grpo", level="token", **extra):
    """Every term without a threshold, so that rounding cannot switch a token on or off."""
    values = {"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, **extra}
    return full_config(loss_type, level, **values)


def assert_same(actual, expected, rtol):
    (out, grads), (expected_out, expected_grads) = actual, expected
    assert_close_to_truth("loss", out.loss, expected_out.loss, rtol=rtol)
    mask = expected_out.per_token_logps != 0
    assert_close_to_truth("log-probs", out.per_token_logps[mask], expected_out.per_token_logps[mask], rtol=rtol)
    assert_close_to_truth("entropy", out.entropy, expected_out.entropy, rtol=rtol)
    for name, a, b in zip(("dX", "dW", "db"), grads, expected_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close_to_truth(name, a, b, rtol=rtol)


@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_equals_the_materialised_loss(options, bias, layout):
    config = smooth_config(**HEADS[options])
    inputs = boundary_inputs() if layout == "padded" else packed(boundary_inputs())
    head = random_head(inputs, bias=bias)
    inputs = on_policy_boundary(inputs, head, config)
    assert_same(linear_loss_and_grads(*head, inputs, config), materialised(head, inputs, config), rtol=1e-11)


@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_equals_the_materialised_loss_of_every_type(loss_type, level):
    config, inputs = smooth_config(loss_type, level), packed(boundary_inputs())
    head = random_head(inputs)
    inputs = on_policy_boundary(inputs, head, config)
    actual = linear_loss_and_grads(*head, inputs, config, num_items_in_batch=31)
    assert_same(actual, materialised(head, inputs, config, num_items_in_batch=31), rtol=1e-11)


@pytest.mark.parametrize("rows", [1, 2, 7, 31, 32, 33, 1000])
def test_chunk_borders(rows, monkeypatch):
    inputs = boundary_inputs(B=8, T=4)
    inputs = packed(replace(inputs, completion_mask=torch.ones_like(inputs.completion_mask)))
    config, head = smooth_config("grpo", "sequence"), random_head(inputs)
    inputs = on_policy_boundary(inputs, head, config)
    expected = linear_loss_and_grads(*head, inputs, config)
    monkeypatch.setattr(reference, "CHUNK_LOGITS", rows * V + V - 1)
    with OperatorLog() as log:
        actual = linear_loss_and_grads(*head, inputs, config)
    assert_same(actual, expected, rtol=1e-12)
    assert max(m[0] for m in log.matmuls() if m[1] == V) == min(rows, 32)


def test_logits_never_exist_whole(monkeypatch):
    inputs = boundary_inputs(V=211)
    config = smooth_config(temperature=0.7, final_logit_softcapping=3.0, top_entropy_quantile=0.8)
    head = random_head(inputs)
    inputs = on_policy_boundary(inputs, head, config)
    tokens = inputs.completion_ids.numel()
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 16 * 211)
    with OperatorLog() as log:
        linear_loss_and_grads(*head, inputs, config)
    largest = max(x.numel() for _, _, outputs in log.calls for x in outputs)
    assert largest == 16 * 211  # one chunk of logits is the largest tensor of all,
    assert largest < 0.1 * tokens * 211  # here a twelfth of the logits
    with OperatorLog() as log:
        materialised(head, inputs, config)
    assert max(x.numel() for _, _, outputs in log.calls for x in outputs) == tokens * 211  # and the log would see them


def test_frozen_head_does_no_weight_gradient_work():
    inputs, config = packed(boundary_inputs()), smooth_config()
    hidden, weight, bias = random_head(inputs)
    inputs = on_policy_boundary(inputs, (hidden, weight, bias), config)
    expected = linear_loss_and_grads(hidden, weight, bias, inputs, config)[1]

    def run(*head):
        with OperatorLog() as log:
            _, grads = linear_loss_and_grads(*head, inputs, config)
        return grads, log

    grads, log = run(hidden, weight.detach(), bias.detach())
    torch.testing.assert_close(grads[0], expected[0], rtol=0, atol=0)
    assert grads[1] is None and grads[2] is None
    assert len(log.matmuls()) == 3  # logits, logits again, dX
    assert not any(x.shape == (V, H) for name, _, outputs in log.calls for x in outputs if name in ("zeros_like", "mm"))
    grads, log = run(hidden.detach(), weight, bias)
    assert grads[0] is None and len(log.matmuls()) == 3  # logits, logits again, dW
    torch.testing.assert_close(grads[1:], expected[1:], rtol=0, atol=0)
    grads, log = run(hidden, weight, bias)
    assert len(log.matmuls()) == 4


def test_masked_rows_are_dropped_before_the_matmul():
    inputs, config = boundary_inputs(), smooth_config()
    head = random_head(inputs)
    inputs = on_policy_boundary(inputs, head, config)
    kept = int(inputs.completion_mask.sum())
    with OperatorLog() as log:
        _, grads = linear_loss_and_grads(*head, inputs, config)
    assert [m[0] for m in log.matmuls() if m[1] == V] == [kept, kept]
    assert (grads[0][~inputs.completion_mask] == 0).all()


def test_rows_without_gradient_are_not_recomputed():
    """Clipped tokens and tokens with A = 0 cost nothing in backward; with KL or entropy bonus all tokens count."""
    inputs = packed(boundary_inputs())
    advantages = inputs.advantages * (torch.arange(8) >= 4)
    head = random_head(inputs)
    for config in (GRPOLossConfig(), GRPOLossConfig(beta=0.1)):
        batch = replace(on_policy_boundary(inputs, head, config), advantages=advantages)
        out, grads = materialised(head, batch, config)
        active = int((grads[0] != 0).any(-1).sum())
        with OperatorLog() as log:
            actual = linear_loss_and_grads(*head, batch, config)
        total = len(batch.completion_ids)
        assert [m[0] for m in log.matmuls() if m[1] == V] == [total, active]
        assert (active < 0.5 * total) if config.beta == 0.0 else (active == total)
        assert_same(actual, (out, grads), rtol=1e-11)


# bf16 inputs against the fp64 truth of the same (already rounded) inputs. The logits are rounded to bf16 by the matmul
# (relative 2^-9, |logit| up to ~10: absolute 0.02), which moves probabilities, and with them gradients, by about 2 %.
# Ratios that such a step could carry across a clip bound are moved away from it: there the gradient jumps.
BF16_LOGP_ATOL, BF16_GRAD_RTOL = 0.04, 0.03


def away_from_the_bounds(inputs, head, config):
    logps = linear_selective_log_softmax(*head[:2], inputs.completion_ids, lm_head_bias=head[2]).detach().double()
    log_ratio = logps - inputs.old_per_token_logps
    bounds = torch.tensor([config.clip_low, config.clip_high]).log()
    near = ((log_ratio[:, None] - bounds).abs() < 2 * BF16_LOGP_ATOL).any(-1)
    assert near.double().mean() < 0.5
    return replace(inputs, old_per_token_logps=torch.where(near, logps, inputs.old_per_token_logps))


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_bf16_against_fp64_truth(weight_dtype, level):
    config = smooth_config("grpo", level)
    inputs = packed(boundary_inputs(level=level))
    head = random_head(inputs, dtype=torch.bfloat16)
    inputs = away_from_the_bounds(on_policy_boundary(inputs, head, config), head, config)
    truth, truth_grads = linear_loss_and_grads(*(x.detach().double().requires_grad_() for x in head), inputs, config)
    head[1:] = [x.detach().to(weight_dtype).requires_grad_() for x in head[1:]]
    out, grads = linear_loss_and_grads(*head, inputs.to(torch.bfloat16), config)
    assert [g.dtype for g in grads] == [torch.bfloat16, weight_dtype, weight_dtype]
    assert out.loss.dtype == out.per_token_logps.dtype == torch.float32
    assert_close_to_truth("log-probs", out.per_token_logps, truth.per_token_logps, atol=BF16_LOGP_ATOL)
    assert_close_to_truth("loss", out.loss, truth.loss, atol=BF16_LOGP_ATOL)
    for name, a, b in zip(("dX", "dW", "db"), grads, truth_grads, strict=True):
        assert_close_to_truth(name, a, b, rtol=BF16_GRAD_RTOL)


def test_weight_gradient_is_accumulated_in_fp32(monkeypatch):
    """One-row chunks of bf16: 2,048 additions into a bf16 buffer would stall; into fp32 they stay accurate."""
    generator = torch.Generator().manual_seed(0)
    n = 2048
    hidden = torch.rand(n, 4, generator=generator).bfloat16().requires_grad_()
    weight = torch.zeros(5, 4, dtype=torch.bfloat16, requires_grad=True)
    index = torch.zeros(n, dtype=torch.long)
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 5)
    linear_selective_log_softmax(hidden, weight, index).sum().backward()
    target = torch.tensor([0.8] + [-0.2] * 4).double()  # onehot - p for uniform p
    truth = target[:, None] * hidden.detach().double().sum(0)
    assert_close_to_truth("dW", weight.grad, truth, rtol=2**-8)  # one bf16 rounding at the end


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_runs_the_matmuls_in_its_dtype(backward_inside):
    inputs, config = packed(boundary_inputs()).to(torch.float32), smooth_config()
    head = random_head(inputs, dtype=torch.float32)
    inputs = on_policy_boundary(inputs, head, config).to(torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in head]
    expected, expected_grads = linear_loss_and_grads(*rounded, inputs, config)
    with OperatorLog() as log:
        leaves = [x.detach().clone().requires_grad_() for x in head]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear_grpo_loss(
                *leaves[:2],
                inputs.completion_ids,
                inputs.advantages,
                lm_head_bias=leaves[2],
                config=config,
                **inputs.keywords(config),
            )
            if backward_inside:
                out.loss.backward()
        if not backward_inside:
            out.loss.backward()
    assert {m[-1] for m in log.matmuls() if m[1] == V} == {torch.bfloat16}  # logits
    assert {m[-1] for m in log.matmuls() if m[:2] == (V, H)} == {torch.float32}  # dW is accumulated in fp32
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=0)
    for leaf, grad in zip(leaves, expected_grads, strict=True):
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad, grad.float(), rtol=2**-7, atol=2**-8 * grad.abs().max().item())


def test_backward_keeps_forward_s_dtype_inside_a_later_autocast():
    inputs, config = packed(boundary_inputs()).to(torch.float32), smooth_config()
    head = random_head(inputs, dtype=torch.float32)
    inputs = on_policy_boundary(inputs, head, config).to(torch.float32)
    grads = []
    for inside in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in head]
        logps = linear_selective_log_softmax(*leaves[:2], inputs.completion_ids, lm_head_bias=leaves[2])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            grads.append(torch.autograd.grad(logps.sum(), leaves))
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_autocast_leaves_fp64_alone():
    inputs, config = packed(boundary_inputs()), smooth_config()
    head = random_head(inputs)
    inputs = on_policy_boundary(inputs, head, config)
    expected = linear_loss_and_grads(*head, inputs, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(linear_loss_and_grads(*head, inputs, config), expected, rtol=1e-12)


def test_fp32_hidden_with_a_bf16_weight_computes_in_fp32():
    inputs, config = packed(boundary_inputs()).to(torch.float32), smooth_config()
    hidden, weight, _ = random_head(inputs, dtype=torch.bfloat16)
    wide = [hidden.detach().float().requires_grad_(), weight, None]
    out, grads = linear_loss_and_grads(*wide, inputs, config)
    truth, truth_grads = linear_loss_and_grads(
        hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), None, inputs, config
    )
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=2e-5)
    assert_close_to_truth("dX", grads[0], truth_grads[0], rtol=2e-5)
    assert grads[1].dtype == torch.bfloat16
    assert_close_to_truth("dW", grads[1], truth_grads[1], rtol=2**-8)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_row_mask_of_the_log_probs(mask_dtype):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 6, H, generator=generator, dtype=torch.float64)[:, :-1].requires_grad_()  # strided
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(V, (3, 5), generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.6
    whole = linear_selective_log_softmax(hidden, weight, index, return_entropy=True)
    some = linear_selective_log_softmax(
        hidden, weight, index.masked_fill(~mask, -100), row_mask=mask.to(mask_dtype), return_entropy=True
    )
    for a, b in zip(some, whole, strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=1e-12, atol=1e-14)
        assert (a[~mask] == 0).all()
    hidden_grad, weight_grad = torch.autograd.grad(some[0].sum() + some[1].sum(), (hidden, weight))
    assert (hidden_grad[~mask] == 0).all()  # even though sum() sends those rows a gradient of 1
    expected = torch.autograd.grad((whole[0] * mask).sum() + (whole[1] * mask).sum(), (hidden, weight))
    torch.testing.assert_close((hidden_grad, weight_grad), expected, rtol=1e-11, atol=1e-13)


def test_entropy_alone_and_log_probs_alone_in_backward():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(V, (6,), generator=generator)
    logps, entropy = linear_selective_log_softmax(hidden, weight, index, return_entropy=True)
    log_p = (hidden @ weight.T).log_softmax(-1)
    expected_logps = log_p.gather(-1, index[:, None]).sum()
    for actual, expected in ((logps.sum(), expected_logps), (entropy.sum(), -(log_p.exp() * log_p).sum())):
        torch.testing.assert_close(
            torch.autograd.grad(actual, (hidden, weight), retain_graph=True),
            torch.autograd.grad(expected, (hidden, weight), retain_graph=True),
            rtol=1e-11,
            atol=1e-13,
        )


def test_inference_mode_needs_no_graph():
    hidden, weight = torch.randn(4, H), torch.randn(V, H)
    with torch.inference_mode():
        logps = linear_selective_log_softmax(hidden, weight, torch.arange(4))
    torch.testing.assert_close(logps, (hidden @ weight.T).log_softmax(-1)[torch.arange(4), torch.arange(4)])


def test_transform_order_is_scale_then_cap_then_temperature():
    x = torch.tensor([0.5, -3.0], dtype=torch.float64)
    z = reference.transform_logits(x, LogitTransform(2.0, 3.0, 0.5))
    torch.testing.assert_close(z, 3.0 * torch.tanh(2.0 * x / 3.0) / 0.5)
