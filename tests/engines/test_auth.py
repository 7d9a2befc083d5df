"""The control plane without a server: who is let in, and which addresses are refused."""

from __future__ import annotations

import asyncio
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import psutil
import pytest

from igrpo import doctor, serve, train
from igrpo.engines.servers.auth import SECRET_VARIABLE, RequireSecret, check_bind, check_url, secret_from_environment
from igrpo.engines.servers.client import Client, ServerError
from igrpo.settings import ConfigError

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


def test_with_the_secret_everything_passes_and_carries_the_instance_id(app):
    start, body = answer(app, [GOOD])
    assert start["status"] == 200 and body["body"] == b"in"
    (instance,) = [value for name, value in start["headers"] if name == b"x-igrpo-instance"]
    assert answer(app, [GOOD])[0]["headers"] == start["headers"]
    other = [value for _, value in answer(RequireSecret(inner), [GOOD])[0]["headers"]]
    assert other != [instance]  # a server started anew is told apart
    assert answer(app, [GOOD], kind="websocket") == [{"type": "websocket.accept"}]


@pytest.mark.parametrize("secret", ["", "short"])
def test_a_server_without_a_proper_secret_does_not_start(monkeypatch, secret):
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    with pytest.raises(ConfigError, match=SECRET_VARIABLE):
        RequireSecret(inner)


ODD_SECRETS = [
    "marker-of-a-secret\n-in-two-lines",
    "marker-of-a-secret-\u00e4\u00f6",
    "marker-of-a-secret-\udcff",  # bytes that are no text
    "marker-of-a-secret-\x01\x7f",
    "marker-of-a\tsecret",
    "\ufeffmarker-of-a-secret",
    "marker",
]


@pytest.mark.parametrize("secret", ODD_SECRETS)
def test_a_secret_that_no_header_can_carry_is_refused_and_not_shown(monkeypatch, capsys, secret):
    """At once and on every side: trainer, server, doctor."""
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    monkeypatch.setattr("os.environ", dict(os.environ))
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--vllm_mode", "server", "--use_cpu", "true"]
    urls = ["--vllm_server_urls", "[http://127.0.0.1:1]"]
    assert train.main([*words, *urls]) == 2 and serve.main(words) == 2 and doctor.main([*words, *urls]) == 1
    with pytest.raises(ConfigError) as error:
        RequireSecret(inner)
    output = capsys.readouterr()
    for text in (output.out, output.err, str(error.value)):
        assert SECRET_VARIABLE in text and "marker" not in text and "Traceback" not in text
    assert len(output.err.splitlines()) == 2


def test_line_ends_around_a_secret_are_not_part_of_it(monkeypatch):
    for around in ("{}\n", "{}\r\n", " {} ", "\n{}"):
        monkeypatch.setenv(SECRET_VARIABLE, around.format(SECRET))
        assert secret_from_environment() == SECRET
        start, _ = answer(RequireSecret(inner), [GOOD])
        assert start["status"] == 200


@pytest.mark.parametrize(
    "change",
    [
        {"vllm_server_base_url": "http://someone:marker@127.0.0.1:8000"},
        {"vllm_server_urls": "[http://127.0.0.1:1, http://marker@127.0.0.1:8000]"},
        {"vllm_server_urls": "http://someone:marker@127.0.0.1:8000"},
        {"vllm_server_urls": "['http://127.0.0.1:8000/?api_key=marker']"},
        {"judge_base_url": "https://someone:marker@127.0.0.1/v1"},
        {"judge_base_url": "https://127.0.0.1/v1?access_token=marker"},
        {"judge_api_key_env": "sk-marker"},
    ],
)
def test_settings_hold_no_key(capsys, change):
    """They are written into config.yaml, to trackers and into messages."""
    words = [word for key, value in change.items() for word in (f"--{key}", value)]
    assert train.main(["--model_name_or_path", "m", "--dataset_name", "d", "--vllm_mode", "server", *words]) == 2
    message = capsys.readouterr().err
    assert next(iter(change)) in message and "marker" not in message and len(message.splitlines()) == 1


def test_an_answer_that_repeats_the_secret_is_not_shown():
    """As a proxy's page of an error, which shows the headers it got."""

    class Repeats(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = str(self.headers).encode()
            self.send_response(502 if self.path == "/broken" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_): ...

    async def ask() -> list[str]:
        client, said = Client(f"http://127.0.0.1:{proxy.server_address[1]}", SECRET), []
        for path in ("/broken", "/no-json"):
            with pytest.raises(ServerError) as error:
                await client.call("GET", path, 10.0)
            said.append("".join(traceback.format_exception(error.value)))
        await client.close()
        return said

    with http.server.HTTPServer(("127.0.0.1", 0), Repeats) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        said = asyncio.run(ask())
        proxy.shutdown()
    assert all("Bearer ***" in text and SECRET not in text for text in said)


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
    for url in ("http://8.8.8.8:8000", "ftp://10.0.0.2", "10.0.0.2:8000", "http://10.0.0.2:8000/v1", "http://",
                "http://10.0.0.2:port", "http://10.0.0.2:99999", "http://[::1:8000"):  # fmt: skip
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
        "p = subprocess.Popen([sys.executable, '-m', 'igrpo.engines.servers.supervise',"
        f" str(os.getpid()), *{SLEEPERS!r}]);"
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
