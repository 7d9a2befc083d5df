"""The error that a setting raises, and how it shows what was written."""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST_MESSAGE = 1500


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line that says what to change.

    Messages quote what somebody wrote: line breaks, control characters and endless text in it do not reach a terminal.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 1]}…")


def shown(value: Any) -> str:
    """What somebody wrote, on one line and of bounded length, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return f"a number of about {value.bit_length() * 3 // 10} digits"  # Python refuses to print it from 4,300 on
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxlevel = 3
