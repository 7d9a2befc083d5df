"""What this computer gives one process, and what the process has taken."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36
"""Options of ``process_control``."""


@dataclass(frozen=True)
class Machine:
    """What one process has: a GPU of its own, or its share of the computer's memory."""

    device: str
    """``"cuda"`` or ``"cpu"``."""
    memory: int
    """Bytes one process may use."""
    processes: int = 1
    """Processes of the run, which share a sharded model."""
    offloads: bool = False
    """Whether they keep its parts in the computer's memory, and bring to the GPU what it computes with."""


def package_folder(name: str) -> Path | None:
    """Of an installed package, which is not imported for that; None where it is not installed."""
    found = importlib.util.find_spec(name)
    return None if found is None or found.origin is None else Path(found.origin).parent


def process_control(option: int, value: int) -> None:
    """Linux's ``prctl``; nothing elsewhere."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def peak_resident() -> int:
    """Highest resident memory of this process, in bytes.

    Not ``ru_maxrss`` where the kernel says better: a process that a large one starts inherits that figure from it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def this_machine(use_cpu: bool = False, processes: int = 1) -> Machine:
    """This computer. Asks torch for the GPU, and only that; a container's memory limit counts as the memory."""
    if not use_cpu:
        import torch

        if torch.cuda.is_available():
            return Machine("cuda", torch.cuda.get_device_properties(0).total_memory, processes, offloads_weights())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()).isdigit():
            memory = min(memory, int(text))
    return Machine("cpu", memory // local_processes(), processes)


def offloads_weights() -> bool:
    """Whether ``accelerate launch`` was told ``fsdp_offload_params``."""
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true"


def local_processes() -> int:
    """Of the run on this computer, as whatever launched it says and accelerate reads it."""
    names = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
    return max(1, int(next((os.environ[name] for name in names if name in os.environ), "1")))
