r"""Reading the answer out of a completion, and comparing it with the reference answer of a data set.

Reading (``extract_answer``). Exactly one passage of a completion counts, the first of these that is there: the last
``<answer>…</answer>``, the last ``\boxed{…}``, what follows the last ``####``, what follows the last "answer is" or
"answer:", the whole completion if it is one line without words, and otherwise the last number or formula (for a
reference in words: the last line). Text before ``</think>`` is not searched when anything follows it. Naming the right
answer along the way, or several answers in the place of one, earns nothing.

Comparing (``judge``). Equal texts are equal. A reference that is a number accepts that number in any notation
(thousands, units, currency, per cent, fractions, powers of ten) but no unevaluated arithmetic, so that repeating the
question's "3 + 4" is not an answer. A reference in words accepts only equal text. Everything else goes to math-verify,
which compares values, not forms: where the task is to factor or to expand, the question itself passes as its answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from igrpo.rows import content_text

MAX_ANSWER_CHARS = 2000
"""A longer answer is no answer: it bounds what a parser can be made to chew on."""

CompletionText = str | Sequence[Mapping[str, Any]]

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+])?(?:[$€£¥]\s*)?
    (?:(?P<whole>\d+)(?:\s*(?=\\frac)|\s+(?=\d+/\d)))?
    (?:\\frac\s*(?:\{{\s*(?P<top>-?{_DECIMAL})\s*\}}|(?P<top1>\d))\s*(?:\{{\s*(?P<bottom>{_DECIMAL})\s*\}}|(?P<bottom1>\d))
      |10\s*\^\s*(?:\{{\s*(?P<power>[-+]?\d+)\s*\}}|(?P<power1>\d+))
      |(?P<decimal>{_DECIMAL})
       (?:[eE](?P<exponent>[-+]?\d+)
         |\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*(?:\{{\s*(?P<exponent1>[-+]?\d+)\s*\}}|(?P<exponent2>-?\d+))
         |\s*/\s*(?P<denominator>{_DECIMAL}))?
    )
    (?P<percent>\s*(?:%|percent\b))?""",
    re.VERBOSE,
)
_MATH_SPAN = r"\$\$?(?P<a>(?:[^$\\]|\\.)+)\$\$?|\\\((?P<b>.+?)\\\)|\\\[(?P<c>.+?)\\\]"
_LAST_EXPRESSION = re.compile(rf"{_MATH_SPAN}|(?<![\w.^])(?P<number>{_NUMBER.pattern})", re.VERBOSE | re.DOTALL)
_ANSWER_IS = re.compile(r"answer(?:\s+is|\W{0,4}[:=])(?:\s+is\b)?[\s:*]*", re.IGNORECASE)
_UNICODE = str.maketrans(
    {
        "\u2212": "-",  # minus sign
        "\u2013": "-",  # en dash
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u00f7": "/",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u221a": "sqrt",
        "\u00b0": r"^\circ ",
        "\u00b2": "^2",
        "\u00b3": "^3",
        "\u222a": r"\cup ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2019": "'",
        "\u00a0": " ",
        "\0": "",
    }
)
_TEXT_COMMAND = r"\\(?:text|mbox|textbf|textit|textrm|mathrm|mathbf|mathit|operatorname)"
MATH_FUNCTIONS = frozenset({"cos", "cot", "csc", "exp", "ln", "log", "pi", "sec", "sin", "sqrt", "tan"}) | frozenset(
    {"arccos", "arcsin", "arctan", "cosh", "sinh", "tanh"}
)


def completion_text(completion: CompletionText) -> str:
    """The text of a completion, whether it came as a string or as messages."""
    if isinstance(completion, str):
        return completion
    return (content_text(completion[-1]["content"]) or "") if completion else ""


def whole_text(completion: CompletionText, prompt_suffix: str) -> str:
    """A completion's text behind the tags that its prompt already ended with."""
    return prompt_suffix + completion_text(completion)


def whole_texts(completions: Sequence[CompletionText], prompt_suffix: Sequence[str] | None) -> list[str]:
    """[n] ``whole_text`` of each; ``prompt_suffix`` is the column of that name, None where a caller has none."""
    suffixes = prompt_suffix or [""] * len(completions)
    return [whole_text(one, suffix) for one, suffix in zip(completions, suffixes, strict=True)]


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}`` whose braces balance within MAX_ANSWER_CHARS; None when there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, min(len(text), start + MAX_ANSWER_CHARS)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return None


def extract_answer(text: str, *, words: bool = False, lines: int = 1) -> str | None:
    """The one passage of a completion that counts as its answer (order: the module's docstring); None without one.

    Args:
        words: The reference is no number or formula: without any marker, the last ``lines`` lines are the answer.
    """
    if text.rfind("<think>") > text.rfind("</think>"):
        return None  # still thinking
    return _passage(text, words, lines)


def _passage(text: str, words: bool = False, lines: int = 1) -> str | None:
    after_thinking = text.rpartition("</think>")[2]
    text = (after_thinking if after_thinking.strip() else text).strip()
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        tagged = text[start + len("<answer>") : end].strip()
        return _limited(last_boxed(tagged) or tagged)
    if (boxed := last_boxed(text)) is not None:
        return _limited(boxed)
    if "####" in text:
        return _limited(_first_line(text.rpartition("####")[2]))
    tail = text[-MAX_ANSWER_CHARS:]
    if announced := list(_ANSWER_IS.finditer(tail)):
        return _limited(_stated(tail[announced[-1].end() :]))
    if words:
        return _limited("\n".join([line for line in tail.splitlines() if line.strip()][-lines:]))
    if "\n" not in tail and _only_notation(tail):
        return _limited(tail)
    if not (found := list(_LAST_EXPRESSION.finditer(tail))):
        return None
    last = found[-1]
    glued = re.match(r"[A-Za-z](?![A-Za-z])|[\^_]\S*", tail[last.end() :])  # 72x is not 72
    return _limited(last["a"] or last["b"] or last["c"] or last["number"] + (glued[0] if glued else ""))


def without_answer(text: str) -> str:
    """The beginning of a completion, up to its conclusion: where the final answer is written, or, if the text states
    it before that, the last such place. The whole text if it has no answer.

    Example: ``"<think>2 + 3 = 5</think><answer>5</answer>"`` becomes ``"<think>2 + 3 = "``.
    """
    answer = _passage(text)  # also of thinking that was cut: what it found is not to be shown either
    if answer is None:
        return text
    written = [m.start() for m in re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text)]
    final = text.rfind("<answer>") if "</answer>" in text else -1
    if final < 0:
        final = written.pop() if written else len(text)
    return text[: max((start for start in written if start < final), default=final)]


def _only_notation(line: str) -> bool:
    return MATH_FUNCTIONS.issuperset(re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", line)))


def _limited(answer: str) -> str | None:
    answer = answer.strip()
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _stated(rest: str) -> str:
    """What "the answer is" introduces: a leading formula, or the rest of the sentence without its justification."""
    rest = _first_line(rest)
    if formula := re.match(_MATH_SPAN, rest, re.DOTALL):
        return formula["a"] or formula["b"] or formula["c"]
    return re.split(r"\.(?:\s|$)|,?\s(?:because|since|which|where|as)\s", rest, maxsplit=1)[0]


def _tidy(text: str) -> str:
    """LaTeX and Unicode notation brought to one spelling; layout, markup, degree signs and trailing units removed."""
    text = re.sub(r"\s+", " ", text.translate(_UNICODE)).strip().strip("`*\"'").strip()
    text = re.sub(r"(?<!\\)(?:\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!\s*|\\[,;:()\[\]])", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", re.sub(r"(?<!\\)\\ |~", " ", text.replace("{,}", ",")))
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "", text.replace("\\%", "%"))
    text = re.sub(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$", r"\1", text).replace("\\$", "$").replace("**", "^").strip()
    if wrapped := re.fullmatch(rf"{_TEXT_COMMAND}\{{([^{{}}]*)\}}\.?", text):
        text = wrapped[1]
    elif re.search(r"\d", text):
        text = re.sub(rf"(?:\s*{_TEXT_COMMAND}\{{[^{{}}]*\}}(?:\^\{{?-?\d\}}?)?)+\.?$", "", text)
    text = re.sub(r"(?<=\d)_\{(\d+)\}", r"_\1", text)  # a number's base
    text = re.sub(r"^([-+])\s+", r"\1", re.sub(r"\s+", " ", text).strip())
    return text.rstrip(".").rstrip()


def _normal_text(text: str) -> str:
    """What two equal texts have in common: no spaces around punctuation, no case, no parentheses around one letter."""
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", _tidy(text)).casefold()
    return text[1:-1] if re.fullmatch(r"\([a-z]\)", text) else text


class _Number(NamedTuple):
    value: Fraction
    places: int | None
    """Decimal places as written; None for a fraction."""
    percent: bool


def _number(text: str) -> _Number | None:
    """The number that a tidy text is, in whatever notation; None when it is anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    part = match.groupdict()
    whole, percent = Fraction(part["whole"] or 0), bool(part["percent"])
    exponent = int(next((e for k in ("exponent", "exponent1", "exponent2", "power", "power1") if (e := part[k])), 0))
    if abs(exponent) > 400:
        return None
    bottom = part["bottom"] or part["bottom1"] or part["denominator"]
    top = part["top"] or part["top1"] or part["decimal"] or "1"
    value, places = _fraction(top), len(top.partition(".")[2])
    if bottom:
        if not (divisor := _fraction(bottom)):
            return None
        value, places = whole + value / divisor, None
    value *= Fraction(10) ** exponent
    return _Number(-value if part["sign"] == "-" else value, places, percent)


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", "").removesuffix("."))


def _number_in_prose(text: str) -> _Number | None:
    """The only number in a phrase such as "72 apples" or "about $72 a day"; None for several, or for formulas."""
    text = re.sub(r"([A-Za-z])\^\{?-?\d\}?", r"\1", text)  # square metres
    found = _NUMBER.search(text)
    if found is None:
        return None
    before, after = text[: found.start()], text[found.end() :]
    # A letter that touches the number makes it a formula (2x, x_2), unless it begins a unit (72km).
    if re.search(r"[\w^_]$", before) or re.match(r"[A-Za-z](?![A-Za-z])|[\^_\d]", after):
        return None
    rest = f"{before} {after}"
    wording = re.fullmatch(r"[A-Za-z\s.,;:'()/%-]*", rest) and not re.search(r"\b[b-zB-Z]\b(?<![mgslhLJVNWKCFI])", rest)
    return _number(found.group()) if wording else None


def _same_number(reference: _Number, answer: _Number) -> bool:
    """Equal values, the answer being evaluated; a decimal may round a fraction at its fourth place or later."""
    if reference.places is not None and answer.places is None and reference.value.denominator == 1:
        return False  # 128/2 for 64: the division that was asked for, not its result
    readings = {answer.value, answer.value / 100} if answer.percent else {answer.value}
    if reference.percent:
        readings |= {value * 100 for value in readings}
    if reference.value in readings:
        return True
    places = {reference.places, answer.places} - {None}
    if len(places) != 1 or None not in (reference.places, answer.places) or (digits := places.pop()) < 4:
        return False
    return any(abs(value - reference.value) <= Fraction(1, 10**digits) for value in readings)


class Reference(NamedTuple):
    text: str
    """Tidy, without a leading ``x =``."""
    normal: str
    number: _Number | None
    words: bool
    lines: int


@lru_cache(maxsize=4096)
def read_reference(solution: str) -> Reference:
    r"""The reference answer in a data set's cell: after ``####``, in the last ``\boxed{}``, or the whole cell."""
    answer = (solution.rpartition("####")[2] if "####" in solution else last_boxed(solution) or solution).strip()
    text = re.sub(r"^[A-Za-z]\s*(?:=|\\in(?![a-z]))\s*", "", _tidy(answer))
    number = _number(text)
    return Reference(text, _normal_text(answer), number, number is None and _in_words(answer), answer.count("\n") + 1)


def _in_words(answer: str) -> bool:
    """Whether a reference is words, codes, dates or grids rather than a formula."""
    text = _tidy(answer)
    bare = re.sub(r"_\{\\text.*?\}|\\(?:begin|end)\{\w+\}|\\[A-Za-z]+", " ", text)
    names = re.findall(r"[A-Za-z]{2,}", bare)
    if "\n" in answer or any(len(name) > 2 and name not in MATH_FUNCTIONS for name in names):
        return True
    if re.search(r"""["?:;]|'\w*'|\d{4}-\d\d-\d\d|[A-Za-z]\d""", bare):
        return True
    return "\\" not in text and bool(re.search(r"\d \d", text) or (names and not re.search(r"[\d+*/^=()-]", text)))


def judge(reference: Reference, answer: str | None) -> float | None:
    """1.0 or 0.0 for an extracted answer; None where the reference is empty or is a formula that cannot be parsed."""
    if not reference.normal:
        return None
    if answer is None:
        return 0.0
    if _normal_text(answer) == reference.normal:
        return 1.0
    if reference.words:
        return 0.0
    tidy = _tidy(answer)
    if "=" not in reference.text:
        tidy = re.sub(r"^[A-Za-z]\s*\\in(?![a-z])\s*", "", tidy.rpartition("=")[2].strip())
    if reference.number is not None:
        number = _number(tidy) or _number_in_prose(tidy)
        return float(number is not None and _same_number(reference.number, number))
    if based := re.fullmatch(r"(\d+)_\d+", reference.text):
        return float(tidy == based[1])
    return _same_formula(reference.text, tidy)


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
    depth = deepest = 0
    for character in answer:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if len(answer) > 200 + 4 * len(reference) or deepest > 20 or explodes(answer):
        return True
    return not commands <= set(re.findall(r"\\[a-z]+|!", reference))


def explodes(text: str) -> bool:
    """Towers of powers and five-digit exponents: a short text that evaluates to more digits than memory holds."""
    return bool(re.search(r"(?:\^|\*\*)[\s({+-]*\d{5}|(?:\^|\*\*)[\s({+-]*\d[\d.]*[\s)]*(?:\^|\*\*)", text))
