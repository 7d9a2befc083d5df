"""What became of the completions that reward functions were given: a run that can score nothing must not go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class RewardError(RuntimeError):
    """A reward function failed on everything it was given."""


@dataclass
class Tally:
    """What became of one function's completions."""

    scored: int = 0
    failed: int = 0
    error: str = ""
    """The last one."""


def check_tallies(everyone: Sequence[Mapping[str, Tally]], what: str) -> None:
    """
    Args:
        everyone: ``RewardPool.tallies`` of each process.
        what: the completions that were scored, in words.

    Raises:
        RewardError: a function failed on all of them.
    """
    for name in everyone[0]:
        tallies = [tallies[name] for tallies in everyone]
        failed = sum(tally.failed for tally in tallies)
        if failed and not any(tally.scored for tally in tallies):
            error = next(tally.error for tally in tallies if tally.error)
            raise RewardError(
                f"the reward function {name} failed on all {failed} completions of {what}: {error}; mend it, or write "
                "stop_on_reward_failure: false to go on with reward_error_value"
            )
