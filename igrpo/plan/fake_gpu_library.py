"""``fake_gpu.cpp``, compiled once for this torch into the user's cache, and loaded before torch is.

torch asks once in its life whether there is a GPU; from then on the process believes in one, and is good for nothing
but rehearsals. Importing this imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from igrpo.machine import package_folder
from igrpo.settings import ConfigError

SOURCE = Path(__file__).with_name("fake_gpu.cpp")
LOADED: list[ctypes.CDLL] = []
"""Libraries, once there are any."""


def load() -> None:
    """Makes torch's C++ see one GPU.

    Raises:
        ConfigError: no torch or one built for CUDA, no C++ compiler, or one that does not get through.
        RuntimeError: torch is imported already.
    """
    if LOADED:
        return
    if "torch" in sys.modules:
        raise RuntimeError("fake_gpu_library.load() must come before anything imports torch")
    root = package_folder("torch")
    if root is None:
        raise ConfigError("rehearse: torch is not installed; pip install torch")
    if any((root / "lib").glob("libtorch_cuda.*")):  # it would end the process: the hooks have one place
        raise ConfigError(
            "rehearse: this torch was built for CUDA, whose own hooks leave no room for made-up GPUs; rehearse where "
            "torch's CPU build is installed"
        )
    library = _built(root)
    for path in (*(root / "lib" / name for name in ("libc10.so", "libtorch_cpu.so")), library):
        LOADED.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))


def _built(root: Path) -> Path:
    version = importlib.metadata.version("torch")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "igrpo"
    built = cache / f"fake_gpu-{version}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if built.is_file():
        return built
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise ConfigError("rehearse: a C++ compiler is needed once, and none is on the path; install g++ or set CXX")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / built.name
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        done = subprocess.run([*command, f"-L{root}/lib", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
            raise ConfigError(f"rehearse: {compiler} does not compile {SOURCE.name}: {reason}")
        os.replace(made, built)
    return built
