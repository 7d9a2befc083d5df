"""Runs one server and takes all its processes down with it: ``python -m igrpo.engines.supervise PARENT_PID COMMAND…``.

A server is several processes (vLLM's front end, its engine, one worker per GPU). Killing the front end alone leaves the
others holding the GPU, and a trainer that dies by ``kill -9`` kills nothing. This small process stands between the two:
it ends the whole group when the server's front end ends, when it is asked to, and when its parent is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
PR_SET_PDEATHSIG = 1


def supervise(command: Sequence[str], parent: int | None) -> tuple[int, bool]:
    """Runs the command; with ``parent``, no longer than that process.

    Returns:
        Its exit code, or 128 + signal, and whether it was asked to end (or its parent did) and did not end by itself.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    # This process is single-threaded and imports nothing heavy, so code between fork and exec is safe here.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_die_with_parent)
    try:
        while child.poll() is None and not asked and (parent is None or os.getppid() == parent):
            time.sleep(POLL_SECONDS)
        if child.poll() is None and asked:
            _signal_group(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
    finally:
        _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    return (128 - code if code < 0 else code), bool(asked) or not (parent is None or os.getppid() == parent)


def _die_with_parent() -> None:
    # Should even this process be killed with -9, the kernel takes the server's front end along.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[2:], int(sys.argv[1]))[0])
