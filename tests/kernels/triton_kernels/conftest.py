"""The Triton kernels against the fp64 truth: on the GPU where there is one, else on CPU tensors under the interpreter.

Triton decides at import whether it interprets, so a process without a GPU collects this folder only if it was started
with TRITON_INTERPRET=1; `tests/kernels/test_triton_suite.py` starts such a process.
"""

import os
from dataclasses import fields, replace

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from igrpo_kernels import GRPOLossConfig
from tests.kernels.oracle import LossInputs, boundary_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config):
    # 0 * inf and log(0) are part of the definition (see `objective.py`); numpy reports each of them.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    if INTERPRETED:
        _patch_the_language_once_per_launch()


@pytest.fixture(scope="session")
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised floating-point memory is NaN: an output nobody wrote cannot look right by luck."""
    empty = torch.empty

    def nan_filled(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.detach().fill_(torch.nan).requires_grad_(x.requires_grad) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", nan_filled)


@pytest.fixture
def small_inputs(device):
    """`boundary_inputs` small enough for the interpreter: 32 rows of 11 logits, on the device."""

    def make(level="token", dtype=torch.float64, seed=0, B=4, T=8, V=11) -> LossInputs:
        config = GRPOLossConfig(importance_sampling_level=level)
        return move(boundary_inputs(B=B, T=T, V=V, level=level, seed=seed, config=config).to(dtype), device)

    return make


def move(inputs: LossInputs, device: str) -> LossInputs:
    """The same inputs on another device."""
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return replace(inputs, **{name: x.to(device) for name, x in tensors.items() if x is not None})


def _patch_the_language_once_per_launch():
    """The interpreter redirects every function of triton.language again for each device function of each program,
    which is most of its time. Redirecting once per launch changes nothing else."""
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    class NothingToRestore:
        def restore(self):
            pass

    def patch_once(function):
        languages = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if languages in patched:
            return NothingToRestore()
        patched.add(languages)
        return patch(function)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
