"""impl="cpu": the compiled row kernels against fp64 PyTorch, and the promises only they make.

The tests shared by all implementations mostly use fp64, which this one leaves to the reference; here nothing does.
"""

import os
from dataclasses import replace
from itertools import product

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, available_impls, fused_loss, grpo_loss, selective_log_softmax
from igrpo_kernels.batch import TokenBatch, compute_dtype
from igrpo_kernels.compiled_rows import CompiledRows
from igrpo_kernels.objective import coupling, objective_and_row_gradients
from igrpo_kernels.types import LogitTransform
from tests.kernels.oracle import (
    LOSS_LEVELS,
    assert_close_to_truth,
    boundary_inputs,
    full_config,
    loss_and_grad,
    packed,
)

SKIPPED = os.environ.get("IGRPO_SKIP_EXT", "0") not in ("", "0")
REASON = available_impls()["cpu"]
ROWS = CompiledRows("cpu")
RTOL = 2e-5  # fp32 against fp64
ULP = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}  # one unit in the last place, generously

needs_library = pytest.mark.skipif(REASON != "available", reason=REASON)
TOKEN_CONFIGS = [
    *(GRPOLossConfig(loss_type=t, max_completion_length=24) for t in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")),
    GRPOLossConfig(loss_type="cispo", epsilon_high=1.3),
    GRPOLossConfig(loss_type="sapo"),
    GRPOLossConfig(delta=1.1, epsilon_high=0.28),
    GRPOLossConfig(dual_clip=1.2),
    GRPOLossConfig(entropy_coef=0.05),
    GRPOLossConfig(importance_sampling_mode="token_mask", importance_sampling_clip_max=1.2, beta=0.1),
    GRPOLossConfig(importance_sampling_mode="sequence_truncate"),
    *(
        GRPOLossConfig(beta=0.3, kl_estimator=k, use_bias_correction_kl=b)
        for k, b in product(("k1", "k2", "k3"), (True, False))
    ),
    GRPOLossConfig(temperature=0.7, logit_scale=-0.5, final_logit_softcapping=4.0, entropy_coef=0.05, beta=0.1),
]


def test_the_extension_is_built():
    assert SKIPPED or REASON == "available", REASON


@pytest.fixture(params=["avx512", "avx2", "portable"])
def capability(request, monkeypatch):
    """Runs a test once per instruction set this processor has."""
    monkeypatch.setenv("IGRPO_CPU_CAPABILITY", request.param)
    if torch.ops.igrpo.cpu_capability() != request.param:
        pytest.skip(f"this processor has no {request.param}")


def random_rows(n, V, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(n, V, generator=generator)).to(dtype)
    return logits, torch.randint(V, (n,), generator=generator)


def rows_and_grads(logits, index, impl, **keywords):
    """logps, entropy and the gradient of a random combination of both."""
    leaf = logits.detach().clone().requires_grad_()
    logps, entropy = selective_log_softmax(leaf, index, return_entropy=True, impl=impl, **keywords)
    weights = torch.randn(2, len(index), generator=torch.Generator().manual_seed(1)).to(logps.dtype)
    (weights[0] * logps + weights[1] * entropy).sum().backward()
    return logps.detach(), entropy.detach(), leaf.grad


def assert_rows_match_truth(logits, index, **keywords):
    actual = rows_and_grads(logits, index, "cpu", **keywords)
    truth = rows_and_grads(logits.double(), index, "torch", **keywords)
    for name, a, b in zip(("log-probs", "entropy"), actual, truth, strict=False):
        assert_close_to_truth(name, a, b, rtol=1e-6, atol=1e-6)
    # Elementwise, not only relative to the largest: small probabilities must be right too.
    rounded = truth[2].to(logits.dtype)
    # The two gradients may cancel: what is left carries the rounding of its terms, not its own.
    tolerance = ULP[logits.dtype] * truth[2].abs() + 1e-6 * truth[2].abs().max()
    assert actual[2].dtype == logits.dtype
    assert ((actual[2].double() - rounded.double()).abs() <= tolerance).all()


# ---- rows


@needs_library
@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 31, 33, 63, 507, 1023, 1024, 1025, 2053])
def test_rows_of_every_length(V, dtype, capability):
    assert_rows_match_truth(*random_rows(7, V, dtype))


@needs_library
@pytest.mark.parametrize("dtype", ULP)
@pytest.mark.parametrize("V", [49_152, 151_936])
def test_rows_of_real_vocabularies(V, dtype, capability):
    assert_rows_match_truth(*random_rows(3, V, dtype), temperature=0.7)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_any_alignment(dtype, capability):
    """Rows that start at odd elements, rows far apart, a row stride of 0: nothing is assumed to be aligned."""
    whole = torch.randn(4, 9, 131).to(dtype)
    index = torch.randint(100, (4, 7))
    views = (
        whole[:, 1:8, 3:103],
        whole[:, 1:8, :100],
        whole.transpose(0, 1).contiguous().transpose(0, 1)[:, :7, 1:101],
    )
    for view in (*views, whole[:1, :7, 5:105].expand(4, 7, 100)):
        results = []
        for x in (view, view.contiguous()):
            leaf = x.detach().requires_grad_()
            out = grpo_loss(leaf, index, torch.tensor([1.0, -1.0, 0.5, 2.0]), impl="cpu")
            results.append((out.loss, out.per_token_logps, torch.autograd.grad(out.loss, leaf)[0]))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@needs_library
def test_exponential_over_its_whole_range(capability):
    """-p_v is the gradient of logp: for log p from 0 to where fp32 ends it must be within 2 ulp of exp(log p)."""
    z = torch.cat([torch.zeros(1), torch.linspace(-87.2, -1e-3, 200_001)])[None, None]
    target = torch.tensor([0])
    stats = ROWS.statistics(z, target, None, LogitTransform())
    grad = ROWS.gradient(z, None, target, None, stats, torch.ones(1), None, LogitTransform())
    log_p = ((z - stats.row_max) - stats.log_sum)[0, 0, 1:]  # rounded to fp32 as in the kernel
    p, truth = -grad[0, 0, 1:].double(), log_p.double().exp()
    normal = truth > 1.2e-38
    assert normal.sum() > 180_000
    assert ((p - truth).abs() <= 2 * 2**-23 * truth)[normal].all()
    assert (p[log_p < -88] == 0).all()


@needs_library
def test_half_conversions_are_exact_and_round_to_even(capability):
    """Every finite value of a 16-bit type survives; a gradient is rounded as PyTorch rounds."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite() & (every.abs() < 80)]
        rows = torch.stack([every, torch.zeros_like(every)], -1)  # p of column 1 depends on column 0's exact value
        index = torch.ones(len(every), dtype=torch.long)
        logps = selective_log_softmax(rows, index, impl="cpu")
        truth = selective_log_softmax(rows.double(), index, impl="torch")
        assert_close_to_truth(str(dtype), logps, truth, rtol=1e-7, atol=1e-7)

        logits, index = random_rows(50, 999, torch.float32)
        wide = rows_and_grads(logits.to(dtype).float(), index, "cpu")[2]
        narrow = rows_and_grads(logits.to(dtype), index, "cpu")[2]
        torch.testing.assert_close(narrow, wide.to(dtype), rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_nearest_even(dtype, capability):
    """p is exactly 1 and 0 here, so the gradient is the coefficient itself: ties, subnormals, overflow, both signs."""
    grid = torch.arange(1, 4096, dtype=torch.float32)  # 12 significant bits: every tie of both types
    g = torch.cat([grid, grid * 2.0**-24, grid * 2.0**-30, grid * 32.0, torch.tensor([0.1, 65519.9, 65520.0, 3e38])])
    logits = torch.tensor([0.0, -float("inf")], dtype=dtype).repeat(1, len(g), 1)
    target = torch.ones(len(g), dtype=torch.long)
    stats = ROWS.statistics(logits, target, None, LogitTransform())
    grad = ROWS.gradient(logits, None, target, None, stats, g, None, LogitTransform())[0]
    torch.testing.assert_close(grad, torch.stack([-g, g], -1).to(dtype), rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_rows_holding_infinities_or_nan_answer_as_the_reference(value, cap, capability):
    config = GRPOLossConfig(final_logit_softcapping=cap)
    logits = torch.randn(2, 3, 77)
    logits[0, 0, 40], logits[1, 1, :] = value, value
    ids = torch.zeros(2, 3, dtype=torch.long)
    outs = [
        grpo_loss(x, ids, torch.ones(2), config=config, impl=i)
        for x, i in ((logits, "cpu"), (logits.double(), "torch"))
    ]
    for name in ("per_token_logps", "entropy"):
        actual, truth = (getattr(out, name).double() for out in outs)
        torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-6, equal_nan=True)


@needs_library
def test_columns_of_minus_infinity_get_gradient_exactly_zero(capability):
    logits, index = random_rows(5, 90, torch.float32)
    index %= 40
    logits[:, 50:70] = -float("inf")
    logps, entropy, grad = rows_and_grads(logits, index, "cpu")
    kept = torch.cat([logits[:, :50], logits[:, 70:]], -1)
    truth = rows_and_grads(kept.double(), index, "torch")
    assert (grad[:, 50:70] == 0).all()
    assert_close_to_truth("gradient", torch.cat([grad[:, :50], grad[:, 70:]], -1), truth[2], rtol=2e-6)
    assert_close_to_truth("log-probs", logps, truth[0], rtol=1e-6)
    assert_close_to_truth("entropy", entropy, truth[1], rtol=1e-6)


# ---- losses


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [full_config(*pair) for pair in LOSS_LEVELS] + TOKEN_CONFIGS)
def test_every_loss_matches_fp64(config, dtype):
    inputs = boundary_inputs(level=config.importance_sampling_level)
    # The truth sees the same rounded logits.
    inputs = replace(inputs, logits=inputs.logits.to(dtype).double())
    out, grad = loss_and_grad(inputs, config)
    for layout, rows in (("padded", inputs.to(dtype)), ("packed", packed(inputs).to(dtype))):
        for inplace in (False, True):
            actual, actual_grad = loss_and_grad(rows, config, impl="cpu", inplace=inplace)
            expected = grad if layout == "padded" else grad[inputs.completion_mask]
            assert_close_to_truth("loss", actual.loss, out.loss, rtol=RTOL, atol=1e-6)
            rtol = RTOL if dtype == torch.float32 else 2**-8
            assert_close_to_truth("gradient", actual_grad, expected, rtol=rtol)
            assert actual.metrics.keys() == out.metrics.keys()
            for name, value in out.metrics.items():
                assert_close_to_truth(name, actual.metrics[name], value, rtol=1e-4, atol=1e-6)


@needs_library
@pytest.mark.parametrize("old", ["given", "current", "exact ratios"])
@pytest.mark.parametrize("config", TOKEN_CONFIGS)
def test_the_coefficient_in_c_is_the_derivative_of_the_python_objective(config, old):
    """Row by row, on clip boundaries and ties too: token_objective.h restates objective.py by hand."""
    inputs = boundary_inputs().to(torch.float32)
    if old == "exact ratios":  # on-policy ties, and ratios that land on a bound
        shift = torch.tensor([1.0, 0.8, 1.2, 1.1, 1.28, 3.0]).log()[torch.arange(24) % 6]
        logps = selective_log_softmax(inputs.logits, inputs.completion_ids, impl="cpu")
        inputs = replace(inputs, old_per_token_logps=logps - shift)
    keywords = inputs.keywords(config)
    if old == "current":
        keywords["old_per_token_logps"] = keywords["sampling_per_token_logps"] = None
    batch = TokenBatch.build(inputs.completion_ids, inputs.advantages, dtype=torch.float32, **keywords)
    assert ROWS.fits_one_pass(batch, config)
    rows = ROWS.coefficient_inputs(batch, config, None)
    logps, entropy, applied, _ = ROWS.token_loss(inputs.logits, None, rows, config)
    _, _, expected, _ = objective_and_row_gradients(logps, entropy, batch, config, None)
    torch.testing.assert_close(applied, expected, rtol=1e-5, atol=1e-7)
    assert (applied[batch.mask] != 0).any()


@needs_library
def test_a_loss_that_couples_tokens_takes_two_passes():
    """Each coupling alone, against fp64: one pass would use a log-probability it has not measured yet."""
    alone = [
        ({"importance_sampling_level": "sequence"}, "sequence"),
        ({"loss_type": "vespo"}, "sequence"),
        ({"off_policy_mask_threshold": 0.02}, "sequence"),
        ({"top_entropy_quantile": 0.5}, "batch"),
        ({"importance_sampling_mode": "sequence_mask"}, "token"),
    ]
    for keywords, expected in alone:
        config = GRPOLossConfig(**keywords)
        inputs = boundary_inputs(level=config.importance_sampling_level)
        inputs = replace(inputs, logits=inputs.logits.float().double())
        given = inputs.keywords(config)
        batch = TokenBatch.build(inputs.completion_ids, inputs.advantages, dtype=torch.float32, **given)
        assert coupling(batch, config) == expected
        if config.importance_sampling_mode is not None:  # without old log-probs its ratio follows the policy's
            assert coupling(replace(batch, old_per_token_logps=None), config) == "sequence"
        for old in (given["old_per_token_logps"], None):
            results = []
            for rows, impl in ((inputs, "torch"), (inputs.to(torch.float32), "cpu")):
                results.append(loss_and_grad(rows, config, impl=impl, old_per_token_logps=old))
            assert_close_to_truth("loss", results[1][0].loss, results[0][0].loss, rtol=RTOL, atol=1e-6)
            assert_close_to_truth("gradient", results[1][1], results[0][1], rtol=RTOL)


@needs_library
@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_masked_rows_are_not_read(loss_type, level, inplace):
    inputs, config = boundary_inputs(level=level).to(torch.float32), full_config(loss_type, level)
    expected, grad = loss_and_grad(inputs, config, impl="cpu")
    mask = inputs.completion_mask
    poisoned = replace(inputs, logits=inputs.logits.masked_fill(~mask[..., None], float("nan")))
    out, actual = loss_and_grad(poisoned, config, impl="cpu", inplace=inplace)
    torch.testing.assert_close((out.loss, actual), (expected.loss, grad), rtol=0, atol=0)
    assert (actual[~mask] == 0).all() and (out.entropy[~mask] == 0).all()


@needs_library
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_bad_target_poisons_its_row_or_its_sequence_only(level):
    """The public function raises first; a kernel called without that check must not read out of bounds."""
    config = GRPOLossConfig(importance_sampling_level=level)
    inputs = boundary_inputs(level=config.importance_sampling_level).to(torch.float32)
    ids = inputs.completion_ids.clone()
    ids[0, 0], ids[1, 0] = 37, -1
    batch = TokenBatch.build(ids, inputs.advantages * 0, dtype=compute_dtype(torch.float32), **inputs.keywords(config))
    leaf = inputs.logits.clone().requires_grad_()
    loss, logps, _, _ = fused_loss.grpo_loss(ROWS, leaf, batch, config, None, inplace=False)
    loss.backward()
    assert loss.isnan()
    poisoned = leaf.grad.isnan()
    assert poisoned[0, 0].all() and poisoned[1, 0].all() and not poisoned[2:].any()
    assert level == "sequence" or not poisoned[:, 1:].any()
    assert logps.isnan().nonzero().flatten().tolist() == [0, 24]


# ---- promises


@needs_library
def test_every_output_element_is_written():
    """Fresh memory filled with NaN must not show: torch fills it under deterministic algorithms."""
    inputs = boundary_inputs().to(torch.float32)
    expected = [loss_and_grad(inputs, c, impl="cpu") for c in (GRPOLossConfig(), full_config("grpo", "sequence"))]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for config, (out, grad) in zip((GRPOLossConfig(), full_config("grpo", "sequence")), expected, strict=True):
            poisoned, poisoned_grad = loss_and_grad(inputs, config, impl="cpu")
            torch.testing.assert_close((poisoned.loss, poisoned_grad), (out.loss, grad), rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_library
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_results_do_not_depend_on_the_number_of_threads(level):
    """Bit for bit. 40 rows of 5,000: enough for every thread to get some."""
    inputs = boundary_inputs(B=8, T=40, V=5000, level=level).to(torch.bfloat16)
    config = full_config("grpo", level, max_completion_length=40)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        out, grad = loss_and_grad(inputs, config, impl="cpu")
        results.append((out.loss, out.per_token_logps, out.entropy, grad))
    torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype):
    logits, index = random_rows(33, 4099, dtype)
    whole = rows_and_grads(logits, index, "cpu")[:2]
    for part in (slice(0, 1), slice(5, 6), slice(7, 30)):
        alone = rows_and_grads(logits[part].clone(), index[part], "cpu")[:2]
        torch.testing.assert_close(alone, tuple(x[part] for x in whole), rtol=0, atol=0)


@needs_library
def test_in_place_overwrites_the_logits_and_tells_autograd():
    inputs = boundary_inputs().to(torch.float32)
    leaf = inputs.logits.clone().requires_grad_()
    logits = leaf * 1.0
    squared = logits.square()  # saves the logits for its own backward
    out = grpo_loss(logits, inputs.completion_ids, inputs.advantages, impl="cpu", inplace=True)
    grad = torch.autograd.grad(out.loss, logits, retain_graph=False)[0]
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    expanded = inputs.logits[:1, :1].expand(8, 24, 37).requires_grad_()
    out = grpo_loss(expanded, inputs.completion_ids, inputs.advantages, impl="cpu", inplace=True)
    out.loss.backward()  # one memory for all rows: written elsewhere instead
    assert expanded.is_leaf and torch.equal(expanded[0, 0], inputs.logits[0, 0])


@needs_library
def test_a_second_backward_says_what_to_do():
    inputs = boundary_inputs().to(torch.float32)
    leaf = inputs.logits.clone().requires_grad_()
    out = grpo_loss(leaf, inputs.completion_ids, inputs.advantages, impl="cpu")
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="impl='torch'"):
        out.loss.backward()
