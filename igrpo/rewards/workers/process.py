"""A reward worker as the trainer sees it: a call goes out and an outcome comes back, in time and within a memory limit.

One thread of the trainer owns each of these, and starts its keeper (``keeper.py``): the kernel ends a keeper
with the thread that started it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import re
import select
import socket
import struct
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import psutil

from igrpo.rewards.functions import RewardFunction
from igrpo.rewards.workers.keeper import SETUP, STATUS
from igrpo.rewards.workers.worker import REPLY, REQUEST, memory_held

GONE_SECONDS = 10.0
"""How long a keeper may take to end what a worker has started."""
WATCH_SECONDS = 0.2
"""Between two looks at the memory of a call."""
CALLS = 10_000
"""A worker is replaced after so many calls, whatever it looks like: what nobody measures never adds up. A new one takes
as long as a few hundred of the quickest calls."""
MOST_PATIENCE = 8
PRINTED = 2000
"""Bytes of one call's output that are shown."""
LONGEST_REPLY = 2**26
WITHHELD = re.compile(
    r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|TOKEN$|KEYS?$|(?:^|_)(?:KEY|TOKEN|PASS|PAT)(?:_|$)", re.IGNORECASE
)
"""Names of environment variables that hold keys."""
THREADS = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
MARK = "IGRPO_REWARD_KEEPER"
"""Variable that tells what belongs to a keeper, for the case that the keeper itself is killed."""
START = "import sys; sys.path[:] = sys.argv[3:]; from igrpo.rewards.workers.keeper import main; main()"


class Lost(Exception):
    """The worker was gone before it began with the call, or could not be started."""


class Died(Lost):
    """It ended while it ran the call: one of its completions did that, or somebody killed it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The whole call failed."""

    text: str
    fresh: bool = True
    """Whether it was the worker's first call: if not, an earlier one may be guilty."""


Result = list[float | str | None] | Failure | TimeoutError | Lost


def worker_environment(named: Collection[str], secrets: Collection[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Environment of the workers, and the names that are kept from them.

    Args:
        named: variables that they get though they look like keys.
        secrets: variables that they do not get, whatever they look like, unless they are named.
    """
    kept = [name for name in os.environ if name not in named and (name in secrets or WITHHELD.search(name))]
    return {name: value for name, value in os.environ.items() if name not in kept} | THREADS, sorted(kept)


class RewardProcess:
    """A keeper and its present worker. Not for use from several threads, but for ``stop``.

    Args:
        timeout: seconds of one call.
        start_timeout: seconds that the imports of the functions may take.
        limit: bytes of memory that a worker and what it starts may take.
        environment: of the workers.
        tell: called with what a function printed, and with why a worker is replaced.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        timeout: float,
        start_timeout: float,
        limit: int,
        environment: Mapping[str, str],
        tell: Callable[[str, str], None],
    ) -> None:
        self.functions, self.limit = functions, limit
        self.timeout, self.start_timeout = timeout, start_timeout
        self.environment, self.tell = environment, tell
        self.calls = 0
        """Of the present worker."""
        self.failed = 0
        """Calls that failed, one after the other."""
        self._patience, self._doubt = 1, 10
        self._number, self._stopped = 0, False
        self._keeper: subprocess.Popen[bytes] | None = None
        self._mark = ""
        self._control: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._output = -1
        self._poll = select.poll()
        self._printed, self._unread = bytearray(), 0

    def start(self) -> None:
        """A worker is there afterwards, with its functions imported.

        Raises:
            Lost: why there is none.
        """
        if self._channel is not None:
            return
        try:
            self._start_keeper()
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._control, [bytes([self._patience])], [theirs.fileno()])  # type: ignore[list-item]
            self._channel, self.calls = ours, 0
            self._poll.register(ours, select.POLLIN)
            self._reply(0, time.monotonic() + self.start_timeout)
            self._show("start")
        except (OSError, TimeoutError, _TooMuch, Died) as error:  # or a module that ends its process
            code = self._end_worker(kill=not isinstance(error, Died))
            self._show("start")
            reason = f"{error} (exit code {code})" if isinstance(error, Died) else error
            raise Lost(f"no reward worker starts: {reason}") from None

    def call(self, function: int, payload: bytes, alone: bool = False) -> Result:
        """The outcome of one call.

        Args:
            alone: it must be the first call of a worker.
        """
        if self._channel is not None and self._hung_up():
            self._replace("it died between two calls", kill=False)
        if (alone and self.calls) or self.calls >= CALLS:
            self._end_worker()
        try:
            self.start()
        except Lost as error:
            return error
        self.calls += 1
        outcome = self._outcome(function, payload, fresh=self.calls == 1)
        self._show(self.functions[function].name)
        self.failed = self.failed + 1 if isinstance(outcome, Failure) else 0
        if self.failed >= self._doubt:  # a new one may do better
            self._end_worker()
            self._doubt *= 2
        elif not self.failed:
            self._doubt = 10
        return outcome

    def stop(self) -> None:
        """From another thread: the call that runs is lost, and no other one begins."""
        self._stopped = True
        self._interrupt()

    def _interrupt(self) -> None:
        keeper = self._keeper  # its own thread may take it away
        if keeper is not None and keeper.poll() is None:
            keeper.terminate()

    def close(self) -> None:
        """Nothing is left of it afterwards."""
        self._end_worker()
        if self._keeper is not None:
            self._close_keeper()

    def _outcome(self, function: int, payload: bytes, fresh: bool) -> Result:
        self._number += 1
        deadline = time.monotonic() + self.timeout
        try:
            self._channel.settimeout(self.timeout)  # type: ignore[union-attr]
            request = REQUEST.pack(self._number, function, len(payload))
            self._channel.sendall(request + payload)  # type: ignore[union-attr]
            outcome, worn = self._reply(self._number, deadline)
        except _TooMuch as error:
            self._replace(str(error))
            return Failure(f"killed: {error} (reward_memory_gib)", fresh)
        except TimeoutError:
            taken = self._request_was_read()
            self._replace(f"a call of {self.functions[function].name} did not end within {self.timeout:g} s")
            return TimeoutError(f"killed after {self.timeout:g} s") if taken else Lost("its worker did not take it")
        except (OSError, Died):
            code = self._replace("it died in a call", kill=False)
            return Died(f"its process died (exit code {code})")
        if worn is not None:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
            self._replace(worn, kill=False)
        return Failure(outcome, fresh) if isinstance(outcome, str) else outcome

    def _reply(self, number: int, deadline: float) -> tuple[list[float | str | None] | str, str | None]:
        """Raises:
        TimeoutError, _TooMuch, Died: instead of a reply.
        """
        data, looked = bytearray(), time.monotonic()
        while True:
            if self._stopped:
                raise Died("it was stopped")
            left = deadline - time.monotonic()
            ready = dict(self._poll.poll(1000 * min(max(left, 0.0), WATCH_SECONDS)))
            if self._output in ready:
                self._drain()
            if self._channel.fileno() in ready:  # type: ignore[union-attr]
                part = self._channel.recv(2**16)  # type: ignore[union-attr]
                if not part:
                    raise Died("its process ended")
                data += part
                size = REPLY.unpack_from(data)[0] if len(data) >= REPLY.size else 0
                if size > LONGEST_REPLY:
                    raise Died("it sent what is no reply")
                if size and len(data) >= REPLY.size + size:
                    break
            if left <= 0:  # only now: a reply may have come in time, and this thread late
                raise TimeoutError
            if time.monotonic() - looked > WATCH_SECONDS:
                self._look_at_memory()
                looked = time.monotonic()
        try:
            answered, outcome, worn = json.loads(data[REPLY.size :])
        except (ValueError, TypeError, RecursionError):
            answered, outcome, worn = None, None, None
        scores = outcome if isinstance(outcome, list) else []
        if (
            answered != number
            or not isinstance(outcome, str | list)
            or not isinstance(worn, str | None)
            or not all(isinstance(score, float | str | None) for score in scores)
        ):
            raise Died("it sent what is no reply")
        return outcome, worn

    def _look_at_memory(self) -> None:
        """Raises:
        _TooMuch: the worker and what it started hold more than the limit.
        """
        held = {}
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._keeper.pid).children(recursive=True):  # type: ignore[union-attr]
                with contextlib.suppress(psutil.Error):
                    held[process.pid] = process.memory_info().rss
        if sum(held.values()) > self.limit:  # the quick sum counts shared pages more than once
            total = sum(map(memory_held, held))
            if total > self.limit:
                raise _TooMuch(f"it held {total / 2**30:.1f} GiB of memory")

    def _request_was_read(self) -> bool:
        """Whether the worker has taken the whole call: one that is stopped has not."""
        try:
            unread = fcntl.ioctl(self._channel, termios.TIOCOUTQ, bytes(4))  # type: ignore[arg-type]
        except OSError:
            return True
        return struct.unpack("i", unread)[0] == 0

    def _hung_up(self) -> bool:
        """Whether the worker is gone, or speaks without being asked."""
        return any(number == self._channel.fileno() for number, _ in self._poll.poll(0))  # type: ignore[union-attr]

    def _replace(self, reason: str, kill: bool = True) -> int | None:
        code = self._end_worker(kill)
        self.tell("replaced", reason)
        return code

    def _end_worker(self, kill: bool = True) -> int | None:
        """Its exit code once it and all it started is gone; None where its keeper was gone first.

        Args:
            kill: at once; a worker that ends by itself is given a moment, so that its exit code can be told.
        """
        if self._channel is None:
            return None
        self._poll.unregister(self._channel)
        self._channel.close()
        self._channel, self.calls = None, 0
        if kill:
            self._interrupt()
        data, asked, give_up = b"", time.monotonic() if kill else 0.0, time.monotonic() + GONE_SECONDS
        self._control.settimeout(0.2)  # type: ignore[union-attr]
        while len(data) < STATUS.size and time.monotonic() < give_up:
            try:
                part = self._control.recv(STATUS.size - len(data))  # type: ignore[union-attr]
            except TimeoutError:
                part = None
            except OSError:
                part = b""
            if part == b"":
                break
            data += part or b""
            if part is None and time.monotonic() - asked > 1.0:  # again: a signal may come before its worker is known
                asked = time.monotonic()
                self._interrupt()
            self._drain()
        if len(data) == STATUS.size:
            return STATUS.unpack(data)[0]
        self._close_keeper(in_order=False)
        return None

    def _start_keeper(self) -> None:
        if self._keeper is not None and self._keeper.poll() is None:
            return
        if self._keeper is not None:
            self._close_keeper(in_order=False)
        self._control, theirs = socket.socketpair()
        self._output, written = os.pipe()
        os.set_blocking(self._output, False)
        self._mark = uuid.uuid4().hex
        command = [sys.executable, "-P", "-c", START, str(theirs.fileno()), str(os.getpid())]
        try:
            self._keeper = subprocess.Popen(
                [*command, *(path or os.getcwd() for path in sys.path)],
                stdin=subprocess.DEVNULL, stdout=written, stderr=written, pass_fds=[theirs.fileno()],
                env={**self.environment, MARK: self._mark},
            )  # fmt: skip
        except OSError:  # no room for another process
            self._control.close()
            os.close(self._output)
            self._output = -1
            raise
        finally:
            theirs.close()
            os.close(written)
        self._poll.register(self._output, select.POLLIN)
        setup = pickle.dumps((tuple(self.functions), self.limit, sys.argv))
        self._control.sendall(SETUP.pack(len(setup)) + setup)

    def _close_keeper(self, in_order: bool = True) -> None:
        self._control.close()  # type: ignore[union-attr]
        keeper, self._keeper = self._keeper, None
        try:
            keeper.wait(GONE_SECONDS if in_order else 1.0)  # type: ignore[union-attr]
        except subprocess.TimeoutExpired:
            keeper.kill()  # type: ignore[union-attr]
            keeper.wait()  # type: ignore[union-attr]
            in_order = False
        if not in_order:
            kill_marked(self._mark)
        self._drain()
        if self._output >= 0:
            self._poll.unregister(self._output)
            os.close(self._output)
            self._output = -1

    def _drain(self) -> None:
        """Reads what the worker has printed; keeps its beginning."""
        for _ in range(64 if self._output >= 0 else 0):
            try:
                part = os.read(self._output, 2**16)
            except BlockingIOError:
                return
            if not part:
                return
            room = PRINTED - len(self._printed)
            self._printed += part[: max(room, 0)]
            self._unread += max(len(part) - max(room, 0), 0)

    def _show(self, name: str) -> None:
        self._drain()
        if not self._printed:
            return
        text = self._printed.decode(errors="backslashreplace").rstrip()
        if self._unread:
            text += f"\n… and {self._unread} bytes more"
        self._printed, self._unread = bytearray(), 0
        self.tell(name, text)


def kill_marked(mark: str) -> None:
    """What a keeper has not seen to the end, as far as it kept its environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                process.kill()


class _TooMuch(Exception):
    """More memory than is allowed."""
