"""`fp32_logits` and `compute_metrics` of the fused linear functions, and where autograd's rarer requests end."""

from dataclasses import replace

import pytest
import torch

from igrpo_kernels import (
    GRPOLossConfig,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    lm_head,
    selective_log_softmax,
)
from tests.kernels.oracle import (
    IMPLS,
    assert_close_to_truth,
    boundary_inputs,
    linear_loss_and_grads,
    packed,
    random_head,
)
from tests.kernels.test_linear import OperatorLog, V, on_policy_boundary, smooth_config

pytestmark = pytest.mark.parametrize("impl", IMPLS)


def test_fp32_logits_are_not_rounded_to_bf16(impl):
    """Narrow hidden states and weight; logits around 30, where neighbours in bf16 are 0.125 apart."""
    inputs = packed(boundary_inputs())
    hidden, weight, _ = random_head(inputs, dtype=torch.bfloat16, bias=False)
    hidden = (4 * hidden.detach()).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = linear_selective_log_softmax(*wide, inputs.completion_ids, impl="torch")
    error = []
    for fp32_logits in (True, False):
        logps = linear_selective_log_softmax(hidden, weight, inputs.completion_ids, fp32_logits=fp32_logits, impl=impl)
        assert logps.dtype == torch.float32
        error.append((logps - truth).abs().max().item())
    assert error[0] < 1e-4 and error[1] > 0.02, error


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_fp32_logits_bring_the_gradients_to_one_rounding(level, impl):
    config, inputs = smooth_config("grpo", level), packed(boundary_inputs(level=level))
    head = random_head(inputs, dtype=torch.bfloat16)
    inputs = on_policy_boundary(inputs, head, config)
    truth, truth_grads = linear_loss_and_grads(*(x.detach().double().requires_grad_() for x in head), inputs, config)
    out, grads = linear_loss_and_grads(*head, inputs.to(torch.bfloat16), config, impl=impl, fp32_logits=True)
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=2e-5, atol=1e-6)
    for name, grad, true_grad in zip(("dX", "dW", "db"), grads, truth_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert_close_to_truth(name, grad, true_grad, rtol=2.0**-8)  # its own storage is bf16
    wider, wide_grads = linear_loss_and_grads(
        *(x.detach().float().requires_grad_() for x in head), inputs.to(torch.float32), config, impl=impl,
        fp32_logits=True,
    )  # fmt: skip
    assert_close_to_truth("loss", wider.loss, truth.loss, rtol=2e-5, atol=1e-6)  # nothing to do for fp32 inputs
    assert_close_to_truth("dX", wide_grads[0], truth_grads[0], rtol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"importance_sampling_level": "sequence"}, {"beta": 0.1}, {"top_entropy_quantile": 0.5}]
)
def test_without_metrics_rows_that_cannot_contribute_meet_no_matmul(options, impl):
    """6·n_contributing·H·V: A = 0 drops a row or a whole sequence, unless the KL term or the bonus wants it."""
    config, inputs = GRPOLossConfig(**options), packed(boundary_inputs())
    head = [None if x is None else x.detach().float().requires_grad_() for x in random_head(inputs)]
    inputs = on_policy_boundary(inputs, head, config).to(torch.float32)
    inputs = replace(inputs, advantages=inputs.advantages * (torch.arange(8) >= 4))
    expected, expected_grads = linear_loss_and_grads(*head, inputs, config, impl=impl)
    with OperatorLog() as log:
        out, grads = linear_loss_and_grads(*head, inputs, config, impl=impl, compute_metrics=False)
    torch.testing.assert_close((out.loss, *grads), (expected.loss, *expected_grads), rtol=1e-6, atol=1e-8)
    assert expected.metrics and out.metrics == {}
    total, kept = len(inputs.completion_ids), int(inputs.cu_seqlens[-1] - inputs.cu_seqlens[4])
    if config.beta or config.top_entropy_quantile < 1.0:  # which of the others is dropped depends on every entropy
        kept = total
    forward = [m[0] for m in log.matmuls() if m[1] == V]
    assert 0 < kept == (forward[0] if impl == "torch" else sum(forward))  # the reference computes logits again
    with torch.no_grad():
        unneeded = linear_grpo_loss(
            *head[:2], inputs.completion_ids, inputs.advantages, lm_head_bias=head[2], config=config, impl=impl,
            compute_metrics=False, **inputs.keywords(config),
        )  # fmt: skip
    torch.testing.assert_close(unneeded.loss, out.loss.detach(), rtol=1e-6, atol=1e-8)
    silent = total - kept
    assert (out.per_token_logps[:silent] == 0).all() and (expected.per_token_logps != 0).all()
    torch.testing.assert_close(out.per_token_logps[silent:], expected.per_token_logps[silent:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fp16_or_not", [torch.float32, torch.float16])
def test_second_derivatives_are_refused(impl, fp16_or_not):
    """Nothing here is differentiable twice; a gradient penalty must fail instead of losing its second term."""
    inputs = boundary_inputs(B=2, T=12, config=GRPOLossConfig(epsilon=0.05)).to(torch.float32)
    hidden, weight, _ = (None if x is None else x.detach().float().requires_grad_() for x in random_head(inputs))
    arguments = (inputs.completion_ids, inputs.advantages)
    logits = inputs.logits.clone().to(fp16_or_not).requires_grad_()
    gspo = GRPOLossConfig(importance_sampling_level="sequence")
    calls = {
        "linear_grpo_loss": (linear_grpo_loss(hidden, weight, *arguments, impl=impl).loss, hidden),
        "linear_selective_log_softmax": (
            linear_selective_log_softmax(hidden, weight, inputs.completion_ids, impl=impl).sum(),
            hidden,
        ),
        "grpo_loss": (grpo_loss(logits, *arguments, impl=impl).loss, logits),
        "grpo_loss, two phases": (grpo_loss(logits, *arguments, config=gspo, impl=impl).loss, logits),
        "selective_log_softmax": (selective_log_softmax(logits, inputs.completion_ids, impl=impl).sum(), logits),
    }
    for name, (loss, leaf) in calls.items():
        if impl == "torch" and "linear" not in name:  # plain autograd all the way
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            assert float(torch.autograd.grad(grad.float().square().sum(), leaf)[0].abs().max()) > 0
            continue
        with pytest.raises(RuntimeError, match=r"create_graph=True asks for second derivatives"):
            torch.autograd.grad(loss, leaf, create_graph=True)


def test_gradient_accumulation_is_exact_with_the_documented_normaliser(impl):
    """Two micro-batches with num_items_in_batch of both, added: the gradient of one batch."""
    config = GRPOLossConfig(loss_type="dapo")
    inputs = boundary_inputs()
    head = [None if x is None else x.detach().float().requires_grad_() for x in random_head(inputs)]
    inputs = on_policy_boundary(inputs, head, config).to(torch.float32)
    n = inputs.completion_mask.sum()
    whole, grads = linear_loss_and_grads(*head, inputs, config, impl=impl, num_items_in_batch=n)
    total, sums = 0.0, [torch.zeros_like(g) for g in grads]
    for half in (slice(0, 4), slice(4, 8)):
        rows = {name: x if x is None else x[half] for name, x in vars(inputs).items()}
        out, parts = linear_loss_and_grads(
            head[0][half].detach().requires_grad_(), *head[1:], replace(inputs, **rows), config, impl=impl,
            num_items_in_batch=n,
        )  # fmt: skip
        total += out.loss.detach()
        sums[0][half] += parts[0]
        sums[1] += parts[1]
        sums[2] += parts[2]
    torch.testing.assert_close(total, whole.loss.detach())
    for a, b in zip(sums, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_checkpointed_loss_has_the_same_gradient(impl):
    inputs, config = packed(boundary_inputs()), smooth_config()
    head = [x.detach().float().requires_grad_() for x in random_head(inputs)]
    inputs = on_policy_boundary(inputs, head, config).to(torch.float32)
    _, expected = linear_loss_and_grads(*head, inputs, config, impl=impl)

    def loss(hidden):
        return linear_grpo_loss(
            hidden * 1.0, head[1], inputs.completion_ids, inputs.advantages, lm_head_bias=head[2], config=config,
            impl=impl, **inputs.keywords(config),
        ).loss  # fmt: skip

    torch.utils.checkpoint.checkpoint(loss, head[0], use_reentrant=False).backward()
    for leaf, grad in zip(head, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("rows", [3, 1000])
def test_lengths_that_the_host_knows_change_nothing_but_who_is_asked(level, rows, impl, monkeypatch):
    """Also with tokens that have no advantage and sequences longer than a chunk."""
    config, inputs = smooth_config("grpo", level), packed(boundary_inputs(level=level))
    inputs = replace(inputs, advantages=inputs.advantages * (torch.arange(inputs.advantages.numel()) % 3 != 1))
    head = random_head(inputs)
    monkeypatch.setattr(lm_head, "CHUNK_BYTES", {"cpu": rows * V * head[0].element_size()})
    with_mask, grads = linear_loss_and_grads(*head, inputs, config, impl=impl)
    lengths = inputs.cu_seqlens.diff().tolist()
    out, same = linear_loss_and_grads(*head, inputs, config, impl=impl, lengths=lengths)
    for a, b in zip((out.loss, *same), (with_mask.loss, *grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for wrong, said in (([*lengths, 0], "entries"), ([lengths[0] + 1, *lengths[1:]], "add up"),
                        (lengths[1:] + lengths[:1], "are not those")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            linear_loss_and_grads(*head, inputs, config, impl=impl, lengths=wrong)
