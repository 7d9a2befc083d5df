r"""Values of expressions that a model wrote, within bounds: no text, however short, costs more than a few milliseconds.

``evaluate`` reads LaTeX and plain notation (``\frac{1}{2}``, ``2^{10}``, ``sqrt(3)/2``, ``\log_2 8``, ``\binom{5}{2}``,
``e^{i\pi}``) and gives the exact rational number where there is one, else a complex number with a bound on its error.
``explodes`` says whether an expression, variables included, holds something too big to be handed to a computer algebra
system: those work such powers out before anybody asks.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from igrpo.rewards.grading.expression import Parser, TooBig, Unknown, context_of, real, tokens_of

DIGITS = (60, 120)
"""Two precisions: where the results agree is what can be trusted."""

_REMAINDER = re.compile(r"([^-+=]+|-?\d+|\([^()]*\))\s*(?:\\b?mod(?![a-z])|(?<![A-Za-z\\(])mod(?![a-z]))\s*([^-+=]+)")
"""A sum before it could mean two numbers."""


class Value(NamedTuple):
    exact: Fraction | None
    """The number, where it is rational and was computed exactly."""
    approximate: Any
    """An mpmath complex number; None where ``exact`` is there."""
    error: Any = 0
    """Of ``approximate``, in absolute value."""


@lru_cache(maxsize=2048)
def evaluate(text: str, log_base: int = 10) -> Value | None:
    r"""The value of an expression without variables; None for anything else, or for what is too big.

    Args:
        log_base: of a ``\log`` without one; 0 for e.
    """
    try:
        if text.count("mod") == 1 and (found := _REMAINDER.fullmatch(text)):
            return _remainder(*(evaluate(found[i]) for i in (1, 2)))
        tokens = tokens_of(text)
        first = Parser(tokens, DIGITS[0], log_base).whole()
        if isinstance(first, Fraction):
            return Value(first, None)
        if isinstance(first, Unknown):
            return None
        second = Parser(tokens, DIGITS[1], log_base).whole()
        error = abs(second - first) * 1000 + abs(second) * 1e-50
        return Value(None, second, error) if error < 1e-30 * max(1, abs(second)) else None  # tan 90° has no value
    except (ZeroDivisionError, ValueError, OverflowError):
        return None


def _remainder(number: Value | None, modulus: Value | None) -> Value | None:
    if number is None or modulus is None or number.exact is None or modulus.exact is None:
        return None
    return Value(number.exact % modulus.exact, None)


def same_value(a: Value, b: Value) -> bool:
    """Whether two values are equal, as far as their errors tell."""
    if a.exact is not None and b.exact is not None:
        return a.exact == b.exact
    context = context_of(DIGITS[1])
    first, second = (real(context, v.exact) if v.exact is not None else v.approximate for v in (a, b))
    return bool(abs(first - second) <= a.error + b.error)


def decimal_of(value: Value) -> Fraction | None:
    """A real value to 50 digits; None for a complex one."""
    if value.exact is not None:
        return value.exact
    if abs(value.approximate.imag) > value.error or abs(value.approximate.real) <= value.error:
        return None if abs(value.approximate.imag) > value.error else Fraction(0)
    sign, mantissa, exponent, _ = value.approximate.real._mpf_
    number = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return -number if sign else number


def explodes(text: str) -> bool:
    """Whether an expression, with variables or without, holds more than a computer algebra system should be given.

    What cannot be read as one expression (a matrix, a set, a chain of relations) is judged by its powers alone, which
    must be small and plain.
    """
    try:
        for part in re.split(
            r"\\\\|&|\\(?:le|ge|leq|geq|lt|gt|ne|neq|cup|cap|in|pm|mp|to|cdots|ldots|dots)(?![a-z])|[=<>;]", text
        ):
            if part.strip(" ,()[]{}"):
                Parser(tokens_of(part), 15, 10, variables=True).whole()
    except TooBig:
        return True
    except (ZeroDivisionError, OverflowError):
        return True
    except ValueError:
        return "!" in text or not all(_plain_power(text, found.end()) for found in re.finditer(r"\^|\*\*", text))
    return False


def _plain_power(text: str, start: int) -> bool:
    """Whether the exponent at a place is small whatever its variables are: no second power, product of numbers, or
    number of more than three digits in it."""
    rest = text[start : start + 200].lstrip()
    depth, end = 0, 0
    for end, character in enumerate(rest, start=1):
        depth += (character in "({") - (character in ")}")
        if depth <= 0 and not (character in "+-" or rest[:end].endswith("\\")):
            break
    exponent = rest[:end]
    return (
        depth <= 0
        and not re.search(r"\^|\*|\d{4}|\\(?:cdot|times)(?![a-z])|\d\s*\(", exponent)
        and not re.match(r"[\d^]*\^", rest)
    )
