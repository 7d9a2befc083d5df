"""Imports go one way, importing has no side effects, and only the named files know the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ONLY_IN = {
    "vllm": ("igrpo/engines/vllm_*.py", "igrpo/engines/servers/vllm_*.py"),
    "accelerate": ("igrpo/learner/learner.py", "igrpo/learner/placements/*.py"),
}
FORBIDDEN = {
    "igrpo_kernels": {"igrpo", "tests", "benchmarks", "transformers", "accelerate", "vllm", "numpy"},
    "igrpo": {"tests", "benchmarks", "trl"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize("package", ["igrpo_kernels", "igrpo"])
def test_imports_go_one_way(package):
    files = sources(package)
    assert files
    for path in files:
        for name in imported(path):
            for bad in FORBIDDEN[package]:
                assert not (name == bad or name.startswith(f"{bad}.")), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("library", ["vllm", "accelerate"])
def test_only_the_named_files_know_the_library(library):
    users = [
        path.relative_to(ROOT)
        for path in sources("igrpo")
        if any(name.split(".")[0] == library for name in imported(path))
    ]
    assert users and all(any(path.match(allowed) for allowed in ONLY_IN[library]) for path in users)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("igrpo_kernels", {"transformers", "accelerate", "vllm", "trl", "numpy.testing", "triton.compiler"}),
        ("igrpo.train", {"torch", "transformers", "vllm", "accelerate", "datasets"}),
        ("igrpo.rewards.functions", {"torch", "transformers", "vllm", "accelerate"}),
    ],
)
def test_importing_stays_light(module, unwanted):
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    assert not unwanted & set(python(code).split())


def test_importing_the_kernels_starts_no_cuda():
    code = "import igrpo_kernels, torch; print(torch.cuda.is_initialized())"
    assert python(code).strip() == "False"


@pytest.mark.parametrize("library", ["trl", "liger_kernel", "verl", "openrlhf", "prime_rl"])
def test_an_adapter_alone_knows_the_library_it_adapts(library):
    home = f"igrpo_kernels/integrations/{library.removesuffix('_kernel')}"
    for path in sources("igrpo_kernels"):
        if any(name.split(".")[0] == library for name in imported(path)):
            assert str(path.relative_to(ROOT)).startswith(home)
