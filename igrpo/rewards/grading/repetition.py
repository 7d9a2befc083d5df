r"""Whether an answer only repeats the question: ``3 + 4`` to "What is 3 + 4?" is not worth what 7 is.

The question's text decides, not the answer's form: ``2^{10}`` for 1024 is right unless the question says 2^{10} (or "2
to the power of 10") itself. Of a plain calculation, a sum or quotient of written numbers, nothing may come from the
question: that would leave its work to the checker.
"""

from __future__ import annotations

import re
from functools import lru_cache

from igrpo.rewards.grading.notation import tidy

MAX_QUESTION_CHARS = 20_000
_OPERATORS = r"[-+*/^=!,()<>|]"
_CALCULATION = re.compile(r"[\d.\s+\-*/()]+")
_SPOKEN = (
    (r"(\d+) (?:raised )?to the (?:power (?:of )?)?(\d+)(?:st|nd|rd|th)?(?: power)?", r"\1^\2"),
    (r"(\d+) squared|(?:the )?square of (\d+)", r"\1\2^2"),
    (r"(\d+) cubed|(?:the )?cube of (\d+)", r"\1\2^3"),
    (r"square root of (\d+)", r"sqrt\1"),
    (r"cube root of (\d+)", r"sqrt[3]\1"),
    (r"(\d+) choose (\d+)", r"binom\1,\2"),
    (r"(\d+) factorial|factorial of (\d+)", r"\1\2!"),
    (r"log(?:arithm)? (?:to (?:the )?)?base (\d+) of (\d+)", r"log_\1 \2"),
    (r"base[- ](\d+) log(?:arithm)? of (\d+)", r"log_\1 \2"),
)


def repeats(expression: str, question: str, reference: str) -> bool:
    """Whether an answer, right in value, is what the question already says.

    Args:
        expression: tidy, and no whole number; what is written like the reference is never a repetition.
        question: the user's text; "" where nobody knows it: a plain calculation then is left undone, all else is right.
    """
    if re.fullmatch(r"[-+]?[\d,]+", expression):
        return False
    said, wanted = _canonical(expression), _canonical(reference)
    if sorted(said) == sorted(wanted):
        return False
    calculation = bool(_CALCULATION.fullmatch(said)) and bool(re.search(r"\d\)*[-+*/]\(*-?[\d.]", said))
    fraction = bool(re.fullmatch(r"-?(?:\d+ )?[\d.]+/[\d.]+", said)) and not re.fullmatch(r"-?[\d,]+", wanted)
    if not question:
        return calculation and not fraction
    asked = _asked(question[:MAX_QUESTION_CHARS])
    if calculation and not fraction:
        numbers = set(re.findall(r"[\d.]*\d", said))
        return bool(numbers & set(re.findall(r"[\d.]*\d", asked)))
    if _stands_in(said, asked):
        return not re.fullmatch(r"-?\d*\.\d+", said) or "/" in wanted
    atoms = [atom for atom in re.split(r"[-+*/()]", said) if atom.strip()]
    return len(atoms) > 1 and not fraction and all(_stands_in(atom.strip(), asked) for atom in atoms)


def _stands_in(expression: str, asked: str) -> bool:
    if not expression:
        return False
    before = r"(?<![\w.^])" if re.match(r"\w", expression) else ""
    after = r"(?!\.?\w)" if re.search(r"\w$", expression) else ""
    return re.search(rf"{before}{re.escape(expression)}{after}", asked) is not None


@lru_cache(maxsize=512)
def _asked(question: str) -> str:
    spoken = [
        found.expand(written) for said, written in _SPOKEN for found in re.finditer(said, question, re.IGNORECASE)
    ]
    return " ; ".join([_canonical(question), *spoken])


def _canonical(text: str) -> str:
    """One spelling of operators, without braces, so that equal expressions are equal text."""
    text = tidy(text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\1/\2", text)
    text = re.sub(r"(\d)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1 \2/\3", text)
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\d?t?binom\s*\{([^{}]*)\}\s*\{([^{}]*)\}|\{([^{}]*)\\choose([^{}]*)\}", r"binom\1\3,\2\4", text)
    text = re.sub(r"\\d?t?binom\s*(\d)\s*(\d)", r"binom\1,\2", text)
    text = re.sub(r"\bC\((\d+), ?(\d+)\)", r"binom\1,\2", text)
    text = re.sub(r"\\(?:cdot|times|ast)(?![a-z])", "*", re.sub(r"\\div(?![a-z])", "/", text)).replace("**", "^")
    text = re.sub(r"(?<=\d)\s+x\s+(?=\d)", "*", text)
    text = re.sub(r"(?:\\?log)_\{?(\w)\}?\s*[({]?\s*(\w+)[)}]?", r"log_\1 \2", text)
    text = re.sub(r"(?:\\?sqrt)\s*[({]?\s*(\w+)[)}]?", r"sqrt\1", text)
    text = re.sub(r"\^\s*[({]\s*(-?\w+)\s*[)}]", r"^\1", text)
    text = re.sub(r"[{}\\$]", "", text).casefold()
    text = re.sub(r"(?<![a-z])(?:pi\s*\*?\s*i|i\s*\*?\s*pi)(?![a-z])", "ipi", text)
    return re.sub(rf"\s*({_OPERATORS})\s*", r"\1", re.sub(r"\s+", " ", text)).strip(" .")
