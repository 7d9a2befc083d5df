"""matplotlib's SVG as small as it need be: one short element per line, and nothing that cannot be seen."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure as Canvas

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_REFERENCE = r'(?:url\(|href=")#([^)"]+)'
_GROUPS = (f"{_SVG}g", f"{_SVG}defs")


def save(canvas: Canvas, path: Path, note: str, **options: Any) -> None:
    """The same figure gives the same file.

    Args:
        note: stands in the file as the picture's description.
        options: of ``savefig``.
    """
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    path.write_text(compact(buffer.getvalue(), note), encoding="utf-8")


def compact(svg: str, note: str) -> str:
    """The same picture with coordinates to a tenth of a point and each style once."""
    for prefix, name in (("", _SVG), ("xlink", _LINK)):
        ElementTree.register_namespace(prefix, name[1:-1])
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    uses = Counter(re.findall(_REFERENCE, svg))
    for i, name in enumerate(uses):
        svg = svg.replace(name, f"i{i}")
    root, uses = ElementTree.fromstring(svg), Counter(re.findall(_REFERENCE, svg))
    _draw_in_place(root, uses)
    _flatten(root, uses)
    markers = {shape for defs in root.iter(f"{_SVG}defs") for shape in defs}
    for element in root.iter():
        _shorten(element, decimals=2 if element in markers else 1)
    for tag, text in (("style", _shared_styles(root)), ("desc", note)):
        root.insert(0, ElementTree.Element(f"{_SVG}{tag}"))
        root[0].text = text
    ElementTree.indent(root, space="")
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>") + "\n"


def _draw_in_place(root: ElementTree.Element, uses: Counter[str]) -> None:
    """A shape that is defined to be used once is drawn where it is used."""
    shapes = {shape.get("id"): (defs, shape) for defs in root.iter(f"{_SVG}defs") for shape in defs}
    for use in list(root.iter(f"{_SVG}use")):
        name = use.get(f"{_LINK}href", "")[1:]
        if uses[name] == 1:
            defs, shape = shapes[name]
            defs.remove(shape)
            style = "; ".join(filter(None, (use.get("style"), shape.get("style"))))
            move = f"translate({use.get('x')} {use.get('y')})"
            use.tag, use.attrib = shape.tag, {"d": shape.get("d"), "transform": move, "style": style}


def _flatten(element: ElementTree.Element, uses: Counter[str]) -> None:
    """Groups that only give a name to their contents make room for them."""
    if element.get("id") not in uses:
        element.attrib.pop("id", None)
    for child in list(element):
        _flatten(child, uses)
        if child.tag in _GROUPS and (not len(child) or (child.tag == _GROUPS[0] and not child.attrib)):
            at = list(element).index(child)
            element[at : at + 1] = list(child)


def _shorten(element: ElementTree.Element, decimals: int) -> None:
    for key in {"d", "x", "y", "width", "height", "transform"} & set(element.attrib):
        text = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.{decimals}f}".rstrip("0").rstrip("."),
                      element.get(key, ""))  # fmt: skip
        element.set(key, re.sub(r" (?=-)", "", " ".join(text.replace("-0 ", "0 ").split())))
    if re.match(r"rotate\(0 |translate\(0 0\)", element.get("transform", "")):
        del element.attrib["transform"]
    if "d" in element.attrib:
        element.set("d", "".join(_path(element.get("d", ""))))


def _path(d: str) -> Iterator[str]:
    """A path's commands, each said once for the points that follow it; after the first point a line is meant."""
    before = ""
    for command, points in re.findall(r"([A-Za-z]) ?([^A-Za-z]*?) ?(?=[A-Za-z]|$)", d):
        implied = command == before or (command, before) == ("L", "M")
        yield f" {points}" if implied else f"{command}{points}"
        before = command


def _shared_styles(root: ElementTree.Element) -> str:
    """Gives each style a class; returns the style sheet."""
    classes: dict[str, str] = {}
    for element in root.iter():
        style = element.attrib.pop("style", "").replace(": ", ":").replace("; ", ";")
        if style:
            element.set("class", classes.setdefault(style, f"s{len(classes)}"))
    rules = [f".{name}{{{style}}}" for style, name in classes.items()]
    return "\n".join(["*{stroke-linejoin:round;stroke-linecap:butt}", *rules])
