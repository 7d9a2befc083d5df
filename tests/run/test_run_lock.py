"""One run holds a folder, on this machine and on others; a run that is gone holds nobody up."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igrpo.run import lock as run_lock
from igrpo.run.checkpoints import find_checkpoint
from igrpo.run.lock import LOCK, locked
from igrpo.settings import ConfigError
from tests.support.run_folders import ROOT, config, make_run, sentence, start, tree


def hold(folder: Path, *, and_fork: bool = False) -> tuple[subprocess.Popen[str], int]:
    """A process that holds the folder, and the child that it has forked (0: none); both are past the fork."""
    code = "import os, sys, time; from pathlib import Path; from igrpo.run.lock import locked\n"
    code += "with locked(Path(sys.argv[1])):\n"
    code += " child = os.fork() if len(sys.argv) > 2 else 0\n"
    code += " os.write(1, f'{child}\\n'.encode())\n time.sleep(60)"
    words = [sys.executable, "-c", code, str(folder), *["fork"] * and_fork]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, max(int(process.stdout.readline()) for _ in range(1 + and_fork))


def test_the_second_run_in_a_folder_is_told_who_holds_it(tmp_path):
    folder = make_run(tmp_path / "run")
    before = tree(folder)
    first, _ = hold(folder)
    try:
        said = sentence(folder, resume_from_checkpoint="last")
        assert f"is in use by process {first.pid} on " in said and " since 20" in said
        os.symlink(folder, tmp_path / "link")
        assert f"process {first.pid} " in sentence(tmp_path / "link")
        assert find_checkpoint(config(folder, resume_from_checkpoint="last")) is not None  # reading is allowed
    finally:
        first.kill()
        first.wait()
    assert (folder / LOCK).is_file()  # nobody took it away; the kernel knows better
    start(folder, resume_from_checkpoint="last")
    assert tree(folder).keys() == before.keys()


def test_a_forked_child_of_a_killed_run_does_not_hold_the_folder(tmp_path):
    first, child = hold(tmp_path, and_fork=True)
    first.kill()
    first.wait()
    try:
        os.kill(child, 0)
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def elsewhere(folder: Path) -> None:
    words = {"host": "node7", "process": "17", "since": "2026-01-01 10:00:00", "boot": "another"}
    (folder / LOCK).write_text(json.dumps(words))


def test_a_run_on_another_machine_holds_the_folder_as_long_as_it_touches_the_lock(tmp_path, monkeypatch):
    """Where the file system does not share the kernel's locks."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    elsewhere(tmp_path)
    with locked(tmp_path):  # it has ended
        pass
    elsewhere(tmp_path)
    beating = multiprocessing.get_context("spawn").Process(target=_touch, args=(str(tmp_path / LOCK),))
    beating.start()
    try:
        time.sleep(0.5)
        began = (tmp_path / LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime_ns == began and time.monotonic() < deadline:
            time.sleep(0.05)
        monkeypatch.setattr(run_lock, "BEAT_SECONDS", 1.0)
        with pytest.raises(ConfigError, match="is in use by process 17 on node7 since 2026-01-01 10:00:00"), \
                locked(tmp_path):  # fmt: skip
            pass
    finally:
        beating.kill()
        beating.join()


def _touch(path: str) -> None:
    while True:
        os.utime(path)
        time.sleep(0.05)


def test_a_file_system_without_locks_is_locked_by_touch(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock.fcntl, "flock", unknown)
    with locked(tmp_path), pytest.raises(ConfigError, match=rf"process {os.getpid()} on"), locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []
    elsewhere(tmp_path)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"[" * 100_000, b'{"host": "\x1b[2J"}'])
def test_a_lock_of_odd_content_holds_nobody_up(tmp_path, content, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.02)
    (tmp_path / LOCK).write_bytes(content)
    with locked(tmp_path):
        pass
