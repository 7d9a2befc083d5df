"""A room's functions read the keys of their own section, and the sections together are the whole configuration."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.settings import ConfigError
from igrpo.settings.section import Section

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {one.__name__: one for one in TrainConfig.__mro__ if issubclass(one, Section)}
KNOWN = {name: {f.name for f in dataclasses.fields(one)} | set(dir(one)) for name, one in SECTIONS.items()}


def section_of(annotation: ast.expr | None) -> str | None:
    """The section that an argument is annotated with; ``X | None`` is X."""
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)] if annotation else []
    return next((name for name in names if name in SECTIONS), None)


def reads(tree: ast.AST, names: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """``(section, key, line)`` of each ``config.key`` and ``self.config.key``; ``names``: what holds a section."""
    for node in ast.iter_child_nodes(tree):
        inside = dict(names)
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                inside.pop(argument.arg, None)
                if section := section_of(argument.annotation):
                    inside[argument.arg] = section
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    inside |= {f"self.{a.arg}": s for a in part.args.args if (s := section_of(a.annotation))}
                if isinstance(part, ast.AnnAssign) and (section := section_of(part.annotation)):
                    inside[f"self.{ast.unparse(part.target)}"] = section
        if isinstance(node, ast.Attribute) and (section := names.get(ast.unparse(node.value))):
            yield section, node.attr, node.lineno
        yield from reads(node, inside)


def test_whoever_is_given_a_section_reads_its_keys_alone():
    found = 0
    for path in sorted((ROOT / "igrpo").rglob("*.py")):
        for section, key, line in reads(ast.parse(path.read_text(encoding="utf-8")), {}):
            found += 1
            assert key in KNOWN[section], f"{path.relative_to(ROOT)}:{line}: {section} has no {key}"
    assert found > 300


def test_no_key_is_written_twice():
    written = [key for section in SECTIONS.values() for key in vars(section).get("__annotations__", ())]
    assert len(written) == len(set(written)) == len(dataclasses.fields(TrainConfig))


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_each_section_stands_alone(section):
    """Its checks read no other section's keys, so that a room can be used without the rest."""
    needed = {"model_name_or_path": "m", "dataset_name": "d"}
    config = section(**{f.name: needed[f.name] for f in dataclasses.fields(section) if f.name in needed})
    for f in dataclasses.fields(section):
        with pytest.raises(ConfigError, match=f.name):
            dataclasses.replace(config, **{f.name: {1: object()}})
