"""Layouts: packed equals padded, views equal copies, ragged sizes, every kind of mask, expanded upstream gradients."""

from dataclasses import replace

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, grpo_loss, linear_grpo_loss, selective_log_softmax
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.losses import LOSSES
from igrpo_kernels.objective import objective_and_row_gradients
from tests.kernels.oracle import (
    IMPLS,
    LOSS_LEVELS,
    assert_close_to_truth,
    boundary_inputs,
    full_config,
    loss_and_grad,
    packed,
)

RTOL = 2e-5  # fp32 against fp64

pytestmark = pytest.mark.parametrize("impl", IMPLS)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_packed_equals_padded(loss_type, level, cu_dtype, impl):
    inputs, config = boundary_inputs(level=level), full_config(loss_type, level)
    out, grad = loss_and_grad(inputs, config, num_items_in_batch=50)
    rows = packed(inputs)
    rows = replace(rows, cu_seqlens=rows.cu_seqlens.to(cu_dtype)).to(torch.float32)
    packed_out, packed_grad = loss_and_grad(rows, config, impl=impl, num_items_in_batch=50)
    mask = inputs.completion_mask
    assert_close_to_truth("loss", packed_out.loss, out.loss, rtol=RTOL)
    assert_close_to_truth("gradient", packed_grad, grad[mask], rtol=RTOL)
    assert_close_to_truth("log-probs", packed_out.per_token_logps, out.per_token_logps[mask], rtol=RTOL)
    assert_close_to_truth("entropy", packed_out.entropy, out.entropy[mask], rtol=RTOL)
    assert packed_out.metrics.keys() == out.metrics.keys()
    for name, value in out.metrics.items():
        assert_close_to_truth(name, packed_out.metrics[name], value, rtol=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_empty_sequences_in_a_packed_batch(level, impl):
    inputs = boundary_inputs(level=level)
    mask = inputs.completion_mask.clone()
    mask[0], mask[3], mask[-1] = False, False, False
    inputs = replace(inputs, completion_mask=mask)
    config = full_config("grpo", level)
    out, grad = loss_and_grad(inputs, config)
    rows = packed(inputs)
    assert (rows.cu_seqlens.diff() == 0).sum() == 3
    packed_out, packed_grad = loss_and_grad(rows, config, impl=impl)
    assert_close_to_truth("loss", packed_out.loss, out.loss, rtol=1e-12)
    assert_close_to_truth("gradient", packed_grad, grad[mask], rtol=1e-12)


def test_a_mask_inside_a_packed_sequence(impl):
    """Prompt or tool tokens may stay in the packed rows under a mask of 0."""
    inputs, config = boundary_inputs(), full_config("grpo", "sequence")
    holes = inputs.completion_mask.clone()
    holes[:, 1::4] = False
    expected, grad = loss_and_grad(replace(inputs, completion_mask=holes), config)
    rows = replace(packed(inputs), completion_mask=holes[inputs.completion_mask])
    out, packed_grad = loss_and_grad(rows, config, impl=impl)
    assert_close_to_truth("loss", out.loss, expected.loss, rtol=1e-12)
    assert_close_to_truth("gradient", packed_grad, grad[inputs.completion_mask], rtol=1e-12)
    assert (packed_grad[~rows.completion_mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_usual_view_of_the_model_s_logits(dtype, impl):
    """logits[:, -T-1:-1] of (B, prompt + T, V): no copy needed, and the gradient lands where the view looked."""
    inputs, config = boundary_inputs().to(dtype), full_config("dapo", "token")
    B, T, V = inputs.logits.shape
    whole = torch.randn(B, 5 + T + 1, V, dtype=dtype)
    whole[:, -T - 1 : -1] = inputs.logits
    whole.requires_grad_()
    view = whole[:, -T - 1 : -1]
    assert not view.is_contiguous()
    out = grpo_loss(view, inputs.completion_ids, inputs.advantages, config=config, impl=impl, **inputs.keywords(config))
    out.loss.backward()
    expected, grad = loss_and_grad(inputs, config, impl=impl)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(whole.grad[:, -T - 1 : -1], grad, rtol=0, atol=0)
    assert (whole.grad[:, : -T - 1] == 0).all() and (whole.grad[:, -1] == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (0, 0, 7)])
def test_no_rows_with_any_strides(shape, level, impl):
    B, T, V = shape
    ids, config = torch.zeros(B, T, dtype=torch.long), GRPOLossConfig(importance_sampling_level=level)
    for logits in (torch.randn(B, T, 2 * V)[..., ::2], torch.randn(V, T, B).permute(2, 1, 0)):
        leaf = logits.requires_grad_()
        out = grpo_loss(leaf, ids, torch.zeros(B), config=config, impl=impl)
        (out.loss + selective_log_softmax(leaf, ids, impl=impl).sum()).backward()
        assert float(out.loss) == 0.0 and leaf.grad.shape == shape and out.per_token_logps.shape == (B, T)
    hidden, weight = torch.randn(B, T, 8)[..., ::2].requires_grad_(), torch.randn(V, 8)[:, ::2].requires_grad_()
    linear_grpo_loss(hidden, weight, ids, torch.zeros(B), config=config, impl=impl).loss.backward()
    assert hidden.grad.shape == hidden.shape and not weight.grad.any()


@pytest.mark.parametrize("n", [4096, 65536])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_value_of_a_long_packed_sequence(level, n, impl):
    """Adding 65,536 fp32 numbers one by one was 5.5e-4 off. The value is the padded one, whatever is beside it."""
    g = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(n + 3, 8, generator=g), torch.randint(8, (n + 3,), generator=g)
    old = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0] + 0.3 * torch.randn(n + 3, generator=g) - 0.1
    config = GRPOLossConfig(importance_sampling_level=level, epsilon=0.9, epsilon_high=9.0)

    def value(rows: int, *lengths: int, dtype: torch.dtype = torch.float32, impl: str = impl) -> torch.Tensor:
        advantages = torch.tensor([0.7] + [0.0] * (len(lengths) - 1), dtype=dtype)
        cu = torch.tensor([0, *lengths]).cumsum(0)
        return grpo_loss(
            logits[:rows].to(dtype), ids[:rows], advantages, old_per_token_logps=old[:rows].to(dtype), cu_seqlens=cu,
            config=config, impl=impl,
        ).loss  # fmt: skip

    alone, truth = value(n, n), value(n, n, dtype=torch.float64, impl="torch")
    assert abs(float(alone) / float(truth) - 1) < 1e-6
    padded = grpo_loss(
        logits[None], ids[None], torch.tensor([0.7]), old_per_token_logps=old[None], config=config, impl=impl,
        completion_mask=(torch.arange(n + 3) < n)[None],
    )  # fmt: skip
    assert float(padded.loss) == float(alone)
    assert 2 * float(value(n + 3, n, 3)) == float(alone)


@pytest.mark.parametrize("make", [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x[..., ::2]])
def test_other_strides(make, impl):
    inputs = boundary_inputs(V=38)
    logits = make(inputs.logits)
    ids = inputs.completion_ids % logits.shape[-1]
    results = []
    for x in (logits, logits.contiguous()):
        x = x.detach().requires_grad_()
        out = grpo_loss(x, ids, inputs.advantages, completion_mask=inputs.completion_mask, impl=impl)
        results.append((out.loss, torch.autograd.grad(out.loss, x)[0]))
    assert not logits.is_contiguous()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_masks_of_every_dtype_and_stride(dtype, contiguous, impl):
    inputs, config = boundary_inputs(), full_config("grpo", "token")
    expected, grad = loss_and_grad(inputs, config, impl=impl)
    mask = inputs.completion_mask.to(dtype)
    if not contiguous:
        mask = torch.stack([mask, torch.ones_like(mask)], -1)[..., 0]
        assert not mask.is_contiguous()
    out, actual = loss_and_grad(replace(inputs, completion_mask=mask), config, impl=impl)
    torch.testing.assert_close((out.loss, actual), (expected.loss, grad), rtol=0, atol=0)


@pytest.mark.parametrize(("B", "T", "V"), [(1, 1, 5), (1, 63, 3), (3, 1, 507), (5, 17, 129), (2, 3, 1128)])
def test_ragged_sizes(B, T, V, impl):
    generator = torch.Generator().manual_seed(B * T * V)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    ids = torch.randint(V, (B, T), generator=generator, dtype=torch.int32)
    advantages = torch.randn(B, generator=generator, dtype=torch.float64)
    old = selective_log_softmax(logits, ids) - 0.3 * torch.randn(B, T, generator=generator)
    results = []
    for dtype, name in ((torch.float64, "torch"), (torch.float32, impl)):
        x = logits.detach().to(dtype, copy=True).requires_grad_()
        out = grpo_loss(x, ids, advantages.to(dtype), old_per_token_logps=old.to(dtype), impl=name)
        out.loss.backward()
        results.append((out.loss, x.grad, out.per_token_logps))
    for name, truth, actual in zip(("loss", "gradient", "log-probs"), *results, strict=True):
        assert_close_to_truth(name, actual, truth, rtol=RTOL)


def test_a_vocabulary_of_one_has_no_choice(impl):
    logits = torch.randn(2, 3, 1, requires_grad=True)
    out = grpo_loss(logits, torch.zeros(2, 3, dtype=torch.long), torch.tensor([1.0, -2.0]), impl=impl)
    out.loss.backward()
    assert (out.per_token_logps == 0).all() and (out.entropy == 0).all() and (logits.grad == 0).all()
    assert out.loss.item() == pytest.approx(-(1.0 - 2.0) / 2)


def test_upstream_gradients_without_strides(impl):
    """sum().backward() sends an expanded scalar; a scaled loss sends a number other than 1."""
    logits = torch.randn(4, 6, 11, dtype=torch.float64, requires_grad=True)
    index = torch.randint(11, (4, 6))
    logps, entropy = selective_log_softmax(logits, index, return_entropy=True, impl=impl)
    expanded = torch.autograd.grad(logps.sum() + entropy.sum(), logits, retain_graph=True)[0]
    dense = torch.autograd.grad((logps, entropy), logits, (torch.ones(4, 6).double(), torch.ones(4, 6).double()))[0]
    torch.testing.assert_close(expanded, dense, rtol=0, atol=0)

    inputs, config = boundary_inputs(), full_config("grpo", "token")
    _, grad = loss_and_grad(inputs, config, impl=impl)
    logits = inputs.logits.clone().requires_grad_()
    out = grpo_loss(
        logits, inputs.completion_ids, inputs.advantages, config=config, impl=impl, **inputs.keywords(config)
    )
    (out.loss.expand(3).sum() * -0.5).backward()
    torch.testing.assert_close(logits.grad, grad * -1.5)


def test_inplace_is_accepted(impl):
    inputs = boundary_inputs()
    expected, grad = loss_and_grad(inputs, GRPOLossConfig(), impl=impl)
    out, actual = loss_and_grad(inputs, GRPOLossConfig(), impl=impl, inplace=True)
    torch.testing.assert_close((out.loss, actual), (expected.loss, grad))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_outputs_have_the_callers_shape_and_are_detached(layout, impl):
    inputs = boundary_inputs().to(torch.bfloat16)
    inputs = inputs if layout == "padded" else packed(inputs)
    config = full_config("grpo", "token")
    weight, hidden = torch.eye(37, dtype=torch.bfloat16), inputs.logits.clone().requires_grad_()
    outs = [
        grpo_loss(hidden, inputs.completion_ids, inputs.advantages, config=config, **inputs.keywords(config)),
        linear_grpo_loss(
            hidden, weight, inputs.completion_ids, inputs.advantages, config=config, **inputs.keywords(config)
        ),
    ]
    for out in outs:
        assert out.loss.shape == () and out.loss.requires_grad and out.loss.dtype == torch.float32
        for x in (out.per_token_logps, out.entropy):
            assert x.shape == inputs.completion_ids.shape and x.dtype == torch.float32 and not x.requires_grad
        assert all(m.shape == () and not m.requires_grad for m in out.metrics.values())


def test_micro_batches_add_up_as_documented(impl):
    """The recipe of docs/algorithm.md, for every loss type, with unequal micro-batches and an entropy bonus."""
    inputs = boundary_inputs()
    mask, lengths = inputs.completion_mask, inputs.completion_mask.sum(-1)
    n_total, s_total = int(lengths.sum()), len(lengths)
    weights = torch.linspace(-0.5, 2.0, mask.numel(), dtype=torch.float64).view(mask.shape)
    for loss_type, level in LOSS_LEVELS:
        if LOSSES[loss_type].term.couples == "batch":
            continue
        config = full_config(loss_type, level, top_entropy_quantile=1.0, kl_tau=0.1)
        items = {"tokens": n_total, "prompts": s_total // 2}[config.loss.reduction.items]
        tensors = {"loss_weights": weights, "nll_weights": weights.flip(0) / 100}
        if loss_type == "prompt_mean":
            tensors["prompt_lengths"] = inputs.prompt_lengths()
        whole, grad = loss_and_grad(inputs, config, num_items_in_batch=items, **tensors)
        loss, grads = 0.0, []
        for part in (slice(0, 3), slice(3, 8)):
            micro = replace(inputs, **{k: v[part] for k, v in vars(inputs).items() if v is not None})
            n, s = int(lengths[part].sum()), len(lengths[part])
            factor = config.loss.reduction.share(s, n, s_total, n_total)
            micro_config = replace(config, entropy_coef=config.entropy_coef * (n / n_total) / factor)
            some = {name: x[part] for name, x in tensors.items()}
            some["nll_weights"] = some["nll_weights"] / factor
            out, micro_grad = loss_and_grad(micro, micro_config, impl=impl, num_items_in_batch=items, **some)
            loss += factor * out.loss
            grads.append(factor * micro_grad)
        torch.testing.assert_close(loss, whole.loss)
        torch.testing.assert_close(torch.cat(grads), grad)


def test_the_parts_of_a_prompt_add_up(impl):
    """Four calls with two of a prompt's eight completions each, of a quarter of the prompt or of their own share."""
    inputs, config = boundary_inputs().to(torch.float32), GRPOLossConfig("prompt_mean")
    n = inputs.completion_mask.sum()
    whole, grad = loss_and_grad(inputs, config, impl=impl, prompt_lengths=n.expand(8))
    for num_items in (None, 0.25):
        loss, parts = 0.0, []
        for rows in torch.arange(8).split(2):
            part = replace(inputs, **{k: v[rows] for k, v in vars(inputs).items() if v is not None})
            share = 0.25 if num_items else part.completion_mask.sum() / n
            out, slope = loss_and_grad(
                part, config, impl=impl, prompt_lengths=n.expand(2), num_items_in_batch=num_items
            )  # fmt: skip
            loss += share * out.loss
            parts.append(share * slope)
        torch.testing.assert_close((loss, torch.cat(parts)), (whole.loss, grad))
    masked = replace(inputs, completion_mask=torch.zeros_like(inputs.completion_mask))
    nothing, none = loss_and_grad(masked, config, impl=impl, prompt_lengths=torch.zeros(8))
    assert nothing.loss == 0.0 and not none.any()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_rows_off_the_cpu_need_no_host_sync(loss_type, level, layout, impl):
    """Meta tensors hold no values: reading one, branching on one or a data-dependent shape raises."""
    inputs, config = boundary_inputs(level=level), full_config(loss_type, level)
    inputs = inputs if layout == "padded" else packed(inputs)
    keywords = {name: x.to("meta") for name, x in inputs.keywords(config).items() if x is not None}
    ids, advantages = inputs.completion_ids.to("meta"), inputs.advantages.to("meta")
    batch = TokenBatch.build(ids, advantages, dtype=torch.float32, **keywords)
    logps = torch.zeros(ids.numel(), device="meta")
    loss, metrics, dlogps, dentropy = objective_and_row_gradients(logps, logps.clone(), batch, config, 9)
    assert {x.device.type for x in (loss, dlogps, dentropy, *metrics.values())} == {"meta"}
    assert loss.shape == () and dlogps.shape == dentropy.shape == logps.shape
