"""Reads the program's ``.jsonl`` logs, whatever a kill, a full disk or an editor has made of them.

One JSON object per line. A last line that was cut off is dropped, a broken one in the middle is named; neither ends
the reader. Everything that reads a log of ours reads it here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 2**28
"""A longer line is no record: 64 completions of 32k tokens are a fiftieth of this."""
LARGEST = 1e30
_SHOWN = 5
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """Example: ``Line(number=3, raw=b'{"step": 1}\\n', record={"step": 1})``"""

    number: int
    """From 1, as an editor counts."""
    raw: bytes
    """As it stands in the file, with its end; of a line longer than ``MOST_BYTES`` only the beginning."""
    record: dict[str, Any] | None
    """None where it is no JSON object."""

    @property
    def whole(self) -> bool:
        """Whether its end was written."""
        return self.raw.endswith(b"\n")

    @property
    def blank(self) -> bool:
        return not self.raw.strip(b" \t\r\n\0")

    @property
    def step(self) -> float | None:
        return step_of(self.record) if self.record is not None else None


def parse(raw: bytes) -> dict[str, Any] | None:
    """The JSON object that a line holds, or None. Not ``splitlines`` and not text before it is a line: a completion
    may hold U+2028, and a cut may be inside a character."""
    try:
        value = json.loads(raw.removeprefix(_BOM).decode("utf-8"))
    except (ValueError, RecursionError):  # no UTF-8, no JSON, a number of thousands of digits; nested too deeply
        return None
    return value if isinstance(value, dict) else None


def number_of(value: Any) -> float | None:
    """A value of a record where it is a number that figures can show: finite, and of less than thirty digits."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return None
    return value


def step_of(record: dict[str, Any]) -> float | None:
    """The record's step where it is a number."""
    return number_of(record.get("step"))


def read_lines(path: Path) -> Iterator[Line]:
    """Every line that is not blank, one at a time.

    Raises:
        OSError: it cannot be read: it is a folder, or not ours to read.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(MOST_BYTES), b""), start=1):
            too_long = len(raw) == MOST_BYTES and not raw.endswith(b"\n") and _skip(file)
            line = Line(number, raw, None if too_long else parse(raw))
            if not line.blank:
                yield line


def read_records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The records; ``notes`` gets a sentence about what was left out: a cut end, broken lines, a file that cannot be
    read. A file that is not there has no records."""
    broken = Broken(path)
    try:
        for line in read_lines(path):
            if line.record is None:
                broken.add(line)
            else:
                yield line.record
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{path} cannot be read ({error.strerror})")
    notes += broken.sentences()


class Broken:
    """Counts the lines of a file that are left out, and says which."""

    def __init__(self, path: Path):
        self.path, self.count, self.first = path, 0, []
        self._cut = False

    def add(self, line: Line) -> None:
        if not line.whole:
            self._cut = True
            return
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(line.number)

    def sentences(self) -> list[str]:
        said = []
        if self._cut:
            said.append(
                f"{self.path}: the last line is cut off and was left out (the run was killed, or is still going)"
            )
        if self.count:
            which = ", ".join(map(str, self.first)) + (", …" if self.count > _SHOWN else "")
            said.append(f"{self.path}: what is no JSON object was left out, in line {which}")
        return said


def _skip(file: BinaryIO) -> bool:
    """Reads on to the end of the line, keeping nothing; whether there was more of it."""
    part = more = file.readline(MOST_BYTES)
    while part and not part.endswith(b"\n"):
        part = file.readline(MOST_BYTES)
    return bool(more)


def whole_characters(text: str) -> str:
    """Half characters, which a log, a folder's name or a tool's answer may hold and nobody can draw or read,
    as question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
