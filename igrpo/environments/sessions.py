"""The trainer's side of environments: a session per trajectory, each request under a deadline, nobody waits for one."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import select
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from igrpo.environments.host import BEGUN, END, NEW, ORDER, SIZE
from igrpo.rewards.workers.process import MARK, kill_marked
from igrpo.settings import ConfigError
from igrpo.terminal import printable

START = "import sys; sys.path[:] = sys.argv[4:]; from igrpo.environments.host import main; main()"
START_SECONDS = 120.0
"""A host that has not made its environment after so long does not start."""
LONGEST_REPLY = 2**28
GONE_SECONDS = 10.0

logger = logging.getLogger(__name__)


class EnvironmentFailed(Exception):
    """A trajectory's environment is no more, or could not do what it was asked."""


class Session:
    """One trajectory's environment: one request at a time, whose reply ``Environments.poll`` brings."""

    def __init__(self, number: int, channel: socket.socket | None, wrong: str = ""):
        self.number, self.channel, self.wrong = number, channel, wrong
        self.asked, self.deadline, self.begun = "", math.inf, False
        self.data = bytearray()
        self.reply: dict[str, Any] | None = None

    @property
    def answered(self) -> bool:
        return self.reply is not None or bool(self.wrong)

    def take(self) -> Any:
        """
        Raises:
            EnvironmentFailed: why there is no answer.
        """
        if self.wrong:
            raise EnvironmentFailed(self.wrong)
        reply, self.reply, self.deadline = self.reply or {}, None, math.inf
        if "ok" not in reply:
            raise EnvironmentFailed(f"{self.asked}: {reply.get('failed', 'no reply')}")
        return reply["ok"]


class Environments:
    """One host and its sessions; use as a context manager or call ``close``.

    Args:
        timeout: seconds of one request; then the session's process is killed.
        memory: bytes that it may hold.
        environment: variables of the host's process.

    Raises:
        ConfigError: the environment cannot be imported or made.
    """

    def __init__(
        self,
        factory: str | None,
        functions: Sequence[str],
        timeout: float,
        memory: int,
        seed: int,
        environment: Mapping[str, str],
    ):
        self.timeout, self.environment = timeout, {**environment, MARK: uuid.uuid4().hex}
        self._setup = pickle.dumps((factory, tuple(functions), memory, str(seed), sys.argv)).hex()
        self._count, self._started = 0, 0
        self._poll = select.poll()
        self._channels: dict[int, Session] = {}
        self._host: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        if wrong := self._start():
            self.close()
            raise ConfigError(f"environment_factory: {factory or ', '.join(functions)}: {wrong}")

    def open(self) -> Session:
        """A copy of the environment in a process of its own; where there is no room for one, its requests fail."""
        self._count += 1
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            return Session(self._count, None, f"start: {error}")
        session = Session(self._count, ours)
        with theirs:
            for _ in range(2):  # once more where the host has died
                if self._host is None and (wrong := self._start()):
                    session.wrong = wrong
                    break
                try:
                    socket.send_fds(self._control, [ORDER.pack(NEW, session.number)], [theirs.fileno()])  # type: ignore[list-item]
                    break
                except OSError:
                    self._stop()
            else:
                session.wrong = "the environment's process does not stay up"
        if session.wrong:
            ours.close()
            session.channel = None
        else:
            self._channels[ours.fileno()] = session
            self._poll.register(ours, select.POLLIN)
        return session

    def ask(self, session: Session, method: str, *arguments: Any) -> None:
        if session.channel is None:
            return
        # A process is given its time once it is there: the host forks one after the other.
        seconds = self.timeout if session.begun else START_SECONDS
        session.asked, session.deadline = method, time.monotonic() + seconds
        data = pickle.dumps((method, arguments))
        try:
            session.channel.settimeout(self.timeout)
            session.channel.sendall(SIZE.pack(len(data)) + data)
        except OSError:
            self._lost(session, f"{method}: its process ended")

    def poll(self, seconds: float) -> None:
        """Takes the replies that are there, after waiting for the first so long; kills what is past its deadline."""
        for number, _ in self._poll.poll(1000 * seconds):
            session = self._channels[number]
            try:
                part = session.channel.recv(2**20)  # type: ignore[union-attr]
            except OSError:
                part = b""
            if not part:
                self._lost(session, f"{session.asked or 'start'}: its process ended")
                continue
            session.data += part
            if not session.begun:
                session.begun = session.data.startswith(BEGUN)
                del session.data[: len(BEGUN)]
                if session.asked:
                    session.deadline = time.monotonic() + self.timeout
            self._read(session)
        now = time.monotonic()
        for session in list(self._channels.values()):
            if session.reply is None and now > session.deadline:
                self._lost(session, f"{session.asked}: killed after {self.timeout:g} s (tool_timeout)")

    def end(self, session: Session) -> None:
        """Nothing is left of it, running or not."""
        self._lost(session, "ended")

    def close(self) -> None:
        for session in list(self._channels.values()):
            self._lost(session, "ended")
        self._stop()

    def __enter__(self) -> Environments:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, session: Session) -> None:
        size = SIZE.unpack_from(session.data)[0] if len(session.data) >= SIZE.size else 0
        if size > LONGEST_REPLY or (session.reply is not None and session.data):
            self._lost(session, f"{session.asked}: its process sent what is no reply")
        elif size and len(session.data) >= SIZE.size + size:
            try:
                reply = json.loads(session.data[SIZE.size : SIZE.size + size])
            except (ValueError, RecursionError):
                reply = {}
            session.reply = reply if isinstance(reply, dict) else {}
            session.data.clear()

    def _lost(self, session: Session, why: str) -> None:
        session.wrong = session.wrong or why
        if session.channel is None:
            return
        del self._channels[session.channel.fileno()]
        self._poll.unregister(session.channel)
        session.channel.close()
        session.channel = None
        with contextlib.suppress(OSError, AttributeError):  # of a host that has died, which took it along
            self._control.send(ORDER.pack(END, session.number))  # type: ignore[union-attr]

    def _start(self) -> str:
        """What is wrong; empty where nothing is."""
        try:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-P", "-c", START, str(theirs.fileno()), str(os.getpid()), self._setup]
            with theirs:
                self._host = subprocess.Popen(
                    [*command, *(path or os.getcwd() for path in sys.path)], stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()], env=self.environment,
                )  # fmt: skip
        except OSError as error:  # no room for another process
            self._stop()
            return str(error)
        self._control.settimeout(START_SECONDS)
        try:
            said = self._control.recv(2**16).decode(errors="replace")
        except TimeoutError:
            said = f"it was not there after {START_SECONDS:g} s"
        except OSError:
            said = ""
        if said == "ready":
            self._started += 1
            if self._started > 1:
                logger.warning("the environment's process died and is replaced")
            return ""
        self._stop()
        return printable(said, 1000) or "its process ended while it was made"

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._host is not None:
            try:
                self._host.wait(GONE_SECONDS)
            except subprocess.TimeoutExpired:
                self._host.kill()
                self._host.wait()
            if self._host.returncode:  # it has not ended what it started
                kill_marked(self.environment[MARK])
            self._host = None
