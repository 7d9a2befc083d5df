"""Which plan a launch gets, without a device: IGRPO_CUDA_PLAN is obeyed or refused, never replaced in silence."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CXX = shutil.which(os.environ.get("CXX", "c++"))
PLAN = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "plan.h"
PROGRAM = """
#include <cstdio>
#include <cstring>
#include "%s"
extern "C" int choose(const char* against, char* said) {
  try { return static_cast<int>(igrpo::cuda::choose_plan(against)); }
  catch (const std::runtime_error& error) { std::strcpy(said, error.what()); return -1; }
}
"""


@pytest.fixture(scope="module")
def choose(tmp_path_factory):
    if CXX is None:
        pytest.skip("there is no C++ compiler")
    work = tmp_path_factory.mktemp("plan")
    (work / "plan.cpp").write_text(PROGRAM % PLAN)
    command = [CXX, "-std=c++20", "-shared", "-fPIC", str(work / "plan.cpp"), "-o", str(work / "plan.so")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(work / "plan.so"))

    def call(against):
        said = ctypes.create_string_buffer(400)
        code = library.choose(None if against is None else against.encode(), said)
        return said.value.decode() if code < 0 else ("cluster", "resident", "two_pass")[code]

    return call


@pytest.mark.parametrize(
    ("wish", "against", "answer"),
    [
        (None, None, "cluster"),
        ("", "too long", "resident"),
        ("cluster", None, "cluster"),
        ("resident", None, "resident"),
        ("two_pass", "too long", "two_pass"),
        ("cluster", "a row is too long", "IGRPO_CUDA_PLAN=cluster cannot be had: a row is too long; write resident or"),
        ("Cluster", None, "IGRPO_CUDA_PLAN=Cluster is unknown; write cluster, resident or two_pass"),
    ],
)
def test_a_plan_is_the_one_that_was_asked_for(choose, wish, against, answer, monkeypatch):
    if wish is None:
        monkeypatch.delenv("IGRPO_CUDA_PLAN", raising=False)
    else:
        monkeypatch.setenv("IGRPO_CUDA_PLAN", wish)
    assert choose(against).startswith(answer)
