"""The shapes an answer may have: one value or several, with names or without; intervals; a letter of a choice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

from igrpo.rewards.grading.arithmetic import decimal_of, evaluate
from igrpo.rewards.grading.notation import ALL_REALS, DENIAL, plain_words, tidy

MAX_PARTS = 40
RELATION = re.compile(
    r"\\(?:n?le|n?ge|n?leq|n?geq|leqslant|geqslant|lt|gt|ne|neq|not|ll|gg|propto|nless|ngtr)(?![A-Za-z])|[<>]"
    r"|(?<!\d)!=|/="  # 5!=120 is a factorial
)
"""What makes a statement about a number something else than its value."""
EQUALS = re.compile(r"\\(?:approx|simeq|sim|equiv|doteq|cong)(?![A-Za-z])|=+")
NAME = re.compile(r"\\?[A-Za-z]+'?(?:_\{?\w+\}?)?(?:\(\w+(?:, ?\w+)*\))?")
_ONE_NAME = re.compile(r"\\?(?:[A-Za-z]|alpha|beta|gamma|theta|lambda|mu|phi|omega)'?(?:_\{?\w+\}?)?")
_AND = r"\\text\{,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\(?:lor|vee|land|wedge)(?![a-z])|;"
_OPEN, _CLOSE = "([{", ")]}"


class Part(NamedTuple):
    """One value: ``x = 48 + 24 = 72`` has the name ``x`` and two sides that claim it."""

    name: str
    sides: tuple[str, ...]


class Claims(NamedTuple):
    parts: tuple[Part, ...]
    ordered: bool
    """Written as a tuple."""


class Interval(NamedTuple):
    low: str
    high: str
    low_closed: bool
    high_closed: bool


def split_top(text: str, *, thousands: bool) -> list[str]:
    """The pieces between commas outside all brackets; with ``thousands`` the comma of ``1,234`` is none."""
    pieces, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        grouped = (
            thousands and i > 0 and text[i - 1].isdigit() and re.match(r",\d{3}(?!\d)", text[i : i + 5]) is not None
        )
        if character == "," and depth == 0 and not grouped:
            pieces.append(text[start:i])
            start = i + 1
    return [piece.strip() for piece in [*pieces, text[start:]] if piece.strip()]


def _inside(text: str, opening: str, closing: str) -> str | None:
    """What stands between brackets that embrace a whole text."""
    if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(opening) + len(closing):
        return None
    inner = text[len(opening) : -len(closing)]
    depths = list(accumulate(((c in _OPEN) - (c in _CLOSE) for c in inner), initial=0))
    return inner if min(depths) == 0 == depths[-1] else None


def read_claims(text: str) -> Claims | None:
    """The values a tidy text gives; None where one is no value but a relation (72 < x), or they are too many."""
    text = re.sub(r"^(?:\\?[A-Za-z]|\([a-z](?:, ?[a-z])+\))\s*(?:\\in(?![a-z])|=)\s*(?=[(\[]|\\[{l])", "", text)
    ordered = False
    for opening, closing in (("(", ")"), (r"\langle", r"\rangle"), (r"\{", r"\}"), ("{", "}"), ("[", "]")):
        inner = _inside(text, opening, closing)
        if inner is not None and (len(split_top(inner, thousands=False)) > 1 or opening == r"\{"):
            if inner.strip() == r"\emptyset":
                return None
            text, ordered = inner, opening in ("(", r"\langle")
            pieces = split_top(re.sub(_AND, ",", inner), thousands=", " in inner)
            break
    else:
        pieces = split_top(re.sub(_AND, ",", text), thousands=True)
    telling = [piece for piece in pieces if not re.fullmatch(r"[A-Za-z][A-Za-z' -]+[.!]?", piece)]
    parts: list[Part] = []
    for piece in telling or pieces:
        if RELATION.search(piece):
            return None
        for one in _signs(piece):
            parts.append(_part(one))
            if len(parts) > MAX_PARTS:
                return None
    return Claims(tuple(parts), ordered) if parts else None


def _signs(piece: str) -> Iterator[str]:
    r"""Both values of ``a \pm b``."""
    if r"\pm" not in piece:
        yield piece
        return
    for plus, minus in (("+", "-"), ("-", "+")):
        text = piece.replace(r"\pm", plus).replace(r"\mp", minus)
        yield re.sub(r"(^|[=(])\s*([+-])\s*", lambda m: m[1] + ("-" if m[2] == "-" else ""), text).strip()


def _part(piece: str) -> Part:
    sides = tuple(side.strip() for side in EQUALS.split(re.sub(r"(?<=\d)!=", "! =", piece)) if side.strip())
    if len(sides) > 1 and NAME.fullmatch(sides[-1]) and not NAME.fullmatch(sides[0]):
        sides = (sides[-1], *sides[:-1])  # 5 = x
    sides = sides or (piece,)
    name = sides[0] if len(sides) > 1 and _ONE_NAME.fullmatch(sides[0]) else ""
    return Part(name, sides[1:] if name else sides)


def is_equation(side: str) -> bool:
    """Whether a side asks for its one variable rather than names a quantity: ``2x``, ``x^2``, ``-x``; not ``a + b``,
    ``f(2)`` or ``x``."""
    bare = re.sub(r"\\(?:frac|sqrt|cdot|times)(?![a-z])", "*", side)
    letters = re.findall(r"[A-Za-z]", bare)
    return (
        len(set(letters)) == 1
        and re.fullmatch(r"[A-Za-z\d\s.{}()+*/^-]*", bare) is not None
        and re.search(r"[\d+*/^-]", bare) is not None
        and not re.search(r"[A-Za-z]\s*\(\s*-?[\d.]+\s*\)", bare)
    )


def read_intervals(text: str) -> tuple[Interval, ...] | None:
    """The intervals of a tidy text: ``(1, 2] \\cup [3, \\infty)``, or what an inequality in one variable says."""
    text = re.sub(r"^(?:[A-Za-z]|\\[a-z]+)\s*\\in(?![a-z])\s*", "", text)
    if (inner := _inside(text, r"\{", r"\}")) is not None:
        of_all = rf"\s*(?:\\in\s*(?:{ALL_REALS.pattern})\s*)?"
        text = re.sub(rf"^\s*[a-z]{of_all}(?:\\mid(?![a-z])|[|:])\s*", "", inner)
    without = re.split(r"\\(?:setminus|backslash)(?![a-z])", text)
    if ALL_REALS.fullmatch(without[0].strip()):
        return _all_but(without[1:])
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup ", text)
    text = text.replace(";", ",") if RELATION.search(text) else text
    union = re.split(r"\\cup(?![a-z])|\\text\{,?\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![a-z])", text)
    found: list[Interval] = []
    for piece in union:
        if point := re.fullmatch(r"\s*[a-z]\s*\\(?:ne|neq)(?![a-z])(.+)", piece):
            found += _all_but([rf"\{{{point[1]}\}}"]) or ()
            continue
        both = re.split(r"\\text\{,?\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:land|wedge)(?![a-z])", piece)
        if RELATION.search(piece) and len(both) == 1:
            both = split_top(piece, thousands=True)
            listed = (
                len({name for one in both for name in re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", one)}) == 1
            )
        else:
            listed = False
        read = [_interval(one.strip()) for one in both]
        if None in read:
            return None
        bounds = [one for one in read if one is not None]
        found += bounds if listed and _apart(bounds) else _intersected(bounds)
    return tuple(found[:MAX_PARTS]) if found else None


def _all_but(excluded: list[str]) -> tuple[Interval, ...] | None:
    r"""All real numbers, or those outside of one interval or of some points: ``\\mathbb{R} \\setminus [1, 2]``."""
    if not excluded:
        return (Interval(r"-\infty", r"\infty", False, False),)
    text = excluded[0].strip()
    if (points := _inside(text, r"\{", r"\}")) is not None:
        ends = [_end(point) for point in split_top(points, thousands=False)]
        values = [decimal_of(value) if (value := evaluate(end)) is not None else None for end in ends]
        if len(excluded) > 1 or not ends or len(set(values)) < len(ends) or (None in values and len(ends) > 1):
            return None
        if len(ends) > 1:  # a letter has no place among them
            ends = [end for _, end in sorted(zip(values, ends, strict=True))]
        lows, highs = [r"-\infty", *ends], [*ends, r"\infty"]
        return tuple(Interval(low, high, False, False) for low, high in zip(lows, highs, strict=True))
    one = _interval(text) if len(excluded) == 1 else None
    if one is None or r"\infty" in one.low + one.high:
        return None
    low = Interval(r"-\infty", one.low, False, not one.low_closed)
    return (low, Interval(one.high, r"\infty", not one.high_closed, False))


def _apart(bounds: list[Interval]) -> bool:
    """Whether nothing meets two bounds, so that a list of them can only mean their union: ``x < 1, x > 2``."""
    lows, highs = (
        [b for b in bounds if getattr(b, end) == sign + r"\infty"] for end, sign in (("high", ""), ("low", "-"))
    )
    if len(bounds) != 2 or len(lows) != 1 or len(highs) != 1:
        return False
    values = [evaluate(x) for x in (lows[0].low, highs[0].high)]
    low, high = (None if value is None else decimal_of(value) for value in values)
    closed = lows[0].low_closed and highs[0].high_closed
    return low is not None and high is not None and (low > high or (low == high and not closed))


def _intersected(bounds: list[Interval]) -> list[Interval]:
    """A lower bound and an upper bound of one variable make one interval."""
    if len(bounds) == 2:
        low = next((b for b in bounds if b.high == r"\infty"), None)
        high = next((b for b in bounds if b.low == r"-\infty"), None)
        if low is not None and high is not None and low is not high:
            return [Interval(low.low, high.high, low.low_closed, high.high_closed)]
    return bounds


_INTERVAL = re.compile(r"([(\[\]])(.*)([)\]\[])", re.DOTALL)
"""``]1, 2[`` is open, as (1, 2)."""
_MAGNITUDE = re.compile(r"\|\s*([a-z])\s*\|\s*(\\(?:le|leq|leqslant|lt)(?![A-Za-z])|<=?)\s*(.+)", re.DOTALL)
_LESS = re.compile(r"(\\(?:le|leq|leqslant|lt|ge|geq|geqslant|gt)(?![A-Za-z])|<=?|>=?)")


def _interval(text: str) -> Interval | None:
    if size := _MAGNITUDE.fullmatch(re.sub(r"\\[lr]?vert(?![a-z])", "|", text)):
        text = f"-({size[3]}) {size[2]} {size[1]} {size[2]} {size[3]}"
    bracketed = _INTERVAL.fullmatch(text)
    ends = split_top(bracketed[2].replace(";", ","), thousands=False) if bracketed is not None else []
    if bracketed is not None and len(ends) == 2:
        return Interval(_end(ends[0]), _end(ends[1]), bracketed[1] == "[", bracketed[3] == "]")
    pieces = _LESS.split(text)
    if len(pieces) not in (3, 5) or not all(piece.strip() for piece in pieces):
        return None
    signs = [re.sub(r"leqslant|leq|le|<=", "<=", s.strip("\\")).replace("lt", "<") for s in pieces[1::2]]
    signs = [re.sub(r"geqslant|geq|ge", ">=", sign).replace("gt", ">") for sign in signs]
    sides = [_end(side) for side in pieces[::2]]
    if any(sign[0] != signs[0][0] for sign in signs):
        return None
    if signs[0][0] == ">":
        sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    closed = [sign == "<=" for sign in signs]
    if len(sides) == 3:
        return Interval(sides[0], sides[2], closed[0], closed[1]) if NAME.fullmatch(sides[1]) else None
    if _ONE_NAME.fullmatch(sides[0]):
        return Interval(r"-\infty", sides[1], False, closed[0])
    return Interval(sides[0], r"\infty", closed[0], False) if _ONE_NAME.fullmatch(sides[1]) else None


def _end(text: str) -> str:
    text = text.strip()
    unbounded = re.fullmatch(r"([-+]?)\s*\\?(?:inf(?:ty|inity)?|oo)", text)
    return ("-" if unbounded[1] == "-" else "") + r"\infty" if unbounded else text


class Choice(NamedTuple):
    letter: str
    value: str
    """What stands beside the letter: ``12`` in ``(B) 12``."""


_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|answer)\s*(?:is\s*)?:?\s*)?([(\[{]\s*)?([A-Ja-j])(\s*[)\]}])?"
    r"((?:[.:,]|\s[-=](?=\s))?)(?:\s+(.*))?",
    re.I | re.S,
)
_LAST_CHOICE = re.compile(r"([^()]{1,200}?)\s*\(\s*([A-J])\s*\)", re.S)
_NONE_OF = re.compile(r"(?:none|all|both) of (?:the above|these|them)", re.I)


def read_choice(text: str) -> Choice | None:
    r"""The one letter that an answer chooses: ``C``, ``(C)``, ``\textbf{(C)}\ 12``, ``C. twelve``; None for several."""
    plain = plain_words(re.sub(r"\\ |~|\\q?quad(?![a-z])|\\[,;:]", " ", text).replace("$", " "))
    plain = re.sub(r"[*`]|\\(?:boxed|left|right)(?![a-z])", "", plain).strip().removesuffix(".")
    if (behind := _LAST_CHOICE.fullmatch(plain)) and not re.search(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])", behind[1]):
        plain = f"({behind[2]}) {behind[1]}"
    found = _CHOICE.fullmatch(plain)
    if found is None:
        return None
    opened, letter, closed, mark, rest = found.groups()
    rest = (rest or "").strip()
    if bool(opened) > bool(closed) or (letter.islower() and not (closed and opened) and rest):
        return None
    if _NONE_OF.fullmatch(rest):
        return Choice(letter.upper(), tidy(rest))
    if rest and (
        DENIAL.search(rest) or re.search(r"(?<![A-Za-z\\])\(?[B-J]\)?(?![A-Za-z(=\d])|\bor\b|\([A-J]\)|\band\b", rest)
    ):
        return None
    if rest and not (closed or mark) and re.match(r"[a-z]|[=<>+\-*/^]", rest):
        return None  # the beginning of a sentence or of a formula
    return Choice(letter.upper(), tidy(rest))
