r"""Units and residue classes: what may stand behind a number and still decide whether it is the answer.

A unit is not asked for: 72 is right for ``72\text{ cm}``, and so is ``72 apples`` for 72. But 72 m is not 72 cm: where
answer and reference both end in a unit of the table, it must be the same one.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from igrpo.rewards.grading.arithmetic import evaluate
from igrpo.rewards.grading.notation import normal_text, plain_words, tidy

_SPELLINGS = (
    "mm millimeter millimetre", "cm centimeter centimetre", "dm decimeter decimetre", "m meter metre",
    "km kilometer kilometre", "in inch", "ft foot feet", "yd yard", "mi mile", "mg milligram", "g gram", "kg kilogram",
    "lb pound", "oz ounce", "ml milliliter millilitre", "l liter litre", "ms millisecond", "s sec second",
    "min minute", "h hr hour", "day", "week", "month", "year yr", "$ dollar usd", "cent", "% percent",
)  # fmt: skip
_UNITS = {word: names.split(" ")[0] for names in _SPELLINGS for word in names.split(" ")}
_UNITS |= {f"{word}s": unit for word, unit in _UNITS.items() if len(word) > 1} | {"inches": "in", "¢": "cent"}
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}
_MEASURED = re.compile(
    r"(?P<head>(?:\\(?:d?frac|sqrt|pi|cdot|times)(?![a-z])|[^A-Za-z\\])*(?:[\d})]|\\pi(?![a-z])))\s*"
    r"(?:(?P<before>square|sq|cubic|cu)\.? )?(?P<unit>[A-Za-z]+|[%¢$])\.?\s*"
    r"(?:\^\s*\{?(?P<power>\d)\}?| (?P<after>squared|cubed))?"
)
_RESIDUE = re.compile(
    r"(?:.*(?:\\equiv(?![a-z])|=)\s*)?(?P<residue>[^=]+?)\s*"
    r"(?:\\p?mod(?![a-z])\s*\{?(?P<a>[^{}]+)\}?|\(\s*\\?b?mod(?![a-z])\s*\{?(?P<b>[^{}()]+)\}?\s*\))"
)


@lru_cache(maxsize=4096)
def unit_of(answer: str) -> str | None:
    r"""``cm2`` of ``72\text{ cm}^2`` and of "72 square centimetres"; None without one that is known."""
    plain = plain_words(re.sub(r"\\[,;:!]|\\ |~|\{\\rm\s*(?=[^{}]*\})", " ", answer).replace(r"\%", "%"))
    plain = re.sub(r"\s+", " ", plain.replace(r"\$", "$").strip("`*. ")).replace("²", "^2").replace("³", "^3")
    if re.fullmatch(r"[-+]?\$\s*[-+]?[\d.,]+", plain):
        return "$"
    found = _MEASURED.fullmatch(plain)
    if found is None or plain.count("$") > (found["unit"] == "$"):
        return None
    unit = _UNITS.get(found["unit"] if len(found["unit"]) == 1 else found["unit"].casefold())
    power = found["power"] or _POWERS.get(found["before"] or found["after"] or "", "")
    return None if unit is None else unit + power.removeprefix("1")


class Residue(NamedTuple):
    r"""``4 \pmod 7``"""

    number: str
    modulus: str


def read_residue(text: str) -> Residue | None:
    r"""Of a tidy text: ``x \equiv 4 \pmod{7}``, ``4 \mod 7``, ``4 (mod 7)``; ``4 \bmod 7`` is a number instead."""
    found = _RESIDUE.fullmatch(plain_words(text)) if "mod" in text else None
    return None if found is None else Residue(found["residue"].strip(), (found["a"] or found["b"]).strip())


def same_class(reference: Residue, answer: str) -> bool:
    """Whether an answer is the same class of the same modulus."""
    given = read_residue(tidy(answer).replace(r"\bmod", r"\mod"))
    if given is None:
        return False
    values = [evaluate(x) for x in (*reference, *given)]
    if any(value is None or value.exact is None for value in values):
        return [normal_text(x) for x in given] == [normal_text(x) for x in reference]
    number, modulus, other, of = (value.exact for value in values)  # type: ignore[union-attr]
    return modulus == of != 0 and ((number - other) / modulus).denominator == 1
