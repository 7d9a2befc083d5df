"""Without a compiled library that loads, the package imports, computes, and says once what is slower and why."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import igrpo_kernels
from igrpo_kernels.compiled_rows import build_command
from igrpo_kernels.source_hash import source_hash

CXX = shutil.which(os.environ.get("CXX") or "c++")
PROGRAM = """
import json, pathlib, shutil, sys, warnings
import torch
import igrpo_kernels
from igrpo_kernels import available_impls, compiled_rows, impls, selective_log_softmax

here, answers = pathlib.Path(igrpo_kernels.__file__).parent, {}
assert here.parent == pathlib.Path(sys.argv[1])
logits, index = torch.randn(2, 4), torch.tensor([0, 1])
for case in ("absent", *sys.argv[2:]):
    if case != "absent":
        shutil.copy(case, here / "_C_cpu.so")
    compiled_rows.missing_library.cache_clear()
    impls._tell_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        selective_log_softmax(logits.double(), index)  # fp64 asks for this
        selective_log_softmax(logits, index, impl="torch")  # and so does the name
        for _ in range(3):
            logps = selective_log_softmax(logits, index)
    torch.testing.assert_close(logps, logits.log_softmax(-1)[torch.arange(2), index])
    answers[pathlib.Path(case).name] = [available_impls()["cpu"], [f"{w.category.__name__}: {w.message}" for w in said]]
print(json.dumps(answers))
with warnings.catch_warnings():
    impls._tell_once.cache_clear()
    warnings.simplefilter("error")
    try:
        selective_log_softmax(logits, index)
    except RuntimeWarning:
        print("a filter was heard")
"""


@pytest.mark.skipif(CXX is None, reason="there is no C++ compiler")
def test_a_library_that_is_not_there_or_does_not_load_breaks_nothing(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(igrpo_kernels.__file__).parent, tmp_path / "igrpo_kernels", ignore=ignore)
    # site-packages may hold other people's sources under this name.
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "other.cpp").write_text("int other;\n")
    libraries = [tmp_path / name for name in ("cut_short", "other_torch", "no_operators")]
    libraries[0].write_bytes(b"\x7fELF, and no more")
    for path, source in zip(libraries[1:], ("void gone(); void f() { gone(); }", "void f() {}"), strict=True):
        (tmp_path / "x.cpp").write_text(source)
        subprocess.run([CXX, "-shared", "-fPIC", "-Wl,-z,now", str(tmp_path / "x.cpp"), "-o", str(path)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("IGRPO_KERNELS_IMPL", None)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *map(str, libraries)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[0])
    wanted = {"absent": "is not built (no torch, no C++ compiler", "cut_short": "does not load", "other_torch": "gone",
              "no_operators": "does not load"}  # fmt: skip
    for case, words in wanted.items():
        reason, (warning,) = answers[case]
        assert words in reason and "IGRPO_REQUIRE_EXT=1 pip install" in reason, case
        assert warning.startswith("RuntimeWarning: impl='auto' computes in plain PyTorch on cpu tensors, several times")
        assert reason in warning and "\n" not in warning
    assert "a filter was heard" in done.stdout


@pytest.mark.parametrize("library", ["_C_cpu", "_C_cuda"])
def test_a_library_here_is_of_these_sources(library):
    """Every test of one that is not would be skipped."""
    built, wanted = Path(igrpo_kernels.__file__).with_name(f"{library}.so"), source_hash(library)
    if built.is_file() and wanted is not None:
        assert wanted.encode() in built.read_bytes(), f"csrc/ has changed since; {build_command()} builds it again"
