"""Our losses under Liger's names against Liger's own chunked loss, on the CPU: values, gradients and metrics.

`triton_grpo_loss` is compared through the same door: hidden states that are the logits and an lm_head that is the
identity make Liger's fused loss a loss from logits.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from igrpo_kernels.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

B, T, H, V = 4, 9, 16, 40
liger = pytest.importorskip("liger_kernel.chunked_loss")

LOSSES = [
    ("grpo", "token"), ("bnpo", "token"), ("dr_grpo", "token"), ("dapo", "token"), ("cispo", "token"),
    ("sapo", "token"), ("luspo", "token"), ("vespo", "token"), ("grpo", "sequence"), ("dapo", "sequence"),
    ("luspo", "sequence"),
]  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"beta": 0.0},
    "kl": {"beta": 0.04},
    "kl, bias-corrected, ratio per token": {"beta": 0.04, "use_bias_correction_kl": True, "ratio": (B, T)},
    "two-sided, ratio per sequence": {"beta": 0.0, "delta": 1.3, "ratio": (B,)},
    "ratio in a column, own count, on-policy": {"beta": 0.04, "ratio": (B, 1), "num_items": 57.0, "old": False},
}  # fmt: skip


class Inputs:
    """Ragged, one sequence empty; old log-probs near the policy's, so that every branch of the clipping is met."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        g = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(B, T, H, generator=g).to(dtype)
        self.weight = (torch.randn(V, H, generator=g) / 2).to(dtype)
        self.bias = torch.randn(V, generator=g).to(dtype)
        self.ids = torch.randint(0, V, (B, T), generator=g)
        self.mask = (torch.arange(T) < torch.tensor([[T], [5], [0], [1]])).float()
        self.advantages = torch.tensor([1.0, -0.7, 0.4, -1.2])
        self.logits = (self.hidden.float() @ self.weight.float().t() + self.bias.float()).to(dtype)
        exact = (self.logits.float() / 0.9).log_softmax(-1).gather(-1, self.ids[..., None])[..., 0]
        self.old = exact + 0.3 * torch.randn(B, T, generator=g)
        self.ref = exact + 0.3 * torch.randn(B, T, generator=g)
        self.generator = g

    def ratio(self, shape: tuple[int, ...] | None) -> torch.Tensor | None:
        if shape is None:
            return None
        ratio = torch.rand(shape, generator=self.generator) + 0.5
        # Liger multiplies the ratios of padding into VESPO's sequence weight; there TRL always has 1.
        return torch.where(self.mask != 0, ratio, 1.0) if shape == (B, T) else ratio


def grads(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def close(ours: Any, theirs: Any, scale: float = 1.0) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6 * scale)


def constructor(loss_type: str, level: str, variant: dict[str, Any]) -> dict[str, Any]:
    delta = variant.get("delta") if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo") else None
    return {
        "beta": variant["beta"], "compiled": False, "use_ref_model": variant["beta"] != 0.0, "temperature": 0.9,
        "epsilon_low": 0.1, "epsilon_high": 1.1 if loss_type == "cispo" else 0.15, "loss_type": loss_type,
        "max_completion_length": 11, "importance_sampling_level": level, "delta": delta,
        "use_bias_correction_kl": variant.get("use_bias_correction_kl", False),
    }  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_the_fused_class_is_ligers(loss_type, level, variant):
    variant = VARIANTS[variant]
    x, keys = Inputs(), constructor(loss_type, level, variant)
    call = {
        "ref_per_token_logps": x.ref if variant["beta"] else None,
        "old_per_token_logps": x.old if variant.get("old", True) else None,
        "vllm_is_ratio": x.ratio(variant.get("ratio")), "num_items_in_batch": variant.get("num_items"),
    }  # fmt: skip
    results = []
    for cls in (liger.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss):
        leaves = [t.clone().requires_grad_() for t in (x.hidden, x.weight, x.bias)]
        loss, metrics = cls(**keys)(leaves[0], leaves[1], x.ids, x.mask, x.advantages, leaves[2], **call)
        results.append((loss, metrics, grads(3.0 * loss, *leaves)))
    (theirs, their_metrics, their_grads), (ours, our_metrics, our_grads) = results
    close(ours, theirs)
    assert type(our_metrics) is tuple and len(our_metrics) == len(their_metrics)
    for mine, other in zip(our_metrics, their_metrics, strict=True):
        close(mine, other)
    assert all(float(grad.abs().max()) > 1e-4 for grad in their_grads)
    for mine, other in zip(our_grads, their_grads, strict=True):
        close(mine, other, float(other.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("loss_type", "level"), LOSSES)
def test_the_loss_from_logits_is_ligers(loss_type, level, variant):
    """reduce=True against Liger; reduce=False summed up as Liger reduces, whole and tokens weighted at random."""
    variant = VARIANTS[variant]
    x, keys = Inputs(), constructor(loss_type, level, variant)
    ratio, old, ref = x.ratio(variant.get("ratio")), x.old if variant.get("old", True) else None, x.ref
    ids = torch.where(x.mask != 0, x.ids, 0)  # padding counts in Liger's fused LUSPO only; there it is left out here
    mask = torch.ones_like(x.mask) if loss_type == "luspo" else x.mask
    hidden = x.logits.clone().requires_grad_()
    theirs, their_metrics = liger.LigerFusedLinearGRPOLoss(**keys)(
        hidden, torch.eye(V), ids, mask, x.advantages, None, ref if keys["use_ref_model"] else None, old,
        vllm_is_ratio=ratio, num_items_in_batch=variant.get("num_items"),
    )  # fmt: skip
    (wanted,) = grads(theirs, hidden)

    same = {
        "temperature": 0.9, "beta": keys["beta"], "eps_low": 0.1, "eps_high": keys["epsilon_high"],
        "loss_type": loss_type, "max_completion_length": 11, "importance_sampling_level": level, "delta": keys["delta"],
        "use_bias_correction_kl": keys["use_bias_correction_kl"], "vllm_is_ratio": ratio,
        "num_items_in_batch": variant.get("num_items"),
    }  # fmt: skip
    one_more = torch.cat([x.logits, torch.full((B, 1, V), torch.nan)], 1).requires_grad_()  # the unused last row
    loss, metrics = triton_grpo_loss(
        one_more, old, ref if keys["beta"] else None, ids, x.advantages, mask, reduce=True, inplace=False, **same
    )
    assert type(metrics) is list and len(metrics) == len(their_metrics)
    close(loss, theirs)
    for mine, other in zip(metrics, their_metrics, strict=True):
        close(mine, other)
    (grad,) = grads(loss, one_more)
    assert float(grad[:, -1].abs().max()) == 0.0
    close(grad[:, :-1], wanted, float(wanted.abs().max()))

    per_token, kl, clipped = triton_grpo_loss(
        one_more, old, ref if keys["beta"] else None, ids, x.advantages, mask, **same
    )
    assert per_token.shape == clipped.shape == (B, T) and (kl is None) == (keys["beta"] == 0.0)
    assert not per_token[mask == 0].any() and not clipped[mask == 0].any()
    close(clipped.sum() / mask.sum(), metrics[-1])
    weights = reduction(loss_type, mask, variant.get("num_items"))
    close((per_token * weights).sum(), theirs)
    (grad,) = grads((per_token * weights).sum(), one_more)
    close(grad[:, :-1], wanted, float(wanted.abs().max()))


def reduction(loss_type: str, mask: torch.Tensor, num_items: float | None) -> torch.Tensor:
    """(B, T) weights whose sum over per-token losses is Liger's reduced loss."""
    lengths, tokens = mask.sum(-1, keepdim=True).clamp(min=1.0), mask.sum()
    return {
        "grpo": mask / lengths / B, "sapo": mask / lengths / B, "bnpo": mask / tokens, "dr_grpo": mask / (B * 11),
        "luspo": mask * mask.sum(-1, keepdim=True) / (B * T),
    }.get(loss_type, mask / (num_items or tokens))  # fmt: skip


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_names_order_and_defaults_of_the_class_are_ligers(method):
    ours, theirs = (getattr(cls, method) for cls in (LigerFusedLinearGRPOLoss, liger.LigerFusedLinearGRPOLoss))
    assert [(p.name, p.default) for p in inspect.signature(ours).parameters.values()] == [
        (p.name, p.default) for p in inspect.signature(theirs).parameters.values()
    ]


def test_names_order_and_defaults_of_the_function_are_ligers():
    """Read from the source: importing liger_kernel.transformers takes longer than all of this file."""
    source = Path(liger.__file__).parents[1] / "transformers" / "grpo_loss.py"
    functions = [
        node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    (theirs,) = (f.args for f in functions if f.name == "triton_grpo_loss")
    parameters = list(inspect.signature(triton_grpo_loss).parameters.values())
    assert [p.name for p in parameters] == [a.arg for a in theirs.args]
    defaults = [p.default for p in parameters if p.default is not inspect.Parameter.empty]
    assert defaults == [ast.literal_eval(d) for d in theirs.defaults]


def test_a_reference_model_instead_of_its_log_probabilities():
    x = Inputs()
    g = torch.Generator().manual_seed(1)
    ref_input, ref_weight, ref_bias = (torch.randn(*s, generator=g) for s in ((B, T, H), (V, H), (V,)))
    both = []
    for cls in (liger.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss):
        args = (x.hidden, x.weight, x.ids, x.mask, x.advantages, x.bias)
        loss_fn = cls(compiled=False, temperature=0.9)
        both.append(
            loss_fn(*args, old_per_token_logps=x.old, ref_input=ref_input, ref_weight=ref_weight, ref_bias=ref_bias)
        )
        with pytest.warns(UserWarning, match="Using ref_per_token_logps"):
            loss_fn(*args, x.ref, ref_input=ref_input, ref_weight=ref_weight)
    close(both[1][0], both[0][0])
    assert float(both[0][1][0]) > 0.1


def test_a_reference_model_does_not_read_masked_ids():
    """Trainers pad ids with -100; Liger never looks there, and neither must the reference's log-probabilities."""
    x, g = Inputs(), torch.Generator().manual_seed(1)
    ref_input, ref_weight = torch.randn(B, T, H, generator=g), torch.randn(V, H, generator=g)
    padded, both = torch.where(x.mask != 0, x.ids, -100), []
    for cls, ids in ((liger.LigerFusedLinearGRPOLoss, x.ids), (LigerFusedLinearGRPOLoss, padded)):
        args = (x.hidden, x.weight, ids, x.mask, x.advantages)
        loss_fn = cls(compiled=False)
        both.append(loss_fn(*args, old_per_token_logps=x.old, ref_input=ref_input, ref_weight=ref_weight)[0])
    close(both[1], both[0])


def test_without_a_reference_the_kl_is_zero():
    x = Inputs()
    hidden = x.hidden.clone().requires_grad_()
    loss, (kl, _) = LigerFusedLinearGRPOLoss(use_ref_model=False, compiled=False)(
        hidden, x.weight, x.ids, x.mask, x.advantages
    )
    other, (their_kl, _) = liger.LigerFusedLinearGRPOLoss(use_ref_model=False, compiled=False)(
        hidden, x.weight, x.ids, x.mask, x.advantages
    )
    close(loss, other)
    assert float(kl) == float(their_kl) == 0.0


def test_a_frozen_lm_head_and_bf16():
    """dX alone; in bf16 we stay closer to fp32 than the precision of the input allows anybody to be wrong by."""
    x = Inputs(torch.bfloat16)
    hidden = x.hidden.clone().requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, temperature=0.9)(
        hidden, x.weight, x.ids, x.mask, x.advantages, old_per_token_logps=x.old
    )
    loss.backward()
    exact = x.hidden.float().requires_grad_()
    wanted, _ = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, temperature=0.9)(
        exact, x.weight.float(), x.ids, x.mask, x.advantages, old_per_token_logps=x.old
    )
    wanted.backward()
    assert hidden.grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(hidden.grad.float(), exact.grad, rtol=5e-2, atol=1e-2 * float(exact.grad.abs().max()))


def wide_bf16() -> dict[str, torch.Tensor]:
    """Logits with a deviation of 16, as Liger's tests have them: bf16 rounds those by up to 1/8."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(torch.bfloat16)  # noqa: E731
    return {"hidden": draw(4, 32, 256), "weight": draw(512, 256), "bias": draw(512)}


def test_luspo_in_bf16_is_nearer_to_the_truth_than_liger():
    """Truth: Liger's loss in fp32 on the same numbers. What rounding a logit costs is multiplied by the length."""
    x, g = wide_bf16(), torch.Generator().manual_seed(4)
    ids, mask = torch.randint(0, 512, (4, 32), generator=g), torch.ones(4, 32)
    exact = {name: t.float() for name, t in x.items()}
    ref = {name: t + 0.01 * torch.randn(t.shape, generator=g).to(t.dtype) for name, t in x.items()}
    exact_ref = {name: t.float() for name, t in ref.items()}
    advantages = torch.tensor([1.0, -0.7, 0.4, -1.2])

    def run(cls, x, ref):
        leaves = [x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        loss_fn = cls(beta=0.1, loss_type="luspo", importance_sampling_level="sequence", compiled=False)
        loss, _ = loss_fn(
            leaves[0], leaves[1], ids, mask, advantages, leaves[2],
            ref_input=ref["hidden"], ref_weight=ref["weight"], ref_bias=ref["bias"],
        )  # fmt: skip
        return [loss.detach(), *grads(loss, *leaves)]

    truth = run(liger.LigerFusedLinearGRPOLoss, exact, exact_ref)
    theirs = run(liger.LigerFusedLinearGRPOLoss, x, ref)
    ours = run(LigerFusedLinearGRPOLoss, x, ref)
    for mine, other, true in zip(ours[1:], theirs[1:], truth[1:], strict=True):
        errors = [float((y.float() - true).norm() / true.norm()) for y in (mine, other)]
        assert errors[0] < 0.004 and errors[1] > 3 * errors[0]
    close(ours[0], truth[0])


def test_a_reference_that_is_the_policy_has_no_kl_whatever_the_precision():
    """Rounding only one of the two models' logits would look like a KL."""
    x = wide_bf16()
    ids = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(4))
    for loss_type in ("luspo", "grpo"):
        _, (kl, _) = LigerFusedLinearGRPOLoss(loss_type=loss_type, beta=0.1)(
            x["hidden"], x["weight"], ids, torch.ones(4, 32), torch.tensor([1.0, -0.7, 0.4, -1.2]), x["bias"],
            ref_input=x["hidden"], ref_weight=x["weight"], ref_bias=x["bias"],
        )  # fmt: skip
        assert float(kl) == 0.0


def test_shapes_that_liger_refuses_work():
    """A strided view of the logits, and transposed ids."""
    x = Inputs()
    wide = torch.randn(B, 2 * (T + 1), V, generator=x.generator)[:, ::2].requires_grad_()
    assert not wide.is_contiguous()
    ids = x.ids.t().contiguous().t()
    keys = {"beta": 0.0, "reduce": True, "inplace": False}
    loss, _ = triton_grpo_loss(wide, x.old, None, ids, x.advantages, x.mask, **keys)
    same, _ = triton_grpo_loss(wide.clone(), x.old, None, x.ids, x.advantages, x.mask, **keys)
    close(loss, same)
    (grad,) = grads(loss, wide)
    assert grad.shape == wide.shape and float(grad.abs().max()) > 0


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_what_liger_refuses_by_meaning_is_refused(loss_type):
    x = Inputs()
    with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported"):
        triton_grpo_loss(
            x.logits, None, None, x.ids[:, 1:], x.advantages, beta=0.0, loss_type=loss_type,
            importance_sampling_level="sequence",
        )  # fmt: skip
    with pytest.raises(ValueError, match="max_completion_length must be provided"):
        LigerFusedLinearGRPOLoss(loss_type="dr_grpo", use_ref_model=False)(
            x.hidden, x.weight, x.ids, x.mask, x.advantages
        )
    with pytest.raises(ValueError, match=r"vllm_is_ratio has shape \(3,\)"):
        triton_grpo_loss(
            x.logits, None, None, x.ids[:, 1:], x.advantages, beta=0.0, vllm_is_ratio=torch.ones(3)
        )  # fmt: skip
