"""Imports go one way, importing has no side effects, and only the named files know the heavy libraries."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ONLY_IN = {
    "vllm": ("igrpo/engines/vllm_*.py", "igrpo/engines/servers/vllm_*.py"),
    "accelerate": ("igrpo/learner/learner.py", "igrpo/learner/placements/*.py"),
}
EVERYWHERE = {"settings", "data_types", "log_lines", "machine", "terminal"}
# Room of igrpo -> the rooms it may import besides those: at the top of a file, inside a function or for a type checker.
ROOMS: dict[str, set[str]] = {
    "data": set(),
    "rewards": set(),
    "run": set(),
    "models": set(),
    "engines": {"models"},  # Hugging Face generate loads a model as the learner does
    "learner": {"models"},
    "environments": {"rewards"},
    "rollout": {"engines", "environments", "rewards", "run"},
    "report": {"run"},
    "eval": {"config", "data", "engines", "environments", "models", "report", "rewards", "rollout", "run"},
    "config": {"data", "eval", "learner", "rollout", "run"},
    "plan": {"config", "learner", "models", "rollout"},
    "integrations": {"rollout"},
}
OF_A_ROOM = {  # where a room may see no more than this of another one
    ("config", room): rf"igrpo\.{room}\.config" for room in ("data", "eval", "learner", "rollout", "run")
} | {("plan", "rollout"): r"igrpo\.rollout\.prompts", ("models", "igrpo_kernels"): r"igrpo_kernels\.model_logits"}
OUTSIDE = {"integrations", "learner", "models", "plan"}
"""Rooms that know igrpo_kernels."""
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


def modules(package: str) -> dict[str, Path]:
    """Module -> its file; of a package, its ``__init__``."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources(package)}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported_modules(path: Path, known: Collection[str]) -> set[str]:
    """Those of ``known`` that a file names anywhere: ``from a import b`` is a.b where that is a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else node.module for name in whole}
    return names & set(known)


def test_rooms_import_what_the_table_says():
    known = {**modules("igrpo"), **modules("igrpo_kernels")}
    seen = set()
    for name, path in modules("igrpo").items():
        room = name.split(".")[1] if "." in name else ""
        if room not in ROOMS:
            lone = "." not in name.removeprefix("igrpo.")
            assert lone or room in EVERYWHERE, f"{name} is in a room that the table lacks"
            continue
        for other in imported_modules(path, known):
            there = other.split(".")[1] if other.startswith("igrpo.") else other.split(".")[0]
            if there in {room, "igrpo"} | EVERYWHERE:
                continue
            allowed = room in OUTSIDE if there == "igrpo_kernels" else there in ROOMS[room]
            assert allowed, f"{name} imports {other}: {room} may import {sorted(ROOMS[room] | EVERYWHERE)}"
            assert re.fullmatch(OF_A_ROOM.get((room, there), ".*"), other), f"{name} imports {other}"
            seen.add((room, there))
    unused = {(room, there) for room, others in ROOMS.items() for there in others} - seen
    assert not unused, f"no file needs these arrows any more: {unused}"


def test_what_everything_may_import_imports_no_room():
    known = modules("igrpo")
    for name, path in known.items():
        if name.split(".")[1:2] and name.split(".")[1] in EVERYWHERE:
            assert all(other.split(".")[1] in EVERYWHERE for other in imported_modules(path, known)), name


@pytest.mark.parametrize("package", ["igrpo_kernels", "igrpo"])
def test_no_import_runs_in_a_circle(package):
    """Not even one that is hidden inside a function or meant for a type checker."""
    known = modules(package)
    try:
        list(
            TopologicalSorter(
                {name: imported_modules(path, known) - {name} for name, path in known.items()}
            ).static_order()
        )
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


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
