"""The control plane without a server: who is let in, and which addresses are refused."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from igrpo.config import ConfigError
from igrpo.engines.control import SECRET_VARIABLE, RequireSecret, check_bind, check_url

SECRET = "0123456789abcdef-of-this-run"
ROOT = Path(__file__).resolve().parents[2]


async def inner(scope, receive, send):
    """An application that lets everybody in and tells what it was asked."""
    if scope["type"] == "websocket":
        return await send({"type": "websocket.accept"})
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def answer(app, headers=(), kind="http", path="/collective_rpc", method="POST") -> list[dict]:
    sent: list[dict] = []

    async def receive():
        return {"type": f"{kind}.connect" if kind == "websocket" else "http.request"}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "method": method, "headers": list(headers)}
    asyncio.run(app(scope, receive, send))
    return sent


@pytest.fixture
def app(monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    return RequireSecret(inner)


GOOD = (b"authorization", b"Bearer " + SECRET.encode())


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", SECRET.encode())],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer " + SECRET.encode()[:-1])],
        [(b"authorization", b"Bearer " + SECRET.encode() + b" ")],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"x-api-key", SECRET.encode())],
        [GOOD, (b"authorization", b"Bearer other")],  # two of them: a proxy and we might read different ones
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_without_the_whole_secret_nothing_is_answered(app, headers, method):
    start, body = answer(app, headers, method=method)
    assert start["status"] == 401 and SECRET.encode() not in body["body"]
    assert answer(app, headers, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_with_the_secret_everything_passes_and_carries_the_boot_number(app):
    start, body = answer(app, [GOOD])
    assert start["status"] == 200 and body["body"] == b"in"
    (boot,) = [value for name, value in start["headers"] if name == b"x-igrpo-boot"]
    assert answer(app, [GOOD])[0]["headers"] == start["headers"]
    other = [value for _, value in answer(RequireSecret(inner), [GOOD])[0]["headers"]]
    assert other != [boot]  # a server started anew is told apart
    assert answer(app, [GOOD], kind="websocket") == [{"type": "websocket.accept"}]


@pytest.mark.parametrize("secret", ["", "short"])
def test_a_server_without_a_proper_secret_does_not_start(monkeypatch, secret):
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    with pytest.raises(ConfigError, match=SECRET_VARIABLE):
        RequireSecret(inner)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "8.8.8.8", "2001:4860:4860::8888", "100.64.0.1", "::ffff:8.8.8.8"])
def test_public_addresses_are_refused_unless_asked_for(host):
    with pytest.raises(ConfigError, match="vllm_server_host"):
        check_bind(host, allow_public=False)
    check_bind(host, allow_public=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "10.1.2.3", "172.16.0.9", "192.168.7.7", "fd00::5"])
def test_private_addresses_are_fine(host):
    check_bind(host, allow_public=False)


def test_the_secret_does_not_cross_a_public_network_in_the_clear():
    check_url("http://10.0.0.2:8000", allow_public=False)
    check_url("http://[fd00::2]:8000/", allow_public=False)
    check_url("https://8.8.8.8:8000", allow_public=False)
    check_url("http://8.8.8.8:8000", allow_public=True)
    for url in ("http://8.8.8.8:8000", "ftp://10.0.0.2", "10.0.0.2:8000", "http://10.0.0.2:8000/v1", "http://"):
        with pytest.raises(ConfigError, match="vllm_server_urls"):
            check_url(url, allow_public=False)


def descendants(pid: int, count: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 30
    while len(found := psutil.Process(pid).children(recursive=True)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


SLEEPERS = ["sh", "-c", "trap '' TERM; sleep 600 & sleep 600"]
"""Like a server: a front end with a process behind it, here one that does not listen to SIGTERM."""


@pytest.mark.parametrize("how", ["parent", "asked", "front end", "supervisor"])
def test_all_of_a_server_ends_with_whoever_should_hold_it(how):
    # The parent is a process of its own, killed with -9 like a trainer that runs out of memory.
    code = (
        "import os, subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-m', 'igrpo.engines.supervise', str(os.getpid()), *{SLEEPERS!r}]);"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        everyone = descendants(parent.pid, count=4)
        supervisor, front = everyone[0], everyone[1]
        assert front.name() == "sh"
        victim, number = {
            "parent": (parent.pid, signal.SIGKILL),
            "asked": (supervisor.pid, signal.SIGTERM),
            "front end": (front.pid, signal.SIGKILL),
            "supervisor": (supervisor.pid, signal.SIGKILL),
        }[how]
        os.kill(victim, number)
        gone = [front] if how == "supervisor" else everyone
        deadline = time.monotonic() + 15
        while not all(ended(process) for process in gone):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
        for process in everyone:
            if process.is_running():
                process.kill()
