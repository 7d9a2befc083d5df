"""A reward for models that know nothing, so that groups still have something to learn from."""

from typing import Any


def even_length(completions: list, completion_ids: list[list[int]] | None = None, **_: Any) -> list[float]:
    """1 for a completion of an even number of tokens (characters, where ids are not given)."""
    return [float(len(c) % 2 == 0) for c in (completion_ids or map(str, completions))]
