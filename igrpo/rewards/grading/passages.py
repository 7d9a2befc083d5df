r"""The one passage of a completion that counts as its answer.

Exactly one passage of a completion counts, the first of these that is there: the last
``<answer>…</answer>``, the last ``\boxed{…}``, what follows the last ``####``, what follows the last "answer is" or
"answer:", the whole completion if it is one line without words, and otherwise the last number or formula (for a
reference in words: the last line). Text before ``</think>`` is not searched when anything follows it; thinking that
never ended, and a last box or tag that never closed, hold no answer. Naming the right answer along the way, or several
answers in the place of one, earns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from igrpo.data_types import content_text
from igrpo.rewards.grading.forms import RELATION
from igrpo.rewards.grading.notation import DENIAL, MATH_FUNCTIONS, NUMBER

MAX_ANSWER_CHARS = 2000
"""A longer answer is no answer, unless the reference is as long: it bounds what a parser can be made to chew on."""

CompletionText = str | Sequence[Mapping[str, Any]]

_MATH_SPAN = r"\$\$?(?P<a>(?:[^$\\]|\\.)+)\$\$?|\\\((?P<b>.+?)\\\)|\\\[(?P<c>.+?)\\\]"
_LAST_EXPRESSION = re.compile(rf"{_MATH_SPAN}|(?<![\w.^])(?P<number>{NUMBER.pattern})", re.VERBOSE | re.DOTALL)
_ANSWER_IS = re.compile(r"answer(?:\s+is|\W{0,4}[:=])(?:\s+is\b)?[\s:*]*", re.IGNORECASE)
_DENIED_AFTER = re.compile(
    r"\W*(?:\w{1,8}n't|(?:(?:is|was)\s+)?(?:not|wrong|incorrect|false|or\s+(?:more|less|fewer|so)))\b", re.IGNORECASE
)
_RELATION_BEFORE = rf"(?:{RELATION.pattern}|[\u2260\u2264\u2265])=?\s*\$?\s*$"
THINK_TAG = re.compile(
    r"<\s?(/?)\s?(?:seed:)?(?:think|thinking|thought|reasoning)\s?>|\[(/?)THINK\]|\u25c1(/?)think\u25b7", re.IGNORECASE
)
"""The tags of reasoning models; those that are special tokens are not in a completion's text."""
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}\{")
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)(?:\s{0,3}(?=[-+]?[.\d]|\\[A-Za-z])|\s{1,3}(?=[A-Za-z](?:\s*(?:[-+*/^=$.,]|\\[)\]]|$)|\n)))"
    r"(.{1,200}?)(?:[.;,]?(?=\s*(?:\$|\\[)\]]|\n|$))|[.;,](?=\s))"
)
r"""``\boxed 5``: what follows it up to the end of the formula, the sentence or the line."""


def completion_text(completion: CompletionText) -> str:
    """The text of a completion, whether it came as a string or as messages."""
    if isinstance(completion, str):
        return completion
    return (content_text(completion[-1]["content"]) or "") if completion else ""


def whole_texts(completions: Sequence[CompletionText], prompt_suffix: Sequence[str] | None) -> list[str]:
    """[n] Each completion's text behind the tags that its prompt already ended with; ``prompt_suffix`` is the column of
    that name, None where a caller has none."""
    suffixes = prompt_suffix or [""] * len(completions)
    return [suffix + completion_text(one) for one, suffix in zip(completions, suffixes, strict=True)]


def _last_box(text: str) -> re.Match[str] | None:
    end = len(text)
    for _ in range(20):  # a command without its brace is none, and nobody writes many of those
        end = max(text.rfind(command, 0, end) for command in ("\\boxed", "\\fbox"))
        if end < 0 or (found := _BOX.match(text, end) or _BARE_BOX.match(text, end)):
            return found if end >= 0 else None
    return None


def last_boxed(text: str, longest: int = 0) -> str | None:
    r"""Content of the last ``\boxed{…}`` whose braces balance within MAX_ANSWER_CHARS; None when there is none."""
    opened = _last_box(text)
    if opened is None:
        return None
    if opened.re is _BARE_BOX:
        return opened[1]
    end = closing(text, opened.end(), max(longest, MAX_ANSWER_CHARS))
    return None if end is None else text[opened.end() : end]


def closing(text: str, start: int, longest: int, depth: int = 1) -> int | None:
    """Where so many open braces are closed."""
    for end in range(start, min(len(text), start + longest)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return end
    return None


def extract_answer(text: str, *, words: bool = False, lines: int = 1, longest: int = MAX_ANSWER_CHARS) -> str | None:
    """The one passage of a completion that counts as its answer (order: the module's docstring); None without one.

    Args:
        words: The reference is no number or formula: without any marker, the last ``lines`` lines are the answer.
        longest: A passage of more characters is no answer.
    """
    if _still_thinking(text) or _left_open(text):
        return None
    answer = (_passage(text, words, lines, longest) or "").strip()
    return answer if 0 < len(answer) <= longest else None


def _still_thinking(text: str) -> bool:
    """Whether a tag of thinking is open at the end. Tags inside others count; two with only blanks between are one,
    since models repeat the one that their prompt ends with."""
    depth, previous = 0, -1
    for tag in THINK_TAG.finditer(text):
        if any(tag.groups()):
            depth, previous = max(depth - 1, 0), -1
        else:
            depth += previous < 0 or bool(text[previous : tag.start()].strip())
            previous = tag.end()
    return depth > 0


def _after_thinking(text: str) -> str:
    ends = [tag.end() for tag in THINK_TAG.finditer(text) if any(tag.groups())]
    return text[ends[-1] :] if ends else text


def _left_open(text: str) -> bool:
    """Whether the last box or tag of an answer was never closed: what was to stand there nobody knows."""
    box = _last_box(text)
    opened = box.start() if box is not None else -1
    tagged = text.rfind("</answer>")
    if text.rfind("<answer>") > max(tagged, opened):
        return True
    if opened <= tagged or box.re is _BARE_BOX:  # type: ignore[union-attr]
        return False
    around = re.search(r"(?:\\(?:boxed|fbox)\s{0,3}\{\s{0,3})*$", text[max(0, opened - 200) : opened])
    depth = 1 + (around[0].count("{") if around is not None else 0)  # boxes that hold nothing but the last one
    return closing(text, box.end(), len(text), depth) is None  # type: ignore[union-attr]


def _passage(text: str, words: bool = False, lines: int = 1, longest: int = MAX_ANSWER_CHARS) -> str | None:
    after_thinking = _after_thinking(text)
    text = (after_thinking if after_thinking.strip() else text).strip()
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        tagged = text[start + len("<answer>") : end].strip()
        return last_boxed(tagged, longest) or tagged
    if (boxed := last_boxed(text, longest)) is not None:
        return boxed
    if "####" in text:
        return _first_line(text.rpartition("####")[2])
    tail = text[-longest:]
    if announced := list(_ANSWER_IS.finditer(tail)):
        return _stated(tail[announced[-1].end() :])
    if words:
        return "\n".join([line for line in tail.splitlines() if line.strip()][-lines:])
    if "\n" not in tail and _only_notation(tail):
        return tail
    found = list(_LAST_EXPRESSION.finditer(tail))
    return _last_found(tail, found[-1], found[-2].end() if len(found) > 1 else 0) if found else None


def _last_found(tail: str, last: re.Match[str], previous: int) -> str | None:
    """The last number or formula of a text, unless its sentence denies it: "it is not 72", "less than 72"."""
    before = re.sub(r"</?\w+>", "", re.split(r"[.!?;:,]\s|\n", tail[previous : last.start()])[-1][-60:])
    after = re.split(r"[.!?;,]\s|\n", tail[last.end() : last.end() + 200])[0][:60]
    if DENIAL.search(before + last[0][:1]) or _DENIED_AFTER.match(after) or re.search(_RELATION_BEFORE, before):
        return None
    glued = re.match(r"[A-Za-z](?![A-Za-z])|[\^_]\S*|\?", tail[last.end() :])  # 72x is not 72
    return last["a"] or last["b"] or last["c"] or last["number"] + (glued[0] if glued else "")


def without_answer(text: str) -> str:
    """The beginning of a completion, up to its conclusion: where the final answer is written, or, if the text states
    it before that, the last such place. The whole text if it has no answer.

    Example: ``"<think>2 + 3 = 5</think><answer>5</answer>"`` becomes ``"<think>2 + 3 = "``.
    """
    answer = (_passage(text) or "").strip()  # also of thinking that was cut: what it found is not to be shown either
    if not 0 < len(answer) <= MAX_ANSWER_CHARS:
        return text
    written = [m.start() for m in re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text)]
    final = text.rfind("<answer>") if "</answer>" in text else -1
    if final < 0:
        final = written.pop() if written else len(text)
    return text[: max((start for start in written if start < final), default=final)]


def _only_notation(line: str) -> bool:
    return MATH_FUNCTIONS.issuperset(re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", line)))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _stated(rest: str) -> str:
    """What "the answer is" introduces: a leading formula, or the rest of the sentence without its justification."""
    rest = _first_line(rest)
    rest = re.split(r"\.(?:\s|$)|,?\s(?:because|since|which|where|as|not|rather|instead)\s", rest, maxsplit=1)[0]
    formula = re.match(_MATH_SPAN, rest, re.DOTALL)
    if formula is None or re.match(r"\s*(?:,|;|\?|or\b|and\b)", rest[formula.end() :]):
        return rest  # another one follows: both are the answer
    return formula["a"] or formula["b"] or formula["c"]
