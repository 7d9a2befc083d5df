"""The parent of a reward worker: it runs no foreign code, and nothing that a reward started outlives it.

    trainer  ->  keeper  ->  worker  ->  whatever a reward function starts

The keeper imports what the built-in rewards need and forks a worker when the trainer asks for one, so that a new one
costs milliseconds. It is the subreaper of all processes below it: when its worker has ended, killed by a deadline or by
itself, the keeper kills what is left. When the trainer ends, however it does, the kernel tells the keeper.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Sequence

from igrpo.machine import SET_CHILD_SUBREAPER, SET_PARENT_DEATH_SIGNAL, process_control
from igrpo.rewards.functions import BUILTIN, RewardFunction
from igrpo.rewards.workers.worker import become_child, end_descendants, receive, serve

SETUP = struct.Struct(">I")
"""Bytes of the pickled ``(functions, bytes of memory that a worker may take, sys.argv)`` that follow, the first
message."""
STATUS = struct.Struct(">i")
"""Exit code of a worker, or minus the signal, once nothing that it started is left."""


class Keeper:
    """Args:
    control: from the trainer: the set-up, then for each worker one byte, its patience, and the worker's channel.
    trainer: number of its process.
    """

    def __init__(self, control: socket.socket, trainer: int) -> None:
        self.control, self.trainer = control, trainer
        self.worker: int | None = None

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._end_worker)
        process_control(SET_CHILD_SUBREAPER, 1)
        process_control(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        header = receive(self.control, SETUP.size)
        setup = receive(self.control, SETUP.unpack(header)[0]) if header is not None else None
        if setup is None:
            return
        functions, limit, sys.argv = pickle.loads(setup)
        _warm_up(functions)
        while os.getppid() == self.trainer:
            try:
                patience, descriptors, _, _ = socket.recv_fds(self.control, 1, 1)
                if not patience:
                    return
                code = self._one_worker(socket.socket(fileno=descriptors[0]), functions, limit, patience[0])
                self.control.sendall(STATUS.pack(code))
            except (BrokenPipeError, ConnectionResetError):  # the trainer is gone
                return

    def _one_worker(
        self, channel: socket.socket, functions: Sequence[RewardFunction], limit: int, patience: int
    ) -> int:
        keeper = os.getpid()
        self.worker = os.fork()
        if self.worker == 0:
            code = 1
            try:
                self.control.close()
                become_child(keeper)
                for stream in (sys.stdout, sys.stderr):
                    stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
                serve(channel, functions, limit, patience)
                code = 0
            finally:
                os._exit(code)
        channel.close()
        _, status = os.waitpid(self.worker, 0)
        self.worker = None
        end_descendants()
        return os.waitstatus_to_exitcode(status)

    def _end_worker(self, *_: object) -> None:
        """The trainer asks for it, or has ended."""
        if self.worker:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.worker, signal.SIGKILL)
        if os.getppid() != self.trainer:
            end_descendants()
            os._exit(0)


def _warm_up(functions: Sequence[RewardFunction]) -> None:
    """Only what is this package's own: a user's module may start threads, which a fork does not take along."""
    for function in functions:
        if function.path in BUILTIN.values():
            with contextlib.suppress(Exception):  # reported by the call that needs it
                loaded = function.load()
                if function.path == BUILTIN["accuracy"]:
                    loaded([r"\boxed{2x}"], [r"x+x"])  # loads the formula parser outside any deadline
    gc.collect()
    gc.freeze()  # pages that no collection writes to stay shared with every worker


def main() -> None:
    Keeper(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).run()
