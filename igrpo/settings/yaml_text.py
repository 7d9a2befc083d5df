"""Settings as text and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from igrpo.settings import ConfigError


def load_yaml(text: str, where: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        ConfigError: nothing in it can be read as one; the message begins with ``where``.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}:{line} is not valid YAML ({reason})") from None
    except RecursionError:
        raise ConfigError(f"{where}: its brackets are nested too deep to be read") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # a date of month 13, `!!int x`, 4,300 digits
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{where}: one value is not what it looks like ({reason}); put it in quotes") from None


def dump_yaml(section: Any) -> str:
    return yaml.safe_dump(dataclasses.asdict(section), sort_keys=False, allow_unicode=True)
