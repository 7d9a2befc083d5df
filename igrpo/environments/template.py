"""How a chat template writes tools: into the prompt, and between two turns of the policy.

What a tool said is appended to what the policy wrote as the ids that the template itself puts there: a short
conversation is rendered with it, and what stands behind the end of the policy's turn is taken. So no token of the
policy's is ever written anew. A template that writes earlier turns otherwise than the policy wrote them is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from igrpo.data_types import Message
from igrpo.environments.calls import ToolCall
from igrpo.settings import ConfigError

_ERRORS = (TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError)
_ASKED: Message = {"role": "user", "content": "Q"}
_PLAIN, _THOUGHT = "A", "<think>\nR\n</think>\n\nA"
_LIKE_A_TAG = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)

DESCRIPTION = """# Tools

These functions may help you, one in each line:
{tools}

To call one, write an object with its name and its arguments in tags, and end your turn; you are then told what it says:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>"""
"""What a system turn says of tools where the template does not."""


class ToolTemplate:
    """Example: ``ToolTemplate(tokenizer, {}, [get_json_schema(multiply)]).between(calls, ["12"], last_id=2)``

    Args:
        schemas: of the tools, as transformers' ``get_json_schema`` makes them.

    Raises:
        ConfigError: no chat template, or one that rewrites earlier turns.
    """

    def __init__(self, tokenizer: Any, kwargs: dict[str, Any], schemas: Sequence[dict[str, Any]]):
        if tokenizer.chat_template is None:
            raise ConfigError(
                "model_name_or_path: the tokenizer has no chat template, which says how tools are written; take an "
                "instruction-tuned model"
            )
        self.tokenizer, self.kwargs, self.schemas = tokenizer, kwargs, list(schemas)
        self.writes_tools = schemas[0]["function"]["name"] in self._rendered([_ASKED], tools=self.schemas)
        self.has_tool_turn = self._works([_ASKED, self._turn(_PLAIN, [], False), _said("unknown", "T")], "T")
        self.wants_calls = not self.has_tool_turn and self._works(
            [_ASKED, self._turn(_PLAIN, [ToolCall()], True), _said("unknown", "T", 0)], "T"
        )
        self._check_earlier_turns()
        added = (token for token in tokenizer.added_tokens_decoder.values())
        texts = [str(t) for t in added if t.special or _LIKE_A_TAG.fullmatch(str(t))]
        self._marks = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)

    def arguments(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, Any]]:
        """The prompt's conversation and what else the template needs, for it to tell of the tools."""
        if self.writes_tools:
            return list(messages), {"tools": self.schemas}
        text = DESCRIPTION.format(tools="\n".join(json.dumps(one["function"]) for one in self.schemas))
        first, *rest = messages
        if first["role"] != "system":
            return [{"role": "system", "content": text}, first, *rest], {}
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest], {}

    def between(self, calls: Sequence[ToolCall], said: Sequence[str], last_id: int) -> tuple[int, ...]:
        """Ids from the end of the policy's turn to where it writes again.

        Text that would be special tokens is broken up, so that no tool can end its turn or begin another's.

        Args:
            last_id: the policy's last token, which ends its turn.

        Raises:
            ValueError: the template makes something else of it.
        """
        ids = self._between(calls, [self._harmless(text) for text in said], last_id)
        bare = self._between(calls, ["0"] * len(said), last_id)
        if sum(i in self._special for i in ids) != sum(i in self._special for i in bare):
            raise ValueError("what the tool said cannot be written without special tokens")
        return ids

    def _between(self, calls: Sequence[ToolCall], said: Sequence[str], last_id: int) -> tuple[int, ...]:
        one = self._written("A", calls, said)
        begun = _parting(one, self._written("B", calls, said))
        if begun is None:
            raise ValueError("the chat template leaves out what the policy wrote beside its calls")
        fillers = (self._written("A", calls, [filler] * len(said)) for filler in "01")
        end = one[begun + 1 : _parting(*fillers)]  # to where answers begin: the same token may stand behind them
        if last_id in end:
            return tuple(one[begun + 2 + end.index(last_id) :])
        # It ended its turn otherwise than the template does, whose own end is still to come.
        return tuple(one[begun + 1 + next((i for i, token in enumerate(end) if token in self._special), 0) :])

    def _written(self, content: str, calls: Sequence[ToolCall], said: Sequence[str]) -> list[int]:
        """Ids of a conversation in which tools have answered a turn."""
        answers = [_said(call.name, text, i) for i, (call, text) in enumerate(zip(calls, said, strict=True))]
        if not (self.has_tool_turn or self.wants_calls):
            texts = (f"<tool_response>\n{text}\n</tool_response>" for text in said)
            answers = [{"role": "user", "content": "\n".join(texts)}]
        turn = self._turn(content, calls, self.wants_calls)
        return self._encode(self._rendered([_ASKED, turn, *answers], tools=self._given))

    @property
    def _given(self) -> list[dict[str, Any]] | None:
        return self.schemas if self.writes_tools else None

    def _harmless(self, text: str) -> str:
        return self._marks.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _check_earlier_turns(self) -> None:
        """Raises ConfigError where the policy's turn is not what it wrote once a tool has answered, or a second."""
        opened = self._rendered([_ASKED], tools=self._given)
        thinks, thought = (opened.rstrip().endswith(tag) for tag in ("<think>", "</think>"))
        # A policy that reasons does so in every turn: a template may write an empty block into turns without one.
        reasons = thinks or ("<think>" in str(self.tokenizer.chat_template) and not thought)
        for content in [_THOUGHT] if reasons else [_PLAIN, _THOUGHT]:
            turn = self._turn(content, [ToolCall()], self.wants_calls)
            answer = _said("unknown", "T", 0) if self.has_tool_turn or self.wants_calls else _ASKED
            once = _squeezed(self._rendered([_ASKED, turn, answer], tools=self._given))
            twice = _squeezed(self._rendered([_ASKED, turn, answer, turn, answer], tools=self._given))
            wrote = _squeezed(opened + content.removeprefix("<think>\n" if thinks else ""))
            if self.wants_calls:  # what it writes is the template's own, in any case
                wrote = _squeezed(self._rendered([_ASKED, turn], False, tools=self._given))
            if not once.startswith(wrote) or not twice.startswith(once):
                raise ConfigError(
                    "environment_factory: the model's chat template rewrites earlier turns (it strips their reasoning, "
                    "or more), so that after a tool's answer the policy would read what it did not write; give the "
                    "model a template that leaves turns as they were"
                )

    def _turn(self, content: str, calls: Sequence[ToolCall], with_calls: bool) -> Message:
        turn: Message = {"role": "assistant", "content": content}
        if with_calls:
            turn["tool_calls"] = [ToolCall(call.name).message(i) for i, call in enumerate(calls)]
        return turn

    def _works(self, messages: Sequence[Message], text: str) -> bool:
        try:
            rendered = self._rendered(messages, tools=self.schemas)
        except ConfigError:
            return False
        return text in rendered[len(self._rendered([_ASKED], False, tools=self.schemas)) :]

    def _rendered(self, messages: Sequence[Message], generation: bool = True, tools: Any = None) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation, **self.kwargs,
                **({"tools": tools} if tools else {}),
            )  # fmt: skip
        except _ERRORS as error:
            raise ConfigError(f"the model's chat template refuses a turn with tools: {error}") from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _parting(one: Sequence[int], two: Sequence[int]) -> int | None:
    """Where they first differ."""
    return next((i for i, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), None)


def _squeezed(text: str) -> str:
    """Without blanks, which a template may trim and the policy may write."""
    return "".join(text.split())


def _said(name: str, text: str, number: int | None = None) -> Message:
    return {"role": "tool", "name": name, "content": text, "tool_call_id": f"call{number or 0:05d}"}
