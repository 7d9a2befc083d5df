"""How the threads of CPU kernels wait, where several processes share the cores."""

from __future__ import annotations

from collections.abc import Mapping

SPINS = "1000"


def shared_cores(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that let a waiting OpenMP thread give its core away after microseconds instead of milliseconds.

    By default it spins as long as the machine seems to have a core per thread, and each process thinks so for itself:
    two servers and a learner beside them then take the cores from each other's working threads. On two cores, four
    requests spread over two servers took 1.4 s with this and 9.3 s without. A process that has the cores to itself is
    better off spinning (a tiny model's GRPO step: 0.9 s, and 1.1 s with this, four runs in turns), so a run with its
    engine inside does without. For a process that has not imported torch yet.

    Args:
        environment: where one of the variables is set already, nothing is added.
    """
    return {} if environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} else {"GOMP_SPINCOUNT": SPINS}
