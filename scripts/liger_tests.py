"""Runs Liger's own published tests of its two GRPO losses against ours.

pip download --no-deps --no-binary :all: liger-kernel==0.8.5 && tar xzf liger_kernel-0.8.5.tar.gz
python scripts/liger_tests.py liger_kernel-0.8.5 -k "not 1024 and not 64000"    # the small shapes
python scripts/liger_tests.py liger_kernel-0.8.5                                # everything

The tests are read where they lie and nothing of Liger is changed: once a test module is imported, its own names for
the losses are bound to ours. Arguments after the folder are pytest's. Needs liger_kernel to be installed, since the
tests take their references from it. What came out: docs/drop-in.md.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from igrpo_kernels import selective_log_softmax
from igrpo_kernels.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

FILES = ("test/chunked_loss/test_grpo_loss.py", "test/transformers/test_grpo_loss.py")
NOT_OURS = {
    "test_selective_chunk_forward_matches_reference": "a method of Liger's base class",
    "test_functional_correctness": "two ways into Liger's own autograd function",
    "test_reduce_grpo_loss_matches_reference": "a private function of Liger's",
    "test_reduce_grpo_loss_requires_max_completion_length": "a private function of Liger's",
    "test_selective_logprob_backward_skips_frozen_params": "a private function of Liger's",
}

WRONG_REFERENCE = (
    "eager bf16 is further from fp64 than the test's tolerance: two roundings of logits up to 130, times the length; "
    "see test_luspo_in_bf16_is_nearer_to_the_truth_than_liger"
)


def fused_selective_log_softmax(logits: torch.Tensor, input_ids: torch.Tensor, temperature: float = 0.9, mask=None):
    """Under Liger's name, which one of the tests uses: logits (B, T+1, V), the last T of input_ids (B, ≥T)."""
    assert mask is None
    return selective_log_softmax(logits[:, :-1], input_ids[:, 1 - logits.shape[1] :], temperature=temperature)


OURS = {f.__name__: f for f in (LigerFusedLinearGRPOLoss, triton_grpo_loss, fused_selective_log_softmax)}


class Ours:
    """A pytest plugin: binds our losses to the test modules' names, leaves out what tests nothing of ours."""

    def __init__(self) -> None:
        self.bound: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Each module is imported by now, and looks its names up when a test runs."""
        for module in {item.module for item in items}:
            for name in OURS.keys() & vars(module).keys():
                setattr(module, name, OURS[name])
                self.bound.add(name)
        left_out = [item for item in items if item.originalname in NOT_OURS]
        items[:] = [item for item in items if item.originalname not in NOT_OURS]
        config.hook.pytest_deselected(items=left_out)
        for item in items:
            if item.originalname == "test_correctness" and _reference_is_wrong(item.callspec.params):
                item.add_marker(pytest.mark.xfail(reason=WRONG_REFERENCE))
        for name, count in Counter(item.originalname for item in left_out).items():
            print(f"left out: {count} x {name}: {NOT_OURS[name]}")


def _reference_is_wrong(case: dict[str, Any]) -> bool:
    wide = case["H"] >= 1024 and case["temperature"] == 1.0 and case["bias"]
    return wide and case["loss_type"] == "luspo" and case["dtype"] == torch.bfloat16


def main(argv: list[str]) -> int:
    """pytest's exit code; 2 where the folder is not a source distribution of Liger."""
    folder = Path(argv[0]) if argv else Path()
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        print(f"{folder} has no {missing[0]}: give the folder of an unpacked liger-kernel source distribution")
        return 2
    folder = folder.resolve()
    os.chdir(folder)  # the tests import `test.utils`
    sys.path.insert(0, str(folder))
    plugin = Ours()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *argv[1:], *FILES], plugins=[plugin])
    if code == 0 and plugin.bound < OURS.keys():
        print(f"the tests no longer speak of {sorted(OURS.keys() - plugin.bound)}: nothing of it was tested")
        return 1
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
