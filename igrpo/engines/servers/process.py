"""A server that the trainer starts on its own machine, and that ends with it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from igrpo.engines.servers.supervise import GRACE_SECONDS

TAIL_LINES = 15


class ServerProcess:
    """One server behind its supervisor.

    Args:
        command: of the server, without secrets.
        environment: what it needs besides ours; holds the secret.
        log: its output, readable by this user alone.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.command, self.environment, self.log = command, environment, log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        supervised = [sys.executable, "-m", "igrpo.engines.servers.supervise", str(os.getpid()), *self.command]
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._process = subprocess.Popen(
                supervised,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,  # Ctrl-C in the terminal asks the trainer, which still needs its servers
            )
        finally:
            os.close(descriptor)

    @property
    def pid(self) -> int | None:
        """Of the supervisor."""
        return self._process.pid if self._process else None

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ends all its processes. A server that hangs lets the supervisor's grace pass and is then killed."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(GRACE_SECONDS + 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def tail(self) -> str:
        """The last lines it wrote."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-TAIL_LINES:])


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]


def address_towards(url: str) -> str:
    """This machine's address on the network where the server is."""
    parts = urlsplit(url)
    family, _, _, _, target = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        return probe.getsockname()[0]
