"""An environment to begin with: questions with a number for an answer, a calculator, and how an answer is wrong.

Expressions are read by the grader's own arithmetic: nothing that a model writes is run as a program.
"""

from __future__ import annotations

from fractions import Fraction

from igrpo.rewards.grading.answers import grade, read_reference
from igrpo.rewards.grading.arithmetic import decimal_of, evaluate

LONGEST = 200
"""Characters of an expression or an answer."""


class Calculator:
    """``environment_factory: igrpo.environments.calculator:Calculator``"""

    def __init__(self) -> None:
        _value("2^0.5")  # loads what arithmetic needs: once, and not in the process of every trajectory
        self.solution, self.tries, self.right = "", 0, False

    def reset(self, solution: str | list[str], **_: object) -> None:
        self.solution = solution if isinstance(solution, str) else solution[0]
        self.tries, self.right = 0, False

    def calculate(self, expression: str) -> str:
        """Works out an expression.

        Args:
            expression: numbers with + - * / ^ and brackets, such as (3 + 4) * 2
        """
        value = _value(expression)
        if value is None:
            raise ValueError("this is no expression of numbers; write for example (3 + 4) * 2")
        return str(value) if value.denominator == 1 else f"{value} = {float(value):.10g}"

    def submit(self, answer: str) -> str:
        """Says whether an answer is right.

        Args:
            answer: the answer alone
        """
        self.tries += not self.right  # what follows the right answer takes nothing back
        reference = read_reference(self.solution)
        if len(str(answer)) <= LONGEST and grade(reference, str(answer)):
            self.right = True
            return "right"
        given, wanted = _value(answer), _value(reference.text)
        if given is None or wanted is None:
            return "wrong"
        return "wrong: it is too small" if given < wanted else "wrong: it is too large"

    def get_reward(self) -> float:
        """1 for the right answer at the first try, 1/2 at the second, 1/3 at the third; 0 without."""
        return 1.0 / self.tries if self.right else 0.0


def _value(text: object) -> Fraction | None:
    text = str(text)
    value = evaluate(text) if len(text) <= LONGEST else None
    return None if value is None else decimal_of(value)
