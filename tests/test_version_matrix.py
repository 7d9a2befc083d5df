"""scripts/version_matrix.py takes along what the kernel tests need, and leaves those that need more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from scripts import version_matrix

KERNELS = Path(__file__).with_name("kernels")


def test_the_copied_tests_find_what_they_import(tmp_path):
    version_matrix.copy_tests(tmp_path)
    code = "import benchmarks, tests.kernels.triton_compile_report as one; print(benchmarks.__path__[0], one.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=version_matrix.clean(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(word.startswith(str(tmp_path)) for word in done.stdout.split())


def test_the_tests_that_read_the_sources_stay_behind():
    reads = re.compile(r"(ROOT|parents\[2\]) / \"(csrc|setup\.py)\"")
    found = {path.name for path in KERNELS.glob("test_*.py") if reads.search(path.read_text(encoding="utf-8"))}
    assert found == set(version_matrix.ABOUT_SOURCES)
