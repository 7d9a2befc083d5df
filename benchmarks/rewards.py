"""Rewards for models that know nothing, so that groups still have something to learn from."""

from typing import Any


def even_length(completions: list, completion_ids: list[list[int]] | None = None, **_: Any) -> list[float]:
    """1 for a completion of an even number of tokens (characters, where ids are not given)."""
    return [float(len(c) % 2 == 0) for c in (completion_ids or map(str, completions))]


def low_letters(completions: list, **_: Any) -> list[float]:
    """Share of characters below "n": in practice never equal over a group, so that every group trains."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch < "n" for ch in text) / max(len(text), 1) for text in texts]
