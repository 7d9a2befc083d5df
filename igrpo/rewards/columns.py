"""Whether the data has what reward functions ask for: said before a model loads, not by a score of 0 everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

from igrpo.data_types import Problem
from igrpo.rewards.functions import BUILTIN, RewardFunction
from igrpo.settings import ConfigError, did_you_mean

ALWAYS = ("prompts", "completions", "completion_ids", "solution", "prompt_suffix")
"""What every reward function can name, whatever the data set's columns."""
OF_ENVIRONMENTS = ("environments",)
"""What they can name besides where there is an environment."""


def check_columns(
    functions: Iterable[RewardFunction], problems: Sequence[Problem], has_environment: bool = False
) -> None:
    """Compares the parameters without a default of each function with what every row can give it.

    Raises:
        ConfigError: one cannot be filled; names the function, the parameter, a row without it and what there is.
    """
    always = ALWAYS + OF_ENVIRONMENTS * has_environment
    for function in functions:
        if function.path in (BUILTIN["judge"], BUILTIN["environment"]):
            continue
        for name, parameter in _parameters(function):
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise ConfigError(
                    f"reward_funcs: {function.name} takes '{name}' by position only; arguments come by name, so remove "
                    "the '/' from its parameters"
                )
            lacking = next((p for p in problems if name not in p.columns), None) if name not in always else None
            if lacking is None:
                continue
            there = sorted({column for problem in problems for column in problem.columns})
            which = f"row {lacking.index} lacks" if name in there else "the data set has not"
            known = () if name in there else (*always, *there)
            hint = did_you_mean(name, known, "; give it a default or add the column", quote="'")
            raise ConfigError(
                f"reward_funcs: {function.name} needs '{name}', which {which}: there are {', '.join(always)} and the "
                f"columns {', '.join(there) or '(none)'}{hint}"
            )


def _parameters(function: RewardFunction) -> list[tuple[str, inspect.Parameter]]:
    """Those that have to be given."""
    try:
        parameters = inspect.signature(function.load()).parameters
    except ValueError:  # some functions written in C tell no signature
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [(n, p) for n, p in parameters.items() if p.default is p.empty and p.kind not in optional]
