"""impl="auto": every decision from its inputs, without the devices it is about."""

import logging
import re

import pytest
import torch

from igrpo_kernels import available_impls, impls

EVERYTHING = {"torch": None, "cpu": None, "triton": None, "cuda": None}.get
HOPPER, AMPERE = (9, 0), (8, 0)
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "vocab_size", "missing", "proven", "expected", "reason"),
    [
        (HOPPER, BF16, 151_936, {}, {HOPPER}, "cuda", "stays on chip"),
        (HOPPER, BF16, 151_936, {}, {AMPERE}, "triton", r"no record .* compute capability \(9, 0\)"),
        (HOPPER, BF16, 151_936, {"cuda": "not built"}, {HOPPER}, "triton", "not built"),
        (HOPPER, FP32, 151_936, {}, {HOPPER}, "cuda", "stays on chip"),  # 608 KB, twice, in 8 x 227 KB
        (HOPPER, FP32, 262_144, {}, {HOPPER}, "triton", "only 0% of a row of 1048576 bytes"),
        (AMPERE, BF16, 151_936, {}, {AMPERE}, "cuda", "stays on chip"),
        (AMPERE, BF16, 262_144, {}, {AMPERE}, "cuda", "stays on chip"),  # 59 % of it
        (AMPERE, FP32, 262_144, {}, {AMPERE}, "triton", "only 30% of a row"),
        (HOPPER, torch.float64, 100, {}, {HOPPER}, "triton", "fp32"),
        (HOPPER, None, None, {}, {HOPPER}, "cuda", "stays on chip"),  # a graph may not know V yet
        (HOPPER, BF16, 100, {"triton": "no triton", "cuda": "not built"}, {HOPPER}, "torch", "not built.*no triton"),
    ],
)
def test_on_cuda(capability, dtype, vocab_size, missing, proven, expected, reason):
    name, why = impls.choose_impl(
        "cuda",
        unavailable=lambda name: missing.get(name),
        capability=capability,
        dtype=dtype,
        vocab_size=vocab_size,
        proven=frozenset(proven),
    )
    assert name == expected
    assert re.search(reason, why), why


def test_elsewhere():
    assert impls.choose_impl("cpu", unavailable=EVERYTHING, dtype=FP32, vocab_size=9)[0] == "cpu"
    assert impls.choose_impl("cpu", unavailable=EVERYTHING, dtype=torch.float64)[0] == "torch"
    name, why = impls.choose_impl("cpu", unavailable={"cpu": "not built"}.get)
    assert name == "torch" and "not built" in why
    assert impls.choose_impl("xpu", unavailable=EVERYTHING) == ("torch", "there are no kernels for xpu devices")


def test_today_no_record_proves_the_cuda_kernels():
    """Whoever adds a capability to the set adds the record that shows it."""
    name, _ = impls.choose_impl("cuda", unavailable=EVERYTHING, capability=HOPPER, dtype=BF16, vocab_size=151_936)
    assert name == "triton" and not impls.PROVEN_CUDA_CAPABILITIES


def test_every_implementation_says_what_it_needs():
    answers = available_impls()
    assert tuple(answers) == impls.NAMES and answers["torch"] == "available"
    for name, answer in answers.items():
        assert answer == "available" or ("impl='" in answer or "pip install" in answer), (name, answer)


def test_the_decision_is_told_once(monkeypatch, caplog):
    monkeypatch.delenv(impls.ENVIRONMENT_VARIABLE, raising=False)
    impls._tell_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="igrpo_kernels"):
        for _ in range(3):
            impls.resolve_impl("auto", "cpu", torch.float64, 9)
    assert [record.message for record in caplog.records] == [
        "impl='auto' uses 'torch' on cpu tensors: fp64 asks for the reference's accuracy"
    ]
    impls._tell_once.cache_clear()
