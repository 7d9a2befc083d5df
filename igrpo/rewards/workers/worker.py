"""What runs inside a reward worker: one call after the other, and no trace of a call after its end.

A worker takes calls from a socket and answers each with scores or with what went wrong, as JSON: nothing that a worker
sends is unpickled. After a call it kills the processes that the call started, and puts back what later calls rely on
(working directory, signal handlers, recursion limit, locale, output). What cannot be put back (open files, threads,
memory, replaced built-ins) it reports, and is replaced.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import errno
import functools
import inspect
import json
import locale
import math
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import psutil

from igrpo.data_types import Pickled
from igrpo.machine import SET_CHILD_SUBREAPER, SET_PARENT_DEATH_SIGNAL, process_control
from igrpo.rewards.functions import RewardFunction

Outcome = list[float | str | None] | str
"""Per completion a score or what is wrong with it; a bare string if the whole call failed."""

REQUEST = struct.Struct(">QHQ")
"""Number of the call, index of its function, bytes of its pickled arguments, which follow."""
REPLY = struct.Struct(">I")
"""Bytes of the JSON that follows: ``[number of the call, outcome, why the worker must be replaced or null]``."""
ONLY_NAMED = ("prompt_suffix", "environment_rewards", "environments")
"""Arguments that ``**kwargs`` does not bring: TRL does not pass the first two, and the last costs a process each."""
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EBADF)
"""Errors of a process that has run out of something or lost its files: later calls would fail with them, too."""
FILES_LEFT, THREADS_LEFT, BYTES_LEFT = 32, 8, 2**29
"""How much more than after each function's first call a worker may hold, times its patience; a first call may load
twice as many bytes."""


def has_children() -> bool:
    """Quickly: for a subreaper it says whether any process is left below it."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def become_child(parent: int) -> None:
    """After a fork: ends with ``parent``, goes before the trainer where memory ends, and finds all that it starts."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    process_control(SET_CHILD_SUBREAPER, 1)
    process_control(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("900")


def end_descendants(keep: Sequence[int] = ()) -> bool:
    """Kills every process below this one but those in ``keep`` and what is below them; whether there were any.

    A subreaper (``SET_CHILD_SUBREAPER``) finds all of them, whatever session or group they are in: one whose parent
    has ended becomes its child.
    """
    found_any = False
    while has_children():
        kept, found = set(keep), []
        for child in psutil.Process().children(recursive=True):  # one look, which lists parents first
            with contextlib.suppress(psutil.Error):
                if child.pid in kept or child.ppid() in kept:
                    kept.add(child.pid)
                else:
                    found.append(child)
        if not found:
            break
        found_any = True
        for act in (psutil.Process.suspend, psutil.Process.kill):  # first none may start another one
            for child in found:
                with contextlib.suppress(psutil.Error):
                    act(child)
        for child in found:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, os.WNOHANG)
    return found_any


def memory_held(pid: int) -> int:
    """Bytes of memory that a process takes from the machine: not its files, and its part of what it shares."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            lines = [line.split() for line in file]
        return 1024 * sum(int(words[1]) for words in lines if words[0] in ("Pss_Anon:", "Pss_Shmem:"))
    except OSError:  # not Linux, or it has ended
        try:
            return psutil.Process(pid).memory_info().rss
        except psutil.Error:
            return 0


class Health:
    """What a worker was like before its first call, and what a call has made of it.

    Args:
        limit: bytes; a worker that keeps more than half of them is replaced.
        patience: factor of what a worker may keep beyond its functions' first calls.
    """

    def __init__(self, limit: int, patience: int) -> None:
        self._limit, self._patience = limit, patience
        self._pid = os.getpid()
        self._helpers = [child.pid for child in psutil.Process().children(recursive=True)] if has_children() else []
        self._builtins = dict(vars(builtins))
        self._streams = sys.stdout, sys.stderr
        self._output = os.fstat(1).st_ino
        self._folder = _folder()
        self._depth, self._locale = sys.getrecursionlimit(), locale.setlocale(locale.LC_ALL)
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD)
        self._handlers = [(number, signal.getsignal(number)) for number in numbers]
        self._statm = os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else None
        self._seen: set[int] = set()
        self._usual = self._holdings()
        self._at_first = self._usual[2]

    def leave_forks(self) -> None:
        """A process that a reward function forked, and that came back from it, ends here."""
        if os.getpid() != self._pid:
            os._exit(0)

    def after_call(self, function: int) -> str | None:
        """Undoes what the call of a function did; says what could not be undone."""
        end_descendants(self._helpers)
        self._put_back()
        if self._builtins != vars(builtins) and not self._builtins.items() <= vars(builtins).items():
            return "a call replaced built-in functions"
        if any(os.fstat(number).st_ino != self._output for number in (1, 2)):
            return "a call closed the standard output"
        held = self._holdings()
        if function not in self._seen:  # what a function loads when it is first called stays
            self._seen.add(function)
            self._usual = tuple(map(max, self._usual, held))
        files, threads, size = (now - usual for now, usual in zip(held, self._usual, strict=True))
        if files > FILES_LEFT * self._patience:
            return f"calls left {files} files open"
        if threads > THREADS_LEFT * self._patience:
            return f"calls left {threads} threads running"
        room = BYTES_LEFT * self._patience
        grown = size > room or held[2] - self._at_first > 2 * room
        if grown or 2 * held[2] > self._limit:
            kept = memory_held(self._pid)
            if grown or 2 * kept > self._limit:
                return f"it kept {kept / 2**30:.1f} GiB of memory after a call"
        return None

    def _put_back(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers:
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        sys.setrecursionlimit(self._depth)
        if self._folder is not None and _folder() != self._folder:
            os.chdir(self._folder)
        if locale.setlocale(locale.LC_ALL) != self._locale:
            locale.setlocale(locale.LC_ALL, self._locale)
        sys.stdout, sys.stderr = self._streams
        sys.stdout.flush()
        sys.stderr.flush()

    def _holdings(self) -> tuple[int, ...]:
        """Open files (by the lowest free number), threads, bytes in memory."""
        free = os.dup(0)
        os.close(free)
        pages = int(os.pread(self._statm, 200, 0).split()[1]) if self._statm is not None else 0
        return free, threading.active_count(), pages * os.sysconf("SC_PAGE_SIZE")


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def serve(channel: socket.socket, functions: Sequence[RewardFunction], limit: int, patience: int) -> None:
    """A worker's life: returns when the trainer closes the channel, or when the worker must be replaced."""
    for function in functions:
        with contextlib.suppress(BaseException):  # a failing import is reported by the call that needs it
            function.load()
    health = Health(limit, patience)
    _send(channel, 0, "ready", None)
    while (header := receive(channel, REQUEST.size)) is not None:
        number, index, size = REQUEST.unpack(header)
        payload = receive(channel, size)
        if payload is None:
            return
        outcome, worn = call_function(functions[index], payload, health)
        try:
            worn = health.after_call(index) or worn
        except BaseException as error:  # what a call has done to this process may raise anything
            worn = f"a call left it unusable ({type(error).__name__})"
        _send(channel, number, outcome, worn)
        if worn is not None:
            return


def receive(channel: socket.socket, size: int) -> bytes | None:
    """So many bytes; None where the other end is closed."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = channel.recv_into(view[done:])
        if not count:
            return None
        done += count
    return bytes(data)


def _send(channel: socket.socket, number: int, outcome: Outcome, worn: str | None) -> None:
    data = json.dumps([number, outcome, worn]).encode()
    channel.sendall(REPLY.pack(len(data)) + data)


def call_function(function: RewardFunction, payload: bytes, health: Health) -> tuple[Outcome, str | None]:
    """The outcome of a call, and why no other one should be made in this process, if so."""
    loaded: Any = None
    try:
        arguments = pickle.loads(payload)
        count = len(arguments["completions"])
        loaded = function.load()
        given = _accepted(loaded, arguments)
        if "environments" in given:
            given["environments"] = [
                pickle.loads(one) if isinstance(one, Pickled) else one for one in given["environments"]
            ]
        scores = returned(loaded, given)
        health.leave_forks()
        if isinstance(scores, str | Mapping) or not hasattr(scores, "__iter__"):
            return f"it returned {type(scores).__name__}, not a list of numbers", None
        if not hasattr(scores, "__len__"):
            scores = list(islice(scores, count + 1))
        if len(scores) != count:
            return f"it returned {len(scores)} scores for {count} completions", None
        return [_checked(score) for score in scores], None
    except BaseException as error:  # SystemExit and KeyboardInterrupt included
        health.leave_forks()
        worn = f"a call ended in {type(error).__name__}" if _unusual(error) else None
        return described(error) + _place(error, loaded), worn


def _unusual(error: BaseException) -> bool:
    """Whether the process, more than the call, may be to blame."""
    if isinstance(error, OSError):
        return error.errno in EXHAUSTED
    exhausted = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    return exhausted or isinstance(error, MemoryError | RecursionError) or not isinstance(error, Exception)


def described(error: BaseException) -> str:
    """Type and text, whatever prints it."""
    try:
        text = str(error)
    except Exception as unprintable:
        text = f"<{type(unprintable).__name__} while printing it>"
    return f"{type(error).__name__}: {text[:800]}"


def _place(error: BaseException, function: Any) -> str:
    """The last line of the user's own file that ran: where a library raised says less."""
    try:
        frames = traceback.extract_tb(error.__traceback__)
        while isinstance(function, functools.partial):
            function = function.func
        own = getattr(getattr(inspect.unwrap(function), "__code__", None), "co_filename", None)
        foreign = [frame for frame in frames if frame.filename != __file__]
        place = next((frame for frame in reversed(foreign) if frame.filename == own), foreign[-1])
        return f" ({os.path.basename(place.filename)}:{place.lineno}: {(place.line or '')[:160]})"
    except Exception:  # none of its lines ran, or out of memory
        return ""


def returned(function: Any, arguments: Mapping[str, Any]) -> Any:
    """What a function returns; of an ``async`` one, what it does in the end."""

    async def awaited() -> Any:
        return await result

    result = function(**arguments)
    return asyncio.run(awaited()) if inspect.isawaitable(result) else result


def _accepted(function: Any, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """All arguments for a function with ``**kwargs``, else the ones it names; ``ONLY_NAMED`` only where they are."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return named
    return {name: values for name, values in arguments.items() if name not in ONLY_NAMED} | named


def _checked(score: Any) -> float | str | None:
    if hasattr(score, "item"):  # NumPy and torch scalars
        score = score.item()
    if score is None:
        return None
    if not isinstance(score, int | float):
        return f"it returned {type(score).__name__} {str(score)[:40]!r} as a score"
    try:
        return float(score) if math.isfinite(score) else f"it returned {score} as a score"
    except OverflowError:
        return "it returned a number too large for a float as a score"
