"""A room's share of the settings: a frozen dataclass whose values are checked as it is made.

``TrainConfig`` inherits the sections of all rooms. A mistake raises ``ConfigError`` with one line that names the key
and says what to write instead.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from igrpo.settings import ConfigError, shown
from igrpo.settings.kinds import Interval, Mark, describe_type, marks_of, matches

DEEPEST, MOST_ITEMS = 20, 100_000
"""Levels and items of a nested value; YAML's references can make one that no program walks to its end."""
_HOLDS_KEY = re.compile(r"@|[?&][^=&]*(key|token|secret|passw|sig)[^=&]*=", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section refuses combinations of its own keys in a method ``check``."""

    def __post_init__(self) -> None:
        hints, marked = field_types(type(self)), field_marks(type(self))
        for key, marks in marked.items():
            _check_secrets(key, getattr(self, key), marks)
        for key, hint in hints.items():
            if not matches(getattr(self, key), hint):
                raise ConfigError(f"{key}: {shown(getattr(self, key))} does not fit; write {describe_type(hint)}")
        for key, marks in marked.items():
            check_value(key, getattr(self, key))
            _check_text(key, getattr(self, key), marks)
        for key, marks in marked.items():
            _check_number(key, getattr(self, key), marks, type(None) in get_args(hints[key]))
        for section in reversed(type(self).__mro__):
            if "check" in vars(section):
                section.check(self)


@cache
def field_types(section: type) -> dict[str, Any]:
    """Type of each key, without what stands beside it."""
    hints = get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@cache
def field_marks(section: type) -> dict[str, tuple[Any, ...]]:
    """What stands beside the type of each key: intervals and ``Mark``s."""
    hints = get_type_hints(section, include_extras=True)
    return {field.name: tuple(marks_of(hints[field.name])) for field in dataclasses.fields(section)}


def default_of(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _check_secrets(key: str, value: Any, marks: tuple[Any, ...]) -> None:
    """What a setting holds is written into ``config.yaml``, to trackers and into messages: no key may be among it."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if Mark.ADDRESS in marks and any(map(_HOLDS_KEY.search, texts)):
        raise ConfigError(
            f"{key}: an address must hold no user, password or key, since settings are written into logs (it is "
            "not shown here); export IGRPO_SERVER_SECRET, or what judge_api_key_env names"
        )
    if Mark.VARIABLE in marks and not all(re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", text) for text in texts):
        raise ConfigError(
            f"{key}: this is no name of an environment variable (it is not shown here); write the name, and "
            "export the key under it"
        )


def _check_number(key: str, value: Any, marks: tuple[Any, ...], or_null: bool) -> None:
    intervals = [mark for mark in marks if isinstance(mark, Interval)]
    for number in (value if isinstance(value, list) else [value]) if intervals else ():
        if number is not None and (advice := intervals[0].advice(number)):
            raise ConfigError(f"{key}: {shown(number)} does not work; write {advice}{', or null' * or_null}")
    if Mark.STEPS in marks and value is not None and value >= 1 and value != int(value):
        raise ConfigError(f"{key}: {value} does not work; write {Mark.STEPS.value}")


def _check_text(key: str, value: Any, marks: tuple[Any, ...]) -> None:
    """Nothing that cannot be opened as a file."""
    if Mark.NEVER_EMPTY in marks and not value.strip():
        raise ConfigError(f"{key}: the text is empty; write a value, or leave the key out")
    if Mark.PATH in marks:
        try:
            Path(value or "").expanduser()
        except RuntimeError:
            raise ConfigError(f"{key}: there is no home folder for {value}; write the whole path") from None


def check_value(key: str, value: Any) -> None:
    """A list or mapping may hold text, numbers, true, false, null and such lists and mappings: what can be written into
    config.yaml and walked through."""
    open_items, count = [(value, 0)], 0
    while open_items:
        item, depth = open_items.pop()
        count += 1
        if depth > DEEPEST or count > MOST_ITEMS:
            raise ConfigError(f"{key}: it is nested more than {DEEPEST} levels deep or has over {MOST_ITEMS} items")
        if isinstance(item, str):
            if "\0" in item or not _is_unicode(item):
                raise ConfigError(f"{key}: {shown(item)} holds a NUL or half a character; write plain text")
        elif isinstance(item, dict):
            if strangers := [name for name in item if not isinstance(name, str)]:
                raise ConfigError(f"{key}: the name {shown(strangers[0])} is not text; put it in quotes")
            open_items += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            open_items += [(part, depth + 1) for part in item]
        elif isinstance(item, int) and abs(item) >= 2**63:
            raise ConfigError(f"{key}: {shown(item)} does not work; write a smaller one")
        elif not isinstance(item, int | float | None):  # a date, a set, bytes
            raise ConfigError(f"{key}: {shown(item)} is a {type(item).__name__}; put it in quotes to write it as text")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
