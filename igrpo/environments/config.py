"""Settings of the environment: what the policy may call between its turns, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from igrpo.settings import ConfigError
from igrpo.settings.kinds import CountOrZero, Mark, Seconds
from igrpo.settings.section import Section


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig(Section):
    # --- environment
    environment_factory: Annotated[str | None, Mark.NOT_FROM_A_RUN] = None
    """`package.module:name` of a class, or of a function that makes one: its methods are tools."""
    tools: Annotated[list[str], Mark.NOT_FROM_A_RUN] = field(default_factory=list)
    """Functions that the model may call, as `package.module:function`."""
    max_tool_calling_iterations: CountOrZero | None = None
    """How often a completion may go on after a call; null: until max_completion_length, which counts what tools say."""
    tool_timeout: Seconds = 10.0
    """Seconds for the calls of one turn, for `reset` and for `get_reward`; then the environment is killed."""

    @property
    def has_environment(self) -> bool:
        return bool(self.environment_factory or self.tools)

    def check(self) -> None:
        for key, paths in (("environment_factory", [self.environment_factory]), ("tools", self.tools)):
            for path in paths:
                module, _, name = (path or "a:b").partition(":")
                if not name or module == "__main__":
                    raise ConfigError(f"{key}: {path!r} does not fit; write package.module:name")
        if len(set(self.tools)) < len(self.tools):
            raise ConfigError("tools: one is given twice; leave it out")
