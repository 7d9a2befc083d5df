"""Token ids of the two prompts: the question alone (q) and the question with a draft (q' = template(q, d)).

q is what the chat template and the tokenizer make of the conversation, to the id. A draft enters q' as the ids that
were sampled: the conversation is rendered with a filler in the draft's place and tokenised whole, and the filler's ids
are cut out. Tokenising the pieces one by one would be wrong: SentencePiece puts a space in front of any text.

    q' = before_draft [system turn, question, draft template up to {draft}]
         + draft ids + after_draft [rest of the template, end of the user turn, start of the assistant turn]

Both begin with the same tokens up to the end of the question, so the engine's prefix cache serves Stage 2 from Stage 1.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jinja2 import TemplateError

from igrpo.data_types import Message, Problem
from igrpo.environments.template import ToolTemplate
from igrpo.rewards.grading.passages import without_answer
from igrpo.rollout.config import PromptsConfig
from igrpo.settings import ConfigError

# No chat template changes these characters, and no question contains them.
_MARK = "\u2063\u2062\u2063<<draft>>\u2063\u2062\u2063"
_FILLERS = (("7", "3"), ("x", "q"), (".", "!"), ("A", "M"))
"""Pairs of texts that nearly every tokenizer keeps apart from what stands beside them."""
_THINKING = "(?:seed:)?(?:think|thinking|thought|reasoning)"
SUFFIX_CHARS = 200
"""Tags at a prompt's end are looked for among its last characters."""


@dataclass(frozen=True, slots=True)
class PromptParts:
    """Example: ``PromptParts(({"role": "user", "content": "3+4?"},), (1, 9, 8, 2, 5), (1, 9, 8, 7), (6, 2, 5))``"""

    messages: tuple[Message, ...]
    """The conversation as reward functions see it."""
    bare: tuple[int, ...]
    """q."""
    before_draft: tuple[int, ...] = ()
    """q' up to the draft; empty where no draft is shown."""
    after_draft: tuple[int, ...] = ()
    """q' from the end of the draft to where the model writes."""
    between_drafts: tuple[int, ...] = ()
    """Ids between two of several drafts."""
    shown_drafts: int = 1
    prompt_suffix: str = ""
    """Tags of an answer that the prompt already ends with, such as ``<think>\\n``: reward functions are told."""

    @property
    def longest_prompt(self) -> int:
        """Tokens of q, or of q' with empty drafts."""
        return max(len(self.bare), self.around_drafts(self.shown_drafts))

    def around_drafts(self, count: int) -> int:
        """Tokens of q' that are of no draft."""
        return len(self.before_draft) + len(self.after_draft) + (count - 1) * len(self.between_drafts)


class PromptBuilder:
    """Builds prompts for one tokenizer and one configuration.

    Args:
        tokenizer: a Hugging Face tokenizer; one without a chat template gets plain text behind its special tokens for
            the start of any text (``<s>``); chat templates write those themselves.
        max_model_length: tokens the engine can hold for prompt + completion.
        vocab_size: of the model; None: not known.
        schemas: of the tools that the model may call.

    Raises:
        ConfigError: the chat template cannot write tools, or rewrites earlier turns.
    """

    def __init__(
        self,
        tokenizer: Any,
        config: PromptsConfig,
        max_model_length: int | None = None,
        vocab_size: int | None = None,
        schemas: Sequence[dict[str, Any]] = (),
    ):
        self.tools = ToolTemplate(tokenizer, config.chat_template_kwargs, schemas) if schemas else None
        self.tokenizer = tokenizer
        self.config = config
        self.max_model_length = max_model_length
        self.vocab_size = vocab_size
        self.before, self.after = config.draft_template.split("{draft}")
        self._after_draft: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._between_drafts: tuple[int, ...] | None = None
        self.start = self._start() if tokenizer.chat_template is None else ()
        # Those without a role of their own too, a chat model's turn markers for example.
        added = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.special_ids = frozenset([*tokenizer.all_special_ids, *added])
        self.special_tags = frozenset(map(str, tokenizer.convert_ids_to_tokens(list(self.special_ids))))

    def parts(self, problem: Problem) -> PromptParts:
        """Raises ConfigError if a conversation does not end in a user turn, the chat template refuses it, or the model
        has no embedding for one of its tokens."""
        messages = self._messages(problem)
        made = self._tokenised(messages)
        if self.vocab_size is not None:
            for token_id in made.bare + made.before_draft + made.after_draft + made.between_drafts:
                if token_id >= self.vocab_size:
                    where = problem.where or f"row {problem.index}"
                    raise ConfigError(f"{where}: {self._no_embedding(token_id, messages)}")
        return made

    def _tokenised(self, messages: tuple[Message, ...]) -> PromptParts:
        text = self._render(messages)
        bare, suffix = self.start + self._encode(text), self._prompt_suffix(text)
        if not self.config.shows_draft:
            return PromptParts(messages, bare, prompt_suffix=suffix)
        asked = f"{messages[-1]['content']}{self.before}{_MARK}{self.after}"
        head, mark, tail = self._render((*messages[:-1], {"role": "user", "content": asked})).partition(_MARK)
        if not mark or _MARK in tail:
            raise ConfigError("the chat template must write the user's text exactly once; choose another model")
        before_draft, after_draft = self._around_draft(head, tail)
        shown = self.config.show_drafts
        if shown > 1 and self._between_drafts is None:
            self._between_drafts = self._between(head, tail)
        between = self._between_drafts or ()
        return PromptParts(messages, bare, self.start + before_draft, after_draft, between, shown, suffix)

    def with_draft(
        self, parts: PromptParts, *drafts: Sequence[int], spans: Sequence[Sequence[int]] = ()
    ) -> tuple[tuple[int, ...], bool]:
        """Ids of q' with one draft or several, and whether one was trimmed.

        A draft loses its special tokens (the end-of-sequence token would end the user turn) and, if the context
        demands it, its beginning: the answer stands at the end. The question and the system prompt are never cut.
        With ``draft_hide_answer`` its conclusion goes first, which does not count as trimming. Several have equal room.

        Args:
            spans: of each draft, as in ``Trajectory``: one of several turns loses whole turns as long as it can.
        """
        room, inside, trimmed = self._room_for_draft(parts, len(drafts)), (), False
        for number, draft_ids in enumerate(drafts):
            draft = self._plain(draft_ids)
            if self.config.draft_hide_answer:
                draft = self._without_answer(draft)
            kept = draft
            if room is not None and len(draft) > room:
                starts = self._turns_of(draft_ids, spans[number] if spans else ())
                kept = draft[next((start for start in starts if 0 < len(draft) - start <= room), len(draft) - room) :]
            inside += (parts.between_drafts if number else ()) + kept
            trimmed |= len(kept) < len(draft)
        return parts.before_draft + inside + parts.after_draft, trimmed

    def _plain(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in ids if i not in self.special_ids)

    def _turns_of(self, ids: Sequence[int], spans: Sequence[int]) -> Iterator[int]:
        """Where turns begin among a draft's ids without the special ones."""
        ends = list(accumulate(spans))[:-1]
        return (len(self._plain(ids[:end])) for end in ends)

    def longest_refinement(self, parts: PromptParts) -> int:
        """Tokens that prompt, longest draft and completion can take together for one question."""
        draft = 0
        if self.config.shows_draft:
            draft = min(self.config.draft_max_tokens or math.inf, self.config.max_completion_length)
        return parts.longest_prompt + parts.shown_drafts * draft + self.config.max_completion_length

    def shortest_context(self, parts: PromptParts) -> int:
        """Tokens without which not even an empty draft fits; a question that needs more is left out."""
        return parts.longest_prompt + self.config.max_completion_length

    def _without_answer(self, draft: tuple[int, ...]) -> tuple[int, ...]:
        """The longest beginning of the draft's tokens that holds nothing of its answer."""
        kept = len(without_answer(self.tokenizer.decode(draft)))
        # The decoded text grows with the number of tokens, so the cut can be searched for.
        end = bisect_right(range(len(draft) + 1), kept, key=lambda n: len(self.tokenizer.decode(draft[:n])))
        return draft[: end - 1]

    def _room_for_draft(self, parts: PromptParts, count: int) -> int | None:
        rooms = [self.config.draft_max_tokens] if self.config.draft_max_tokens is not None else []
        if self.max_model_length is not None:
            taken = parts.around_drafts(count) + self.config.max_completion_length
            rooms.append((self.max_model_length - taken) // count)
        if rooms and min(rooms) < 0:
            raise ValueError(
                f"a question of {len(parts.bare)} tokens leaves no room in a context of {self.max_model_length}; "
                "raise vllm_max_model_length or lower max_completion_length"
            )
        return min(rooms) if rooms else None

    def _messages(self, problem: Problem) -> tuple[Message, ...]:
        if isinstance(problem.prompt, str):
            turns = (*self._examples(), {"role": "user", "content": problem.prompt})
        else:
            turns = tuple(problem.prompt)
        if not turns or turns[-1]["role"] != "user":
            raise ConfigError(f"row {problem.index}: a conversation must end in a user turn to be answered")
        if problem.observation:
            turns = (*turns[:-1], {**turns[-1], "content": turns[-1]["content"] + problem.observation})
        if self.config.system_prompt and turns[0]["role"] != "system":
            turns = ({"role": "system", "content": self.config.system_prompt}, *turns)
        return turns

    def _prompt_suffix(self, prompt: str) -> str:
        written = re.search(rf"(?:<{_THINKING}>\s*)?(?:</{_THINKING}>\s*)?(?:<answer>\s*)?$", prompt[-SUFFIX_CHARS:])
        suffix = written[0].lstrip() if written is not None else ""
        # Completions are decoded without special tokens: of a tag that is one, rewards see neither end.
        return "" if any(tag in self.special_tags for tag in re.findall(r"<[\w:]+>", suffix)) else suffix

    def _examples(self) -> list[Message]:
        return [
            {"role": role, "content": example[key]}
            for example in self.config.few_shot_examples
            for role, key in (("user", "prompt"), ("assistant", "completion"))
        ]

    def _render(self, messages: tuple[Message, ...]) -> str:
        if self.tokenizer.chat_template is None:
            return "\n\n".join(m["content"] for m in messages) + "\n\n"
        turns, tools = (list(messages), {}) if self.tools is None else self.tools.arguments(messages)
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.config.chat_template_kwargs, **tools
            )
        except (TemplateError, ArithmeticError, TypeError, ValueError, LookupError, AttributeError) as error:
            hint = "; write system_prompt: null" if messages[0]["role"] == "system" else ""
            raise ConfigError(f"the model's chat template refuses the conversation: {error}{hint}") from None

    def _around_draft(self, head: str, tail: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and behind what stands between the two texts: those that two different fillers leave alike."""
        if tail in self._after_draft:  # as for the problem before: nearly always, and then one filler is enough
            one, after_draft = self._after_draft[tail]
            ids = self._encode(head + one + tail)
            cut = len(ids) - len(after_draft)
            if ids[cut:] == after_draft and self.tokenizer.decode(ids[cut - 1 : cut]).strip() == one:
                return ids[: cut - 1], after_draft
        for one, two in _FILLERS:
            a, b = self._encode(head + one + tail), self._encode(head + two + tail)
            before = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
            after = next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), len(a))
            cut = len(a) - after
            if before < cut and self.tokenizer.decode(a[before:cut]).strip() == one:
                self._after_draft[tail] = (one, a[cut:])
                return a[:before], a[cut:]
        raise ConfigError(
            "draft_template: this tokenizer joins what stands beside {draft} with the draft; put line breaks around it"
        )

    def _between(self, head: str, tail: str) -> tuple[int, ...]:
        """Ids between two drafts, found as those around one are."""
        before, after = (len(ids) for ids in self._around_draft(head, tail))
        for one, two in _FILLERS:
            texts = (f"{head}{filler}{self.config.draft_separator}{filler}{tail}" for filler in (one, two))
            a, b = (ids[before : len(ids) - after] for ids in map(self._encode, texts))
            same = next((i for i, (x, y) in enumerate(zip(a[1:], b[1:], strict=False)) if x != y), 0) + 1
            ends = [self.tokenizer.decode(ids).strip() for ids in (a[:1], a[same:], b[:1], b[same:])]
            if ends == [one, one, two, two]:
                return a[1:same]
        raise ConfigError(
            "draft_separator: this tokenizer joins it with the drafts beside it; put line breaks around it"
        )

    def _start(self) -> tuple[int, ...]:
        """Special tokens in front of any text: between none and the first of the text's own."""
        text = "a"
        whole, own = self.tokenizer.encode(text), self._encode(text)
        found = next((i for i in range(len(whole)) if tuple(whole[i : i + len(own)]) == own), 0)
        return tuple(whole[:found])

    def _no_embedding(self, token_id: int, messages: tuple[Message, ...]) -> str:
        """About an id beyond the model's vocabulary, and which text brought it into the prompt."""
        named = {"system": "the system prompt"}
        texts = [("the question", messages[-1]["content"]), ("draft_template", self.before + self.after)]
        texts += [("draft_separator", self.config.draft_separator)]
        texts += [(named.get(turn["role"], "an earlier turn"), turn["content"]) for turn in messages[:-1]]
        origin = next((name for name, text in texts if token_id in self._encode(text)), "the chat template")
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return (
            f"the token {token!r} of {origin} has the id {token_id}, and the model knows ids below "
            f"{self.vocab_size} only; tokens were added to its tokenizer, not to its embedding: resize that, or "
            "take the tokenizer it came with"
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False)) if text else ()
