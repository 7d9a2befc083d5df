"""What keeps a server on another node up: real processes that end, hang while they live, or end again and again."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from igrpo.engines.servers.process import free_port
from igrpo.serve import MAX_RESTARTS
from tests.engines.test_auth import ended
from tests.support.servers import wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import http.server, os, subprocess, sys, threading, time
how, port = sys.argv[1], int(sys.argv[2])
engine = subprocess.Popen(["sleep", "600"])  # behind the front end, as vLLM's is
asked = 0
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        if asked == 1:
            print("asked", flush=True)
        if asked == 2 and how == "ends":
            os._exit(7)
        if how == "is slow":
            time.sleep(0.8)
        self.send_response(503 if asked > 1 and how == "says that it is dead" else 200)
        self.send_header("x-igrpo-instance", "1")
        self.end_headers()
        if asked == 2 and how == "closes its port":
            threading.Thread(target=server.shutdown).start()
    def log_message(self, *_): ...
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answers)
if how == "never comes up":
    sys.exit("no such model")
print("up", flush=True)
server.serve_forever()
server.server_close()
time.sleep(600)  # as vLLM, which waits for a request that nobody answers any more
"""
KEEPER = """
import sys
from igrpo import serve
from igrpo.engines.servers import supervise
supervise.PROBE_SECONDS, supervise.PATIENCE_SECONDS = 0.1, 1.0
supervise.SILENCE_SECONDS = 5.0
how, port = sys.argv[1:]
sys.exit(serve.keep_up([sys.executable, "-c", sys.stdin.read(), how, port], "127.0.0.1", int(port), "secret"))
"""


@pytest.fixture
def keep(tmp_path):
    started: list[tuple[subprocess.Popen, Path]] = []

    def start(how: str, port: int = 0) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"{how}.log"
        command = [sys.executable, "-c", KEEPER, how, str(port or free_port("127.0.0.1"))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("w") as output:
            keeper = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, env=environment
            )
        keeper.stdin.write(SERVER)
        keeper.stdin.close()
        started.append((keeper, log))
        return started[-1]

    yield start
    for keeper, _ in started:
        keeper.terminate()
        keeper.wait(20)


def test_a_server_that_hangs_is_killed_whole_and_started_again(keep):
    """Its process lives, so whoever watched that alone would wait for ever."""
    kinds = {"closes its port": "its port was closed", "says that it is dead": "it answered 503", "stops": "no answer",
             "ends": "ended with code 7"}  # fmt: skip
    keepers = {how: keep(how) for how in kinds}
    slow, _ = keep("is slow")
    wait_until(lambda: "asked" in keepers["stops"][1].read_text() and psutil.Process(slow.pid).children(), 60)
    (front,) = psutil.Process(keepers["stops"][0].pid).children()
    engine, patient = front.children(), psutil.Process(slow.pid).children()
    time.sleep(0.5)
    os.kill(front.pid, signal.SIGSTOP)
    for how, (_, log) in keepers.items():
        wait_until(lambda log=log: log.read_text().count("up\n") >= 2, 60)
        assert f"{kinds[how]}" in log.read_text() and "starting it again" in log.read_text()
    assert ended(front) and all(map(ended, engine))
    assert patient and not any(map(ended, patient))  # one that is slow is not one that hangs


def test_what_answers_on_the_port_of_a_server_that_did_not_start_is_not_taken_for_it(keep):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        keeper, log = keep("stops", other.server_address[1])
        assert keeper.wait(60) == 1
        assert "Address already in use" in log.read_text()
        assert "the server ended with code 1 before it came up" in log.read_text()
        other.shutdown()


def test_one_that_ends_again_and_again_or_never_came_up_is_given_up_with_a_sentence(keep):
    again, log = keep("ends")
    never, never_log = keep("never comes up")
    assert never.wait(60) == 1
    assert "no such model\nthe server ended with code 1 before it came up" in never_log.read_text()
    assert again.wait(60) == 7
    said = log.read_text()
    assert said.count("up\n") == MAX_RESTARTS + 1
    assert said.endswith("for the 6th time in 30 minutes; starting it again would not help\n")
