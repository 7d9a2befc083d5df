"""A compacted picture draws what the original draws."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest

from igrpo.report.drawing import WIDE, Canvas, styled
from igrpo.report.svg import compact


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text)]


def drawn(svg: str, *tags: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if e.tag.partition("}")[2] in tags]


@pytest.fixture(scope="module")
def pictures() -> tuple[str, str]:
    with styled():
        canvas, buffer = Canvas(figsize=(WIDE, 3)), io.StringIO()
        ax = canvas.subplots()
        ax.plot([0, 1, 2], [0.0, -1.234, 2.5], "o--", label="a < b & c")
        ax.fill_between([0, 1, 2], [0, 1, 2], [1, 2, 4], alpha=0.2)
        ax.errorbar(1, 2, xerr=0.5, capsize=3)
        ax.set_ylabel("turned")
        ax.legend()
        canvas.savefig(buffer, format="svg")
    return buffer.getvalue(), compact(buffer.getvalue(), "a note")


def test_lines_points_and_texts_survive(pictures):
    before, after = pictures
    texts = [[(e.text, "rotate(-90" in e.get("transform", "")) for e in drawn(svg, "text")] for svg in pictures]
    assert texts[0] == texts[1] and ("turned", True) in texts[1] and ("a < b & c", False) in texts[1]
    shapes = [sum(e.get("id") is None for e in drawn(svg, "path", "use")) for svg in pictures]
    assert shapes[0] == shapes[1] > 20
    (line,) = (e for e in drawn(before, "path") if "stroke-dasharray" in e.get("style", "") and "clip-path" in e.attrib)
    (name,) = re.findall(r"\.(\w+)\{[^}]*stroke-dasharray", after)
    same = next(e for e in drawn(after, "path") if e.get("class") == name)
    assert numbers(same.get("d", "")) == pytest.approx(numbers(line.get("d", "")), abs=0.051)


def test_every_reference_holds_and_nothing_is_said_twice(pictures):
    before, after = pictures
    assert len(after) < len(before) / 2 and "a note" in after
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', after)) == set(re.findall(r' id="([^"]+)"', after))
    assert set(re.findall(r'class="([^"]+)"', after)) == set(re.findall(r"^\.(\w+)\{", after, re.MULTILINE))
    assert all(line.count("<") <= 2 for line in after.splitlines())
