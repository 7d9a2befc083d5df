"""Without a GPU: runs tests/kernels/triton_kernels in processes of their own under Triton's interpreter.

The variable must be set before triton is imported, and must not reach the other tests of this session, which import
triton too. Two files run at a time: the interpreter uses one core.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton_kernels"
NAMES = sorted(path.stem for path in FOLDER.glob("test_*.py"))


def run(name: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", str(FOLDER / f"{name}.py"), "-p", "no:cacheprovider", "--maxfail=5"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs():
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {name: pool.submit(run, name) for name in NAMES}


@pytest.mark.slow
@pytest.mark.applies(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    otherwise="the folder tests/kernels/triton_kernels itself is collected",
)
@pytest.mark.parametrize("name", NAMES)
def test_under_the_interpreter(runs, name):
    done = runs[name].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
