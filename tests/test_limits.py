"""Budgets that keep files readable: they grow past them only by changing this test."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    p
    for d in ("igrpo", "igrpo_kernels", "scripts", "benchmarks", "experiments", "tests")
    for p in (ROOT / d).rglob("*.py")
)
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 400, 60, 120


def test_files_and_functions_stay_short():
    assert [excess for path in FILES for excess in excesses(path)] == []


def excesses(path: Path) -> Iterator[str]:
    source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
    if (lines := len(source.splitlines())) > MAX_FILE:
        yield f"{name} has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = MAX_KERNEL if "kernel" in node.name or _jitted(node) else MAX_FUNCTION
            if _code_lines(node) > limit:
                yield f"{name}: {node.name} has {_code_lines(node)} lines"


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the function without its docstring."""
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def _jitted(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(d) for d in node.decorator_list)
