"""impl="cuda" on a device: every launch plan against fp64. `make gpu-check` runs this; elsewhere it is skipped."""

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, available_impls, grpo_loss, linear_grpo_loss, selective_log_softmax
from tests.kernels.oracle import LOSS_LEVELS, assert_close_to_truth, boundary_inputs, full_config

REASON = available_impls()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON != "available", reason=REASON)]
RTOL = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=["", "resident", "two_pass"], ids=["chosen", "resident", "two_pass"])
def plan(request, monkeypatch):
    """The plan the launcher chooses (a cluster on sm_90 and later), and the others."""
    monkeypatch.setenv("IGRPO_CUDA_PLAN", request.param)


def run(inputs, config, device, impl, **keywords):
    to = {name: None if x is None else x.to(device) for name, x in inputs.keywords(config).items()}
    leaf = inputs.logits.detach().to(device).requires_grad_()
    arguments = (leaf, inputs.completion_ids.to(device), inputs.advantages.to(device))
    out = grpo_loss(*arguments, config=config, impl=impl, **to, **keywords)
    out.loss.backward()
    return out, leaf.grad.cpu()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_every_loss(plan, loss_type, level, dtype, inplace):
    config, inputs = full_config(loss_type, level), boundary_inputs(level=level, V=1001)
    rounded = inputs.to(dtype)
    truth, grad = run(rounded.to(torch.float64), config, "cpu", "torch")
    out, actual = run(rounded, config, "cuda", "cuda", inplace=inplace)
    assert_close_to_truth("loss", out.loss.cpu(), truth.loss, rtol=2e-5, atol=1e-6)
    assert_close_to_truth("entropy", out.entropy.cpu(), truth.entropy, rtol=2e-5)
    assert_close_to_truth("gradient", actual, grad, rtol=RTOL[dtype])


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("V", [1, 63, 507, 49_152, 151_936, 262_147])
@pytest.mark.parametrize("dtype", RTOL)
def test_rows_of_every_length_and_alignment(plan, dtype, V, offset):
    generator = torch.Generator().manual_seed(V)
    storage = (3 * torch.randn(2, 5, V + 8, generator=generator)).to(dtype)
    ids, advantages = torch.randint(V, (2, 4), generator=generator), torch.tensor([1.0, -0.5])
    results = []
    for device, wide, impl in (("cpu", torch.float64, "torch"), ("cuda", dtype, "cuda")):
        view = storage.to(device, wide)[:, :-1, offset : offset + V].detach().requires_grad_()
        out = grpo_loss(view, ids.to(device), advantages.to(device), impl=impl)
        results.append((out.per_token_logps.cpu(), torch.autograd.grad(out.loss, view)[0].cpu()))
    assert_close_to_truth("log-probs", results[1][0], results[0][0], rtol=2e-6, atol=2e-6)
    assert_close_to_truth("gradient", results[1][1], results[0][1], rtol=RTOL[dtype])


def test_runs_agree_bit_for_bit_and_rows_do_not_depend_on_their_batch(plan):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 700, 32_000, generator=generator).bfloat16().cuda()
    ids = torch.randint(32_000, (1, 700), generator=generator).cuda()
    advantages = torch.randn(1, 700, generator=generator).cuda()

    def gradient(part, n):
        leaf = logits[:, part].clone().requires_grad_()
        config = GRPOLossConfig(loss_type="dapo")
        out = grpo_loss(leaf, ids[:, part], advantages[:, part], config=config, num_items_in_batch=n, impl="cuda")
        out.loss.backward()
        return out.per_token_logps.detach(), leaf.grad

    whole = gradient(slice(None), 700)
    for _ in range(3):
        torch.testing.assert_close(gradient(slice(None), 700), whole, rtol=0, atol=0)
    for part in (slice(0, 1), slice(311, 420)):
        alone = gradient(part, 700)
        torch.testing.assert_close(alone, tuple(x[:, part] for x in whole), rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, -0.5])
def test_the_upstream_factor_and_the_fused_linear_loss(factor):
    inputs, config = boundary_inputs(V=601), full_config("grpo", "token", top_entropy_quantile=1.0)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 24, 64, generator=generator), 0.2 * torch.randn(601, 64, generator=generator)
    results = []
    for device, dtype, impl in (("cpu", torch.float64, "torch"), ("cuda", torch.float32, "cuda")):
        leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
        logps = selective_log_softmax(leaves[0] @ leaves[1].T, inputs.completion_ids.to(device), impl=impl).detach()
        keywords = {k: None if x is None else x.to(device) for k, x in inputs.to(dtype).keywords(config).items()}
        keywords |= dict.fromkeys(
            ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"), logps - 0.01
        )
        out = linear_grpo_loss(
            *leaves, inputs.completion_ids.to(device), inputs.advantages.to(device, dtype), config=config, impl=impl,
            **keywords,
        )  # fmt: skip
        (out.loss * factor).backward()
        results.append([x.grad.cpu() for x in leaves])
    for name, truth, actual in zip(("dX", "dW"), *results, strict=True):
        assert_close_to_truth(name, actual, truth, rtol=1e-4)
