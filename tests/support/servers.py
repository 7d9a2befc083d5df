"""What tests ask a running server beside the engine, a server as on another node, and a network that breaks."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil

from igrpo.config.train_config import TrainConfig
from igrpo.engines import Sampling
from igrpo.engines.servers.auth import SECRET_VARIABLE
from igrpo.engines.servers.process import free_port

ROOT = Path(__file__).resolve().parents[2]
LONG = Sampling(temperature=0.7, max_tokens=180)
REQUEST_SECONDS = 10.0


def config(path: str, **settings) -> TrainConfig:
    return TrainConfig(
        model_name_or_path=path, dataset_name="d", vllm_mode="server", use_cpu=True, bf16=False,
        vllm_request_timeout=REQUEST_SECONDS, **settings,
    )  # fmt: skip


def processes(server) -> tuple[psutil.Process, psutil.Process]:
    """Front end and engine of a server that runs."""
    (front,) = psutil.Process(server.process.pid).children()
    (core,) = [p for p in front.children() if "EngineCore" in p.name() or "EngineCore" in "".join(p.cmdline())]
    return front, core


def http_of(url: str, secret: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=60)


def own_http(server) -> httpx.Client:
    """A connection beside the engine's own."""
    return http_of(server.client.url, server.client.http.headers["Authorization"].removeprefix("Bearer "))


def running(http: httpx.Client) -> float:
    """Sequences that the server itself says it works on; brought up to date at each of its steps."""
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", http.get("/metrics").text, re.M)
    assert len(found) == 2
    return sum(map(float, found))


def is_idle(http: httpx.Client) -> bool:
    """Whether the server has nothing left but the one token it is asked for here."""
    body = {"model": "policy", "prompt": [5, 6, 7], "max_tokens": 1, "return_token_ids": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    return running(http) <= 1


def wait_until(condition, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Served:
    """A generation node of its own: ``recipes/nodes/generate.sh`` with one server. Nobody starts it again by itself."""

    def __init__(self, recipe: Path, log: Path):
        self.recipe, self.log, self.secret = recipe, log, "a-secret-shared-by-two-nodes"
        self.port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            **os.environ, SECRET_VARIABLE: f"{self.secret}\n", "HF_HUB_OFFLINE": "1", "GPUS_PER_NODE": "1",
            "FIRST_PORT": str(self.port), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def start(self) -> None:
        command = ["recipes/nodes/generate.sh", str(self.recipe), "127.0.0.1"]
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def everyone(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            return http_of(self.url, self.secret).get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        left = self.everyone()
        self.process.terminate()
        self.process.wait(20)
        psutil.wait_procs(left, 20)


class Network(socketserver.ThreadingTCPServer):
    """A way to a server that drops connections: ``broken`` are the paths whose requests never arrive, ``deaf`` those
    that arrive and whose answers do not. Each drops ``times`` requests."""

    daemon_threads = True

    def __init__(self, url: str):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.broken: dict[str, float] = {}
        self.deaf: dict[str, float] = {}
        self.dropped: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def drops(self, paths: dict[str, float], request: bytes) -> bool:
        words = request[:200].split(b" ")
        path = words[1].partition(b"?")[0].decode() if words[0] in (b"GET", b"POST") else ""
        if paths.get(path, 0) <= 0:
            return False
        paths[path] -= 1
        self.dropped.append(path)
        return True


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with socket.create_connection(self.server.target) as onward:
            self.deaf = False
            threading.Thread(target=self.answers, args=(onward,), daemon=True).start()
            while data := self.request.recv(1 << 20):
                if self.server.drops(self.server.broken, data):
                    return
                self.deaf = self.server.drops(self.server.deaf, data) or self.deaf
                onward.sendall(data)

    def answers(self, onward: socket.socket) -> None:
        try:
            while (data := onward.recv(1 << 20)) and not self.deaf:
                self.request.sendall(data)
        except OSError:  # the other direction ended
            return
        finally:
            with contextlib.suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)
