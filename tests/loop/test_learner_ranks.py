"""Two gloo processes do what one does: same losses, same gradient norm, same weights after two steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def launch(processes: int, loss_type: str, output: Path) -> dict:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        "-m", "tests.loop.train_on_ranks", loss_type, str(output),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo"])
def test_two_processes_equal_one(loss_type, tmp_path):
    one, two = (launch(n, loss_type, tmp_path / f"{n}.pt") for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    for a, b in zip(one["figures"], two["figures"], strict=True):
        assert a["grad_norm"] > 1e-3
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
