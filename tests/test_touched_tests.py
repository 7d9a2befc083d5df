"""`make test-fast`: every file of the packages has tests that it picks, and what was measured as quick is little."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK_SECONDS = 160.0  # of two processes together; each collects for some 15 seconds besides


@pytest.fixture(scope="module")
def touched():
    spec = importlib.util.spec_from_file_location("touched_tests", ROOT / "scripts" / "touched_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_has_tests(touched):
    names = touched.all_names()
    files = [name for name in names if name.startswith("igrpo")]
    assert [name for name in files if not touched.tests_naming(name, names, set())] == []


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ("igrpo/learner/packing.py", "tests/learner/test_packing.py"),
        ("csrc/cpu/rows.h", "tests/kernels/test_cpu_ops.py"),
        ("csrc/cpu/kept.h", "tests/kernels/test_kept_gradients.py"),
        ("tests/support/tiny.py", "tests/learner/test_learner.py"),
        ("tests/kernels/triton_kernels/test_values.py", "tests/kernels/test_triton_suite.py"),
        ("docs/kernels.md", "tests/test_docs.py"),
        ("tests/report/test_runs.py", "tests/report/test_runs.py"),
        ("recipes/quickstart.yaml", "tests/test_recipes.py"),
    ],
)
def test_a_change_picks_the_tests_of_what_it_touches(touched, changed, wanted):
    assert wanted in touched.tests_of([changed])


def test_the_quick_tests_are_quick_by_the_record():
    """A record, not a clock: a loaded machine does not fail it, a slow test that nobody measured is told at its run."""
    record = json.loads((ROOT / "tests" / "slow_tests.json").read_text(encoding="utf-8"))
    assert record.pop("quick tests together") < QUICK_SECONDS
    gone = [name for name in record if not is_there(name)]
    assert len(gone) <= len(record) // 5, f"run make test ARGS=--measure: there is no {gone}"


def is_there(name: str) -> bool:
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file():
        return (ROOT / path).is_dir()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in ast.walk(tree))
