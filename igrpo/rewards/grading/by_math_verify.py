"""``grader: math_verify``: answers read and compared by math-verify alone, as other people's evaluations do it.

``parse`` and ``verify`` with the library's own defaults on the whole completion, thinking included: no rule of
``answers.py`` holds here. Only a formula that would never be worked out is cut from the completion first; the library
itself gives it up after five seconds, if it can. Its alarm signals are off: they interrupt neither big numbers nor a
thread, and the pool's deadline does.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from functools import lru_cache
from itertools import accumulate
from typing import Any

from igrpo.rewards.grading.arithmetic import explodes
from igrpo.rewards.grading.passages import closing, last_boxed
from igrpo.settings import ConfigError

MAX_FORMULA_CHARS, MAX_DEPTH = 500, 20
_FORMULA = re.compile(
    r"(?<!\\)\$\$?(?:[^$\\]|\\.)+\$\$?|\\\((?:[^\\]|\\[^()])*\\\)|\\\[(?:[^\\]|\\[^][])*\\\]|[\d.,\s+*/^()!-]{4,}",
    re.DOTALL,
)
"""What the library may take for a formula, boxes apart: mathematics in dollars or brackets, runs of numbers."""
_TOWER = re.compile(r"(?:[\d)}!]\s*(?:\^|\*\*|!)[\s{(]*-?\d*[\s)}]*){2,}|[\d)}](?:\^|\*\*)[\s{(]*\d{4,}|\d{4,}\s*!")
_ENDLESS = re.compile(r"\\(?:sum|prod|i*int|oint|lim)(?![a-z])")


def check_installed() -> None:
    """
    Raises:
        ConfigError: math-verify is not there.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("grader: math_verify is not installed; pip install 'math-verify>=0.8,<0.10', or write igrpo")


def grade_by_math_verify(text: str, solution: str) -> float | None:
    """1.0 or 0.0 for a completion; None where the library cannot read the reference."""
    from math_verify import verify

    reference = _reference(solution)
    if not reference:
        return None
    answer = _parsed(_without_endless(text, solution))
    return float(verify(reference, answer, timeout_seconds=None))


@lru_cache(maxsize=4096)
def _reference(solution: str) -> list[Any]:
    """Of a data set's cell: after ``####``, in the last box, or all of it."""
    boxed = last_boxed(solution, len(solution))
    answer = (solution.rpartition("####")[2] if "####" in solution else boxed or solution).strip()
    return (_parsed(f"${answer}$") if "$" not in answer else []) or _parsed(answer)


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    return parse(text, parsing_timeout=None)


def _without_endless(text: str, solution: str) -> str:
    """The completion without formulas that would keep a computer algebra system for ever."""
    worked_out = not _ENDLESS.search(solution)

    def kept(formula: str) -> str:
        depth = max(accumulate(((c in "([{") - (c in ")]}") for c in formula), initial=0))
        if len(formula) > MAX_FORMULA_CHARS + len(solution) or depth > MAX_DEPTH:
            return " "
        if (worked_out and _ENDLESS.search(formula)) or explodes(formula.strip("$")):
            return " "
        return formula

    pieces, start = [], 0
    for box in re.finditer(r"\\(?:boxed|fbox)\s{0,3}\{", text):
        if box.start() >= start:
            pieces.append(text[start : box.end()])
            inside = text[box.end() : closing(text, box.end(), len(text))]  # of one that never closes: all the rest
            pieces.append(kept(inside))
            start = box.end() + len(inside)
    return _TOWER.sub(
        lambda found: kept(found[0]),
        _FORMULA.sub(lambda found: kept(found[0]), "".join([*pieces, text[start:]])),
    )
