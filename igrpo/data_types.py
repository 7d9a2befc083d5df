"""The nouns of the training loop: one problem's way from the data set to the learner.

Suffixes on variable names give the axes: ``_P`` problems of a step, ``_N`` drafts, ``_G`` refinements, ``_T`` tokens.
Everything here is frozen: a stage reads the previous stage's objects and makes new ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

Runs = tuple[tuple[int, int], ...]
"""A version of the weights for each token, oldest first: ``((3, 40), (4, 12))`` is 40 tokens of version 3, 12 of 4."""
Message = dict[str, Any]
"""One chat turn: ``{"role": "system" | "user" | "assistant" | "tool", "content": "..."}``; an assistant's may have
``tool_calls``, a tool's has its ``name``."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of the data set.

    Example: ``Problem(index=7, prompt="What is 3 + 4?", solution="7", columns={"level": 2})``
    """

    index: int
    """Row number in the data set, stable over epochs and restarts."""
    prompt: str | tuple[Message, ...]
    """The question: plain text, or a conversation that ends in a user turn."""
    solution: str | list[str]
    """The reference answer as the data set writes it (``#### 72``, LaTeX, a plain number), or those that are right."""
    columns: dict[str, Any] = field(default_factory=dict)
    """All other columns of the row; reward functions receive them by name."""
    where: str = ""
    """Where the row stands, in words that find it again: ``train.jsonl:17``."""
    observation: str = ""
    """What an environment's ``reset`` says of the row: it stands behind the question."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a sampler with top-p, top-k or min-p left to choose from, token by token: packed, since they are many.

    Example: ``Kept.of([[5, 7, 9], [2]])``
    """

    ids: bytes
    """Token ids of all sets, one after the other, int32."""
    counts: bytes
    """[T] sizes of the sets, int32."""

    @classmethod
    def of(cls, sets: Sequence[Sequence[int]]) -> Kept:
        return cls(array("i", (i for one in sets for i in one)).tobytes(), array("i", map(len, sets)).tobytes())

    def sets(self) -> Iterator[array[int]]:
        """[T]"""
        ids, counts = array("i"), array("i")
        ids.frombytes(self.ids)
        counts.frombytes(self.counts)
        start = 0
        for count in counts:
            yield ids[start : start + count]
            start += count


class Pickled(bytes):
    """An object that only reward workers may make again."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """How a completion came about in an environment: turns of the policy, and what tools said between them.

    Example: ``Trajectory(spans=(12, 30, 8), messages=({"role": "assistant", "content": "…"}, …), calls=1)``
    """

    spans: tuple[int, ...]
    """Tokens of the policy, of the tools, of the policy, …: they add up to T."""
    messages: tuple[Message, ...]
    """What reward functions see: the turns of the policy and of the tools."""
    calls: int = 0
    failures: int = 0
    """Of the calls: those that raised, took too long, or could not be made."""
    ended: str = ""
    """Why it went no further though a call was left: ``tokens``, ``turns`` or what failed; empty: the policy ended."""
    reward: float | str | None = None
    """What ``get_reward`` said; text: why it said nothing."""
    environment: Pickled | None = None
    """The environment itself, until it is scored."""


@dataclass(frozen=True, slots=True)
class Routes:
    """Which experts an engine sent tokens to: one row for each token that it read, the prompt's first."""

    ids: bytes
    """[tokens][layers][k] int16."""
    layers: int
    k: int
    """Experts of a token."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine sampled: token ids as sampled, never re-tokenised.

    Example: ``Completion(token_ids=(523, 2), logprobs=(-0.4, -0.01), text="7", finish_reason="stop", version=3)``
    """

    token_ids: tuple[int, ...]
    """[T] sampled ids, with the tools' between them; the end-of-sequence token is the last one when
    ``finish_reason == "stop"``."""
    logprobs: tuple[float, ...]
    """[T] log-probability of each sampled id under the distribution it was sampled from (nats); NaN at the tools'."""
    text: str
    """``token_ids`` decoded without special tokens: what reward functions read, where there is no ``trajectory``."""
    finish_reason: str
    """``"stop"`` (ended by itself) or ``"length"`` (cut at the limit)."""
    version: int
    """Version of the weights that sampled its last token, or of those it was sent to where the engine cannot tell: the
    number of optimiser steps done."""
    kept: Kept | None = None
    """[T] what was left to choose from, but for the tools' tokens; None where the loss does not ask, or nothing was
    left out."""
    routes: Routes | None = None
    """[P + T - 1] of prompt and completion but its last token; of engines that were asked."""
    trajectory: Trajectory | None = None
    """None: one turn, and no environment had a part in it."""
    versions: Runs = ()
    """Weights of each token, where they changed in between; empty: all are of ``version``."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token ids but {len(self.logprobs)} log-probabilities")

    @property
    def runs(self) -> Runs:
        return self.versions or ((self.version, len(self.token_ids)),)

    @property
    def oldest(self) -> int:
        """Version of the weights that sampled its first token."""
        return self.runs[0][0]

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def spans(self) -> tuple[int, ...]:
        """As in ``Trajectory``; empty: the policy wrote all."""
        return self.trajectory.spans if self.trajectory is not None else ()

    @property
    def written_ids(self) -> tuple[int, ...]:
        """What the policy wrote."""
        return written(self.token_ids, self.spans)


@dataclass(frozen=True, slots=True)
class Scored:
    """A completion with its rewards.

    Example: ``Scored(completion, rewards={"accuracy": 1.0, "format": 0.0}, reward=1.0)``
    """

    completion: Completion
    rewards: dict[str, float | None]
    """Raw score of each reward function, before weights; None where the function could not judge."""
    reward: float
    """Weighted sum over the functions; a None counts as nothing."""


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """Everything one problem produced in one step: drafts, the chosen one, refinements and their advantages.

    With ``algorithm: grpo`` there are no drafts, and ``prompt_ids`` is the bare prompt.
    """

    problem: Problem
    drafts: tuple[Scored, ...]
    """[N] Stage 1, in sampling order; fewer when siblings were aborted, empty without Stage 1."""
    chosen: int | None
    """Index of the draft shown in the refinement prompt; None when none is shown."""
    prompt_ids: tuple[int, ...]
    """[P'] the ids the engine read: the question, and the chosen draft if any."""
    refinements: tuple[Scored, ...]
    """[G] Stage 2, in sampling order: the only completions that are trained on."""
    advantages: tuple[float, ...]
    """[G] group-relative advantages."""
    draft_trimmed: bool = False
    """The chosen draft was cut to fit the context."""
    draft_prompt_ids: tuple[int, ...] = ()
    """[P] the bare prompt the drafts were sampled from."""
    draft_advantages: tuple[float, ...] = ()
    """[N] of the drafts among themselves; only with ``train_on_drafts``."""
    shown: tuple[int, ...] = ()
    """All drafts in the refinement prompt, in its order; ``chosen`` is one of them."""
    copies: tuple[bool, ...] = ()
    """[G] whether a refinement repeats a draft too much to be trained on under the question alone; empty: none."""
    demonstrations: tuple[int, ...] = ()
    """Right drafts that a teacher sees: one for every other completion and another for that one; fewer if not right."""
    teacher_prompts: tuple[tuple[int, ...], ...] = ()
    """The prompts with them."""

    def __post_init__(self) -> None:
        if len(self.refinements) != len(self.advantages):
            raise ValueError(f"{len(self.refinements)} refinements but {len(self.advantages)} advantages")

    @property
    def contributes(self) -> bool:
        """Whether any advantage is non-zero; without KL or entropy terms the rest has no gradient."""
        return any(a != 0.0 for a in self.advantages)


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One sequence for the learner.

    Example: ``TrainingSample(prompt_ids=(5, 6), completion_ids=(7, 2), sampling_logprobs=(-0.1, -0.2), advantage=1.5)``
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    """[T] aligned with ``completion_ids``."""
    advantage: float
    masked: bool = False
    """True: no token of it counts in the loss (a cut completion under ``mask_truncated_completions``, a mere copy)."""
    positive: bool = False
    """Its reward is above 0."""
    prompt_length: int = 0
    """Completion tokens that count, of all completions of its prompt."""
    opens_prompt: bool = False
    """The first completion of its prompt: so many prompts are counted."""
    weight: float = 1.0
    """How much of a sequence it is, in the loss and in its denominators."""
    behaviour_logprobs: tuple[float, ...] | None = None
    """[T] as sampled, where that was behind another prompt than ``prompt_ids``; for the figures alone."""
    kept: Kept | None = None
    """As in ``Completion``."""
    routes: Routes | None = None
    """As in ``Completion``; None where they are not those of this prompt."""
    spans: tuple[int, ...] = ()
    """As in ``Trajectory``: only what the policy wrote is trained on. Empty: all."""
    teacher_prompt_ids: tuple[int, ...] = ()
    """What a teacher reads before ``completion_ids``; empty: there is none."""

    @property
    def trained_tokens(self) -> int:
        return sum(self.spans[::2]) if self.spans else len(self.completion_ids)


def written(values: tuple[Any, ...], spans: Sequence[int]) -> tuple[Any, ...]:
    """Those of [T] values that stand at the policy's tokens, with ``spans`` as in ``Trajectory``.

    Example: ``written((5, 6, 7, 8), (1, 2, 1))`` is ``(5, 8)``.
    """
    if not spans:
        return values
    ends = list(accumulate(spans, initial=0))
    return tuple(value for i in range(0, len(spans), 2) for value in values[ends[i] : ends[i + 1]])


def merged(runs: Sequence[tuple[int, int]]) -> Runs:
    """Those of one version after the other as one; empty for one in all, as in ``Completion``.

    Example: ``merged([(3, 5), (3, 2), (4, 1)])`` is ``((3, 7), (4, 1))``.
    """
    made: dict[int, int] = {}
    for version, count in runs:
        made[version] = made.get(version, 0) + count
    return tuple(made.items()) if len(made) > 1 else ()


def content_text(content: Any) -> str | None:
    """The text of a message's content, which may come in blocks; None for anything but text.

    Example: ``content_text([{"type": "text", "text": "3 + 4?"}])`` is ``"3 + 4?"``.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        return None
    texts = [block.get("text") if isinstance(block, Mapping) else block for block in content]
    kinds = {block.get("type", "text") for block in content if isinstance(block, Mapping)}
    return "".join(texts) if kinds <= {"text"} and all(isinstance(text, str) for text in texts) else None
