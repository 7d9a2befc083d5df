"""Without a GPU: runs tests/kernels/triton_kernels in a process of its own under Triton's interpreter.

The variable must be set before triton is imported, and must not reach the other tests of this session, which import
triton too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton_kernels"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the folder itself is collected and runs on the device")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the folder itself is collected")
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("test_*.py")))
def test_under_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", str(FOLDER / f"{name}.py"), "-p", "no:cacheprovider", "--maxfail=5"]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
