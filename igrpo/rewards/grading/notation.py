"""LaTeX, Unicode and markdown notation brought to one spelling, and numbers read in whatever notation."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_EXPONENT = 20_000
MAX_DIGITS = 100_000
"""A longer number is compared as it is written."""
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
NUMBER = re.compile(
    rf"""(?P<sign>[-+])?(?:[$€£¥]\s*)?
    (?:(?P<whole>\d+)(?:\s*(?=\\frac)|\s+(?=\d+/\d)))?
    (?:\\frac\s*(?:\{{\s*(?P<top>-?{DECIMAL})\s*\}}|(?P<top1>\d))\s*(?:\{{\s*(?P<bottom>{DECIMAL})\s*\}}|(?P<bottom1>\d))
      |10\s*\^\s*(?:\{{\s*(?P<power>[-+]?\d+)\s*\}}|(?P<power1>[-+]?\d+))
      |(?P<decimal>{DECIMAL}|\.(?=\\(?:overline|bar|dot)))
       (?:\\(?:overline|bar|dot)\s*(?:\{{\s*(?P<period>\d+)\s*\}}|(?P<period1>\d))
         |[eE](?P<exponent>[-+]?\d+)
         |\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*(?:\{{\s*(?P<exponent1>[-+]?\d+)\s*\}}|(?P<exponent2>[-+]?\d+))
         |\s*/\s*(?P<denominator>{DECIMAL}))?
    )
    (?P<percent>\s*(?:%|percent\b))?""",
    re.VERBOSE,
)
UNICODE = str.maketrans(
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
        "\u222a": r"\cup ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u2248": r"\approx ",
        "\u2260": r"\ne ",
        "\u00b1": r"\pm ",
        "\u2205": r"\emptyset ",
        "\u2208": r"\in ",
        "\u00bd": r"\frac{1}{2}",
        "\u2153": r"\frac{1}{3}",
        "\u2154": r"\frac{2}{3}",
        "\u00bc": r"\frac{1}{4}",
        "\u00be": r"\frac{3}{4}",
        "\u2155": r"\frac{1}{5}",
        "\u2156": r"\frac{2}{5}",
        "\u2157": r"\frac{3}{5}",
        "\u2158": r"\frac{4}{5}",
        "\u2159": r"\frac{1}{6}",
        "\u215a": r"\frac{5}{6}",
        "\u215b": r"\frac{1}{8}",
        "\u215c": r"\frac{3}{8}",
        "\u215d": r"\frac{5}{8}",
        "\u215e": r"\frac{7}{8}",
        "\u2044": "/",
        "\u22c5": r"\cdot ",
        "\u2a7d": r"\le ",
        "\u2a7e": r"\ge ",
        "\u2229": r"\cap ",
        "\u211d": r"\mathbb{R}",
        "\u00d8": r"\emptyset ",
        "\uff0c": ",",
        "\uff08": "(",
        "\uff09": ")",
        "\u2026": "...",
        "\u202f": " ",
        "\u2009": " ",
        "\u2019": "'",
        "\u00a0": " ",
        "\0": "",
    }
)
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_TEXT = (
    r"\\(?:text|mbox|textbf|textit|textrm|textnormal|textup|textsf|texttt|mathrm|mathbf|mathit|mathsf|boldsymbol|bm"
    r"|operatorname|hbox|underline)"
)
MATH_FUNCTIONS = frozenset({"cos", "cot", "csc", "exp", "ln", "log", "pi", "sec", "sin", "sqrt", "tan"}) | frozenset(
    {"arccos", "arcsin", "arctan", "cosh", "sinh", "tanh"}
)
_NEEDS_MORE = re.compile(rf"(?:[-+_^]|\\(?:{'|'.join(sorted(MATH_FUNCTIONS - {'pi'}))}))\s?$")
_VECTOR = re.compile(r"\\(?:mathbf|mathit|boldsymbol|bm)\{[A-Za-z]\}")
_TRIGONOMETRIC = re.compile(r"(?<![A-Za-z])\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
DENIAL = re.compile(
    r"\b(?:not|isnt|cannot|never|neither|nor|except|unless|than|wrong|incorrect|false|untrue|between|exceeds?)\b|n't\b"
    r"|\bno\b(?![.:])|\bor\s+[a-z]{2,}|\b(?:over|under|above|below|beyond|up to|at least|at most|exceeding)\W*(?=$|\d)"
    r"|\b(?:at least|at most|and up)\W*$|\\neg(?![a-z])|\\lnot(?![a-z])",
    re.IGNORECASE,
)
"""Words that make a number before or after them something else than the answer."""


_PLAIN = re.compile(r"[A-Za-z0-9 .,:=+-]*")
_NO_VALUE = re.compile(r"(?:there (?:is|are) )?no (?:real )?(?:solutions?|roots?)|(?:the )?empty set", re.IGNORECASE)
ALL_REALS = re.compile(r"\\(?:mathbb|mathbf|Bbb) ?\{? ?R ?\}?|\\R(?:eals)?|all real(?:s| numbers)", re.IGNORECASE)
_OTHER_SPELLINGS = tuple(
    (re.compile(found), written)
    for found, written in (
        (r"\u221b\s*(\d+|\([^()]{1,200}\))", r"\\sqrt[3]{\1}"),
        (r"\\root\s*\{?(\w)\}?\s*\\of\s*(\{[^{}]{1,200}\}|\d)", r"\\sqrt[\1]\2"),
        (r"\{([^{}\\]{1,200})\\over(?![a-z])([^{}\\]{1,200})\}|^([^{}\\]{1,200})\\over(?![a-z])([^{}\\]{1,200})$",
         r"\\frac{\1\3}{\2\4}"),
        (r"(?:\{\}|(?<![\w)}\]]))[_^]\{?(\d+)\}?\s*(?:C|\\mathrm\{C\})_\{?(\d+)\}?", r"\\binom{\1}{\2}"),
        (r"(?<![A-Za-z\\}])C(?:_\{?(\d+)\}?\^\{?(\d+)\}?|\((\d+), ?(\d+)\))", r"\\binom{\1\3}{\2\4}"),
        (r"(?<![A-Za-z\\}])C\^\{?(\d+)\}?_\{?(\d+)\}?", r"\\binom{\2}{\1}"),
        (r"(\d)(?:\u0305|\u0304)", r"\\overline{\1}"),
        (r"\.(\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r".\1\\overline{\2\3\4}"),
        (r"(?<=\d)\{\.\}(?=\d|\\)", "."),
        (r"(\.\d*)(\d) (?:recurring|repeating)\b", r"\1\\overline{\2}"),
    )
)  # fmt: skip


@lru_cache(maxsize=4096)
def tidy(text: str) -> str:
    """LaTeX and Unicode notation brought to one spelling; layout, markup, degree signs and trailing units removed."""
    if _NO_VALUE.fullmatch(text.strip(" .")):
        return r"\emptyset"
    if _PLAIN.fullmatch(text) and not text.endswith("ing"):
        return re.sub(r"^([-+])\s+", r"\1", re.sub(r"\s+", " ", text).strip()).rstrip(".").rstrip()
    text = re.sub(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub(r"\s+", " ", re.sub(r"</?(?:b|i|u|em|strong|span|p)>", "", text.translate(UNICODE))).strip()
    text = re.sub(r"(?<![\w*)}])(\*\*|__|\*)(?=[^\s*_])([^*_]{0,200}?)(?<=\S)\1(?![\w*({])", r"\2", text)
    text = text.strip("`*\"'").strip()
    text = re.sub(r"(?<!\\)(?:\\(?:left|right|displaystyle|textstyle)(?![a-zA-Z])|\\!\s*|\\[,;:()\[\]])", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", re.sub(r"(?<!\\)\\ |~|\\q?quad(?![a-z])", " ", text.replace("{,}", ",")))
    degree = r"\\degree " if _TRIGONOMETRIC.search(text) else ""
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", degree, text.replace("\\%", "%"))
    text = text[1:] if text.count("$") == 1 and re.match(r"\$[^\d\s.+-]", text) else text
    text = re.sub(r"(?<!\\)\$((?:[^$\\]|\\.)+)\$", r"\1", text).replace("\\$", "$").replace("**", "^").strip()
    text = re.sub(r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset", text)
    text = _braced(text)
    text = re.sub(
        r"\\mathrm\s*\{\s*([ei])\s*\}|(?<![\d }{])\\(?:mathrm|mathbf|mathit)\{([A-Za-z])\}(?=.)", r"\1\2", text
    )
    if wrapped := re.fullmatch(rf"{_TEXT}\{{([^{{}}]*)\}}\.?", text):
        text = wrapped[1]
    elif re.search(r"\d", text):
        one = rf"(?:(?:\\mu\s*)?{_TEXT}\{{[^{{}}]*\}}|\\Omega)(?:\^(?:-?\d|\{{-?\d\}}))?"
        per = rf"\\frac\{{{one}\}}\{{{one}\}}|{one}"
        text = re.sub(rf"(?:\s*(?:(?:\\cdot|/)\s*)?(?:{per}))+\.?$", _unit, text)
    for found, written in _OTHER_SPELLINGS:
        text = found.sub(written, text)
    text = re.sub(r"\\overline\{(\d)\}\\overline\{(\d)\}", r"\\overline{\1\2}", text)
    text = re.sub(r"(?<=\d)_\{(\d+)\}", r"_\1", text)  # a number's base
    text = re.sub(r"(?<=\d)\.(\d*)\((\d+)\)(?!\d)", r".\1\\overline{\2}", text)  # 0.(3)
    text = re.sub(r"^([-+])\s+", r"\1", re.sub(r"\s+", " ", text).strip())
    text = text.rstrip(".").removesuffix(r"\ldots").removesuffix(r"\dots").rstrip()
    return r"\emptyset" if _NO_VALUE.fullmatch(text) else text


def _braced(text: str) -> str:
    r"""Without groups around one thing: ``{72 cm}``, ``{\rm cm}``, ``{\mathrm{cm}}``; a set and an argument stay."""
    text = re.sub(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{\\?([^{}\\]*)\}", r"\1\\text{ \2}", text)
    text = re.sub(r"\\(?:unit|si)\s*\{\\?([^{}\\]*)\}", r"\\text{ \1}", text)
    text = re.sub(r"\{\\(?:rm|bf|it|sf|tt)(?![a-z])\s*([^{}]*)\}", r"\\text{\1}", text)
    text = re.sub(rf"(?<![}}A-Za-z^_])\{{\s*({_TEXT}\{{[^{{}}]*\}})\s*\}}", r"\1", text)
    while (inner := re.fullmatch(r"\{((?:[^{},]|\{[^{}]*\})*)\}", text)) and not re.search(r"\\(?:over|choose)", text):
        text = inner[1].strip()
    return text


def _unit(found: re.Match[str]) -> str:
    """Nothing for a unit; an index, an operand or a vector stays."""
    kept = DENIAL.search(plain_words(found[0])) or re.search(r"\b(?:or|and)\b", found[0]) or _VECTOR.search(found[0])
    return found[0] if kept or _NEEDS_MORE.search(found.string[max(0, found.start() - 9) : found.start()]) else ""


def plain_words(text: str) -> str:
    r"""``\text{…}`` and the like replaced by what stands in them."""
    return re.sub(r"\s+", " ", re.sub(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", r" \1 ", text)).strip()


def normal_text(text: str) -> str:
    """What two equal texts have in common: no spaces around punctuation, no case, no parentheses around one letter."""
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", tidy(text)).casefold()
    return text[1:-1] if re.fullmatch(r"\([a-z]\)", text) else text


class Number(NamedTuple):
    value: Fraction
    places: int | None
    """Decimal places as written, a power of ten moving them; None for a fraction."""
    percent: bool
    point: bool
    """Whether digits stand behind a decimal point."""


def read_number(text: str) -> Number | None:
    """The number that a tidy text is, in whatever notation; None when it is anything else."""
    text = re.sub(r"^\$\s*(?=[-+])|\s*[€£¥¢$]$", "", text[: MAX_DIGITS + 1])
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3}|'\d{3})+(?:\.\d+)?", text):
        text = text.replace(" ", "").replace("'", "")
    match = NUMBER.fullmatch(text) if len(text) <= MAX_DIGITS else None
    if match is None:
        return None
    part = match.groupdict()
    whole, percent = repeating(part["whole"] or "0"), bool(part["percent"])
    exponent = next((e for k in ("exponent", "exponent1", "exponent2", "power", "power1") if (e := part[k])), "0")
    if len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    bottom = part["bottom"] or part["bottom1"] or part["denominator"]
    top = part["top"] or part["top1"] or part["decimal"] or "1"
    period = part["period"] or part["period1"] or ""
    value, places = repeating(top, period), None if period else len(top.partition(".")[2])
    if bottom:
        if not (divisor := repeating(bottom)):
            return None
        value, places = whole + value / divisor, None
    value *= Fraction(10) ** int(exponent)
    point, places = bool(places), None if places is None else places - int(exponent)
    return Number(-value if part["sign"] == "-" else value, places, percent, point)


def repeating(number: str, period: str = "") -> Fraction:
    """``0.1`` with the period ``6`` is 1/6. Digits in any number: Python itself reads 4,300."""
    sign = -1 if number.startswith("-") else 1
    whole, _, places = number.lstrip("-").replace(",", "").partition(".")
    value = Fraction(_integer(whole + places), 10 ** len(places))
    if period:
        value += Fraction(_integer(period), (10 ** len(period) - 1) * 10 ** len(places))
    return sign * value


def _integer(digits: str) -> int:
    value = 0
    for start in range(0, len(digits), 4000):
        chunk = digits[start : start + 4000]
        value = value * 10 ** len(chunk) + int(chunk)
    return value
