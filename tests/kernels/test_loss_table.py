"""One table of losses: what reads it refuses a name or a code that it does not know, and a new row works at once."""

import inspect
from typing import get_args

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from igrpo.settings.losses import CorrectionMode, KLEstimator, Level, LossType, takes
from igrpo_kernels import GRPOLossConfig, available_impls, losses
from igrpo_kernels.compiled_rows import _term_code, objective_numbers
from igrpo_kernels.losses import LOSSES, SEQUENCE_MEAN, Loss, Term
from igrpo_kernels.triton_math import policy_slopes
from tests.kernels.oracle import IMPLS, assert_close_to_truth, boundary_inputs, loss_and_grad

REASON = available_impls()["cpu"]
needs_library = pytest.mark.skipif(REASON != "available", reason=REASON)


def test_the_choices_of_both_configurations_are_the_tables():
    assert get_args(LossType) == tuple(LOSSES)
    assert get_args(Level) == losses.IMPORTANCE_SAMPLING_LEVELS and get_args(KLEstimator) == losses.KL_ESTIMATORS
    assert get_args(CorrectionMode) == losses.IMPORTANCE_SAMPLING_MODES
    assert takes("grpo", "epsilon") and not takes("sapo", "epsilon")
    with pytest.raises(ValueError, match="loss_type='grpoo' is unknown; choose one of 'grpo', 'bnpo'"):
        GRPOLossConfig(loss_type="grpoo")


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_is_complete(name):
    loss = LOSSES[name]
    assert inspect.getdoc(loss.term.function) and inspect.getdoc(loss.bounds)
    assert set(loss.term.settings) <= set(GRPOLossConfig.__dataclass_fields__)
    low, high = loss.bounds(0.2, 0.3)
    assert low < high


@needs_library
def test_the_compiled_kernels_know_every_term_they_shall_and_no_other():
    assert set(torch.ops.igrpo.policy_terms().split()) == {x.term.name for x in LOSSES.values() if x.term.one_pass}
    with pytest.raises(ValueError, match="has no slope of the policy term 'grpoo', only of clipped, cispo"):
        _term_code("grpoo")


@needs_library
@pytest.mark.parametrize(
    ("place", "code", "message"),
    [(0, 99, "policy term 99 is unknown; there are clipped"), (0, -1, "policy term -1"), (1, 4, "KL estimator k4")],
)
def test_a_code_that_no_kernel_has_is_refused(place, code, message):
    numbers = objective_numbers(GRPOLossConfig())
    numbers[place] = code
    row = torch.zeros(1)
    arguments = (torch.zeros(1, dtype=torch.long), None, row, row, *[None] * 6, numbers, 1.0, 0.0, 1.0)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.igrpo.token_loss(torch.zeros(1, 1, 4), *arguments)


@triton.jit
def slopes_kernel(x_ptr, TERM: tl.constexpr):
    w = tl.load(x_ptr)
    through_w, direct = policy_slopes(w, w, w, w, w, w, w, w, w, w, TERM)
    tl.store(x_ptr, through_w + direct)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("term", [*dict.fromkeys(x.term.name for x in LOSSES.values() if x.term.one_pass), "grpoo"])
def test_triton_compiles_every_term_it_shall_and_no_other(term):
    source = ASTSource(slopes_kernel, {"x_ptr": "*fp32", "TERM": "constexpr"}, {"TERM": term})
    if term != "grpoo":
        assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
        return
    with pytest.raises(triton.CompilationError) as refused:
        triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert "does not know this policy term" in str(refused.value.__cause__)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("key", "value"),
    [("kl_estimator", "k4"), ("importance_sampling_level", "group"), ("importance_sampling_mode", "token_drop")],
)
def test_a_choice_without_an_equation_is_refused(key, value, impl):
    """As if somebody had added it to the choices and forgotten the rest."""
    config = GRPOLossConfig(beta=0.1, importance_sampling_mode="token_mask")
    object.__setattr__(config, key, value)
    with pytest.raises((ValueError, RuntimeError), match=r"has no equation here|is unknown"):
        loss_and_grad(boundary_inputs().to(torch.float32), config, impl=impl)


def unclipped(x, config):
    """-w·A"""
    return -losses.times(x.advantages, x.weight)


@needs_library
@pytest.mark.parametrize("level", losses.IMPORTANCE_SAMPLING_LEVELS)
def test_a_row_added_to_the_table_works_everywhere_in_two_passes(level, monkeypatch):
    monkeypatch.setitem(LOSSES, "made_up", Loss(Term("made_up", unclipped, ()), SEQUENCE_MEAN))
    config, inputs = GRPOLossConfig("made_up", level, beta=0.1), boundary_inputs(level=level)
    truth, true_grad = loss_and_grad(inputs, config, impl="torch")
    wide = GRPOLossConfig(importance_sampling_level=level, epsilon=0.999, epsilon_high=1e9, beta=0.1)
    torch.testing.assert_close(truth.loss, loss_and_grad(inputs, wide, impl="torch")[0].loss)
    out, grad = loss_and_grad(inputs.to(torch.float32), config, impl="cpu")
    assert_close_to_truth("loss", out.loss, truth.loss, rtol=2e-5)
    assert_close_to_truth("gradient", grad, true_grad, rtol=2e-5)


@needs_library
def test_a_term_that_claims_a_slope_which_no_kernel_has_is_refused(monkeypatch):
    monkeypatch.setitem(LOSSES, "made_up", Loss(Term("made_up", unclipped, (), one_pass=True), SEQUENCE_MEAN))
    with pytest.raises(ValueError, match="no slope of the policy term 'made_up'"):
        loss_and_grad(boundary_inputs().to(torch.float32), GRPOLossConfig("made_up"), impl="cpu")
