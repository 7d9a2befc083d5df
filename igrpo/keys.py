"""Secrets and keys of the environment: read so that no error can show them."""

from __future__ import annotations

import os

from igrpo.config_errors import ConfigError


def key_from_environment(variable: str) -> str:
    """The variable's value without the blanks and line ends around it, which files of secrets usually end with;
    empty where it is not set.

    Raises:
        ConfigError: it cannot travel in an HTTP header. A library would print it to say so; this message does not.
    """
    value = os.environ.get(variable, "").strip()
    if not all(" " <= character <= "~" for character in value):
        raise ConfigError(
            f"{variable}: the value holds a line end, a control character or one that is not ASCII, which no header "
            "can carry; export it anew (it is not shown here)"
        )
    return value
