"""`distillation_weight`: the divergence to a teacher's top k, against TRL's own functions on whole fp64 log-probs."""

import math
from dataclasses import replace

import pytest
import torch
from trl.experimental.sdpo.loss_utils import add_tail_bucket, compute_divergence

from igrpo_kernels import GRPOLossConfig, SamplingMask, distillation, grpo_loss, linear_topk_log_softmax, lm_head
from tests.kernels.oracle import (
    IMPLS,
    assert_close_to_truth,
    boundary_inputs,
    full_config,
    linear_loss_and_grads,
    loss_and_grad,
    packed,
    random_head,
)

K = 5
CONFIGS = [
    GRPOLossConfig(distillation_weight=0.3, distillation_alpha=0.0),
    GRPOLossConfig("dapo", distillation_weight=1.0),
    GRPOLossConfig("dapo", "sequence", distillation_weight=0.6, distillation_alpha=0.3, entropy_coef=0.02),
    full_config(distillation_weight=0.5, temperature=0.7, final_logit_softcapping=3.0, logit_scale=1.3),
]


def teacher_of(inputs, k=K, seed=3):
    """Top k of other logits, near enough that the token's own id is often among them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(inputs.logits.shape, generator=generator, dtype=torch.float64)
    logps, ids = (inputs.logits + 1.5 * noise).log_softmax(-1).topk(k, -1)
    return {"teacher_topk_ids": ids, "teacher_topk_logps": logps}


def plain(logits, inputs, config, teacher):
    """The part that is added, on whole logits."""
    z = logits * config.logit_scale
    if config.final_logit_softcapping is not None:
        z = torch.tanh(z / config.final_logit_softcapping) * config.final_logit_softcapping
    policy = (z / config.temperature).log_softmax(-1).gather(-1, teacher["teacher_topk_ids"])
    buckets = add_tail_bucket(policy), add_tail_bucket(teacher["teacher_topk_logps"])
    found = compute_divergence(*buckets, config.distillation_alpha)
    mask = inputs.completion_mask
    found = torch.where(mask, found, 0.0)
    mean = found.sum() / mask.sum()
    loss = mean if config.loss_type == "dapo" else (found.sum(-1) / mask.sum(-1)).mean()
    return config.distillation_weight * loss, mean


def truth_of(inputs, config, teacher):
    """Loss, its gradient and the metric in fp64."""
    without = replace(config, distillation_weight=0.0)
    out, grad = loss_and_grad(inputs, without)
    logits = inputs.logits.detach().clone().requires_grad_()
    added, metric = plain(logits, inputs, config, teacher)
    added.backward()
    rest = 1.0 - config.distillation_weight
    return rest * out.loss.detach() + added.detach(), rest * grad + logits.grad, metric.detach()


def typed(inputs, dtype):
    return type(inputs)(**{**vars(inputs), "logits": inputs.logits.to(dtype)})


def as_packed(inputs, teacher):
    return packed(inputs), {name: x[inputs.completion_mask] for name, x in teacher.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.loss_type}-{c.distillation_weight}")
def test_the_loss_and_its_gradient_are_trls(config, impl):
    inputs = boundary_inputs(level=config.importance_sampling_level)
    teacher = teacher_of(inputs)
    own = (teacher["teacher_topk_ids"] == inputs.completion_ids[..., None]).any(-1)
    assert own.any() and not own.all()
    loss, grad, metric = truth_of(inputs, config, teacher)
    mask = inputs.completion_mask
    for dtype in [torch.float64, torch.float32] if impl == "torch" else [torch.float32]:
        close = {"rtol": 1e-9 if dtype == torch.float64 else 2e-5, "atol": 1e-9}
        flat = as_packed(inputs, teacher)
        for (some, its), expected in (((inputs, teacher), grad), (flat, grad[mask])):
            for inplace in (False, True):
                some = typed(some, dtype)
                keywords = {**its, "inplace": inplace, "impl": impl}
                out, found = loss_and_grad(some, config, **keywords)
                assert_close_to_truth("loss", out.loss, loss, **close)
                assert_close_to_truth("gradient", found, expected, **close)
                assert_close_to_truth("metric", out.metrics["self_distillation/distillation_loss"], metric, **close)
                with torch.no_grad():
                    value = grpo_loss(
                        some.logits, some.completion_ids, some.advantages, config=config, impl=impl,
                        **some.keywords(config), **its,
                    ).loss  # fmt: skip
                assert_close_to_truth("loss without gradient", value, loss, **close)


@pytest.mark.parametrize("impl", IMPLS)
def test_beside_a_temperature_of_each_token(impl):
    inputs, config = boundary_inputs(), replace(CONFIGS[0], final_logit_softcapping=3.0)
    teacher, dtype = teacher_of(inputs), torch.float64 if impl == "torch" else torch.float32
    own = torch.linspace(0.5, 1.5, inputs.completion_ids.numel()).view_as(inputs.completion_ids)
    bent = 3.0 * torch.tanh(inputs.logits / 3.0)
    loss, grad, _ = truth_of(replace(inputs, logits=bent / own[..., None]), CONFIGS[0], teacher)
    out, found = loss_and_grad(typed(inputs, dtype), config, impl=impl, temperatures=own, **teacher)
    assert_close_to_truth("loss", out.loss, loss, rtol=2e-5)
    assert_close_to_truth("gradient", found, grad * (1 - (bent / 3.0) ** 2) / own[..., None], rtol=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_the_gradient_once(dtype, impl):
    inputs, config = boundary_inputs(), CONFIGS[0]
    inputs = typed(typed(inputs, dtype), torch.float64)
    teacher = teacher_of(inputs)
    _, truth, _ = truth_of(inputs, config, teacher)
    _, found = loss_and_grad(typed(inputs, dtype), config, impl=impl, **teacher)
    assert_close_to_truth("gradient", found, truth, baseline=truth.to(dtype), factor=1.001, rtol=1e-5, atol=1e-7)
    assert found[~inputs.completion_mask].abs().max() == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[3]], ids=lambda c: c.loss_type)
def test_the_linear_loss_is_that_of_its_logits(config, impl, monkeypatch):
    inputs = boundary_inputs()
    dtype = torch.float64 if impl == "torch" else torch.float32
    head = [x.detach().double().requires_grad_() for x in random_head(inputs, dtype=dtype)]
    logits = head[0] @ head[1].t() + head[2]
    inputs = type(inputs)(**{**vars(inputs), "logits": logits.detach()})
    teacher = teacher_of(inputs)
    loss, grad, _ = truth_of(inputs, config, teacher)
    logits.backward(grad)
    close = {"rtol": 1e-9 if dtype == torch.float64 else 5e-5, "atol": 1e-9}
    for chunk in (None, 4096):
        if chunk is not None:
            monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", chunk)
        for (some, its), rows in (((inputs, teacher), ...), (as_packed(inputs, teacher), inputs.completion_mask)):
            leaves = [x.detach().to(dtype).requires_grad_() for x in (head[0][rows], *head[1:])]
            for metrics in (True, False):
                keywords = {**its, "impl": impl, "compute_metrics": metrics}
                out, grads = linear_loss_and_grads(*leaves, some, config, **keywords)
                assert_close_to_truth("loss", out.loss, loss, **close)
                for x, y in zip(grads, (head[0].grad[rows], head[1].grad, head[2].grad), strict=True):
                    assert_close_to_truth("gradient", x, y, **close)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_edges(alpha, impl):
    """Garbage in masked rows, no entry, all entries, no mass on either side, a token without an advantage."""
    inputs = boundary_inputs(V=9)
    config = GRPOLossConfig("dapo", distillation_weight=0.5, distillation_alpha=alpha)
    dtype = torch.float64 if impl == "torch" else torch.float32
    close = {"rtol": 1e-9 if dtype == torch.float64 else 2e-5, "atol": 1e-7}
    teacher = teacher_of(inputs, k=9)
    inputs.advantages[0] = 0.0
    _, truth, _ = truth_of(inputs, config, teacher)  # k = V: the divergence over the whole vocabulary
    dirty = {name: x.clone() for name, x in teacher.items()}
    outside = ~inputs.completion_mask
    dirty["teacher_topk_ids"][outside], dirty["teacher_topk_logps"][outside] = -7, torch.nan
    _, found = loss_and_grad(typed(inputs, dtype), config, impl=impl, **dirty)
    assert_close_to_truth("gradient", found, truth, **close)
    assert found[0].abs().max() > 0

    few = teacher_of(inputs, k=3)
    cut = {name: x.clone() for name, x in teacher_of(inputs, k=5).items()}
    cut["teacher_topk_ids"][..., 3] = -1
    cut["teacher_topk_logps"][..., 4] = -torch.inf
    wanted, _ = loss_and_grad(typed(inputs, dtype), config, impl=impl, **few)
    got, _ = loss_and_grad(typed(inputs, dtype), config, impl=impl, **cut)
    assert_close_to_truth("loss without two entries", got.loss, wanted.loss, rtol=1e-6)

    none = {**few, "teacher_topk_ids": torch.full_like(few["teacher_topk_ids"], -1)}
    got, grad = loss_and_grad(typed(inputs, dtype), config, impl=impl, **none)
    plain_out, plain_grad = loss_and_grad(typed(inputs, dtype), GRPOLossConfig("dapo"), impl=impl)
    assert_close_to_truth("loss without any", 2 * got.loss, plain_out.loss, rtol=1e-6)
    assert_close_to_truth("gradient without any", 2 * grad, plain_grad, rtol=1e-6)
    assert got.metrics["self_distillation/distillation_loss"] == 0

    lacking = typed(inputs, dtype)
    lacking.logits[0, 0, few["teacher_topk_ids"][0, 0, 0]] = -torch.inf
    lacking.completion_ids[0, 0] = few["teacher_topk_ids"][0, 0, 1]
    lacking.old_per_token_logps[0, 0] = lacking.logits[0, 0].log_softmax(-1)[lacking.completion_ids[0, 0]]
    got, grad = loss_and_grad(lacking, config, impl=impl, **few)
    assert got.loss.isinf() if alpha == 0.0 else got.loss.isfinite()
    assert alpha == 0.0 or grad.isfinite().all()

    padded = typed(inputs, dtype)  # columns without mass on either side, with finite logits, among the entries
    padded.logits[..., 5:] = -1e4
    padded.completion_ids.clamp_(max=4)
    got, grad = loss_and_grad(padded, config, impl=impl, **teacher_of(padded, k=7))
    assert got.loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_teacher_in_sixteen_bits_is_one(impl):
    """Its sum is off by more than its numbers are."""
    inputs, config = boundary_inputs(), GRPOLossConfig("dapo", distillation_weight=1.0)
    ids = torch.arange(37).expand(inputs.logits.shape)
    even = torch.full(ids.shape, -math.log(37))
    assert even.bfloat16().double().exp().sum(-1).min() > 1.001
    losses = [
        loss_and_grad(typed(inputs, torch.float32), config, impl=impl, teacher_topk_ids=ids, teacher_topk_logps=logps)
        for logps in (even, even.bfloat16())
    ]
    (wanted, _), (found, _) = losses
    assert_close_to_truth("loss", found.loss, wanted.loss, rtol=5e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.slow
def test_finite_differences(alpha):
    inputs = boundary_inputs(T=8, V=5)
    config = GRPOLossConfig("dapo", distillation_weight=0.7, distillation_alpha=alpha, final_logit_softcapping=4.0)
    teacher = teacher_of(inputs, k=3)

    def loss(logits):
        old = {**inputs.keywords(config), **teacher}
        return grpo_loss(logits, inputs.completion_ids, inputs.advantages, config=config, impl="torch", **old).loss

    torch.autograd.gradcheck(loss, inputs.logits.clone().requires_grad_())


def test_a_divergence_is_none_where_both_are_equal_and_never_below_zero():
    z, noise = torch.randn(2, 64, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logps, ids = z.log_softmax(-1).topk(4)
    other = (z + noise).log_softmax(-1).gather(-1, ids)
    for alpha in (0.0, 0.2, 1.0):
        teacher = distillation.Teacher(ids, logps, alpha)
        assert teacher.divergence(logps).abs().max() < 1e-14
        assert teacher.divergence(other).min() > 0


WRONG = {
    "needs teacher_topk_ids": lambda t: {"teacher_topk_ids": None},
    "k entries for each": lambda t: {"teacher_topk_ids": t["teacher_topk_ids"][..., :2]},
    "int32 or int64": lambda t: {"teacher_topk_ids": t["teacher_topk_logps"]},
    "hold an id twice": lambda t: {"teacher_topk_ids": t["teacher_topk_ids"] * 0},
    "must lie in": lambda t: {"teacher_topk_ids": t["teacher_topk_ids"] + 30},
    "add up to more than 1": lambda t: {"teacher_topk_logps": t["teacher_topk_logps"] + 2},
    "cannot be combined": lambda t: {"sampling_mask": SamplingMask.from_top_k(torch.arange(37).expand(192, 37))},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_refused(message, monkeypatch):
    inputs, config = boundary_inputs(), CONFIGS[0]
    teacher = teacher_of(inputs)
    wrong = WRONG[message](teacher)
    with pytest.raises(ValueError, match=message):
        loss_and_grad(inputs, config, **{**teacher, **wrong})
    if message in ("hold an id twice", "must lie in", "add up to more than 1"):  # where values cannot be looked at
        monkeypatch.setattr(distillation, "values_may_be_read", lambda x: False)
        out, grad = loss_and_grad(inputs, config, **{**teacher, **wrong})
        assert out.loss.isnan() and grad[inputs.completion_mask].isnan().any(-1).any()


def test_the_teachers_top_k_come_chunk_by_chunk(monkeypatch):
    inputs = boundary_inputs()
    hidden, weight, bias = (x.detach() for x in random_head(inputs))
    z = 3 * torch.tanh(1.3 * (hidden @ weight.t() + bias) / 3) / 0.7
    logps, ids = z.log_softmax(-1).topk(K)
    monkeypatch.setattr("igrpo_kernels.reference.CHUNK_LOGITS", 37 * 50)
    options = {"lm_head_bias": bias, "temperature": 0.7, "logit_scale": 1.3, "final_logit_softcapping": 3.0}
    found_ids, found = linear_topk_log_softmax(hidden, weight, K, **options)
    assert torch.equal(found_ids, ids)
    torch.testing.assert_close(found, logps)
    with pytest.raises(ValueError, match="between 1 and"):
        linear_topk_log_softmax(hidden, weight, 38)
