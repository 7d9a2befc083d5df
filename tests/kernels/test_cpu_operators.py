"""The registered operators of _C_cpu themselves: schemas, fake kernels, compilation, and what a wrong call says."""

import pytest
import torch

from igrpo_kernels import GRPOLossConfig, available_impls, compiled_rows, grpo_loss
from igrpo_kernels.batch import TokenBatch
from tests.kernels.oracle import boundary_inputs

REASON = available_impls()["cpu"]
pytestmark = pytest.mark.skipif(REASON != "available", reason=REASON)


def operator_arguments():
    inputs = boundary_inputs(B=2, T=12, config=GRPOLossConfig(epsilon=0.05)).to(torch.float32)
    batch = TokenBatch.build(
        inputs.completion_ids, inputs.advantages, dtype=torch.float32, **inputs.keywords(GRPOLossConfig(beta=0.1))
    )
    return inputs.logits, batch


def test_opcheck():
    logits, batch = operator_arguments()
    transform, ops = (1.0, 0.0, 0.7), torch.ops.igrpo
    stats = ops.row_stats(logits, batch.index, batch.mask, *transform)
    row_arguments = (batch.index, batch.mask, *stats, batch.advantages, None, *transform)
    constants = (batch.index, batch.mask, batch.advantages, batch.advantages, batch.old_per_token_logps)
    constants = (*constants, batch.ref_per_token_logps, None, None, None, None)
    constants = (*constants, compiled_rows.objective_numbers(GRPOLossConfig(beta=0.1)), *transform)
    torch.library.opcheck(ops.row_stats, (logits, batch.index, batch.mask, *transform))
    torch.library.opcheck(ops.row_grad, (logits, *row_arguments))
    torch.library.opcheck(ops.row_grad_, (logits.clone(), *row_arguments))
    torch.library.opcheck(ops.token_loss, (logits, *constants))
    torch.library.opcheck(ops.token_loss_, (logits.clone(), *constants))


def test_a_wrong_call_names_file_line_and_condition():
    logits, batch = operator_arguments()
    transform = (1.0, 0.0, 1.0)
    with pytest.raises(RuntimeError, match=r"operators\.h:\d+: .*index.*is false: tensor index must be contiguous"):
        torch.ops.igrpo.row_stats(logits, batch.index[1:], None, *transform)
    with pytest.raises(RuntimeError, match=r"scalar_type.*must be Long"):
        torch.ops.igrpo.row_stats(logits, batch.index.int(), None, *transform)
    with pytest.raises(RuntimeError, match="columns of logits must be contiguous"):
        torch.ops.igrpo.row_stats(logits.transpose(1, 2), batch.index, None, *transform)
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16"):
        torch.ops.igrpo.row_stats(logits.double(), batch.index, None, *transform)


def test_the_operators_compile_without_a_graph_break():
    logits, batch = operator_arguments()
    transform = (1.0, 0.0, 0.7)

    def rows(x, index, mask):
        logps, entropy, norm = torch.ops.igrpo.row_stats(x, index, mask, *transform)
        grad = torch.ops.igrpo.row_grad(x, index, mask, logps, entropy, norm, 2.0 * logps, None, *transform)
        return logps + entropy, grad

    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (logits, logits[:, :5]):
        arguments = (x, batch.index[: x.shape[0] * x.shape[1]], batch.mask[: x.shape[0] * x.shape[1]])
        torch.testing.assert_close(compiled(*arguments), rows(*arguments), rtol=0, atol=0)


def test_no_gradient_is_computed_that_nobody_asked_for():
    inputs = boundary_inputs().to(torch.float32)
    arguments = (inputs.completion_ids, inputs.advantages)
    with torch.profiler.profile() as profile:
        grpo_loss(inputs.logits, *arguments, impl="cpu")
        with torch.no_grad():
            grpo_loss(inputs.logits.clone().requires_grad_(), *arguments, impl="cpu")
    names = [event.name for event in profile.events()]
    assert names.count("igrpo::row_stats") == 2 and not any("token_loss" in n or "row_grad" in n for n in names)


@pytest.mark.parametrize("inplace", [False, True])
def test_memory_beyond_the_gradient_is_a_few_numbers_per_row(inplace):
    logits = torch.randn(4, 16, 20_000, requires_grad=True)
    index = torch.randint(20_000, (4, 16))
    torch.ops.igrpo.cpu_keep_at_most(0)  # of an earlier gradient: taking it is no event
    with torch.profiler.profile(profile_memory=True) as profile:
        out = grpo_loss(logits, index, torch.randn(4), impl="cpu", inplace=inplace)
        out.loss.backward()
    largest = sorted((event.cpu_memory_usage for event in profile.events()), reverse=True)
    row_numbers = 64 * 64
    assert (largest[0] >= 4 * logits.numel()) is (not inplace)
    # Nested events repeat their children's memory; only the gradient may be larger than rows.
    sizes = {size for size in largest if size > row_numbers}
    assert all(abs(size - 4 * logits.numel()) <= 16 * row_numbers for size in sizes), sizes
