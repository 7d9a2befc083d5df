"""impl="cpu", fused linear: the reference's numbers in fp32 and bf16, with no logits computed twice."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch

from igrpo_kernels import (
    GRPOLossConfig,
    available_impls,
    compiled_rows,
    fused_linear,
    fused_linear_autograd,
    impls,
    linear_grpo_loss,
    linear_selective_log_softmax,
    lm_head,
    selective_log_softmax,
)
from igrpo_kernels.side_stream import SideStream
from tests.kernels.oracle import (
    LOSS_LEVELS,
    assert_close_to_truth,
    boundary_inputs,
    full_config,
    linear_loss_and_grads,
    packed,
    random_head,
)
from tests.kernels.test_linear import HEADS, OperatorLog, V, away_from_the_bounds, on_policy_boundary, smooth_config

REASON = available_impls()["cpu"]
pytestmark = pytest.mark.skipif(REASON != "available", reason=REASON)
RTOL = 2e-5  # fp32 against fp64


def single(head):
    """The head's leaves in fp32."""
    return [None if x is None else x.detach().float().requires_grad_(x.requires_grad) for x in head]


def assert_matches_truth(head, inputs, config, **keywords):
    truth, truth_grads = linear_loss_and_grads(*head, inputs, config, impl="torch", **keywords)
    out, grads = linear_loss_and_grads(*single(head), inputs.to(torch.float32), config, impl="cpu", **keywords)
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=RTOL, atol=1e-6)
    assert_close_to_truth("log-probs", out.per_token_logps, truth.per_token_logps, rtol=RTOL)
    assert_close_to_truth("entropy", out.entropy, truth.entropy, rtol=RTOL)
    for name, a, b in zip(("dX", "dW", "db"), grads, truth_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close_to_truth(name, a, b, rtol=RTOL)
    assert out.metrics.keys() == truth.metrics.keys()


@pytest.mark.parametrize("rows_per_chunk", [7, 25, 1000])
@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_every_loss_in_any_chunks(loss_type, level, rows_per_chunk, monkeypatch):
    """25 rows hold whole sequences of at most 24 tokens; 7 rows split them, so that logits are computed twice."""
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", rows_per_chunk * V * 4)
    config = smooth_config(loss_type, level)
    for inputs in (boundary_inputs(), packed(boundary_inputs())):
        head = random_head(inputs)
        assert_matches_truth(head, on_policy_boundary(inputs, head, config), config, num_items_in_batch=31)


class Late(SideStream):
    """A second stream as slow as it may be: work is done when it is waited for."""

    def start(self, work):
        return functools.cache(work)


@pytest.mark.parametrize("stream", [SideStream, Late])
@pytest.mark.parametrize("rows_per_chunk", [14, 1000])
@pytest.mark.parametrize(("loss_type", "level"), [("grpo", "token"), ("dapo", "sequence"), ("vespo", "token")])
def test_halves_beside_their_products(loss_type, level, rows_per_chunk, stream, monkeypatch):
    """Nothing is read before it was waited for or overwritten before it was read, whichever stream is faster."""
    monkeypatch.setattr(fused_linear, "SideStream", stream)
    monkeypatch.setitem(lm_head.HALF_ROWS, "cpu", 4)
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", rows_per_chunk * V * 4)
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: torch.full(*shape, torch.nan, **how))
    config = smooth_config(loss_type, level)
    for options in ({}, {"compute_metrics": False}):
        inputs = boundary_inputs()
        head = random_head(inputs)
        inputs = on_policy_boundary(inputs, head, config)
        inputs = replace(inputs, advantages=inputs.advantages * (torch.arange(8) % 3 != 1))
        assert_matches_truth(head, inputs, config, **options)


@pytest.mark.parametrize("rows_per_chunk", [25, 1000])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_where_the_host_may_not_ask_every_row_is_computed(level, rows_per_chunk, monkeypatch):
    """As while a CUDA graph is captured. What masked rows hold, NaN here, still reaches nobody."""
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", rows_per_chunk * V * 4)
    config, inputs = smooth_config("grpo", level), boundary_inputs()
    head = random_head(inputs)
    inputs = on_policy_boundary(inputs, head, config)
    for module in (fused_linear, fused_linear_autograd):
        monkeypatch.setattr(module, "may_ask", lambda x: False)
    garbage = [head[0].detach().masked_fill(~inputs.completion_mask[..., None], torch.nan).requires_grad_(), *head[1:]]
    with OperatorLog() as log:
        assert_matches_truth(garbage, inputs, config, compute_metrics=False)
    assert sum(m[0] for m in log.matmuls() if m[1] == V and m[-1] == torch.float32) >= inputs.completion_ids.numel()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", HEADS)
def test_heads(options, bias):
    config = smooth_config(**HEADS[options])
    inputs = boundary_inputs()
    head = random_head(inputs, bias=bias)
    assert_matches_truth(head, on_policy_boundary(inputs, head, config), config)


@pytest.mark.parametrize(
    ("config", "walks"),
    [
        (GRPOLossConfig(), 1),
        (GRPOLossConfig(beta=0.1, entropy_coef=0.1, loss_type="dapo"), 1),
        (GRPOLossConfig(importance_sampling_level="sequence"), 1),
        (full_config("grpo", "token", top_entropy_quantile=0.8), 2),
    ],
)
def test_no_logits_are_computed_twice_where_a_chunk_is_closed(config, walks, monkeypatch):
    """2·n·H·V FLOP for the logits in all, and dX and dW only for rows that have a gradient."""
    inputs = packed(boundary_inputs())
    head = random_head(inputs)
    inputs = on_policy_boundary(inputs, head, config).to(torch.float32)
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", 50 * V * 4)
    with OperatorLog() as log:
        _, grads = linear_loss_and_grads(*single(head), inputs, config, impl="cpu")
    total, active = len(inputs.completion_ids), int((grads[0] != 0).any(-1).sum())
    computed = sum(m[0] for m in log.matmuls() if m[1] == V)
    assert computed == (total if walks == 1 else total + active)
    assert sum(m[0] for m in log.matmuls() if m[1] == 8 and m[2] == V) == active  # dX
    assert max(x.numel() for _, _, outputs in log.calls for x in outputs) <= 50 * V


def test_rows_without_gradient_cost_no_matmul():
    inputs, config = packed(boundary_inputs()), GRPOLossConfig()
    head = random_head(inputs)
    inputs = on_policy_boundary(inputs, head, config).to(torch.float32)
    with OperatorLog() as log:
        _, grads = linear_loss_and_grads(*single(head), inputs, config, impl="cpu")
    active = int((grads[0] != 0).any(-1).sum())
    written = [x.shape for name, _, outputs in log.calls if name == "copy_" for x in outputs]
    assert not any(shape[1:] == (V,) for shape in written)  # dlogits, over the logits
    assert 0 < active < 0.8 * len(inputs.completion_ids)  # the others are clipped
    assert [m[2] for m in log.matmuls() if m[:2] == (V, 8)] == [active]  # dW's inner size


def test_frozen_head_does_no_weight_gradient_work():
    inputs, config = packed(boundary_inputs()), smooth_config()
    hidden, weight, bias = random_head(inputs)
    hidden, weight, bias = single((hidden, weight.detach(), bias.detach()))
    with OperatorLog() as log:
        _, grads = linear_loss_and_grads(hidden, weight, bias, inputs.to(torch.float32), config, impl="cpu")
    assert grads[1] is None and grads[2] is None and len(log.matmuls()) <= 3
    assert not any(m[:2] == (V, 8) for m in log.matmuls())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_bf16_is_as_close_to_the_truth_as_the_reference(weight_dtype, level, monkeypatch):
    config = smooth_config("grpo", level)
    inputs = packed(boundary_inputs(level=level))
    head = random_head(inputs, dtype=torch.bfloat16)
    inputs = away_from_the_bounds(on_policy_boundary(inputs, head, config), head, config)
    _, truth = linear_loss_and_grads(*(x.detach().double().requires_grad_() for x in head), inputs, config)
    head[1:] = [x.detach().to(weight_dtype).requires_grad_() for x in head[1:]]
    _, baseline = linear_loss_and_grads(*head, inputs.to(torch.bfloat16), config, impl="torch")
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", 30 * V * 2)
    out, grads = linear_loss_and_grads(*head, inputs.to(torch.bfloat16), config, impl="cpu")
    assert [g.dtype for g in grads] == [torch.bfloat16, weight_dtype, weight_dtype]
    assert out.loss.dtype == torch.float32
    for name, a, b, c in zip(("dX", "dW", "db"), grads, truth, baseline, strict=True):
        # dlogits are rounded to bf16 before dW and db; the reference sums both from fp32.
        assert_close_to_truth(name, a, b, baseline=c, factor=1.0, rtol=2**-7)


def test_autocast_runs_the_matmuls_in_its_dtype():
    inputs, config = packed(boundary_inputs()).to(torch.float32), smooth_config()
    head = single(random_head(inputs))
    expected, expected_grads = linear_loss_and_grads(
        *(x.detach().bfloat16().requires_grad_() for x in head), inputs, config, impl="cpu"
    )
    with OperatorLog() as log, torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = linear_loss_and_grads(*head, inputs, config, impl="cpu")
    assert {m[-1] for m in log.matmuls() if m[:2] != (V, 8)} == {torch.bfloat16}  # logits, dX
    assert {m[-1] for m in log.matmuls() if m[:2] == (V, 8)} == {torch.float32}  # dW is accumulated in fp32
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=0)
    for a, b in zip(grads, expected_grads, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=2**-7, atol=2**-8 * b.abs().max().item())


@pytest.mark.parametrize("rows_per_chunk", [1, 512])
def test_weight_gradient_is_accumulated_in_fp32(rows_per_chunk, monkeypatch):
    """512 additions into a bf16 buffer would stall; one chunk is one product, whose sum is rounded once."""
    hidden = torch.rand(512, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    weight = torch.zeros(5, 4, dtype=torch.bfloat16, requires_grad=True)
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", rows_per_chunk * 5 * 2)
    with OperatorLog() as log:
        logps = linear_selective_log_softmax(hidden, weight, torch.zeros(512, dtype=torch.long), impl="cpu")
        logps.sum().backward()
    products = [m for m in log.matmuls() if m[:2] == (5, 4)]
    assert {m[-1] for m in products} == ({torch.float32} if rows_per_chunk == 1 else {torch.bfloat16})
    truth = torch.tensor([0.8] + [-0.2] * 4).double()[:, None] * hidden.detach().double().sum(0)
    assert_close_to_truth("dW", weight.grad, truth, rtol=2**-8)


@pytest.mark.parametrize("wanted", ["logps", "entropy", "both"])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, 100])
def test_linear_log_probs(wanted, rows_per_chunk, monkeypatch):
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", rows_per_chunk * V * 4)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 6, 8, generator=generator, dtype=torch.float64)[:, :-1]
    weight, bias = torch.randn(V, 8, generator=generator).double(), torch.randn(V, generator=generator).double()
    index, mask = torch.randint(V, (3, 5), generator=generator), torch.rand(3, 5, generator=generator) < 0.6
    results = []
    for dtype, impl in ((torch.float64, "torch"), (torch.float32, "cpu")):
        leaves = [x.to(dtype).clone().requires_grad_() for x in (hidden, weight, bias)]
        logps, entropy = linear_selective_log_softmax(
            *leaves[:2], index.masked_fill(~mask, -100), lm_head_bias=leaves[2], row_mask=mask, temperature=0.7,
            final_logit_softcapping=3.0, return_entropy=True, impl=impl,
        )  # fmt: skip
        total = {"logps": logps.sum(), "entropy": entropy.sum(), "both": logps.sum() + 0.3 * entropy.sum()}[wanted]
        results.append((logps, entropy, *torch.autograd.grad(total, leaves)))
    for name, truth, actual in zip(("logps", "entropy", "dX", "dW", "db"), *results, strict=True):
        assert_close_to_truth(name, actual, truth, rtol=RTOL)


@pytest.mark.parametrize("some", [False, True])
def test_few_logits_wait_for_backward_and_many_are_computed_again(some, monkeypatch):
    """The same gradients, from a second backward as well, and with rows that some upstream gradients leave out."""
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((24, 8), (V, 8))]
    index, upstream = torch.randint(V, (24,), generator=generator), torch.randn(24, generator=generator)
    upstream = upstream * (torch.arange(24) % 3 != 1) if some else upstream
    results = []
    for limit, products in ((24 * V * 4, 3), (24 * V * 4 - 1, 4)):
        monkeypatch.setitem(lm_head.KEPT_BYTES, "cpu", limit)
        with OperatorLog() as log:
            logps = linear_selective_log_softmax(*leaves, index, impl="cpu")
            results.append(torch.autograd.grad(logps, leaves, upstream, retain_graph=True))
        assert len(log.matmuls()) == products
        results.append(torch.autograd.grad(logps, leaves, upstream))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)


def test_fp64_is_the_references_work():
    inputs, config = boundary_inputs(), smooth_config()
    head = random_head(inputs)
    results = [linear_loss_and_grads(*head, inputs, config, impl=impl) for impl in ("cpu", "torch")]
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss, rtol=0, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


# ---- which implementation a call gets


def test_auto_takes_the_compiled_kernels_on_the_cpu(monkeypatch):
    monkeypatch.delenv(impls.ENVIRONMENT_VARIABLE, raising=False)
    assert impls.resolve_impl("auto", "cpu").name == "cpu"
    monkeypatch.setenv(impls.ENVIRONMENT_VARIABLE, "torch")
    assert impls.resolve_impl("auto", "cpu") is None


def test_a_missing_extension_is_told_once_and_pytorch_serves(monkeypatch, tmp_path):
    monkeypatch.delenv(impls.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(compiled_rows, "__file__", str(tmp_path / "compiled_rows.py"))
    compiled_rows.missing_library.cache_clear()
    impls._tell_once.cache_clear()
    try:
        assert "IGRPO_SKIP_EXT" in available_impls()["cpu"]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                logps = selective_log_softmax(torch.zeros(2, 4), torch.tensor([0, 1]))
        assert len(said) == 1 and "slower" in str(said[0].message) and "_C_cpu.so is not built" in str(said[0].message)
        torch.testing.assert_close(logps, torch.full((2,), 0.25).log())
        with pytest.raises(RuntimeError, match=r"impl='cpu' is not available.*pip install"):
            selective_log_softmax(torch.zeros(2, 4), torch.tensor([0, 1]), impl="cpu")
    finally:
        monkeypatch.undo()
        compiled_rows.missing_library.cache_clear()
        impls._tell_once.cache_clear()


def test_a_library_of_other_sources_is_refused_and_told_of(monkeypatch):
    monkeypatch.setattr(compiled_rows, "source_hash", lambda library: "0" * 16)
    monkeypatch.delenv(impls.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("IGRPO_REQUIRE_EXT", raising=False)
    compiled_rows.missing_library.cache_clear()
    impls._tell_once.cache_clear()
    try:
        assert "built from other sources" in available_impls()["cpu"]
        with pytest.warns(
            RuntimeWarning, match=r"plain PyTorch.*built from other sources.*pip install.*builds it again"
        ):
            selective_log_softmax(torch.zeros(2, 4), torch.tensor([0, 1]))
        with pytest.warns(RuntimeWarning, match=r"uses 'triton' on cuda.*built from other sources"):
            impls._tell_once("cuda", "triton", f"'cuda' is not chosen: {available_impls()['cpu']}")
    finally:
        compiled_rows.missing_library.cache_clear()
        impls._tell_once.cache_clear()


def test_cpu_tensors_only():
    with pytest.raises(RuntimeError, match="CPU tensors"):
        impls.resolve_impl("cpu", "cuda")


def test_a_whole_masked_batch_needs_no_matmul():
    inputs = boundary_inputs().to(torch.float32)
    head = single(random_head(inputs))
    with OperatorLog() as log:
        out = linear_grpo_loss(
            *head[:2], inputs.completion_ids, inputs.advantages, completion_mask=inputs.completion_mask * 0, impl="cpu"
        )
        out.loss.backward()
    assert out.loss == 0 and (head[0].grad == 0).all() and (head[1].grad == 0).all() and not log.matmuls()
