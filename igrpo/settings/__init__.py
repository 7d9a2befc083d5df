"""The error that a setting raises, how it shows what was written, and keys that no error may show."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable
from typing import Any

EXIT_BAD_CONFIG, EXIT_ENGINE, EXIT_DISK_FULL, EXIT_REWARD, EXIT_UPLOAD, EXIT_INTERRUPTED = 2, 3, 4, 5, 6, 130
"""Exit codes that mean the same in every command; each command's ``main`` says which it has."""
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


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6, quote: str = "") -> str:
    """The end of a message about a name that is not known: the nearest of those that are, or ``otherwise``."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {quote}{near[0]}{quote}?" if near else otherwise


def key_from_environment(variable: str) -> str:
    """The variable's value without the blanks and line ends around it, which files of secrets usually end with;
    empty where it is not set.

    Raises:
        ConfigError: it cannot travel in an HTTP header. A library would print it to say so; this message does not.
    """
    value = os.environ.get(variable, "").strip()
    if not all(" " <= character <= "~" for character in value):
        raise ConfigError(
            f"{variable}: the value holds a line end, a control character or one that is not ASCII, which no header "
            "can carry; export it anew (it is not shown here)"
        )
    return value


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxlevel = 3
