"""What a setting may be: a type, the interval of a number, what a text stands for, and who may write it.

A section writes them beside the field: ``lora_r: Count = 16``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin

LARGEST_COUNT = 2**31 - 1
"""What engines and tensor libraries index with 32 bits."""


@dataclass(frozen=True)
class Interval:
    """The finite numbers from ``low`` to ``high``, the ends included unless ``above`` or ``below`` says otherwise."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def advice(self, x: float) -> str | None:
        """What to write in place of x; None where x is inside."""
        if isinstance(x, float) and not math.isfinite(x):
            return "a finite number"
        if x < self.low or (self.above and x == self.low):
            return f"a number above {self.low}" if self.above else f"{self.low} or more"
        if x > self.high or (self.below and x == self.high):
            return f"a number below {self.high}" if self.below else f"{self.high} or less"
        return None


class Mark(Enum):
    """What a type does not say of a setting."""

    ADDRESS = "no user, password or key in it"
    VARIABLE = "the name of an environment variable"
    NEVER_EMPTY = "more than blanks"
    PATH = "a file or folder"
    STEPS = "a whole number of steps, or a share of all below 1"
    NOT_FROM_A_RUN = "a run's folder may be somebody else's; an evaluation takes this from a recipe or its command line"
    ONLY_IF_ASKED = "an evaluation takes this from its command line alone"


Count = Annotated[int, Interval(1, LARGEST_COUNT)]
CountOrZero = Annotated[int, Interval(0, LARGEST_COUNT)]
Processes = Annotated[int, Interval(1, 4096)]
Port = Annotated[int, Interval(0, 65535)]
Finite = Annotated[float, Interval()]
NotNegative = Annotated[float, Interval(0.0)]
Positive = Annotated[float, Interval(0.0, above=True)]
Share = Annotated[float, Interval(0.0, 1.0)]
ShareAboveZero = Annotated[float, Interval(0.0, 1.0, above=True)]
ShareBelowOne = Annotated[float, Interval(0.0, 1.0, below=True)]
Gibibytes = Annotated[float, Interval(0.0, 2.0**20, above=True)]
Seconds = Annotated[float, Interval(0.0, 1e7, above=True)]
"""Up to four months; clocks and locks of the operating system refuse much longer waits."""
Steps = Annotated[NotNegative, Mark.STEPS]
Text = Annotated[str, Mark.NEVER_EMPTY]
PathText = Annotated[str, Mark.PATH]
NamedPath = Annotated[str, Mark.PATH, Mark.NEVER_EMPTY]
Address = Annotated[str, Mark.ADDRESS]


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has the type a key asks for; an int is a fine float, a bool and NaN are never a number."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin is list:
        return isinstance(value, list) and all(matches(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if args:  # X | None
        return any(matches(value, a) for a in args)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or isinstance(value, hint)


def describe_type(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list of {describe_type(args[0]).removeprefix('a ')}s"
    if args and origin is not dict:
        return " or ".join(describe_type(a) for a in args)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return {**names, dict: "a mapping", type(None): "null"}.get(origin or hint, str(hint))


def marks_of(hint: Any) -> list[Any]:
    """What stands beside the type, at any depth: of a list, what stands beside its elements' type, too."""
    if get_origin(hint) is Literal:
        return []
    if get_origin(hint) is Annotated:
        return [*hint.__metadata__, *marks_of(hint.__origin__)]
    return [mark for part in get_args(hint) for mark in marks_of(part)]
