"""docs/metrics.md as the tests read it: which figures there are, and in which files they are computed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def documented() -> dict[str, list[str]]:
    """Name as the page writes it -> the files in the headings above it."""
    found: dict[str, list[str]] = {}
    files: list[str] = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            files = re.findall(r"`([^`]+\.py)`", line)
        elif row := re.match(r"\| `([^`]+)` \| [^|]+ \| [^|]+ \|$", line):
            found.setdefault(row[1], []).extend(files)
    return found


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of the figures of a run that the page does not have."""
    known = [re.escape(name).replace("<name>", "[^/]+") for name in documented()]
    return sorted(name for name in names if not re.fullmatch("|".join(known), name))
