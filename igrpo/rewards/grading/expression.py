r"""The parser behind ``arithmetic.py``: it computes as it reads, and refuses what grows beyond its bounds.

Grammar: expression := term {(+|-) term};  term := factor {(*|/|nothing) factor};  factor := atom {! ° %} [^ exponent].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

from igrpo.rewards.grading.notation import repeating

MAX_BITS = 80_000
"""Of a numerator or denominator, and of a real number's exponent."""
MAX_DEPTH = 40
MAX_DEGREE, MAX_TERMS = 5000, 2000
TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
INVERSES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "asin": "asin", "acos": "acos", "atan": "atan"}
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)
    (?:\\(?:overline|bar|dot)\s*\{?(?P<repeating>\d+)\}?)?
    |\\(?P<command>[A-Za-z]+|[{}|])|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|[-+*/^!%(){}\[\]|,_]))""",
    re.VERBOSE,
)
_WORDS = ("root", "log", "ln", "exp", "pi", "gcd", "lcm", "max", "min", "abs", "Abs", *TRIGONOMETRIC, *INVERSES)
_CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}


class TooBig(ValueError):
    """An intermediate result that would not fit."""


class Unreadable(ValueError):
    """No expression of this grammar."""


class Unknown(NamedTuple):
    """Something with variables: what a product of it out would have."""

    terms: int = 1
    degree: int = 1


@cache
def context_of(digits: int) -> Any:
    """One of mpmath's own worlds, so that nobody else's precision is changed."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = digits
    return context


def real(context: Any, number: Fraction) -> Any:
    return context.mpf(number.numerator) / context.mpf(number.denominator)


def tokens_of(text: str) -> list[str | Fraction]:
    tokens: list[str | Fraction] = []
    position, text = 0, text.strip()
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise Unreadable(text[position : position + 20])
        position = found.end()
        if found["number"]:
            tokens.append(repeating(found["number"], found["repeating"] or ""))
        elif found["command"]:
            command = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom"}.get(
                found["command"], found["command"]
            )
            tokens.append("\\" + {"vert": "|", "lvert": "|", "rvert": "|"}.get(command, command))
        elif found["word"]:
            # Plain sqrt13 is the root of 13; LaTeX reads \sqrt13 as 3 times the root of 1.
            word = {"sqrt": "root"}.get(found["word"], found["word"])
            tokens += ["\\" + word] if word in _WORDS else _letters(word)
        else:
            tokens.append("^" if found["sign"] == "**" else found["sign"])
    return ["|" if token == r"\|" else token for token in tokens]


def _letters(word: str) -> list[str]:
    """A run of letters is a product of variables, or a function that another runs into: ``xsin``."""
    if len(word) > 12:
        raise Unreadable(word)
    return list(word)


class Parser:
    """One pass over the tokens that computes as it reads, with ``digits`` for what is not rational."""

    def __init__(self, tokens: list[str | Fraction], digits: int, log_base: int, variables: bool = False) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.context, self.log_base, self.variables = context_of(digits), log_base, variables

    def whole(self) -> Any:
        value = self.expression()
        while self.variables and self.next() == ",":
            self.at += 1
            self.expression()
        if self.at < len(self.tokens):
            raise Unreadable(str(self.next()))
        return value

    def next(self) -> str | Fraction | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, token: str) -> None:
        if self.next() != token:
            raise Unreadable(f"{token} expected")
        self.at += 1

    def expression(self) -> Any:
        value = self.term()
        while (sign := self.next()) in ("+", "-"):
            self.at += 1
            value = self.sum(value, self.term(), -1 if sign == "-" else 1)
        return value

    def term(self) -> Any:
        value = self.factor()
        while (sign := self.next()) is not None:
            if sign in ("*", "/", r"\cdot", r"\times", r"\div", r"\ast"):
                self.at += 1
                other = self.factor()
                value = self.product(value, self.inverse(other) if sign in ("/", r"\div") else other)
            elif self.starts_atom(sign):
                mixed = (
                    sign == r"\frac" and isinstance(self.tokens[self.at - 1], Fraction) and isinstance(value, Fraction)
                )
                other = self.factor()
                mixed = mixed and isinstance(other, Fraction) and 0 < other < 1 and value.denominator == 1
                value = self.sum(value, other, 1) if mixed else self.product(value, other)
            else:
                break
        return value

    def starts_atom(self, token: str | Fraction) -> bool:
        if isinstance(token, Fraction):  # "2 3" is no product, "(2)3" is one
            return self.tokens[self.at - 1] in ("!", *_CLOSING.values())
        if token in _CLOSING:
            return token != "|"
        return token.isalpha() or (token[:1] == "\\" and token not in (r"\choose", *_CLOSING.values()))

    def factor(self) -> Any:
        negative = False
        while (sign := self.next()) in ("+", "-"):
            self.at += 1
            negative ^= sign == "-"
        value = self.powers(self.atom())
        return self.product(value, Fraction(-1)) if negative else value

    def powers(self, value: Any) -> Any:
        while (sign := self.next()) in ("!", "%", r"\degree", r"\circ"):
            self.at += 1
            if sign == "!":
                double = self.next() == "!"
                self.at += double
                value = self.factorial(value, 2 if double else 1)
            elif sign == "%":
                value = self.product(value, Fraction(1, 100))
            else:
                value = self.product(value, self.context.pi / 180)
        if self.next() == "^":
            self.at += 1
            return self.power(value, self.within(self.factor))
        return value

    def atom(self) -> Any:
        return self.within(self.atom_here)

    def within(self, read: Callable[[], Any]) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig("brackets within brackets, powers of powers")
        value = read()
        self.depth -= 1
        return value

    def atom_here(self) -> Any:
        token = self.next()
        if token is None:
            raise Unreadable("end")
        self.at += 1
        if isinstance(token, Fraction):
            return token
        if token in _CLOSING:
            value = self.expression()
            if token in ("{", "(") and self.next() == r"\choose":
                self.at += 1
                value = self.binomial(value, self.expression())
            self.take(_CLOSING[token])
            return self.bracketed(token, value)
        if token.startswith("\\") and len(token) > 1:
            return self.command(token[1:])
        if token == "e":
            return self.context.e
        if token == "i" and not self.variables:
            return self.context.mpc(0, 1)
        if token.isalpha() and self.variables:
            while self.next() == "_":
                self.at += 1
                self.atom()
            return Unknown()
        raise Unreadable(token)

    def bracketed(self, bracket: str, value: Any) -> Any:
        if bracket not in ("|", r"\lfloor", r"\lceil") or isinstance(value, Unknown):
            return value
        if bracket == "|":
            return abs(value)
        if isinstance(value, Fraction):
            return Fraction(math.floor(value) if bracket == r"\lfloor" else math.ceil(value))
        rounded = self.context.floor(value) if bracket == r"\lfloor" else self.context.ceil(value)
        return Fraction(int(rounded.real))

    def command(self, name: str) -> Any:
        if name in ("frac", "binom"):
            top, bottom = self.argument(), self.argument()
            return self.product(top, self.inverse(bottom)) if name == "frac" else self.binomial(top, bottom)
        if name == "sqrt":
            index = None
            if self.next() == "[":
                self.at += 1
                index = self.expression()
                self.take("]")
            return self.root(self.argument(), index if index is not None else Fraction(2))
        if name == "root":
            return self.root(self.atom(), Fraction(2))
        if name in ("pi", "infty"):
            return self.context.pi if name == "pi" else self.unknown()
        if name in ("gcd", "lcm", "max", "min"):
            return self.several(name)
        if name in ("log", "ln", "lg", "exp", "abs", "Abs", *TRIGONOMETRIC, *INVERSES):
            return self.function(name)
        if name in ("mathrm", "operatorname", "text", "mathbf"):
            return self.argument()
        return self.unknown()

    def unknown(self) -> Unknown:
        if not self.variables:
            raise Unreadable("a variable")
        return Unknown()

    def argument(self) -> Any:
        r"""Of ``\frac`` and the like: a group, or one digit as in ``\frac12``."""
        token = self.next()
        if isinstance(token, Fraction) and token.denominator == 1 and token >= 10:
            digits = str(token.numerator) if token < 10**20 else ""
            if not digits:
                raise Unreadable("digits")
            self.tokens = [
                *self.tokens[: self.at],
                Fraction(int(digits[0])),
                Fraction(int(digits[1:])),
                *self.tokens[self.at + 1 :],
            ]
        return self.atom()

    def several(self, name: str) -> Any:
        self.take("(")
        values = [self.expression()]
        while self.next() == ",":
            self.at += 1
            values.append(self.expression())
        self.take(")")
        if not all(isinstance(value, Fraction) for value in values):
            return self.unknown()
        if name in ("max", "min"):
            return max(values) if name == "max" else min(values)
        if any(value.denominator != 1 for value in values):
            raise Unreadable(name)
        return Fraction((math.gcd if name == "gcd" else math.lcm)(*(value.numerator for value in values)))

    def function(self, name: str) -> Any:
        base: Any = Fraction(10) if name == "lg" or (name == "log" and self.log_base) else self.context.e
        power = Fraction(1)
        while self.next() in ("_", "^"):
            below = self.next() == "_"
            self.at += 1
            base, power = (self.argument(), power) if below else (base, self.factor())
        inverse = power == -1 and name in TRIGONOMETRIC
        given = self.applied()
        if any(isinstance(value, Unknown) for value in (given, base, power)):
            return self.unknown()
        value = real(self.context, given) if isinstance(given, Fraction) else given
        return self.power(self.compute("a" + name if inverse else name, value, base), Fraction(1) if inverse else power)

    def compute(self, name: str, value: Any, base: Any) -> Any:
        if name in ("log", "ln", "lg"):
            base = real(self.context, base) if isinstance(base, Fraction) else base
            return self.context.log(value) / self.context.log(base)
        if name in ("abs", "Abs"):
            return abs(value)
        if name == "exp" and abs(value) > MAX_BITS / 2:
            raise TooBig("exp")
        if abs(value) > 1e30:
            raise TooBig(name)
        return getattr(self.context, INVERSES.get(name, name))(value)

    def applied(self) -> Any:
        """What a function is applied to: one group, or a product without signs such as ``2 pi x``."""
        if self.next() in ("-", "+"):
            return self.factor()
        value = self.powers(self.atom())
        grouped = self.tokens[self.at - 1] in _CLOSING.values()
        while not grouped and (token := self.next()) is not None and self.starts_atom(token):
            if token in ("(", "[") or (isinstance(token, str) and token[1:] in _WORDS and token != r"\pi"):
                break
            value = self.product(value, self.powers(self.atom()))
        return value

    def sum(self, a: Any, b: Any, sign: int) -> Any:
        if isinstance(a, Unknown) or isinstance(b, Unknown):
            a, b = (one if isinstance(one, Unknown) else Unknown(1, 0) for one in (a, b))
            return _bounded_unknown(a.terms + b.terms, max(a.degree, b.degree))
        return self.bounded(self.alike(a, b, lambda x, y: x + sign * y))

    def product(self, a: Any, b: Any) -> Any:
        if isinstance(a, Unknown) or isinstance(b, Unknown):
            a, b = (one if isinstance(one, Unknown) else Unknown(1, 0) for one in (a, b))
            return _bounded_unknown(a.terms * b.terms, a.degree + b.degree)
        return self.bounded(self.alike(a, b, lambda x, y: x * y))

    def inverse(self, value: Any) -> Any:
        return value if isinstance(value, Unknown) else 1 / value

    def alike(self, a: Any, b: Any, operation: Callable[[Any, Any], Any]) -> Any:
        if isinstance(a, Fraction) != isinstance(b, Fraction):
            a, b = (real(self.context, one) if isinstance(one, Fraction) else one for one in (a, b))
        return operation(a, b)

    def power(self, base: Any, exponent: Any) -> Any:
        if exponent == 1 and isinstance(exponent, Fraction):
            return base
        if isinstance(base, Unknown) or isinstance(exponent, Unknown):
            if isinstance(base, Unknown) and isinstance(exponent, Fraction) and exponent.denominator == 1:
                times = abs(exponent.numerator)
                if times > MAX_DEGREE or (base.terms > 1 and times * math.log(base.terms) > math.log(MAX_TERMS)):
                    raise TooBig("a power")
                return _bounded_unknown(base.terms**times, base.degree * times)
            return Unknown()
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if base not in (0, 1, -1) and bits * abs(exponent) > MAX_BITS:
                raise TooBig("a power")
            return base**exponent.numerator if base not in (1, -1) else base ** (exponent.numerator % 2)
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent == Fraction(1, 2) and base >= 0:
            top, bottom = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if top * top == base.numerator and bottom * bottom == base.denominator:
                return Fraction(top, bottom)
        base, exponent = (real(self.context, one) if isinstance(one, Fraction) else one for one in (base, exponent))
        if base == 0:
            return Fraction(0) if exponent.real > 0 else 1 / Fraction(0)
        if abs(self.context.log(base) * exponent) > MAX_BITS / 2:
            raise TooBig("a power")
        return self.context.power(base, exponent)

    def root(self, value: Any, index: Any) -> Any:
        """Of a negative number the real one, where there is one."""
        odd = isinstance(index, Fraction) and index.denominator == 1 and index.numerator % 2 == 1
        if odd and isinstance(value, Fraction) and value < 0:
            return self.product(self.power(-value, 1 / index), Fraction(-1))
        return self.power(value, self.inverse(index))

    def factorial(self, value: Any, step: int) -> Any:
        if isinstance(value, Unknown):
            return Unknown()
        if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
            raise Unreadable("factorial")
        if value > 1000:
            raise TooBig("factorial")
        return Fraction(math.prod(range(value.numerator, 0, -step)))

    def binomial(self, n: Any, k: Any) -> Any:
        if isinstance(n, Unknown) or isinstance(k, Unknown):
            return Unknown()
        if not all(isinstance(one, Fraction) and one.denominator == 1 and one >= 0 for one in (n, k)):
            raise Unreadable("binomial")
        if n > 5000:
            raise TooBig("binomial")
        return Fraction(math.comb(n.numerator, k.numerator))

    def bounded(self, value: Any) -> Any:
        if isinstance(value, Fraction):
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
                raise TooBig("digits")
        elif not self.context.isfinite(value) or (value != 0 and abs(self.context.mag(value)) > MAX_BITS):
            raise TooBig("magnitude")
        return value


def _bounded_unknown(terms: int, degree: int) -> Unknown:
    if terms > MAX_TERMS or degree > MAX_DEGREE:
        raise TooBig("terms")
    return Unknown(terms, degree)
