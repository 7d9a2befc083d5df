"""Which tools a turn calls: read as the tokenizer says, or as ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.

What the policy wrote may be anything. Reading takes time in proportion to its length, and what cannot be read is a call
that failed, so that the policy is told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 32
"""Calls of one turn that are made."""
DEEPEST = 32
"""Levels of an argument: what is deeper cannot be sent to every process."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Example: ``ToolCall("multiply", {"a": 3, "b": 4})``"""

    name: str = "unknown"
    arguments: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""
    """Why it cannot be made."""

    def message(self, number: int) -> dict[str, Any]:
        """As a chat template reads it; some want an id of nine characters."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call{number:05d}", "type": "function", "function": function}


def read_calls(tokenizer: Any, ids: Sequence[int], prompt_ids: Sequence[int], schemas: list[dict]) -> list[ToolCall]:
    """The calls of one turn, at most ``MOST_CALLS`` of which can be made."""
    if getattr(tokenizer, "response_template", None) is not None:
        calls = _by_template(tokenizer, ids, prompt_ids, schemas)
    else:
        calls = calls_in(tokenizer.decode(ids))
    names = {schema["function"]["name"] for schema in schemas}
    return [_known(call, names, number) for number, call in enumerate(calls[: MOST_CALLS + 1])]


def calls_in(text: str) -> list[ToolCall]:
    """Every ``<tool_call>`` behind the reasoning.

    Example: ``calls_in('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')``
    """
    rest, calls = text.rpartition("</think>")[2], []
    while len(calls) <= MOST_CALLS:
        _, opened, rest = rest.partition(OPEN)
        if not opened:
            break
        inside, closed, rest = rest.partition(CLOSE)
        calls.append(_read(inside) if closed else ToolCall(wrong=f"the call has no {CLOSE}"))
    return calls


def _by_template(tokenizer: Any, ids: Sequence[int], prompt_ids: Sequence[int], schemas: list[dict]) -> list[ToolCall]:
    try:
        parsed = tokenizer.parse_response(list(ids), prefix=list(prompt_ids), tools=schemas)
        found = parsed.get("tool_calls") or []
        return [_checked(one.get("function", one)) for one in found[: MOST_CALLS + 1]]
    except Exception as error:  # a template's own rules meet text that a model made up
        return [ToolCall(wrong=f"the call cannot be read ({type(error).__name__})")]


def _read(text: str) -> ToolCall:
    try:
        return _checked(json.loads(text))
    except RecursionError:
        return ToolCall(wrong="the call is nested too deeply")
    except ValueError as error:  # no JSON, or a number of thousands of digits
        return ToolCall(wrong=f"the call is no JSON: {str(error)[:100]}")


def _checked(call: Any) -> ToolCall:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(wrong='a call is {"name": …, "arguments": {…}}')
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # as OpenAI writes them
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return ToolCall(call["name"], wrong="arguments must be an object with a value for each name")
    if _depth(arguments) > DEEPEST:
        return ToolCall(call["name"], wrong="the call is nested too deeply")
    return ToolCall(call["name"], arguments)


def _depth(value: Any) -> int:
    """Levels of lists and mappings, counted up to one more than ``DEEPEST``."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        depth += 1
        parts = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [inner for part in parts for inner in part]
    return depth


def _known(call: ToolCall, names: set[str], number: int) -> ToolCall:
    if call.name not in names:  # no name that the policy made up gets into the template
        there = ", ".join(sorted(names))
        return ToolCall(wrong=call.wrong or f"there is no tool {call.name[:60]!r}, only {there}")
    if number >= MOST_CALLS:
        return ToolCall(call.name, wrong=f"more than {MOST_CALLS} calls in one turn")
    return call
