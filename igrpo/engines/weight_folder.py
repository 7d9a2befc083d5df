"""Where weights lie on their way to an engine: a private folder in shared memory, or where the run says."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from igrpo.engines.base import EngineError
from igrpo.settings import ConfigError

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "igrpo-weights-"


def weight_folder(chosen: str | None) -> Path:
    """A new private folder for the weights of this run: in ``chosen``, else in shared memory, else on disk.

    Raises:
        ConfigError: no folder can be made there.
    """
    in_memory = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    base = Path(chosen).expanduser() if chosen else SHARED_MEMORY if in_memory else Path(tempfile.gettempdir())
    try:
        base.mkdir(parents=True, exist_ok=True)
        if chosen:
            return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))
        _remove_leftovers(base)
        # Under a name that nobody clears away until it is locked.
        new = Path(tempfile.mkdtemp(prefix=".igrpo-new-", dir=base))
        _lock(new)
        return new.rename(base / f"{PREFIX}{os.getpid()}-{new.name.rpartition('-')[2]}")
    except OSError as error:
        raise ConfigError(
            f"vllm_weight_dir: no folder for the weights can be made in {base} ({error.strerror}); write a folder that "
            "trainer and servers can use"
        ) from error


def _lock(folder: Path) -> int:
    """Holds the folder until this process ends, however it ends, or closes the descriptor it gets.

    The kernel keeps the lock with the folder itself, so that other containers see it, to whom a process number of ours
    says nothing. Raises OSError: somebody holds it, or it is no folder or only a link to one.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_leftovers(base: Path) -> None:
    """Folders of runs of this user that were killed: memory that nobody else would free."""
    for folder in base.glob(f"{PREFIX}*"):
        try:
            descriptor = _lock(folder)
        except OSError:
            continue
        if os.fstat(descriptor).st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def not_written(version: int, target: Path, error: Exception) -> EngineError:
    """What to enlarge; ``target`` makes way."""
    written = sum(file.stat().st_size for file in target.glob("*")) / GIB
    shutil.rmtree(target, ignore_errors=True)
    return EngineError(
        f"the weights of version {version} could not be written to {target.parent.parent} (after {written:.2f} GiB: "
        f"{error}); it needs room for two versions: enlarge it (docker run --shm-size) or write another folder as "
        "vllm_weight_dir"
    )
