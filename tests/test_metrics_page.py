"""docs/metrics.md has every figure that the source logs, under the file that computes it, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.metrics_page import documented, undocumented

ROOT = Path(__file__).resolve().parents[1]
RETURNED = {"Metrics", "dict[str, float]", "dict[str, Tensor]", "dict[str, torch.Tensor]"}
WRITERS = {"loop", "log", "log_metrics"}
"""Functions that add figures and return none."""
TRL = ("igrpo_kernels/integrations/trl.py", "igrpo/integrations/trl.py")


def text(node: ast.AST | None) -> str | None:
    """A name, with * for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values)
    return None


def keys(function: ast.FunctionDef) -> Iterator[str | None]:
    """Keys of the dicts that a function builds or adds to."""
    for node in ast.walk(function):
        if isinstance(node, ast.Dict):
            yield from map(text, node.keys)
        elif isinstance(node, ast.DictComp):
            yield text(node.key)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            yield text(node.slice)


def appended(tree: ast.AST) -> Iterator[str | None]:
    """``log["name"].append(value)``, as TRL's trainers log."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "append" and isinstance(node.value, ast.Subscript):
            yield text(node.value.slice)


def logged() -> dict[str, set[str]]:
    """File -> the figures that its functions return as ``Metrics``, or write."""
    found: dict[str, set[str]] = {}
    for path in (p for package in ("igrpo", "igrpo_kernels") for p in sorted((ROOT / package).rglob("*.py"))):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))
        names = set(appended(tree)) if name in TRL else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and name not in TRL:
                returned = node.returns is not None and ast.unparse(node.returns) in RETURNED
                names |= set(keys(node)) if returned or node.name in WRITERS else set()
            elif name.endswith("rewards/workers/pool.py") and isinstance(node, ast.DictComp):
                names.add(text(node.key))
        if names := {one for one in names if one}:
            found[name] = names
    return found


def matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".+"), name) is not None


def test_every_figure_of_the_source_is_on_the_page_and_the_other_way_round():
    page, source = documented(), logged()
    missing = {
        f"{file}: {pattern}"
        for file, patterns in source.items()
        for pattern in patterns
        if not any(matches(pattern, name) and file in files for name, files in page.items())
    }
    assert not missing, "write these into docs/metrics.md"
    stale = {
        name
        for name, files in page.items()
        if not any(matches(pattern, name) for file in files for pattern in source.get(file, ()))
    }
    assert not stale, "nothing in the files of the heading logs these any more"
    assert len(page) > 80


def test_a_figure_that_nobody_wrote_down_is_found():
    assert undocumented(["loss", "rewards/mine/mean", "draft/best_accuracy", "losss", "rewards/mine"]) == [
        "losss",
        "rewards/mine",
    ]
