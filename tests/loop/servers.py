"""What tests ask a running server beside the engine: its processes, and what it works on."""

from __future__ import annotations

import re
import time

import httpx
import psutil


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


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
