"""How `impl="triton"` lives inside PyTorch: operators, torch.compile, checkpointing, accumulation, misuse."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from igrpo_kernels import GRPOLossConfig, grpo_loss, selective_log_softmax, triton_ops
from tests.kernels.oracle import assert_close_to_truth, loss_and_grad

OPS = torch.ops.igrpo_kernels


def call(logits, inputs, config, **keywords):
    return grpo_loss(
        logits,
        inputs.completion_ids,
        inputs.advantages,
        config=config,
        impl="triton",
        **inputs.keywords(config),
        **keywords,
    )


@pytest.fixture
def row_arguments(device):
    """(logits (3, 7), index, mask) and per-row vectors."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, generator=generator).to(device)
    index = torch.tensor([1, 6, 0], device=device)
    mask = torch.tensor([True, True, False], device=device)
    vectors = [torch.randn(3, generator=generator).to(device) for _ in range(5)]
    return logits, index, mask, vectors


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    "name", ["row_statistics", "row_gradient", "row_gradient_", "token_loss", "token_loss_", "scale_"]
)
def test_opcheck(row_arguments, name, monkeypatch):
    monkeypatch.undo()  # the poison is NaN, and opcheck compares two runs
    logits, index, mask, (a, b, c, d, e) = row_arguments
    temperatures, transform = e.abs() + 0.5, (1.0, None, 1.0)
    row_max, log_sum = logits.amax(-1), torch.zeros_like(a)
    loss_inputs = (
        [index, mask, a, b, c, None, None, None, d[0], None, temperatures],
        *transform,
        [1.0] * len(triton_ops.LossScalars._fields),
    )
    arguments = {
        "row_statistics": (logits, index, mask, *transform, temperatures, True),
        "row_gradient": (logits, index, mask, row_max, log_sum, c, d, e, *transform, temperatures),
        "row_gradient_": (logits, index, mask, row_max, log_sum, c, d, e, *transform, temperatures),
        "token_loss": (logits, *loss_inputs, "clipped", [0, 0, 1, 0]),
        "token_loss_": (logits, *loss_inputs, "clipped", [0, 0, 1, 0]),
        "scale_": (logits, a[0]),
    }[name]
    torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs_compile_without_a_graph_break(row_arguments, entropy):
    logits, index, mask, _ = row_arguments
    from igrpo_kernels.fused_loss import selective_log_softmax
    from igrpo_kernels.triton_rows import TRITON
    from igrpo_kernels.types import LogitTransform

    def loss(x):
        logps, h = selective_log_softmax(TRITON, x, index, LogitTransform(), return_entropy=entropy, row_mask=mask)
        return logps.sum() + (h.sum() if entropy else 0.0)

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x = logits.clone().requires_grad_()
        function(x).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_in_place_gradient_does_not_pass_for_logits(small_inputs):
    """A consumer that needs the overwritten values in its backward must fail, not compute with gradients."""
    for level in ("token", "sequence"):
        inputs, config = small_inputs(level), GRPOLossConfig(importance_sampling_level=level)
        leaf = inputs.logits.requires_grad_()
        logits = leaf * 1.0
        other = (logits * logits).sum()  # saves logits
        loss = call(logits, inputs, config, inplace=True).loss
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + other).backward()


def test_logits_may_feed_another_loss(small_inputs):
    inputs, config = small_inputs(), GRPOLossConfig()
    _, expected = loss_and_grad(inputs, config, impl="triton")
    logits = inputs.logits.clone().requires_grad_()
    (call(logits, inputs, config).loss + (logits**2).sum()).backward()
    assert_close_to_truth("grad", logits.grad, expected + 2 * inputs.logits, rtol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
def test_upstream_gradient(small_inputs, factor):
    inputs, config = small_inputs(), GRPOLossConfig(beta=0.1)
    _, expected = loss_and_grad(inputs, config, impl="triton")
    logits = inputs.logits.clone().requires_grad_()
    (factor * call(logits, inputs, config).loss).backward()
    assert_close_to_truth("grad", logits.grad, factor * expected, rtol=1e-14)


def test_second_backward_is_refused_where_the_gradient_was_handed_out(small_inputs):
    inputs = small_inputs()
    logits = inputs.logits.clone().requires_grad_()
    loss = call(logits, inputs, GRPOLossConfig()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_second_backward_of_a_sequence_level_loss_adds_up(small_inputs):
    inputs, config = small_inputs("sequence"), GRPOLossConfig(importance_sampling_level="sequence")
    _, expected = loss_and_grad(inputs, config, impl="triton")
    logits = inputs.logits.clone().requires_grad_()
    loss = call(logits, inputs, config).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close_to_truth("grad", logits.grad, 2 * expected, rtol=1e-14)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_checkpointing_and_accumulation(small_inputs, inplace):
    inputs, config = small_inputs(), GRPOLossConfig()
    _, expected = loss_and_grad(inputs, config, impl="triton")
    leaf = inputs.logits.clone().requires_grad_()
    for _ in range(2):
        checkpoint(lambda x: call(x * 1.0, inputs, config, inplace=inplace).loss, leaf, use_reentrant=False).backward()
    assert_close_to_truth("grad", leaf.grad, 2 * expected, rtol=1e-14)


def test_no_gradient_means_no_gradient_buffer(small_inputs, monkeypatch):
    """Frozen logits or no_grad: statistics only, and `inplace` leaves the logits alone."""
    for name in ("token_loss_fwd", "row_gradient_bwd"):
        monkeypatch.setattr(triton_ops, name, None)
    inputs, config = small_inputs(), GRPOLossConfig(beta=0.1)
    kept = inputs.logits.clone()
    assert not call(inputs.logits, inputs, config, inplace=True).loss.requires_grad
    with torch.no_grad():
        call(inputs.logits.requires_grad_(), inputs, config, inplace=True)
    assert torch.equal(inputs.logits, kept)


def test_a_row_does_not_depend_on_the_other_rows(device):
    """Batch invariance and run-to-run determinism, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 507, generator=generator).to(device)
    index = torch.randint(507, (4,), generator=generator).to(device)
    whole = selective_log_softmax(logits, index, return_entropy=True, impl="triton")
    again = selective_log_softmax(logits, index, return_entropy=True, impl="triton")
    alone = selective_log_softmax(logits[2:3], index[2:3], return_entropy=True, impl="triton")
    for x, y, z in zip(whole, again, alone, strict=True):
        assert torch.equal(x, y) and torch.equal(x[2:3], z)
