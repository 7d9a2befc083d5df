"""Whether this machine has an NVIDIA GPU that the pinned list can use. Standard library only."""

from __future__ import annotations

import contextlib
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

OLDEST_DRIVER = 580
"""CUDA 13, for which the torch of requirements/gpu.txt is built, needs it."""

ASK_DRIVER = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count, version = ctypes.c_int(), ctypes.c_int()
assert cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
assert cuda.cuDriverGetVersion(ctypes.byref(version)) == 0
print(count.value, version.value)
"""


@dataclass(frozen=True)
class Choice:
    device: str
    """``cpu`` or ``gpu``."""
    why: str
    asked: bool = False
    """Whether DEVICE said so."""
    seen: bool = False
    """Whether a GPU was found here."""

    @property
    def sentence(self) -> str:
        return f"requirements/{self.device}.txt ({self.why})"


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str
    recent: bool
    """Whether the driver runs CUDA 13."""


def choose_device(asked: str) -> Choice:
    """``asked``: the user's word (cpu, gpu) or empty.

    Raises:
        ValueError: another word, or a GPU whose driver is too old for the list; one sentence.
    """
    if asked in ("cpu", "gpu"):
        return Choice(asked, f"DEVICE={asked}", asked=True)
    if asked:
        raise ValueError(f"DEVICE={asked}: write cpu or gpu, or leave it out")
    gpu = find_gpu()
    if gpu is None:
        return Choice("cpu", "no NVIDIA driver was found")
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return Choice("cpu", f"there is a {gpu.name}, but the list for GPUs is for Linux on x86_64")
    if not gpu.recent:
        raise ValueError(
            f"the {gpu.name} has driver {gpu.driver}, and CUDA 13 needs {OLDEST_DRIVER} or newer; update it, or run "
            "DEVICE=cpu make train"
        )
    return Choice("gpu", f"{gpu.name}, driver {gpu.driver}", seen=True)


def find_gpu() -> Gpu | None:
    """The first GPU; /proc/driver/nvidia is no answer, as a container without a GPU sees its host's."""
    cuda = cuda_version()
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(query, capture_output=True, text=True, timeout=60)
            name, comma, driver = (part.strip() for part in done.stdout.partition("\n")[0].partition(","))
            if done.returncode == 0 and comma:
                major = driver.partition(".")[0]
                # A data-centre GPU may have a compatibility package: then libcuda is newer than the driver.
                return Gpu(name, driver, cuda >= 13000 or not major.isdigit() or int(major) >= OLDEST_DRIVER)
    if cuda:
        return Gpu("NVIDIA GPU", f"for CUDA {cuda // 1000}.{cuda % 1000 // 10}", cuda >= 13000)
    return None


def cuda_version() -> int:
    """What libcuda offers, such as 13000, where it finds a GPU; 0 where it does not. Asked in a process of its own."""
    done = subprocess.run([sys.executable, "-c", ASK_DRIVER], capture_output=True, text=True)
    count, _, version = done.stdout.partition(" ")
    return int(version) if done.returncode == 0 and int(count) > 0 else 0
