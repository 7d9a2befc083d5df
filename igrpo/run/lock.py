"""One run per folder: a lock that the kernel holds, so that it ends with the process that took it, however that ends.

Where the folder is shared by machines and the file system does not share such locks, the file's time of change stands
for it: a run touches it every few seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from igrpo.settings import ConfigError

LOCK = ".igrpo-lock"
BEAT_SECONDS = 5.0
PATIENCE = 3
"""A run on another machine that leaves out so many beats has ended."""
_WORDS = ("host", "process", "since", "boot")
_open_locks: set[int] = set()
"""Descriptors; a forked child gives its copies up, or the lock would outlive the run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, which must be there, for one process.

    Raises:
        ConfigError: another one holds it.
        OSError: the folder cannot be written.
    """
    path = folder / LOCK
    descriptor = _take(path)
    _open_locks.add(descriptor)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(descriptor, ended), name="igrpo-lock", daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        with suppress(OSError):  # the folder may have gone, or its disk
            if _same_file(descriptor, path):
                path.unlink()
        _open_locks.discard(descriptor)
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            decided = _flock(descriptor, path)
            if decided and not _same_file(descriptor, path):  # whoever held it has just removed it
                os.close(descriptor)
                continue
            holder = _holder(path)
            # The kernel's word counts for this machine; what it knows of others depends on the file system.
            if holder and not (decided and holder["boot"] == _boot()) and _still_beats(descriptor):
                raise _taken(path, holder)
            _write(descriptor)
            return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise


def _flock(descriptor: int, path: Path) -> bool:
    """Whether this file system has such locks.

    Raises:
        ConfigError: somebody holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise _taken(path, _holder(path)) from None
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
            raise
        return False
    return True


def _taken(path: Path, holder: dict[str, str]) -> ConfigError:
    who = "another run"
    if holder:
        who = f"process {holder['process']} on {holder['host']} since {holder['since']}"
    return ConfigError(
        f"output_dir: {path.parent} is in use by {who}; wait for that run or stop it, or write another output_dir"
    )


def _holder(path: Path) -> dict[str, str]:
    """Empty where the file says nothing; it is read by path, since its words are for whoever looks."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: "".join(c for c in str(found.get(key))[:200] if c.isprintable()) for key in _WORDS}


def _write(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    words = (socket.gethostname(), os.getpid(), since, _boot())
    text = json.dumps(dict(zip(_WORDS, words, strict=True))) + "\n"
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _boot() -> str:
    """The same in every container of one running machine, and in no other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _still_beats(descriptor: int) -> bool:
    """Whether someone touches the file within the time of a few beats; clocks of two machines are not compared."""
    first = os.fstat(descriptor).st_mtime_ns
    deadline = time.monotonic() + PATIENCE * BEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 5)
        if os.fstat(descriptor).st_mtime_ns != first:
            return True
    return False


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _give_up_copies() -> None:
    for descriptor in _open_locks:
        with suppress(OSError):
            os.close(descriptor)
    _open_locks.clear()


os.register_at_fork(after_in_child=_give_up_copies)
