r"""Whether an answer only repeats the question: ``3 + 4`` to "What is 3 + 4?" is not worth what 7 is.

The question's text decides, not the answer's form: ``2^{10}`` for 1024 is right unless the question says 2^{10} (or "2
to the power of 10") itself. Of a plain calculation, a sum or quotient of written numbers, nothing may come from the
question: that would leave its work to the checker.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

from igrpo.rewards.grading.notation import repeating, tidy

MAX_QUESTION_CHARS = 20_000
_OPERATORS = r"[-+*/^=!,()<>|]"
_CALCULATION = re.compile(r"[\d.\s+\-*/()]+")
_UP_TO_NINETEEN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_WORDS = {word: i for i, word in enumerate(_UP_TO_NINETEEN.split(" "))}
_TENS = dict(twenty=20, thirty=30, forty=40, fifty=50, sixty=60, seventy=70, eighty=80, ninety=90)
_ORDINALS = {"second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12, "twentieth": 20}
_ORDINALS |= {f"{word}th": i for word, i in _WORDS.items()}
_NUMBER_WORD = re.compile(
    rf"\b(?:({'|'.join(_TENS)})(?:[- ]({'|'.join(list(_WORDS)[1:10])}))?|({'|'.join([*_ORDINALS, *_WORDS])}))\b",
    re.IGNORECASE,
)
_FUNCTIONS = {"sine": "sin", "cosine": "cos", "tangent": "tan", "cotangent": "cot", "secant": "sec", "cosecant": "csc"}
_FUNCTION = "|".join([*_FUNCTIONS, *_FUNCTIONS.values()])
_SPOKEN = (
    (r"(\d+) (?:raised )?to the (?:power (?:of )?)?(\d+)(?:st|nd|rd|th)?(?: power)?", r"\1^\2"),
    (r"(\d+)(?:st|nd|rd|th)? power of (\d+)", r"\2^\1"),
    (r"(\d+) squared|(?:the )?square of (\d+)", r"\1\2^2"),
    (r"(\d+) cubed|(?:the )?cube of (\d+)", r"\1\2^3"),
    (r"square root of (\d+)", r"sqrt\1"),
    (r"cube root of (\d+)", r"sqrt[3]\1"),
    (r"(\d+)(?:st|nd|rd|th)? root of (\d+)", r"sqrt[\1]\2"),
    (r"(\d+) choose (\d+)", r"binom\1,\2"),
    (r"(\d+) factorial|factorial of (\d+)", r"\1\2!"),
    (r"log(?:arithm)? (?:to (?:the )?|in )?base (\d+) of (\d+)", r"log_\1 \2"),
    (r"log(?:arithm)? of (\d+) (?:to|in|with)? ?(?:the )?base (\d+)", r"log_\2 \1"),
    (r"base[- ](\d+) log(?:arithm)? of (\d+)", r"log_\1 \2"),
    (rf"\b(?:{_FUNCTION}) (?:of )?(?:an? )?(?:angle (?:of )?)?([\d.]+) ?(?:degrees?|deg\b|°)", None),
)


def repeats(expression: str, question: str, reference: str) -> bool:
    """Whether an answer, right in value, is what the question already says.

    Args:
        expression: tidy, and no whole number; what is written like the reference is never a repetition.
        question: the user's text; "" where nobody knows it: a plain calculation then is left undone, all else is right.
    """
    if re.fullmatch(r"[-+]?[\d,]+", expression):
        return False
    said, wanted, as_written = _canonical(expression), _canonical(reference), _one_spelling(expression)
    if sorted(as_written) == sorted(wanted):
        return False
    calculation = bool(_CALCULATION.fullmatch(as_written)) and bool(re.search(r"\d\)*[-+*/]\(*-?[\d.]", as_written))
    fraction = bool(re.fullmatch(r"-?(?:\d+ )?[\d.]+/[\d.]+", said)) and not re.fullmatch(r"-?[\d,]+", wanted)
    if not question:
        return calculation and not fraction
    asked = _asked(question[:MAX_QUESTION_CHARS])
    if calculation and not fraction:
        numbers = set(re.findall(r"[\d.]*\d", said))
        in_words = set(re.findall(r"[\d.]*\d", _in_digits(asked))) - {"1"}  # "each one" is no number
        return bool(numbers & (in_words | set(re.findall(r"[\d.]*\d", asked))))
    if _stands_in(said, asked):
        return not re.fullmatch(r"-?\d*\.\d+", said) or "/" in wanted
    if "/" in wanted and _rounds_a_decimal_in(asked, said):
        return True
    atoms = [atom for atom in re.split(r"[-+*/()]| mod ", said) if atom.strip()]
    return len(atoms) > 1 and not fraction and all(_stands_in(atom.strip(), asked) for atom in atoms)


def _stands_in(expression: str, asked: str) -> bool:
    if not expression:
        return False
    before = r"(?<![\w.^])" if re.match(r"\w", expression) else ""
    after = r"(?!\.?\w)" if re.search(r"\w$", expression) else ""
    return re.search(rf"{before}{re.escape(expression)}{after}", asked) is not None


def says(expression: str, question: str) -> bool:
    """Whether the question holds an expression, in whatever spelling."""
    return bool(question) and _stands_in(_canonical(expression), _asked(question[:MAX_QUESTION_CHARS]))


def _rounds_a_decimal_in(asked: str, said: str) -> bool:
    """0.333 where the question gives 0.333... or 0.3 with a bar and wants the fraction."""
    given = re.fullmatch(r"-?(\d*\.\d+)(?:overline(\d+))?", said)
    if given is None:
        return False
    unit = Fraction(1, 10 ** len(given[1].partition(".")[2]))
    decimals = re.finditer(r"(?<![\d.])(\d*\.\d*)(?:overline(\d+))?", asked)
    value = repeating(given[1], given[2] or "")
    return any(abs(repeating(one[1], one[2] or "") - value) <= unit for one in decimals if 1 < len(one[0]) < 100)


def _in_digits(question: str) -> str:
    """The question with its numbers in words as digits."""

    def digits(found: re.Match[str]) -> str:
        tens, units, one = (found[i].lower() if found[i] else "" for i in (1, 2, 3))
        return str(_ORDINALS.get(one) or _WORDS.get(one, 0) + _TENS.get(tens, 0) + _WORDS.get(units, 0))

    return _NUMBER_WORD.sub(digits, question.replace("$", ""))


def _spoken(question: str) -> list[str]:
    """Expressions that the question says in words, as ``_canonical`` would have them."""
    text, made = _in_digits(question), []
    for said, written in _SPOKEN:
        for found in re.finditer(said, text, re.IGNORECASE):
            if written is None:
                name = found[0].partition(" ")[0].lower()
                made.append(f"{_FUNCTIONS.get(name, name)} {found[1]}degree")
            else:
                made.append(found.expand(written))
    return made


@lru_cache(maxsize=512)
def _asked(question: str) -> str:
    return " ; ".join([_canonical(question), *_spoken(question)])


def _canonical(text: str) -> str:
    """``_one_spelling`` without what changes nothing, so that equal expressions are equal text."""
    return _without_detours(_one_spelling(text))


def _one_spelling(text: str) -> str:
    """One spelling of operators, without braces."""
    text = tidy(text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", re.sub(r"\\[lr]?vert(?![a-z])", "|", text))
    text = re.sub(r"(\d)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1 \2/\3", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\d?t?binom\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\{([^{}]*)\\choose([^{}]*)\}", r"binom\1\3,\2\4", text)
    text = re.sub(r"\\d?t?binom\s*(\d)\s*(\d)", r"binom\1,\2", text)
    text = re.sub(r"\bC\((\d+), ?(\d+)\)", r"binom\1,\2", text)
    text = re.sub(r"\\(?:cdot|times|ast)(?![a-z])", "*", re.sub(r"\\div(?![a-z])", "/", text)).replace("**", "^")
    text = re.sub(r"(?<=\d)\s+x\s+(?=\d)", "*", text)
    text = re.sub(r"(?:\\?log)_(?:\{(\w+)\}|(\w))\s*[({]?\s*(\w+)[)}]?", r"log_\1\2 \3", text)
    text = re.sub(r"(?:\\?sqrt)\s*[({]?\s*(\w+)[)}]?", r"sqrt\1", text)
    text = re.sub(r"\^\s*[({]\s*(-?\w+)\s*[)}]", r"^\1", text)
    text = re.sub(r"\s*(?:\(\s*)?(?:\\[bp]?mod(?![a-z])|\bmod(?:ulo)?\b)\s*", " mod ", text)
    text = re.sub(r"[{}\\$]", "", text).casefold()
    text = re.sub(r"(?<![a-z])(?:pi\s*\*?\s*i|i\s*\*?\s*pi)(?![a-z])", "ipi", text)
    return re.sub(rf"\s*({_OPERATORS})\s*", r"\1", re.sub(r"\s+", " ", text)).strip().rstrip(".")


def _without_detours(text: str) -> str:
    """Spellings that change nothing: ``+ 0``, ``1 *``, ``10.0``, brackets around one number; a root as a power, a
    quotient of logarithms, a quotient of factorials that is a binomial coefficient."""
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", re.sub(r"(?<![\d.])(\d+)\.0+(?![\d.])", r"\1", text)).removeprefix("+")
    if re.fullmatch(r"\([^()]*\)", text):
        text = text[1:-1]
    text = re.sub(r"(?<![a-z\d])\((\d+)\)", r"\1", re.sub(r"\^\+", "^", text))
    text = re.sub(r"(?<![\d.^/])1\*|[*/]1(?![\d.^])|(?<![\d.^])0\+|[-+]0(?![\d.^])", "", text)
    text = re.sub(r"(\d+)\^\(?1/(\d+)\)?", lambda m: f"sqrt{'' if m[2] == '2' else f'[{m[2]}]'}{m[1]}", text)
    text = re.sub(r"(\d+)\^0?\.5(?!\d)", r"sqrt\1", text)
    text = re.sub(r"(?:log|ln) ?\(?(\d+)\)?/(?:log|ln) ?\(?(\d+)\)?", r"log_\2 \1", text)
    text = re.sub(r"(\d{1,4})!/\(?(\d{1,4})!\*?(?:\((\d+)-(\d+)\)|(\d{1,4}))!\)?", _binomial, text)
    text = re.sub(r"(?<![a-z])(?:lg|log) ?\(?(\d+)\)?", r"log_10 \1", text).replace("sqrt[2]", "sqrt")
    text = re.sub(rf"({'|'.join(_FUNCTIONS.values())}) ?\(?(\^?[a-z\d./*]+)\)?", r"\1 \2", text)
    text = re.sub(r"(gcd|lcm)\((\d+),(\d+)\)", lambda m: f"{m[1]}({','.join(sorted(m.groups()[1:]))})", text)
    return re.sub(r"binom(\d{1,4}),(\d{1,4})", _smaller_binomial, text)


def _binomial(found: re.Match[str]) -> str:
    n, k = int(found[1]), int(found[2])
    other = int(found[5]) if found[5] else int(found[3]) - int(found[4])
    return f"binom{n},{min(k, other)}" if k + other == n else found[0]


def _smaller_binomial(found: re.Match[str]) -> str:
    n, k = int(found[1]), int(found[2])
    return f"binom{n},{min(k, n - k) if k <= n else k}"
