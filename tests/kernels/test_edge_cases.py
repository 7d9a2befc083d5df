"""Inputs at the edge of the definition, by name. Each states the defined result; none may be NaN by accident."""

import math
from dataclasses import replace

import pytest
import torch

from igrpo_kernels import (
    GRPOLossConfig,
    fused_linear_autograd,
    fused_loss,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    reference,
    selective_log_softmax,
)
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.impls import resolve_impl
from igrpo_kernels.losses import LOSSES
from igrpo_kernels.types import LogitTransform
from tests.kernels.oracle import (
    CONSTANT_WEIGHTS,
    IMPLS,
    LOSS_LEVELS,
    assert_close_to_truth,
    boundary_inputs,
    full_config,
    linear_loss_and_grads,
    loss_and_grad,
    packed,
    random_head,
)

pytestmark = pytest.mark.parametrize("impl", IMPLS)
NAN, INF = math.nan, math.inf


def assert_finite(*tensors):
    for x in tensors:
        assert torch.isfinite(x).all()


# ---- masked rows


@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_masked_rows_may_hold_anything(loss_type, level, garbage, impl):
    inputs, config = boundary_inputs(level=level), full_config(loss_type, level)
    expected, grad = loss_and_grad(inputs, config, impl=impl)
    mask = inputs.completion_mask
    poisoned = replace(
        inputs,
        logits=inputs.logits.masked_fill(~mask[..., None], garbage),
        completion_ids=inputs.completion_ids.masked_fill(~mask, -100),
        old_per_token_logps=inputs.old_per_token_logps.masked_fill(~mask, garbage),
        ref_per_token_logps=inputs.ref_per_token_logps.masked_fill(~mask, garbage),
        sampling_per_token_logps=inputs.sampling_per_token_logps.masked_fill(~mask, garbage),
    )
    out, actual = loss_and_grad(poisoned, config, impl=impl)
    torch.testing.assert_close((out.loss, actual), (expected.loss, grad), rtol=0, atol=0)
    torch.testing.assert_close(out.metrics, expected.metrics, rtol=0, atol=0)
    assert (actual[~mask] == 0).all() and (out.per_token_logps[~mask] == 0).all() and (out.entropy[~mask] == 0).all()


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_masked_hidden_states_may_hold_nan(layout, impl):
    inputs, config = boundary_inputs(), full_config()
    mask = inputs.completion_mask
    if layout == "packed":
        inputs = packed(replace(inputs, completion_mask=torch.ones_like(mask)))
        mask = mask.flatten()
        inputs = replace(inputs, completion_mask=mask)
    hidden, weight, bias = random_head(inputs)
    expected, grads = linear_loss_and_grads(hidden, weight, bias, inputs, config, impl=impl)
    poisoned = hidden.detach().masked_fill(~mask[..., None], NAN).requires_grad_()
    out, actual = linear_loss_and_grads(poisoned, weight, bias, inputs, config, impl=impl)
    torch.testing.assert_close((out.loss, *actual), (expected.loss, *grads), rtol=0, atol=0)
    assert (actual[0][~mask] == 0).all()


def test_garbage_advantages_of_a_masked_sequence(impl):
    inputs, config = boundary_inputs(), full_config("vespo", importance_sampling_mode="token_mask")
    mask = inputs.completion_mask.clone()
    mask[1] = False
    clean = replace(inputs, completion_mask=mask)
    dirty = replace(clean, advantages=inputs.advantages.index_fill(0, torch.tensor([1]), NAN))
    results = [loss_and_grad(x, config, impl=impl) for x in (clean, dirty)]
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss, rtol=0, atol=0)
    torch.testing.assert_close(results[0][0].metrics, results[1][0].metrics, rtol=0, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


# ---- nothing to learn from


@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_a_whole_masked_batch_gives_zero_loss_and_zero_gradients(loss_type, level, impl):
    inputs, config = boundary_inputs(level=level), full_config(loss_type, level)
    inputs = replace(inputs, completion_mask=torch.zeros_like(inputs.completion_mask))
    for num_items in (None, 0, torch.tensor(0)):
        out, grad = loss_and_grad(inputs, config, impl=impl, num_items_in_batch=num_items)
        assert out.loss.item() == 0.0 and (grad == 0).all()
        assert_finite(*out.metrics.values())
    out, grads = linear_loss_and_grads(*random_head(inputs), inputs, config, impl=impl)
    assert out.loss.item() == 0.0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
@pytest.mark.parametrize("num_sequences", [0, 3])
def test_no_tokens_at_all(loss_type, level, num_sequences, impl):
    config = full_config(loss_type, level)
    rows = dict.fromkeys(("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"), torch.zeros(0))
    of_prompts = {"prompt_lengths": torch.zeros(num_sequences)}
    out = grpo_loss(
        logits := torch.zeros(0, 5, requires_grad=True),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(num_sequences),
        cu_seqlens=torch.zeros(num_sequences + 1, dtype=torch.int32),
        config=config,
        impl=impl,
        **rows | of_prompts,
    )
    out.loss.backward()
    assert out.loss.item() == 0.0 and logits.grad.shape == (0, 5)
    assert_finite(*out.metrics.values())
    padded = {name: torch.zeros(num_sequences, 0) for name in rows}
    out = grpo_loss(
        torch.zeros(num_sequences, 0, 5, requires_grad=True),
        torch.zeros(num_sequences, 0, dtype=torch.long),
        torch.zeros(num_sequences),
        config=config,
        impl=impl,
        **padded | of_prompts,
    )
    out.loss.backward()
    assert out.loss.item() == 0.0


@pytest.mark.parametrize(("loss_type", "level"), [p for p in LOSS_LEVELS if LOSSES[p[0]].term.of_advantage])
def test_zero_advantage_rows_have_exactly_zero_policy_gradient(loss_type, level, impl):
    inputs = boundary_inputs(level=level)
    inputs = replace(inputs, advantages=inputs.advantages * (torch.arange(8) >= 4))
    config = GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=24)
    out, grad = loss_and_grad(inputs, config, impl=impl)
    assert (grad[:4] == 0).all() and (grad[4:] != 0).any()
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):  # A = 0 is never clipped, whatever its ratio
        if name in out.metrics:
            silent, _ = loss_and_grad(replace(inputs, advantages=torch.zeros(8).double()), config, impl=impl)
            assert silent.metrics[name] == 0.0


# ---- extreme logits


def test_columns_of_minus_infinity_have_probability_zero(impl):
    """Value and gradient equal those of the softmax without the columns, entropy bonus included."""
    inputs, config = boundary_inputs(), full_config()
    banned = torch.zeros(37, dtype=torch.bool)
    banned[[3, 17, 36]] = True
    inputs = replace(inputs, completion_ids=torch.where(banned[inputs.completion_ids], 4, inputs.completion_ids))
    out, grad = loss_and_grad(replace(inputs, logits=inputs.logits.masked_fill(banned, -INF)), config, impl=impl)
    kept = (~banned).nonzero().squeeze(-1)
    position = torch.zeros(37, dtype=torch.long).index_put_((kept,), torch.arange(len(kept)))
    smaller = replace(inputs, logits=inputs.logits[..., kept], completion_ids=position[inputs.completion_ids])
    expected, smaller_grad = loss_and_grad(smaller, config, impl=impl)
    assert_close_to_truth("loss", out.loss, expected.loss, rtol=1e-12)
    assert_close_to_truth("gradient", grad[..., kept], smaller_grad, rtol=1e-12)
    assert (grad[..., banned] == 0).all()


def test_minus_infinity_from_the_lm_head_bias(impl):
    """Padded vocabulary columns are usually switched off by a bias of -inf."""
    inputs, config = boundary_inputs(), full_config()
    hidden, weight, bias = random_head(inputs)
    inputs = replace(inputs, completion_ids=inputs.completion_ids % 30)
    closed = bias.detach().index_fill(0, torch.arange(30, 37), -INF).requires_grad_()
    out, grads = linear_loss_and_grads(hidden, weight, closed, inputs, config, impl=impl)
    cut = [hidden, weight.detach()[:30].requires_grad_(), bias.detach()[:30].requires_grad_()]
    expected, cut_grads = linear_loss_and_grads(*cut, inputs, config, impl=impl)
    assert_close_to_truth("loss", out.loss, expected.loss, rtol=1e-12)
    assert_close_to_truth("dX", grads[0], cut_grads[0], rtol=1e-12)
    for name, actual, truth in (("dW", grads[1], cut_grads[1]), ("db", grads[2], cut_grads[2])):
        assert_close_to_truth(name, actual[:30], truth, rtol=1e-12)
        assert (actual[30:] == 0).all()


@pytest.mark.parametrize("offset", [-1e4, -200.0, 88.0, 1e4])
def test_rows_of_large_or_all_negative_logits(offset, impl):
    """A running maximum that starts at 0, or an exp without a maximum, breaks here."""
    logits = torch.randn(4, 6, 33, generator=torch.Generator().manual_seed(0))
    index = torch.arange(24).view(4, 6)
    shifted = (logits.double() + offset).float()
    truth = selective_log_softmax(shifted.double(), index, return_entropy=True)
    actual = selective_log_softmax(shifted, index, return_entropy=True, impl=impl)
    for name, a, b in zip(("log-probs", "entropy"), actual, truth, strict=True):
        assert_close_to_truth(name, a, b, rtol=1e-4 if abs(offset) > 1e3 else 2e-6)


def test_a_certain_token_has_entropy_zero_and_no_gradient(impl):
    logits = torch.full((1, 1, 4), -INF)
    logits[..., 2] = 7.0
    logits.requires_grad_()
    logps, entropy = selective_log_softmax(logits, torch.tensor([[2]]), return_entropy=True, impl=impl)
    (logps + entropy).sum().backward()
    assert logps.item() == 0.0 and entropy.item() == 0.0 and (logits.grad == 0).all()


def test_bfloat16_extremes_do_not_overflow(impl):
    logits = torch.tensor([[[3e38, 3e38, -3e38, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    logps, entropy = selective_log_softmax(logits, torch.tensor([[0]]), return_entropy=True, impl=impl)
    (logps + entropy).sum().backward()
    assert logps.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(math.log(2))
    assert_finite(logits.grad)


# ---- extreme ratios


@pytest.mark.parametrize(("loss_type", "level"), [p for p in LOSS_LEVELS if LOSSES[p[0]].term.of_advantage])
def test_an_overflowing_ratio_is_never_nan(loss_type, level, impl):
    """exp(200) is inf in fp32. Clipped (A > 0) or without advantage its gradient is exactly 0, where TRL has NaN."""
    inputs = boundary_inputs(level=level).to(torch.float32)
    advantages = inputs.advantages.abs()
    advantages[3] = 0.0
    old = inputs.old_per_token_logps.clone()
    old[3:5] -= 200.0
    delta = 2.0 if loss_type.startswith("dppo") else None  # what bounds their weight
    config = GRPOLossConfig(
        loss_type, level, max_completion_length=24, epsilon_high=1.3 if loss_type == "cispo" else 0.2, delta=delta
    )
    out, grad = loss_and_grad(replace(inputs, advantages=advantages, old_per_token_logps=old), config, impl=impl)
    assert_finite(out.loss, grad, *out.metrics.values())
    assert (grad[3] == 0).all()
    if loss_type not in CONSTANT_WEIGHTS:
        assert (grad[4] == 0).all()


def test_an_overflowing_ratio_with_negative_advantage_is_infinite_not_nan(impl):
    inputs = boundary_inputs().to(torch.float32)
    old = inputs.old_per_token_logps.clone()
    old[0, 0] -= 200.0  # A < 0: the surrogate is unbounded there, as in TRL
    inputs = replace(inputs, old_per_token_logps=old)
    out, _ = loss_and_grad(inputs, GRPOLossConfig(), impl=impl)
    assert out.loss.item() == INF
    for bound in ({"delta": 2.0}, {"dual_clip": 3.0}):
        out, grad = loss_and_grad(inputs, GRPOLossConfig(**bound), impl=impl)
        assert_finite(out.loss, grad)


def test_a_dropped_sequence_stays_silent_even_with_an_infinite_loss(impl):
    inputs = boundary_inputs().to(torch.float32)
    old = inputs.old_per_token_logps.clone()
    old[0] -= 200.0
    sampling = inputs.sampling_per_token_logps.clone()
    sampling[0] += 50.0
    inputs = replace(inputs, old_per_token_logps=old, sampling_per_token_logps=sampling)
    out, grad = loss_and_grad(inputs, GRPOLossConfig(off_policy_mask_threshold=10.0), impl=impl)
    assert_finite(out.loss, grad)
    assert (grad[0] == 0).all()


# ---- targets


@pytest.mark.parametrize("bad", [-1, -100, 37, 10**12])
def test_a_target_outside_the_vocabulary_raises_on_the_cpu(bad, impl):
    inputs = boundary_inputs()
    ids = inputs.completion_ids.clone()
    ids[0, 0] = bad
    head = random_head(inputs)
    with pytest.raises(ValueError, match=r"\[0, 37\).*completion_mask"):
        grpo_loss(inputs.logits, ids, inputs.advantages, completion_mask=inputs.completion_mask, impl=impl)
    with pytest.raises(ValueError, match=r"\[0, 37\)"):
        linear_grpo_loss(*head[:2], ids, inputs.advantages, completion_mask=inputs.completion_mask, impl=impl)
    with pytest.raises(ValueError, match=r"\[0, 37\)"):
        selective_log_softmax(inputs.logits, ids, impl=impl)
    with pytest.raises(ValueError, match=r"\[0, 37\)"):
        linear_selective_log_softmax(*head[:2], ids, impl=impl)


def test_where_looking_would_sync_a_bad_target_poisons_its_row_only(impl):
    """The implementations see unchecked targets on accelerators: NaN in that row, nothing elsewhere."""
    kernels = resolve_impl(impl, "cpu")
    over = () if kernels is None else (kernels,)
    logits = torch.randn(3, 5, requires_grad=True)
    index = torch.tensor([1, 5, -1])
    materialised, linear = (reference, reference) if kernels is None else (fused_loss, fused_linear_autograd)
    logps, entropy = materialised.selective_log_softmax(*over, logits, index, LogitTransform(), return_entropy=True)
    assert logps.isnan().tolist() == [False, True, True]
    assert_finite(entropy)
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    logps, entropy = linear.linear_selective_log_softmax(
        *over, hidden, weight, None, index, LogitTransform(), return_entropy=True
    )
    assert logps.isnan().tolist() == [False, True, True]
    logps.sum().backward()
    assert hidden.grad.isnan().any(-1).tolist() == [False, True, True]


@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_a_poisoned_row_shows_in_the_loss(loss_type, level, impl):
    """Also where its advantage is 0: a wrong target is a bug in the caller, not a token without signal."""
    inputs, config = boundary_inputs(level=level), full_config(loss_type, level, off_policy_mask_threshold=None)
    inputs = replace(inputs, advantages=inputs.advantages * (torch.arange(8) > 0))
    config = replace(config, top_entropy_quantile=1.0)
    kernels = resolve_impl(impl, "cpu", torch.float64)
    for row in (0, 1):
        ids = inputs.completion_ids.clone()
        ids[row, 0] = 37
        batch = TokenBatch.build(ids, inputs.advantages, dtype=torch.float64, **inputs.keywords(config))
        arguments = (inputs.logits, batch, config, None)
        if kernels is None:
            loss, *_ = reference.grpo_loss(*arguments)
        else:
            loss, *_ = fused_loss.grpo_loss(kernels, *arguments, inplace=False)
        assert loss.isnan()


# ---- what a loss scale protects


@pytest.mark.parametrize(("linear", "autocast"), [(False, False), (True, False), (True, True)])
def test_an_fp16_loss_scale_acts_before_gradients_are_rounded(impl, linear, autocast):
    """Gradients once made for an upstream gradient of 1, and scaled when most of them had become 0."""
    generator = torch.Generator().manual_seed(0)
    rows, V, H = 24, 4000, 32
    hidden = torch.randn(rows, H, generator=generator)
    weight = 0.3 * torch.randn(V, H, generator=generator)
    ids = torch.randint(V, (rows,), generator=generator)
    advantages, lengths = torch.randn(rows, generator=generator), torch.tensor([0, 8, 16, 24])
    config = GRPOLossConfig(loss_type="dapo")

    def gradients(dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
        leaves = [
            x.to(dtype, copy=True).requires_grad_() for x in ((hidden, weight) if linear else (hidden @ weight.T,))
        ]
        function = linear_grpo_loss if linear else grpo_loss
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast and dtype != torch.float64):
            out = function(
                *leaves, ids, advantages, cu_seqlens=lengths, num_items_in_batch=2.0**14, config=config, impl=impl
            )
        (out.loss * 2.0**16).backward()
        return [leaf.grad.double() for leaf in leaves]

    found = gradients(torch.float32 if autocast else torch.float16, impl)
    for ours, true in zip(found, gradients(torch.float64, "torch"), strict=True):
        assert float((ours - true).norm() / true.norm()) < 5e-3


@pytest.mark.parametrize("linear", [False, True])
def test_no_tokens_with_a_kl_term(impl, linear):
    """An empty tensor has no address; it was once taken for a reference that had not been given."""
    shape, none = (2, 0), torch.zeros(2, 0)
    leaf = torch.zeros(*shape, 7, requires_grad=True)
    head = (torch.randn(5, 7),) if linear else ()
    out = (linear_grpo_loss if linear else grpo_loss)(
        leaf, *head, none.long(), torch.ones(2), ref_per_token_logps=none, config=GRPOLossConfig(beta=0.1), impl=impl
    )
    out.loss.backward()
    assert float(out.loss) == 0.0 and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("ids", [torch.tensor([0.7, 1.2]), torch.tensor([True, False])], ids=["float", "bool"])
def test_ids_that_are_no_ids_are_refused(impl, ids):
    with pytest.raises(ValueError, match="token ids must be int32 or int64"):
        selective_log_softmax(torch.zeros(2, 5), ids, impl=impl)
    with pytest.raises(ValueError, match="token ids must be int32 or int64"):
        linear_selective_log_softmax(torch.zeros(2, 3), torch.zeros(5, 3), ids, impl=impl)


def test_overlapping_logits_are_not_overwritten(impl):
    """Each row begins inside the one before it, so writing one row's gradient would change the next row's logits."""
    V, memory = 7, torch.randn(20, generator=torch.Generator().manual_seed(0))
    args = (torch.tensor([[1, 2, 3, 4]]), torch.ones(1))

    def gradient(inplace: bool) -> torch.Tensor:
        leaf = memory.clone().as_strided((1, 4, V), (0, 2, 1)).requires_grad_()
        out = grpo_loss(leaf, *args, config=GRPOLossConfig(), impl=impl, inplace=inplace)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        return grad.clone()

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("scale", [0.0, NAN, INF])
def test_a_logit_scale_that_is_none_is_refused(impl, scale):
    with pytest.raises(ValueError, match="logit_scale"):
        linear_selective_log_softmax(
            torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64), logit_scale=scale, impl=impl
        )


@pytest.mark.parametrize("count", [-5, NAN])
def test_a_number_of_tokens_that_is_none_is_refused(impl, count):
    args = (torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1))
    with pytest.raises(ValueError, match="num_items_in_batch"):
        grpo_loss(*args, num_items_in_batch=count, config=GRPOLossConfig(loss_type="dapo"), impl=impl)
