"""Runs one server and takes all its processes down with it.

As a program: ``python -m igrpo.engines.servers.supervise PARENT_PID COMMAND…``.

A server is several processes (vLLM's front end, its engine, one worker per GPU). Killing the front end alone leaves the
others holding the GPU, and a trainer that dies by ``kill -9`` kills nothing. This small process stands between the two:
it ends the whole group when the server's front end ends, when it is asked to, when its parent is gone, and (where no
trainer watches) when the server does not answer any more.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from igrpo.engines.servers.auth import INSTANCE_HEADER
from igrpo.machine import SET_PARENT_DEATH_SIGNAL, process_control

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
PROBE_SECONDS = 1.0
PATIENCE_SECONDS = 5.0
"""For a server whose port is closed, or that says that it is dead, to end by itself."""
SILENCE_SECONDS = 30.0
SILENT = "it gave no answer"


@dataclass(frozen=True, slots=True)
class End:
    """How a supervised server ended."""

    code: int
    """Its exit code, or 128 + signal."""
    asked: bool = False
    """It was asked to end, or its parent did."""
    came_up: bool = False
    """It answered before."""
    hung: str = ""
    """Why it was taken for dead while its process lived."""


def supervise(command: Sequence[str], parent: int | None, health: Health | None = None) -> End:
    """Runs the command; with ``parent``, no longer than that process; with ``health``, no longer than it answers."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    # This process is single-threaded and imports nothing heavy, so code between fork and exec is safe here.
    # Should even this process be killed with -9, the kernel takes the server's front end along.
    dies_along = partial(process_control, SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=dies_along)
    ended = threading.Event()
    watcher = threading.Thread(target=health.watch, args=(ended,)) if health is not None else None
    if watcher is not None:
        watcher.start()
    try:
        while child.poll() is None and not asked and (parent is None or os.getppid() == parent):
            if health is not None and health.lost:
                break
            time.sleep(POLL_SECONDS)
        if child.poll() is None and asked:
            _signal_group(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
    finally:
        ended.set()
        _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    if watcher is not None:
        watcher.join()  # at once: whatever it asked has just been killed
    wanted = bool(asked) or not (parent is None or os.getppid() == parent)
    came_up, lost = (health.came_up, health.lost) if health is not None else (False, "")
    return End(128 - code if code < 0 else code, wanted, came_up, lost)


class Health:
    """Whether a server that came up still answers: one that hangs while it dies keeps its process.

    Loading may take as long as it takes. A busy server answers in time, since its front end does nothing else; one
    whose port is closed is given ``PATIENCE_SECONDS`` to end by itself, one that is silent ``SILENCE_SECONDS``.
    """

    def __init__(self, host: str, port: int, secret: str):
        self.host, self.port, self.secret = host, port, secret
        self.came_up = False
        self.lost = ""
        """Why it is taken for dead."""

    def watch(self, ended: threading.Event) -> None:
        answered = time.monotonic()
        while not ended.wait(PROBE_SECONDS):
            problem = self._ask()
            if not problem:
                self.came_up, answered = True, time.monotonic()
            silent = time.monotonic() - answered
            if self.came_up and problem and silent > (SILENCE_SECONDS if problem == SILENT else PATIENCE_SECONDS):
                self.lost = f"{problem} for {silent:.0f} s"
                return

    def _ask(self) -> str:
        """What is wrong with it; empty where it is well."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SILENCE_SECONDS)
        try:
            connection.request("GET", "/health", headers={"Authorization": f"Bearer {self.secret}"})
            answer = connection.getresponse()
        except TimeoutError:
            return SILENT
        except (OSError, http.client.HTTPException):
            return "its port was closed"
        finally:
            connection.close()
        if answer.status == 200 and answer.headers.get(INSTANCE_HEADER.decode()) is None:
            return "something else answered on its port"
        return "" if answer.status == 200 else f"it answered {answer.status}"


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], int(sys.argv[1])).code)
