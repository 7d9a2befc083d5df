r"""Comparing the answer of a completion with the reference answer of a data set.

``extract_answer`` reads the one passage that counts (``passages.py``), ``grade`` compares it. Equal texts are
equal. Numbers and constants are worked out by ``arithmetic.py``, exactly or to 50 digits; a decimal may round an
exact value (``rounds``). An answer in several values must give those of the reference and no more. A reference in words
accepts only equal text. Formulas with variables go to math-verify, which compares values, not forms. Whether an
expression is an answer or the question repeated, the question's text decides (``repetition.py``). docs/rewards.md
holds the table of accepted and refused forms.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from igrpo.rewards.grading.arithmetic import Value, decimal_of, evaluate, explodes, same_value
from igrpo.rewards.grading.forms import (
    RELATION,
    Choice,
    Claims,
    Interval,
    Part,
    is_equation,
    read_choice,
    read_claims,
    read_intervals,
)
from igrpo.rewards.grading.notation import (
    DENIAL,
    MATH_FUNCTIONS,
    NUMBER,
    Number,
    normal_text,
    plain_words,
    read_number,
    tidy,
)
from igrpo.rewards.grading.passages import MAX_ANSWER_CHARS, last_boxed
from igrpo.rewards.grading.repetition import repeats, says
from igrpo.rewards.grading.units import Residue, read_residue, same_class, unit_of


@dataclass(frozen=True)
class Reference:
    """A reference answer; what only some answers need to be compared with is read when it is asked for."""

    cell: str
    text: str
    """Tidy, without a leading ``x =``."""
    normal: str
    number: Number | None
    words: bool
    lines: int

    @property
    def is_formula(self) -> bool:
        return self.number is None and not self.words and len(self.text) <= MAX_ANSWER_CHARS

    @cached_property
    def unit(self) -> str | None:
        return None if self.words else unit_of(self.cell)

    @cached_property
    def residue(self) -> Residue | None:
        found = read_residue(self.text) if self.is_formula else None
        if found is None and r"\bmod" in self.text and self.value is None:  # a \bmod b
            found = read_residue(self.text.replace(r"\bmod", r"\mod"))
        return found

    @cached_property
    def value(self) -> Value | None:
        """Where it has no variables."""
        if self.number is not None:
            return Value(self.number.value, None)
        return evaluate(self.text) if self.is_formula else None

    @cached_property
    def claims(self) -> Claims | None:
        if self.number is not None:
            return Claims((Part("", (self.text,)),), False)
        return read_claims(self.text) if self.is_formula else None

    @cached_property
    def intervals(self) -> tuple[Interval, ...] | None:
        return read_intervals(self.text) if self.is_formula else None

    @cached_property
    def choice(self) -> Choice | None:
        variable = re.fullmatch(r"[a-z]", self.text)
        return read_choice(self.cell) if self.number is None and not variable and len(self.cell) < 200 else None


@lru_cache(maxsize=4096)
def read_reference(solution: str) -> Reference:
    r"""The reference answer in a data set's cell: after ``####``, in the last ``\boxed{}``, or the whole cell."""
    boxed = last_boxed(solution, len(solution))
    answer = (solution.rpartition("####")[2] if "####" in solution else boxed or solution).strip()
    return _read(answer, normal_text(answer), answer.count("\n") + 1)


@lru_cache(maxsize=4096)
def _read(answer: str, normal: str = "", lines: int = 1) -> Reference:
    text = tidy(answer)
    if text.count("=") < 2:
        text = re.sub(r"^[A-Za-z]\s*(?:=|\\in(?![a-z]))\s*|\s*=\s*[A-Za-z]$", "", text)
    number = read_number(text)
    return Reference(answer, text, normal, number, number is None and bool(normal) and _in_words(answer), lines)


def _in_words(answer: str) -> bool:
    """Whether a reference is words, codes, dates or grids rather than a formula."""
    text = tidy(answer)
    listed = plain_words(text)
    text = re.sub(r"(?:,\s*)?\b(?:and|or)\b", ",", listed) if re.search(r"[\d}]\s*,?\s*(?:and|or)\b", listed) else text
    bare = re.sub(r"_\{\\text.*?\}|\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", " ", text)
    names = re.findall(r"[A-Za-z]{2,}", bare)
    if "\n" in answer or any(len(name) > 2 and name not in MATH_FUNCTIONS for name in names):
        return True
    if re.search(r"""["?:;]|'\w*'|\d{4}-\d\d-\d\d|[A-Za-z]\d""", bare):
        return True
    return "\\" not in text and bool(re.search(r"\d \d", text) or (names and not re.search(r"[\d+*/^=()-]", text)))


def grade(reference: Reference, answer: str | None, question: str = "") -> float | None:
    """1.0 or 0.0 for an extracted answer; None where the reference is empty or is a formula that cannot be parsed.

    Args:
        question: what was asked; tells an answer from the question repeated.
    """
    if not reference.normal:
        return None
    if answer is None:
        return 0.0
    if reference.unit is not None and (unit := unit_of(answer)) is not None and unit != reference.unit:
        return 0.0
    if normal_text(answer) == reference.normal:
        return 1.0
    if reference.choice is not None:
        return _same_choice(reference.choice, answer, question)
    text = tidy(answer)
    if reference.residue is not None:
        return float(same_class(reference.residue, answer))
    if reference.number is not None and (residue := read_residue(text)) is not None:
        text = text if evaluate(text) is not None else residue.number  # 17 mod 7 = 3, and 3 (mod 7)
    bare = re.sub(r"^[A-Za-z] ?= ?", "", text)
    if reference.number is not None and (plain := read_number(bare)) is not None:
        return float(_same_number(reference.number, plain) and not repeats(bare, question, reference.text))
    if reference.words or ("?" in text and "?" not in reference.text) or DENIAL.search(plain_words(text)):
        return 0.0
    if based := re.fullmatch(r"(\d+)_\d+", reference.text):
        return float(text == based[1])
    if not _readable(reference):
        return None
    if reference.intervals is not None and (given := read_intervals(text)) is not None:
        same = _same_intervals(reference.intervals, given, question)
        return float(same and not (RELATION.search(text) and repeats(text, question, reference.text)))
    closed = reference.intervals is not None and not re.fullmatch(r"\([^()\[\]]*\)", reference.text)
    if closed or reference.claims is None or ("=" in reference.text and "=" in text):
        return _same_formula(reference.text, text)
    claims = read_claims(text)
    if claims is None:
        return 0.0
    return _same_claims(reference, claims, text, question)


def _readable(reference: Reference) -> bool:
    if reference.value is not None or reference.intervals is not None:
        return True
    parts = reference.claims.parts if reference.claims is not None else ()
    if len(parts) > 1 and all(_read(part.sides[-1]).value is not None for part in parts):
        return True
    return bool(_parse_reference(reference.text))


def _same_choice(choice: Choice, answer: str, question: str) -> float:
    given = read_choice(re.sub(r"^[a-zK-Z]\s*=\s*", "", answer))
    if given is not None:
        same_value = not (choice.value and given.value) or grade(read_reference(choice.value), given.value, question)
        return float(given.letter == choice.letter and bool(same_value))
    return float(bool(choice.value) and bool(grade(read_reference(choice.value), answer, question)))


def _same_intervals(reference: Iterable[Interval], given: Iterable[Interval], question: str) -> bool:
    left, right = list(reference), list(given)
    if len(left) != len(right):
        return False
    for one in left:
        for other in right:
            closed = (one.low_closed, one.high_closed) == (other.low_closed, other.high_closed)
            if closed and _same_end(one.low, other.low, question) and _same_end(one.high, other.high, question):
                right.remove(other)
                break
        else:
            return False
    return True


def _same_end(reference: str, given: str, question: str) -> bool:
    if r"\infty" in reference or r"\infty" in given:
        return reference == given
    return bool(_same_part(_read(reference), Part("", (given,)), question))


def _same_claims(reference: Reference, claims: Claims, text: str, question: str) -> float | None:
    wanted, given = reference.claims.parts, list(claims.parts)  # type: ignore[union-attr]
    if len(wanted) == 1 == len(given):
        return _same_part(reference, given[0], question)
    if len(wanted) != len(given):
        return _same_formula(reference.text, text) if r"\begin" in reference.text + text else 0.0
    names = [[part.name for part in parts] for parts in (wanted, given)]
    named = [all(those) and len(set(those)) == len(those) for those in names]
    if all(named):
        if sorted(names[0]) != sorted(names[1]):
            return 0.0
        given.sort(key=lambda part: names[0].index(part.name))
    elif named[1] and reference.claims.ordered:  # type: ignore[union-attr]
        given.sort(key=lambda part: part.name)
    ordered = any(named) or (reference.claims.ordered and claims.ordered)  # type: ignore[union-attr]
    if reference.claims.ordered != claims.ordered and not any(named):  # type: ignore[union-attr]
        return 0.0  # (1, 2) is a point, and 1, 2 are two numbers
    for part in wanted:
        own = _read(part.sides[-1])
        found = next((one for one in given[: 1 if ordered else None] if _same_part(own, one, question)), None)
        if found is None:
            return 0.0
        given.remove(found)
    return 1.0


class _Given(NamedTuple):
    """What a side of an answer comes to."""

    text: str
    number: Number | None
    value: Value


def _same_part(reference: Reference, part: Part, question: str) -> float | None:
    """One value against one: all sides that can be worked out must agree, and the last is the answer."""
    if reference.value is None:
        side = _core(part.sides[-1] if "=" not in reference.text else " = ".join(part.sides), shortest=3)
        same = _same_formula(reference.text, side)
        return 0.0 if same and repeats(side, question, reference.text) else same
    sides = [_given(side) for side in part.sides]
    open_sides = [written for written, side in zip(part.sides, sides, strict=True) if side is None]
    if not part.name and any(is_equation(written) and not says(written, question) for written in open_sides):
        return 0.0  # 2x = 5 is not x = 5
    if sides[-1] is None and sides[0] is not None:
        sides.reverse()  # 5 = a + b
    last = sides[-1]
    if last is None or not all(_agree(side, last) for side in sides if side is not None):
        return 0.0
    exact = [side for side in sides[:-1] if side is not None and (side.number is None or not side.number.point)]
    return float(any(_same_number_or_value(reference, side, question) for side in [last, *exact]))


def _given(side: str) -> _Given | None:
    core = _core(side)
    for text in (side, core):
        if (number := read_number(text)) is not None:
            return _Given(text, number, Value(number.value, None))
        if (value := evaluate(text)) is not None:
            return _Given(text, None, value)
    number = _number_in_prose(side)
    return _Given(side, number, Value(number.value, None)) if number is not None else None


def _core(text: str, shortest: int = 2) -> str:
    """A passage without the words around its number or formula: "The distance is 2 sqrt(3) units".

    Args:
        shortest: letters of a word; fewer may be a product of variables.
    """
    tokens = plain_words(text).split(" ")
    while len(tokens) > 1 and _is_word(tokens[0], shortest):
        del tokens[0]
    while len(tokens) > 1 and _is_word(tokens[-1], shortest):
        del tokens[-1]
    return " ".join(tokens).rstrip(".,;:")


def _is_word(token: str, shortest: int) -> bool:
    letters = token.strip(".,:;'()").replace("-", "")
    if not (letters.isascii() and letters.isalpha()) or letters in MATH_FUNCTIONS:
        return False
    return len(letters) >= shortest or letters in ("is", "to", "of")


def _agree(side: _Given, last: _Given) -> bool:
    """Whether the left of "= 72" says the same as its right, up to rounding."""
    if same_value(side.value, last.value) or side is last:
        return True
    exact = decimal_of(side.value)
    return exact is not None and last.number is not None and rounds(exact, last.number, digits=1)


def _same_number_or_value(reference: Reference, given: _Given, question: str) -> bool:
    number = reference.number
    if number is not None and given.number is not None:
        same = _same_number(number, given.number)
    else:
        value = reference.value
        same = same_value(value, given.value)  # type: ignore[arg-type]
        if not same and "log" in reference.text + given.text:  # written without a base: 10 or e
            pair = evaluate(reference.text, 0) or value, evaluate(given.text, 0)
            same = pair[1] is not None and same_value(*pair)  # type: ignore[arg-type]
        for exact, decimal in ((value, given.number), (given.value, number)):
            if not same and decimal is not None and (point := decimal_of(exact)) is not None:  # type: ignore[arg-type]
                same = rounds(point, decimal)
        if number is not None and number.percent and given.value.exact is not None:
            same = same or given.value.exact * 100 == number.value
    return same and not repeats(given.text, question, reference.text)


def _same_number(reference: Number, answer: Number) -> bool:
    """Equal values, or an exact one and a decimal that rounds it."""
    readings = {answer.value, answer.value / 100} if answer.percent else {answer.value}
    if reference.percent:
        readings |= {value * 100 for value in readings}
    if reference.value in readings:
        return True
    if reference.places is None:
        return rounds(reference.value, answer) or (answer.percent and rounds(reference.value * 100, answer))
    return answer.places is None and rounds(answer.value, reference)


def rounds(exact: Fraction, decimal: Number, digits: int = 3) -> bool:
    """The one rule for decimals: rounded or cut correctly, to at least three digits, not all before the point.

    0.333 and 0.3333 are right for 1/3, 0.33 and 0.3334 are not; 0.667 and 0.666 are right for 2/3.
    """
    if decimal.places is None or (digits > 1 and not decimal.point) or (exact < 0) != (decimal.value < 0):
        return False
    written, scaled = abs(decimal.value) * Fraction(10) ** decimal.places, abs(exact) * Fraction(10) ** decimal.places
    return written >= 10 ** (digits - 1) and written in (scaled // 1, (scaled + Fraction(1, 2)) // 1)


def _number_in_prose(text: str) -> Number | None:
    """The only number in a phrase such as "72 apples" or "about $72 a day"; None for several, or for formulas."""
    text = re.sub(r"([A-Za-z])\s*\\cdot\s*(?=[A-Za-z])", r"\1-", plain_words(text))  # kg·m
    text = re.sub(r"([A-Za-z])\^\{?-?\d\}?", r"\1", text)  # square metres
    found = NUMBER.search(text)
    if found is None:
        return None
    before, after = text[: found.start()], text[found.end() :]
    # A letter that touches the number makes it a formula (2x, x_2), unless it begins a unit (72km).
    if re.search(r"[\w^_]$", before) or re.match(r"[A-Za-z](?![A-Za-z])|[\^_\d]", after):
        return None
    rest = f"{before} {after}"
    if MATH_FUNCTIONS.intersection(re.findall(r"[A-Za-z]+", rest)):
        return None
    wording = re.fullmatch(r"[A-Za-z\s.,;:'()/%€£¥-]*", rest) and not re.search(
        r"\b[b-zB-Z]\b(?<![mgslhLJVNWKCFI])", rest
    )
    return read_number(found.group()) if wording else None


def _same_formula(reference: str, answer: str) -> float | None:
    """math-verify's verdict, without its alarm signals: the pool's deadline stops what does not end."""
    parsed_reference = _parse_reference(reference)
    if not parsed_reference:
        return None
    if _postpones_work(reference, answer) or not (parsed_answer := _parse_formula(answer)):
        return 0.0
    from math_verify import verify

    return float(verify(parsed_reference, parsed_answer, timeout_seconds=None))


@lru_cache(maxsize=4096)
def _parse_reference(text: str) -> list[Any]:
    """Apart from the answers, which would push references out: one serves all completions of its problem."""
    return _parse_formula(text)


@lru_cache(maxsize=256)
def _parse_formula(text: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    text = re.sub(r"(?<![\\a-z])sqrt\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}", text)
    text = re.sub(rf"(?:\bnp\.|(?<![\\A-Za-z]))({'|'.join(MATH_FUNCTIONS)})(?![a-z])", r"\\\1 ", text)
    return parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)


def _postpones_work(reference: str, answer: str) -> bool:
    """Whether an answer leaves to the checker what the reference has worked out, or would drown it."""
    commands = set(re.findall(r"\\(?:sum|prod|int|lim|binom|choose)(?![a-z])|!", answer))
    deepest = max(accumulate(((c in "([{") - (c in ")]}") for c in answer), initial=0))
    if len(answer) > 200 + 4 * len(reference) or deepest > 20 or explodes(answer):
        return True
    return not commands <= set(re.findall(r"\\[a-z]+|!", reference))
