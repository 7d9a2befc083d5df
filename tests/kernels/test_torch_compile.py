"""torch.compile(fullgraph=True) of the public functions: no graph break, no recompilation for a new length, the same
bits as without. `triton_kernels/test_compile.py` runs these on impl="triton"."""

from dataclasses import replace

import pytest
import torch

from igrpo_kernels import (
    GRPOLossConfig,
    available_impls,
    fused_linear_autograd,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    lm_head,
    selective_log_softmax,
)
from igrpo_kernels.batch import TokenBatch
from igrpo_kernels.impls import resolve_impl
from igrpo_kernels.objective import may_contribute
from igrpo_kernels.types import LogitTransform

IMPLS = tuple(name for name in ("torch", "cpu") if available_impls()[name] == "available")
pytestmark = pytest.mark.parametrize("impl", IMPLS)
V, H = 11, 6
TOKEN = GRPOLossConfig(loss_type="dapo", beta=0.1, entropy_coef=0.05, final_logit_softcapping=5.0)
SEQUENCE = GRPOLossConfig(importance_sampling_level="sequence", epsilon=0.9, epsilon_high=9.0)
CASES = [
    "log_probs", "token", "packed_sequence", "linear_log_probs", "linear_token", "linear_log_probs_whole",
    "linear_sequence_whole",
]  # fmt: skip


def tensors(T, device):
    """Everything a call needs, B = 2; the last token is masked."""
    generator = torch.Generator().manual_seed(T)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    ids = torch.randint(V, (2, T), generator=generator).to(device)
    mask = torch.ones(2, T, dtype=torch.bool, device=device)
    mask[1, -1] = False
    logps = randn(2, T) * 0.3 - 2.4
    return {
        "logits": randn(2, T, V), "hidden": randn(2, T, H), "weight": randn(V, H), "ids": ids, "mask": mask,
        "advantages": torch.tensor([1.0, -0.5], device=device), "old": logps, "ref": logps + 0.1,
        "cu_seqlens": torch.tensor([0, T, 2 * T], device=device), "temperatures": 1.0 + logps.abs().sqrt(),
    }  # fmt: skip


def outputs(case, impl, x, leaves):
    """Differentiable scalars and plain outputs of one call."""
    if case == "log_probs":
        logps, entropy = selective_log_softmax(leaves[0], x["ids"], return_entropy=True, impl=impl)
        return logps.sum() + entropy.sum(), logps, entropy
    mask = None if "whole" in case else x["mask"]
    if case.startswith("linear_log_probs"):
        one = {"temperature": 0.7} if mask is None else {"temperatures": x["temperatures"]}
        logps = linear_selective_log_softmax(*leaves, x["ids"], row_mask=mask, impl=impl, **one)
        return logps.sum(), logps
    rows = {"completion_mask": mask, "old_per_token_logps": x["old"]}
    config = SEQUENCE if "sequence" in case else TOKEN
    if config.beta:
        rows["ref_per_token_logps"] = x["ref"]
    if mask is not None:
        rows["temperatures"] = x["temperatures"]
    arguments = {"config": config, "impl": impl, "num_items_in_batch": 7}
    ids = x["ids"]
    if case == "packed_sequence":
        rows, ids = {name: value.flatten() for name, value in rows.items()}, ids.flatten()
        arguments["cu_seqlens"], leaves = x["cu_seqlens"], [leaves[0].flatten(0, 1)]
    function = linear_grpo_loss if case.startswith("linear") else grpo_loss
    out = function(*leaves, ids, x["advantages"], **rows, **arguments)
    return out.loss, out.per_token_logps, out.entropy, out.metrics["clip_ratio/region_mean"] + 0.0 * out.loss.detach()


def leaves_of(case, x):
    return [x[name].clone().requires_grad_() for name in (["hidden", "weight"] if "linear" in case else ["logits"])]


@pytest.fixture
def device():
    return "cpu"


CASES_OF = {
    "cpu": CASES,
    # The one with autograd functions of its own; the fused linear compacts rows in plain PyTorch: not one graph.
    "torch": ["packed_sequence"],
    # The rest of the Python is impl="cpu"'s, and test_autograd.py compiles the operators.
    "triton": ["token", "linear_log_probs", "linear_token"],
}


@pytest.mark.applies(lambda x: x["case"] in CASES_OF[x["impl"]], otherwise="CASES_OF says why")
@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_every_length(case, impl, device, monkeypatch):
    monkeypatch.setitem(lm_head.CHUNK_BYTES, "cpu", 12 * 4 * V)  # between the lengths
    torch._dynamo.reset()
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (5, 3, 8):
        x = tensors(T, device)
        results = []
        for function in (outputs, compiled):
            leaves = leaves_of(case, x)
            with torch.compiler.set_stance("fail_on_recompile" if T != 5 else "default"):
                loss, *rest = function(case, impl, x, leaves)
            loss.backward()
            results.append([loss.detach(), *(y.detach() for y in rest), *(leaf.grad for leaf in leaves)])
        assert all(leaf.grad.abs().max() > 1e-4 for leaf in leaves)
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.applies(lambda x: x["impl"] != "torch", otherwise="the reference has no operators")
def test_opcheck_of_the_linear_operators(impl, device):
    """Schemas, fake kernels and dynamic shapes of what a graph calls instead of the chunked functions."""
    x = tensors(4, device)
    batch = TokenBatch.build(
        x["ids"], x["advantages"], dtype=torch.float32, completion_mask=x["mask"], old_per_token_logps=x["old"]
    )
    batch = replace(batch, temperatures=x["temperatures"].flatten())
    config = GRPOLossConfig()
    head = (x["hidden"].flatten(0, 1), x["weight"], torch.zeros(V, device=device))
    plan = (torch.float32, torch.float32, 3)
    contributes = may_contribute(batch, config)
    inputs = list(resolve_impl(impl, device).coefficient_inputs(batch, config, None))
    arguments = (impl, *head, inputs, contributes, batch.mask & ~contributes)
    needs = [True, True, False]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    loss_arguments = (*arguments, *fused_linear_autograd._config_arguments(config), needs, *plan)
    torch.library.opcheck(fused_linear_autograd.linear_token_loss, loss_arguments, test_utils=checks)
    rows, transform = (impl, *head, batch.index, batch.mask), tuple(LogitTransform(temperatures=batch.temperatures))
    torch.library.opcheck(fused_linear_autograd.linear_log_probs, (*rows, *transform, True, *plan), test_utils=checks)
    stats = fused_linear_autograd.linear_log_probs(*rows, *transform, True, *plan)
    grads = (batch.advantages, None)
    backward = (*rows, *stats, *grads, *transform, needs, *plan)
    torch.library.opcheck(fused_linear_autograd.linear_log_probs_backward, backward, test_utils=checks)


@pytest.mark.parametrize("config", [TOKEN, SEQUENCE, GRPOLossConfig("dr_grpo", max_completion_length=9, delta=2.0)])
def test_a_configuration_survives_the_operator_boundary(config, impl):
    assert fused_linear_autograd._config(*fused_linear_autograd._config_arguments(config)) == config
