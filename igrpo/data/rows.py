"""One row of a data set as a problem: where its question and its reference answer stand, and in which shapes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from igrpo.data_types import Problem, content_text

USUAL_NAMES = {
    "prompt": ("question", "problem", "query", "instruction", "input", "messages"),
    "solution": ("answer", "final_answer", "expected_answer", "ground_truth", "target", "label", "output"),
}
Located = tuple[str, Mapping[str, Any]]
"""A row, and where it stands in words that find it again: ``train.jsonl:17``."""


def read_rows(
    rows: Iterable[Located], name: str, prompt_column: str, solution_column: str, max_samples: int | None
) -> Iterator[Problem]:
    """One problem per row; the columns may be paths into nested fields, such as ``reward_model.ground_truth``.

    Raises:
        ValueError: A row lacks one of them, or it holds something that is no question or no reference answer.
    """
    for index, (where, row) in enumerate(rows):
        if index == max_samples:
            return
        values = {}
        for key, column in (("prompt", prompt_column), ("solution", solution_column)):
            found = _at(row, column)
            if found is None:
                raise ValueError(_missing_column(where if index else f"'{name}'", key, column, row))
            values[key] = found[0]
        passed_anyway = (prompt_column, "solution") if solution_column == "solution" else (prompt_column,)
        columns = {key: value for key, value in row.items() if key not in passed_anyway}
        prompt = _prompt(values["prompt"], where, prompt_column)
        yield Problem(index, prompt, _solution(values["solution"], where, solution_column), columns, where)


def _at(row: Mapping[str, Any], path: str) -> tuple[Any] | None:
    """What stands in a column, or at the end of a path of names with dots; None where there is no such place."""
    if path in row:
        return (row[path],)
    first, dot, rest = path.partition(".")
    while dot:
        if isinstance(inner := row.get(first), Mapping) and (found := _at(inner, rest)) is not None:
            return found
        more, dot, rest = rest.partition(".")  # a column's name may have dots of its own
        first = f"{first}.{more}"
    return None


def _paths(row: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of all fields, those inside others with a dot, outer ones first."""
    yield from (prefix + str(key) for key in row)
    for key, value in row.items():
        if isinstance(value, Mapping) and prefix.count(".") < 4:
            yield from _paths(value, f"{prefix}{key}.")


def _nearest(wanted: Sequence[str], row: Mapping[str, Any], prefix: str = "") -> str | None:
    """The place whose last name is one of those, the first that there is."""
    paths = list(_paths(row, prefix))
    return next((path for name in wanted for path in paths if path.rpartition(".")[2] == name), None)


def _missing_column(where: str, key: str, column: str, row: Mapping[str, Any]) -> str:
    usual = (column.rpartition(".")[2], key, *USUAL_NAMES[key])
    close = difflib.get_close_matches(column, list(_paths(row)), n=1)
    alike = bool(close) and difflib.SequenceMatcher(a=column, b=close[0]).ratio() > 0.85
    near = close[0] if alike else _nearest(usual, row) or next(iter(close), None)
    hint = f"; set dataset_{key}_column: {near}" if near else ""
    return f"dataset_{key}_column: {where} has no column '{column}', only {', '.join(map(str, row))}{hint}"


def _prompt(value: Any, where: str, column: str) -> str | tuple[dict[str, str], ...]:
    if isinstance(value, str) and value.strip():
        return _whole_text(value, where, column)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        contents = [content_text(turn.get("content")) for turn in turns]
        if len(turns) == len(value) and None not in contents:
            if turns[-1].get("role") == "user" and all(isinstance(turn.get("role"), str) for turn in turns):
                texts = [_whole_text(str(text), where, column) for text in contents]
                return tuple({"role": t["role"], "content": text} for t, text in zip(turns, texts, strict=True))
            raise ValueError(f"{where}: the conversation in '{column}' must end in a turn with role 'user'")
        if len(turns) == len(value) and any(isinstance(turn.get("content"), Sequence) for turn in turns):
            raise ValueError(
                f"{where}: a turn's content in '{column}' must be text or blocks of text, {{type: text, text: …}}"
            )
    hint = _inner_hint("prompt", value, column)
    raise ValueError(f"{where}: '{column}' must be text or a list of messages, not {_shown(value)}{hint}")


def _solution(value: Any, where: str, column: str) -> str | list[str]:
    if isinstance(value, str) and value.strip():
        return _whole_text(value, where, column)
    if isinstance(value, int | float) and math.isfinite(value):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        accepted = [_solution(one, where, column) for one in value if isinstance(one, str | int | float)]
        if len(accepted) == len(value):
            return accepted if len(accepted) > 1 else accepted[0]  # type: ignore[return-value]
    hint = _inner_hint("solution", value, column)
    raise ValueError(f"{where}: '{column}' must be text or a number, not {_shown(value)}{hint}")


def _inner_hint(key: str, value: Any, column: str) -> str:
    inner = _nearest((key, *USUAL_NAMES[key]), value, f"{column}.") if isinstance(value, Mapping) else None
    return f"; set dataset_{key}_column: {inner}" if inner else ""


def _whole_text(value: str, where: str, column: str) -> str:
    """JSON can write half of a surrogate pair, which is no character: no tokenizer reads it, no file holds it."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: '{column}' holds half a character, {value[error.start]!a} at {error.start}; the text was "
            "cut inside one: write it again whole"
        ) from None
    return value


def _shown(value: Any) -> str:
    return repr(value) if value is None or value == "" else f"{type(value).__name__} {str(value)[:40]!r}"
