"""Which problems a step works on, which come next, and which stand in; none is left out or taken twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from igrpo.data.config import DataConfig
from igrpo.data.sources import ProblemSampler
from igrpo.data_types import Problem


@dataclass(frozen=True, slots=True)
class Batch:
    """This process's share of a step; all refinements of a problem stay in one process."""

    problems: tuple[Problem, ...]
    ahead: tuple[Problem, ...]
    """Problems of the next steps that may begin now, in order (``policy_lag``, ``draft_policy_lag``)."""
    substitutes: tuple[Problem, ...]
    """Replace problems whose group has no advantage (``zero_variance: resample``); give back what is not used."""


class ProblemFeed:
    """Hands out the sampler's rows, the same to every process, each row to one process.

    Args:
        rank: this process's number among ``processes``.
        gather: one object of each process, in rank order, at every process.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        sampler: ProblemSampler,
        config: DataConfig,
        processes: int = 1,
        rank: int = 0,
        gather: Callable[[Any], list[Any]] = lambda one: [one],
    ):
        self.problems, self.sampler, self.config = problems, sampler, config
        self.processes, self.rank, self.gather = processes, rank, gather
        self._ahead: list[int] = []
        self._substitutes: list[int] = []

    def take(self, left: int) -> Batch:
        """The next step's problems; ``left``: how many steps come after it."""
        n = self.config.prompts_per_step * self.processes
        wanted = n * (1 + min(self.config.steps_ahead, left))
        known = self._ahead + self.sampler.next_batch(max(0, wanted - len(self._ahead)))
        rows, self._ahead = known[:n], known[n:]
        if self.config.zero_variance == "resample":
            self._substitutes = self.sampler.next_batch(n * (self.config.dynamic_sampling_max_gen_batches - 1))
        return Batch(self._own(rows), self._own(self._ahead), self._own(self._substitutes))

    def give_back(self, used: int) -> None:
        """After the step: this process took the first ``used`` of its substitutes; the rest come first next time."""
        if self._substitutes:
            taken = self.gather(used)
            unused = [r for i, r in enumerate(self._substitutes) if i // self.processes >= taken[i % self.processes]]
            self.sampler.give_back(unused)
            self._substitutes = []

    @property
    def epoch(self) -> int:
        """Epoch of the last row handed out for a step."""
        return max(self.sampler.rows_taken - len(self._ahead) - 1, 0) // self.sampler.num_problems

    def state_dict(self, begun: Sequence[int]) -> dict[str, Any]:
        """After ``give_back``; the rows of all processes that were ``begun`` ahead count as not yet taken."""
        state = self.sampler.state_dict()
        return state | {"returned": [*begun, *state["returned"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)

    def _own(self, rows: Sequence[int]) -> tuple[Problem, ...]:
        return tuple(self.problems[row] for row in rows[self.rank :: self.processes])


def steps_of(config: DataConfig, problems: int, processes: int) -> int:
    """Rollout batches of the whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * problems / (config.prompts_per_step * processes)))
