"""fp64 finite differences agree with the gradients of every loss type, level and option."""

from dataclasses import replace

import pytest
import torch

from igrpo_kernels import (
    GRPOLossConfig,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.objective import grpo_objective, objective_and_row_gradients
from tests.kernels.oracle import CONSTANT_WEIGHTS, LOSS_LEVELS, REQUIRED, boundary_inputs, loss_and_grad, packed

OPTIONS = {
    "plain": {},
    "k3": {"beta": 0.3},
    "k2 without correction": {"beta": 0.3, "kl_estimator": "k2", "use_bias_correction_kl": False},
    "k1": {"beta": 0.3, "kl_estimator": "k1"},
    "sampler and OPSM": {"importance_sampling_mode": "token_truncate", "off_policy_mask_threshold": 0.02},
    "entropy": {"entropy_coef": 0.2, "top_entropy_quantile": 0.6},
    "logits": {"temperature": 0.7, "logit_scale": 1.3, "final_logit_softcapping": 5.0},
    "all": {
        "beta": 0.3,
        "importance_sampling_mode": "token_mask",
        "entropy_coef": 0.2,
        "top_entropy_quantile": 0.8,
        "temperature": 1.4,
        "final_logit_softcapping": 5.0,
    },
}


def make_config(loss_type, level, options):
    options = {**REQUIRED.get(loss_type, {}), **options}
    return GRPOLossConfig(loss_type=loss_type, importance_sampling_level=level, max_completion_length=7, **options)


def small_inputs(level):
    return boundary_inputs(B=4, T=5, V=4, level=level, seed=1)


@pytest.mark.parametrize("options", list(OPTIONS), ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize(
    ("loss_type", "level"), [p for p in LOSS_LEVELS if p[0] not in CONSTANT_WEIGHTS and p[1] != "sequence_token"]
)
def test_logits_gradient(loss_type, level, options):
    config, inputs = make_config(loss_type, level, OPTIONS[options]), small_inputs(level)

    def loss(logits):
        return call(grpo_loss, logits, inputs=inputs, config=config).loss

    assert torch.autograd.gradcheck(loss, inputs.logits.clone().requires_grad_())


@pytest.mark.parametrize("options", list(OPTIONS), ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize(("loss_type", "level"), [p for p in LOSS_LEVELS if p[0] in CONSTANT_WEIGHTS])
def test_logits_gradient_with_detached_weights(loss_type, level, options):
    """The weight is a constant: the loss is linear in logp, so differences of a surrogate whose
    ratio is frozen at the point of evaluation must reproduce the gradient."""
    options = {"epsilon_high": 1.3, **OPTIONS[options]} if loss_type == "cispo" else OPTIONS[options]
    config, inputs = make_config(loss_type, level, options), small_inputs(level)
    policy_only = replace(config, beta=0.0, entropy_coef=0.0)
    batch = TokenBatch.build(inputs.completion_ids, inputs.advantages, dtype=torch.float64, **inputs.keywords(config))
    out, grad = loss_and_grad(inputs, policy_only, num_items_in_batch=9)
    _, _, slope, _ = objective_and_row_gradients(
        out.per_token_logps.flatten(), out.entropy.flatten(), batch, policy_only, 9
    )

    def frozen(logits):
        logps = selective_log_softmax(
            logits * config.logit_scale
            if config.final_logit_softcapping is None
            else config.final_logit_softcapping * (logits * config.logit_scale / config.final_logit_softcapping).tanh(),
            inputs.completion_ids,
            temperature=config.temperature,
        )
        return (slope * logps.flatten()).sum()

    logits = inputs.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(frozen, logits)
    torch.testing.assert_close(torch.autograd.grad(frozen(logits), logits)[0], grad, rtol=1e-10, atol=1e-14)
    # loss = sum(slope·logp) for these, which pins the slope itself
    torch.testing.assert_close((slope * out.per_token_logps.flatten()).sum(), out.loss.detach())


@pytest.mark.parametrize("loss_type", CONSTANT_WEIGHTS)
def test_kl_and_entropy_beside_detached_weights(loss_type):
    """With A = 0 the detached policy term vanishes and everything left must pass finite differences."""
    config = make_config(loss_type, "token", {"beta": 0.3, "entropy_coef": 0.2})
    inputs = replace(small_inputs("token"), advantages=torch.zeros(4, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda logits: call(grpo_loss, logits, inputs=inputs, config=config).loss,
        inputs.logits.clone().requires_grad_(),
    )


@pytest.mark.parametrize("extra", [{"delta": 1.3}, {"dual_clip": 1.3}], ids=["delta", "dual_clip"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ratio_bounds(extra, level):
    config, inputs = make_config("grpo", level, extra), small_inputs(level)
    assert torch.autograd.gradcheck(
        lambda logits: call(grpo_loss, logits, inputs=inputs, config=config).loss,
        inputs.logits.clone().requires_grad_(),
    )


@pytest.mark.parametrize("options", ["k3", "all"])
@pytest.mark.parametrize(("loss_type", "level"), [("grpo", "token"), ("grpo", "sequence"), ("dapo", "token")])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_linear_loss_in_hidden_weight_and_bias(loss_type, level, options, layout):
    config = make_config(loss_type, level, {"logit_scale": 0.8, **OPTIONS[options]})
    inputs = small_inputs(level)
    inputs = inputs if layout == "padded" else packed(inputs)
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((*inputs.completion_ids.shape, 3), (4, 3), (4,))
    )

    def loss(hidden, weight, bias):
        return call(linear_grpo_loss, hidden, weight, inputs=inputs, config=config, lm_head_bias=bias).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("return_entropy", [False, True])
def test_log_probs_and_entropy_are_both_differentiable(return_entropy):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.randint(5, (3, 4), generator=generator)
    assert torch.autograd.gradcheck(
        lambda x: selective_log_softmax(x, index, temperature=0.6, return_entropy=return_entropy), logits
    )
    hidden = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in ((5, 2), (5,))
    )
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_selective_log_softmax(
            h, w, index, lm_head_bias=b, temperature=0.6, logit_scale=1.7, final_logit_softcapping=3.0,
            return_entropy=return_entropy,
        ),
        (hidden, weight, bias),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("loss_type", "level"), [("grpo", "sequence"), ("luspo", "token"), ("sapo", "sequence")])
def test_row_gradients_are_the_objective_s_own(loss_type, level, layout):
    config = make_config(loss_type, level, OPTIONS["all"])
    inputs = small_inputs(level)
    inputs = inputs if layout == "padded" else packed(inputs)
    batch = TokenBatch.build(inputs.completion_ids, inputs.advantages, dtype=torch.float64, **inputs.keywords(config))
    logps, entropy = selective_log_softmax(inputs.logits, inputs.completion_ids, return_entropy=True)
    leaves = [logps.flatten().requires_grad_(), entropy.flatten().requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, b: grpo_objective(a, b, batch, config)[0], leaves)
    loss, metrics, dlogps, dentropy = objective_and_row_gradients(*leaves, batch, config)
    expected = torch.autograd.grad(grpo_objective(*leaves, batch, config)[0], leaves)
    torch.testing.assert_close((dlogps, dentropy), expected, rtol=0, atol=0)
    assert not loss.requires_grad and not any(value.requires_grad for value in metrics.values())
    assert objective_and_row_gradients(*leaves, batch, replace(config, entropy_coef=0.0))[3] is None


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("loss_type", "level"), LOSS_LEVELS)
def test_masked_rows_of_the_objective_may_hold_nan(loss_type, level, layout):
    """Kernels leave masked rows of their log-prob buffers unwritten and rely on this."""
    config = make_config(loss_type, level, {**OPTIONS["all"], "off_policy_mask_threshold": 0.02})
    if loss_type == "vespo":
        config = replace(config, importance_sampling_mode="token_mask")
    inputs = small_inputs(level)
    mask = inputs.completion_mask.clone()
    mask[:, 1] = False
    keywords = {**inputs.keywords(config), "completion_mask": mask}
    ids = inputs.completion_ids
    if layout == "packed":
        keywords = {name: None if x is None else x.flatten() for name, x in keywords.items()}
        keywords["cu_seqlens"] = torch.arange(0, ids.numel() + 1, ids.shape[1])
        ids = ids.flatten()
    batch = TokenBatch.build(ids, inputs.advantages, dtype=torch.float64, **keywords)
    rows = [x.flatten() for x in selective_log_softmax(inputs.logits, inputs.completion_ids, return_entropy=True)]
    clean = objective_and_row_gradients(*rows, batch, config, 9)
    dirty = objective_and_row_gradients(*(x.masked_fill(~batch.mask, torch.nan) for x in rows), batch, config, 9)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert all((grad[~batch.mask] == 0).all() for grad in dirty[2:])


def call(function, *tensors, inputs, config, **extra):
    return function(
        *tensors,
        inputs.completion_ids,
        inputs.advantages,
        config=config,
        num_items_in_batch=9,
        **inputs.keywords(config),
        **extra,
    )
