"""The process that has a user's environment: it is made once, and every trajectory gets a copy in a process of its own.

    trainer  ->  host  ->  one process per trajectory  ->  whatever a tool starts

The host imports the environment, makes it, and forks when the trainer asks for a trajectory. A copy serves one
trajectory's requests; a tool that raises, loops, sleeps, forks or takes its process down ends that trajectory alone.
What a copy sends is JSON, which runs no code. When the trainer ends, however it does, the kernel tells the host, and
nothing that a tool started outlives its trajectory.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import gc
import importlib
import inspect
import json
import math
import os
import pickle
import random
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from igrpo.log_lines import whole_characters
from igrpo.machine import SET_CHILD_SUBREAPER, SET_PARENT_DEATH_SIGNAL, process_control
from igrpo.rewards.workers.worker import become_child, described, end_descendants, receive, returned

NEW, END = b"N", b"E"
ORDER = struct.Struct(">cQ")
"""A trajectory's number, to begin it (its channel comes along) or to end it."""
SIZE = struct.Struct(">I")
"""Bytes of a request (pickled) or of a reply (JSON), which follow."""
BEGUN = b"+"
"""What a trajectory says once it is there, before any reply: it may have waited for others to be forked."""
LONGEST = 100_000
"""Characters that the tools of one turn may say, or a ``reset``."""
OWN = ("reset", "get_reward")
"""Methods of an environment that are no tools."""


def load(path: str) -> Any:
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))


def tools_of(environment: Any, functions: Sequence[Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The functions and the environment's public methods, by name, as TRL finds them."""
    members = inspect.getmembers(type(environment), predicate=inspect.isfunction) if environment is not None else []
    names = [name for name, _ in members if name not in OWN and not name.startswith("_")]
    return {f.__name__: f for f in functions} | {name: getattr(environment, name) for name in names}


class Trajectory:
    """A copy of the environment, and the requests that it answers.

    Requests are ``(method, arguments)`` for the methods that follow; a reply is ``{"ok": …}`` or ``{"failed": why}``.
    """

    def __init__(self, environment: Any, tools: Mapping[str, Callable[..., Any]]):
        self.environment, self.tools = environment, tools

    def reset(self, row: dict[str, Any], seed: str, then: str) -> str | None:
        """What ``reset`` says of a row: with one seed all of a problem's trajectories begin alike, and go on with
        their own."""
        _seed(seed)
        reset = getattr(self.environment, "reset", None)  # there may be functions alone
        said = returned(reset, _accepted(reset, row)) if reset is not None else None
        _seed(then)
        if said is not None and not isinstance(said, str):
            raise TypeError(f"reset returned {type(said).__name__}, not text or None")
        if said is not None and len(said) > LONGEST:
            raise ValueError(f"reset returned {len(said)} characters, more than {LONGEST}")
        return None if said is None else whole_characters(said)

    def call(self, calls: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, bool]]:
        """What each call said, and whether it failed."""
        said, left = [], LONGEST
        for name, arguments in calls:
            text, failed = self._call(name, arguments)
            if len(text) > left:
                text, failed = f"Error: the tool returned {len(text)} characters, more than {left}", True
            left = max(left - len(text), 0)
            said.append((text, failed))
        return said

    def _call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        tool, own = self.tools[name], os.getpid()
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            return f"Error: {name}: {error}", True
        try:
            return whole_characters(str(returned(tool, arguments))), False
        except BaseException as error:  # SystemExit and KeyboardInterrupt included
            return f"Error: {whole_characters(described(error))}", True
        finally:
            if os.getpid() != own:  # a process that the tool forked, and that came back from it
                os._exit(0)

    def finish(self, wants_reward: bool, wants_state: bool) -> dict[str, Any]:
        """Its own reward (text: why there is none) and itself, pickled (or why not)."""
        reward, state = None, None
        if wants_reward:
            try:
                reward = _number(returned(self.environment.get_reward, {}))
            except BaseException as error:
                reward = f"get_reward: {whole_characters(described(error))}"
        if wants_state:
            try:
                state = base64.b64encode(pickle.dumps(self.environment)).decode()
            except Exception as error:  # pickle raises whatever a value's own hooks raise
                state = f"the environment cannot be pickled for reward functions: {whole_characters(described(error))}"
        return {"reward": reward, "environment": state}

    def serve(self, channel: socket.socket) -> None:
        channel.sendall(BEGUN)
        while (header := receive(channel, SIZE.size)) is not None:
            method, arguments = pickle.loads(receive(channel, SIZE.unpack(header)[0]) or b"")
            try:
                reply = {"ok": getattr(self, method)(*arguments)}
            except BaseException as error:
                reply = {"failed": whole_characters(described(error))}
            _reply(channel, reply)


class Host:
    """Args:
    control: from the trainer: orders, one per message; the first reply says what is wrong with the environment.
    """

    def __init__(self, control: socket.socket, trainer: int):
        self.control, self.trainer = control, trainer
        self.alive: dict[int, int] = {}

    def run(self, factory: str | None, functions: Sequence[str], limit: int, seed: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._left)
        process_control(SET_CHILD_SUBREAPER, 1)
        process_control(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        wrong = ""
        try:
            _seed(seed)
            environment = load(factory)() if factory else None
            trajectory = Trajectory(environment, tools_of(environment, [load(path) for path in functions]))
        except BaseException as error:
            wrong = whole_characters(described(error))
        with contextlib.suppress(OSError):  # the trainer is gone
            self.control.send(wrong.encode() or b"ready")
        gc.collect()
        gc.freeze()  # pages that no collection writes to stay shared with every copy
        while not wrong and os.getppid() == self.trainer:
            if select.select([self.control], [], [], 1.0)[0]:
                order, descriptors, _, _ = socket.recv_fds(self.control, ORDER.size, 1)
                if not order:
                    break
                kind, number = ORDER.unpack(order)
                if kind == NEW:
                    self._begin(number, socket.socket(fileno=descriptors[0]), trajectory, limit)
                elif number in self.alive:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.alive[number], signal.SIGKILL)
            self._reap()
        end_descendants()

    def _left(self, *_: object) -> None:
        """The trainer has ended."""
        if os.getppid() != self.trainer:
            end_descendants()
            os._exit(0)

    def _begin(self, number: int, channel: socket.socket, trajectory: Trajectory, limit: int) -> None:
        host = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:  # no room for another process: the others live on
            with channel, contextlib.suppress(OSError):
                channel.sendall(BEGUN)
                _reply(channel, {"failed": whole_characters(described(error))})
            return
        if pid:
            self.alive[number] = pid
            channel.close()
            return
        try:
            self.control.close()
            become_child(host)
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(silence, stream)
            trajectory.serve(channel)
        finally:
            os._exit(0)

    def _reap(self) -> None:
        """What has ended, and what it left behind."""
        ended = [number for number, pid in self.alive.items() if os.waitpid(pid, os.WNOHANG)[0]]
        for number in ended:
            del self.alive[number]
        if ended and _children() - set(self.alive.values()):
            end_descendants(keep=list(self.alive.values()))


def _reply(channel: socket.socket, reply: dict[str, Any]) -> None:
    data = json.dumps(reply).encode()
    channel.sendall(SIZE.pack(len(data)) + data)


def _children() -> set[int]:
    """Of this process: those that it started, and those that were left to it."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return set(map(int, file.read().split()))
    except OSError:  # a kernel that does not list them
        return {child.pid for child in psutil.Process().children()}


def _accepted(function: Callable[..., Any], row: dict[str, Any]) -> dict[str, Any]:
    """The whole row for ``**kwargs``, else the columns that are named."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return row
    return {parameter.name: row[parameter.name] for parameter in parameters if parameter.name in row}


def _number(reward: Any) -> float | None:
    if hasattr(reward, "item"):  # NumPy and torch scalars
        reward = reward.item()
    if reward is None:
        return None
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise TypeError(f"it returned {str(reward)[:40]!r}, which is no number")
    return float(reward)


def _seed(text: str) -> None:
    random.seed(text)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(random.getrandbits(32))


def main() -> None:
    control, trainer = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    factory, functions, limit, seed, sys.argv = pickle.loads(bytes.fromhex(sys.argv[3]))
    Host(control, trainer).run(factory, functions, limit, seed)
