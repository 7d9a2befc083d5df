"""What the completions browser shows: a sample of ``completions.jsonl`` with the changes from draft to refinement."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from igrpo.log_lines import MOST_BYTES, number_of, parse, whole_characters
from igrpo.report.arms import Arm
from igrpo.settings import shown

MOST_GROUPS = 300
"""Groups on a page, over all runs."""
MOST_CHARACTERS = 6_000_000
"""Characters of model text on a page: a page of 10 MB opens at once, one of 500 MB does not."""
MOST_TEXT = 20_000
"""Characters of one completion or prompt; what is beyond is left out and said so."""
MOST_COMPARED = 4_000_000
"""Words of draft times words of refinement up to which words are compared; beyond, lines are."""
_STEP = re.compile(r'\{"step":\s*(\d+)')

Group = dict[str, Any]
Change = list[int]
"""[a0, a1, b0, b1]: the characters a0:a1 of the draft became b0:b1 of the refinement."""


@dataclass(frozen=True)
class Sample:
    """Groups for the page, and what was left out."""

    groups: list[Group]
    total: int


def sample_groups(arms: Sequence[Arm], notes: list[str], most: int = MOST_GROUPS) -> Sample:
    """Evenly spread over each run's steps, the first and the last step among them."""
    runs = [(arm, run) for arm in arms for run in arm.runs]
    groups: list[Group] = []
    total = 0
    for arm, run in runs:
        path = run.path / "completions.jsonl"
        if not path.is_file():
            notes.append(f"{run.name}: completions.jsonl is missing, so the browser has none of its completions")
            continue
        places = _places(path)
        total += sum(map(len, places.values()))
        name = arm.label if len(arm.runs) == 1 else f"{arm.label}, {run.name}"
        found, broken = _read(path, _spread(places, max(1, most // len(runs))))
        if broken:
            notes.append(f"{run.name}: {broken} lines of completions.jsonl cannot be read and are not in the browser")
        groups += [{**group, "run": name} for group in found]
    size = sum(len(group["prompt"]) for group in groups)
    size += sum(len(s["text"]) for group in groups for s in (*group["drafts"], *group["refinements"]))
    if size > MOST_CHARACTERS:
        keep = max(1, int(len(groups) * MOST_CHARACTERS / size))
        groups = [groups[i] for i in _even(len(groups), keep)]
    return Sample(groups, total)


def _places(path: Path) -> dict[int, list[int]]:
    """Step -> byte offsets of its lines; the file is scanned, not parsed, since it may hold gigabytes."""
    places: dict[int, list[int]] = {}
    with open(path, "rb") as file:
        offset = 0
        for line in file:
            found = _STEP.match(line[:40].decode("ascii", errors="replace"))
            if line.strip():
                places.setdefault(int(found[1]) if found else -1, []).append(offset)
            offset += len(line)
    return places


def _spread(places: dict[int, list[int]], most: int) -> list[int]:
    """Offsets of at most ``most`` lines: whole steps where they fit, a few groups of evenly spaced steps otherwise."""
    steps = sorted(places)
    if not steps:
        return []
    per_step = max(map(len, places.values()))
    if sum(map(len, places.values())) <= most:
        return [offset for step in steps for offset in places[step]]
    per_step = min(per_step, max(4, most // len(steps)), most)
    chosen = [steps[i] for i in _even(len(steps), max(1, most // per_step))]
    return [offset for step in chosen for offset in places[step][:per_step]]


def _even(count: int, wanted: int) -> list[int]:
    """``wanted`` of ``count`` positions, the first and the last included."""
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def _read(path: Path, offsets: Sequence[int]) -> tuple[list[Group], int]:
    groups, broken = [], 0
    with open(path, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            record = parse(file.readline(MOST_BYTES))
            group = _group(record) if record is not None else None
            if group is None:
                broken += 1
            else:
                groups.append(group)
    return groups, broken


def _group(record: dict[str, Any]) -> Group | None:
    """A record as the page needs it, or None if it has no refinements; keys that an older version lacks are null."""
    drafts = [_scored(d) for d in _dicts(record.get("drafts"))]
    refinements = [_scored(r) for r in _dicts(record.get("refinements"))]
    if not refinements:
        return None
    chosen = record.get("chosen")
    if not isinstance(chosen, int) or not 0 <= chosen < len(drafts):
        chosen = None
    if chosen is not None:
        for refinement in refinements:
            refinement["changes"] = changes(drafts[chosen]["text"], refinement["text"])
    return {
        "step": _number(record.get("step")),
        "row": _number(record.get("row")),
        "prompt": _cut(_plain(record.get("prompt"))),
        "solution": _cut(_text(record.get("solution", ""))),
        "drafts": drafts,
        "chosen": chosen,
        "refinements": refinements,
        "tags": _tags(drafts, chosen, refinements),
    }


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def _plain(prompt: Any) -> str:
    """A conversation as text, one turn after the other."""
    turns = _dicts(prompt)
    return "\n\n".join(f"[{_text(t.get('role'))}] {_text(t.get('content'))}" for t in turns) or _text(prompt)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def _scored(record: dict[str, Any]) -> Group:
    rewards = record.get("rewards")
    return {
        "text": _cut(_text(record.get("text", ""))),
        "reward": _number(record.get("reward")),
        "rewards": {str(k): _number(v) for k, v in rewards.items()} if isinstance(rewards, dict) else {},
        "advantage": _number(record.get("advantage")),
        "tokens": _number(record.get("tokens")),
        "cut": record.get("finish_reason") == "length",
    }


def _number(value: Any) -> float | None:
    number = number_of(value)
    return None if number is None else round(number, 6)


def _cut(text: str) -> str:
    if len(text) <= MOST_TEXT:
        return text
    return f"{text[:MOST_TEXT]}\n[… {len(text) - MOST_TEXT} more characters are in completions.jsonl]"


def _judge(scored: Group) -> float:
    """The reward that says right or wrong: ``accuracy`` if there is one, else the first (``correctness_reward``)."""
    rewards = scored["rewards"]
    value = rewards.get("accuracy", next(iter(rewards.values()), None))
    return value if value is not None else 0.0


def _tags(drafts: Sequence[Group], chosen: int | None, refinements: Sequence[Group]) -> list[str]:
    """What the outcome filter offers."""
    rewards = [r["reward"] for r in refinements if r["reward"] is not None]
    right = [_judge(r) >= 1.0 for r in refinements]
    signal = len(set(rewards)) > 1
    tags = {
        "signal": signal,
        "no signal": not signal,
        "all right": all(right),
        "all wrong": not any(right),
        "some right": any(right) and not all(right),
        "cut": any(s["cut"] for s in (*drafts, *refinements)),
    }
    if chosen is not None:
        draft = drafts[chosen]
        if draft["reward"] is not None:
            tags["better than draft"] = any(reward > draft["reward"] for reward in rewards)
            tags["worse than draft"] = any(reward < draft["reward"] for reward in rewards)
        tags["copies draft"] = any(r["text"] == draft["text"] for r in refinements)
    return [name for name, holds in tags.items() if holds]


def changes(draft: str, refinement: str) -> list[Change]:
    """The spans in which the refinement departs from the draft, word by word (line by line in very long texts)."""
    # A word and the blank before it are one piece: blanks of their own would match all over and make this slow.
    a, b = (re.findall(r"\s*\S+|\s+", text) for text in (draft, refinement))
    if len(a) * len(b) > MOST_COMPARED:
        a, b = draft.splitlines(keepends=True), refinement.splitlines(keepends=True)
    starts_a, starts_b = (list(accumulate(map(len, parts), initial=0)) for parts in (a, b))
    spans: list[Change] = []
    for tag, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            pairs = zip("".join(a[i:j]), "".join(b[k:m]), strict=False)
            same = len(list(takewhile(lambda pair: pair[0] == pair[1] and pair[0].isspace(), pairs)))
            spans.append([starts_a[i] + same, starts_a[j], starts_b[k] + same, starts_b[m]])
    return spans


def as_script_json(value: Any) -> str:
    """JSON that can stand inside a ``<script>`` element: no character in it can end or open a tag.

    JavaScript counts UTF-16 units and Python code points, so the offsets in ``changes`` would drift after an emoji; the
    page therefore splits texts with ``Array.from``, which counts code points too.
    """
    # A lone surrogate, which \ud800 in a log can leave, is no valid UTF-8.
    text = whole_characters(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
