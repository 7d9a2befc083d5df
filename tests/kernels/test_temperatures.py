"""`temperatures`: every token's logits divided by its own number, in value and in gradient.

The truth is the reference's ordinary loss in fp64 on logits that autograd divided.
"""

import pytest
import torch

from igrpo_kernels import (
    GRPOLossConfig,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    linear_topk_log_softmax,
    lm_head,
    reference,
    selective_log_softmax,
)
from tests.kernels.oracle import IMPLS, assert_close_to_truth, boundary_inputs, full_config, packed, random_head
from tests.kernels.test_sampling_mask import mask_of, random_sets

CAPPED = {"logit_scale": 1.3, "final_logit_softcapping": 5.0}
CONFIGS = {
    "clipped": GRPOLossConfig(),
    "every term": full_config(**CAPPED, importance_sampling_mode="token_mask", off_policy_mask_threshold=None,
                              top_entropy_quantile=1.0),
    "two passes": full_config("dapo", "sequence", **CAPPED),
    "taught": GRPOLossConfig("dapo", distillation_weight=0.6, distillation_alpha=0.3, entropy_coef=0.1, **CAPPED),
    "cap alone": GRPOLossConfig("cispo", epsilon_high=1.3, final_logit_softcapping=3.0, entropy_coef=0.3),
}  # fmt: skip
CASES = [(name, "padded", False) for name in CONFIGS] + [
    ("every term", "packed", False),
    ("two passes", "packed", True),
]


def spread(inputs):
    """From 0.3 to 3, a factor apart from one token to the next, as the logits' view: NaN where masked."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.rand(*inputs.completion_ids.shape, 2, generator=generator, dtype=torch.float64).mul(2.3).sub(1.2).exp()
    temperatures = wide[..., 1]  # not contiguous
    return (
        temperatures if inputs.completion_mask is None else temperatures.masked_fill(~inputs.completion_mask, torch.nan)
    )


def divided(logits, temperatures, config):
    """z of fp64 logits, and a configuration whose loss of z is that of the logits."""
    x, cap = logits * config.logit_scale, config.final_logit_softcapping
    x = x if cap is None else cap * torch.tanh(x / cap)
    values = {**vars(config), "logit_scale": 1.0, "final_logit_softcapping": None}
    return x / temperatures.nan_to_num(1.0)[..., None], GRPOLossConfig(**values)


def close_to(impl):
    return {"rtol": 1e-11, "atol": 1e-12} if impl == "torch" else {"rtol": 3e-5, "atol": 1e-7}


def teacher_of(inputs, config):
    """Top 5 of other logits, where the configuration has a teacher."""
    if not config.distillation_weight:
        return {}
    logps, ids = inputs.logits.roll(1, 0).log_softmax(-1).topk(5, -1)
    return {"teacher_topk_ids": ids, "teacher_topk_logps": logps}


def dtype_of(impl):
    return torch.float64 if impl == "torch" else torch.float32


def same(out, truth, close):
    for name in ("loss", "per_token_logps", "entropy"):
        assert_close_to_truth(name, getattr(out, name), getattr(truth, name), **close)
    for name in truth.metrics:
        assert_close_to_truth(name, out.metrics[name], truth.metrics[name], **close)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("name", "layout", "kept"), CASES)
def test_a_loss_is_that_of_logits_divided_one_by_one(name, layout, kept, impl):
    config, inputs = CONFIGS[name], boundary_inputs(level=CONFIGS[name].importance_sampling_level)
    inputs = packed(inputs) if layout == "packed" else inputs
    mask = mask_of(random_sets(inputs), inputs.completion_mask) if kept else None
    temperatures, leaf = spread(inputs), inputs.logits.clone().requires_grad_()
    # Old and other log-probs stay near the current ones.
    z, plain = divided(leaf, temperatures, config)
    rows = inputs.keywords(config) | {"sampling_mask": mask, "num_items_in_batch": 17}
    moved = selective_log_softmax(z.detach(), inputs.completion_ids, impl="torch")
    moved = moved - selective_log_softmax(inputs.logits, inputs.completion_ids, impl="torch")
    rows |= {k: v + moved for k, v in rows.items() if k.endswith("logps") and v is not None}
    rows |= teacher_of(inputs, config)
    truth = grpo_loss(z, inputs.completion_ids, inputs.advantages, config=plain, impl="torch", **rows)
    truth.loss.backward()
    assert leaf.grad.abs().max() > 1e-4
    storage = torch.full((*inputs.logits.shape[:-1], inputs.logits.shape[-1] + 3), torch.nan, dtype=dtype_of(impl))
    storage[..., 2:-1] = inputs.logits
    storage.requires_grad_()
    for inplace in (False, True):
        storage.grad, view = None, storage[..., 2:-1]  # rows lie 40 logits apart
        out = grpo_loss(
            view * 1.0 if inplace else view, inputs.completion_ids, inputs.advantages.to(dtype_of(impl)), config=config,
            impl=impl, temperatures=temperatures, inplace=inplace, **rows,
        )  # fmt: skip
        (2.0 * out.loss).backward()
        same(out, truth, close_to(impl))
        assert_close_to_truth("gradient", storage.grad[..., 2:-1], 2.0 * leaf.grad, **close_to(impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1000, 50])
@pytest.mark.parametrize(
    ("name", "kept"), [("clipped", False), ("two passes", False), ("every term", True), ("taught", False)]
)
def test_a_linear_loss_is_that_of_logits_divided_one_by_one(name, kept, rows, impl, monkeypatch):
    """In one chunk and in several, of which none looks at another's rows; some rows only report, some are masked."""
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", 37 * 4 * rows)
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 37 * rows)
    config, inputs = CONFIGS[name], boundary_inputs(level=CONFIGS[name].importance_sampling_level)
    head, temperatures = random_head(inputs), spread(inputs)
    advantages = inputs.advantages * (torch.arange(8) != 2)
    z, plain = divided(head[0] @ head[1].T + head[2], temperatures, config)
    mask = mask_of(random_sets(inputs), inputs.completion_mask) if kept else None
    given = inputs.keywords(config) | {"sampling_mask": mask, "num_items_in_batch": 17}
    given |= {
        k: inputs.old_per_token_logps * 0.0 - 3.0 for k, v in given.items() if k.endswith("logps") and v is not None
    }
    given |= teacher_of(inputs, config)
    truth = grpo_loss(z, inputs.completion_ids, advantages, config=plain, impl="torch", **given)
    true_grads = torch.autograd.grad(truth.loss, head)
    mine = [x.detach().to(dtype_of(impl)).requires_grad_() for x in head]
    out = linear_grpo_loss(
        mine[0], mine[1], inputs.completion_ids, advantages.to(dtype_of(impl)), lm_head_bias=mine[2], config=config,
        impl=impl, temperatures=temperatures, **given,
    )  # fmt: skip
    out.loss.backward()
    same(out, truth, close_to(impl))
    for x, true_grad in zip(mine, true_grads, strict=True):
        assert true_grad.abs().max() > 1e-4
        assert_close_to_truth("gradient", x.grad, true_grad, **close_to(impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("linear", [False, True])
def test_log_probs_and_entropies(linear, impl, monkeypatch):
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", 37 * 4 * 50)
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 37 * 50)
    inputs = boundary_inputs()
    head, temperatures, ids = random_head(inputs), spread(inputs).nan_to_num(1.0), inputs.completion_ids
    config = GRPOLossConfig(**(CAPPED if linear else {}))
    leaves = head if linear else [inputs.logits.clone().requires_grad_()]
    z, _ = divided(head[0] @ head[1].T + head[2] if linear else leaves[0], temperatures, config)
    true = selective_log_softmax(z, ids, return_entropy=True, impl="torch")
    mask = inputs.completion_mask if linear else torch.ones_like(inputs.completion_mask)
    (true[0] * mask).sin().sum().backward(retain_graph=True)
    (true[1] * mask).cos().sum().backward()
    mine = [x.detach().to(dtype_of(impl)).requires_grad_() for x in leaves]
    options = {"return_entropy": True, "impl": impl, "temperatures": temperatures.masked_fill(~mask, -1.0)}
    if linear:
        options |= {**CAPPED, "row_mask": mask, "lm_head_bias": mine[2]}
    function = linear_selective_log_softmax if linear else selective_log_softmax
    found = function(*mine[:2], ids, **options)
    (found[0].sin().sum() + found[1].cos().masked_fill(~mask, 0.0).sum()).backward()
    for name, a, b in zip(("logps", "entropy"), found, true, strict=True):
        assert_close_to_truth(name, a, b * mask, **close_to(impl))
    for x, leaf in zip(mine, leaves, strict=True):
        assert_close_to_truth("gradient", x.grad, leaf.grad, **close_to(impl))


def test_a_teachers_top_k_has_them_too():
    inputs = boundary_inputs()
    hidden, weight, bias = (x.detach() for x in random_head(inputs))
    temperatures = spread(inputs).nan_to_num(1.0)
    ids, logps = linear_topk_log_softmax(hidden, weight, 5, lm_head_bias=bias, temperatures=temperatures)
    z = (hidden @ weight.T + bias) / temperatures[..., None]
    assert_close_to_truth("logps", logps, z.log_softmax(-1).topk(5, -1).values, rtol=1e-12)
    assert torch.equal(ids, z.topk(5, -1).indices)


def test_gradcheck_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    w = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    ids, temperatures = torch.tensor([[1, 0, 4], [2, 2, 3]]), torch.tensor([[0.5, 1.0, 2.0]] * 2)
    options = {"temperatures": temperatures, "return_entropy": True, "impl": "torch"}
    assert torch.autograd.gradcheck(lambda z: selective_log_softmax(z, ids, **options), x)
    assert torch.autograd.gradcheck(lambda h, w: linear_selective_log_softmax(h, w, ids, **options, **CAPPED), (x, w))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_temperature_for_all_is_the_configuration_s_to_the_last_bit(impl):
    """Bits of bf16 logits, whose gradient is rounded once."""
    inputs = boundary_inputs().to(torch.bfloat16)
    results = []
    for config, more in (
        (full_config(temperature=0.7), {}),
        (full_config(), {"temperatures": torch.full((8, 24), 0.7)}),
    ):
        logits = inputs.logits.clone().requires_grad_()
        rows = inputs.keywords(config) | more
        out = grpo_loss(logits, inputs.completion_ids, inputs.advantages, config=config, impl=impl, **rows)
        out.loss.backward()
        results.append((out.loss.detach(), out.per_token_logps, out.entropy, logits.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


IDS = torch.tensor([[1, 0, 2]])
WRONG = {
    "a number": (0.7, {}, "must be a floating-point tensor, got float; one number for all tokens is `temperature`"),
    "integers": (torch.ones(1, 3, dtype=torch.int64), {}, "must be a floating-point tensor, got torch.int64"),
    "per sequence": (torch.ones(1), {}, r"has shape \(1,\) but the token ids have shape \(1, 3\).*expand"),
    "transposed": (torch.ones(3, 1), {}, r"has shape \(3, 1\)"),
    "twice": (torch.ones(1, 3), {"temperature": 0.7}, "take the place of temperature=0.7"),
    "zero": (torch.tensor([[1.0, 0.0, 1.0]]), {}, "finite and > 0 on unmasked positions, got 0.0; a greedy token"),
    "negative": (torch.tensor([[1.0, -1.0, 1.0]]), {}, "got -1.0"),
    "NaN": (torch.tensor([[1.0, 1.0, torch.nan]]), {}, "got nan"),
    "infinite": (torch.tensor([[torch.inf, 1.0, 1.0]]), {}, "got inf"),
    "too small for fp32": (torch.full((1, 3), 1e-60, dtype=torch.float64), {}, "got 0.0"),
    "elsewhere": (torch.ones(1, 3, device="meta"), {}, "is on meta but the token ids are on cpu"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_a_temperature_is_refused(case, impl):
    temperatures, more, words = WRONG[case]
    logits, hidden, weight = torch.zeros(1, 3, 4), torch.zeros(1, 3, 2), torch.zeros(4, 2)
    advantages, config = torch.ones(1), GRPOLossConfig(**more)
    calls = (
        lambda **o: selective_log_softmax(logits, IDS, **more, **o),
        lambda **o: linear_selective_log_softmax(hidden, weight, IDS, **more, **o),
        lambda **o: grpo_loss(logits, IDS, advantages, config=config, **o),
        lambda **o: linear_grpo_loss(hidden, weight, IDS, advantages, config=config, **o),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"^temperatures.*{words}"):
            call(impl=impl, temperatures=temperatures)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_unusable_temperature_of_a_graph_poisons_its_row(impl):
    """As on a GPU, where nobody may look."""
    logits = torch.randn(1, 3, 4, requires_grad=True)

    def call(temperatures):
        return selective_log_softmax(logits, IDS, temperatures=temperatures, impl=impl)

    torch._dynamo.reset()
    logps = torch.compile(call, backend="eager", fullgraph=True)(torch.tensor([[1.0, 0.0, 2.0]]))
    logps.sum().backward()
    assert logps.isnan().tolist() == [[False, True, False]]
    assert logits.grad.isnan().all(-1).tolist() == [[False, True, False]]
