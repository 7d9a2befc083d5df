"""What a process that does not feed the servers sees of them: here beside one that says which weights it
holds."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean
from types import SimpleNamespace

import pytest

from igrpo.engines.servers import engine as servers_engine
from igrpo.engines.servers.auth import INSTANCE_HEADER
from igrpo.engines.servers.client import NEEDED_PATHS, Client
from igrpo.engines.servers.engine import ServerEngine
from igrpo.engines.servers.launch import SERVED_NAME
from igrpo.engines.servers.server import Server
from igrpo.engines.sync import WeightSync
from tests.support.servers import REQUEST_SECONDS, config, wait_until


class Told(ThreadingHTTPServer):
    """A server whose weights the first process has in hand: ``version`` is what it says of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.version, self.instance, self.asked = "0", "first", 0
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked += self.path == "/weight_info"
        body = {
            "/openapi.json": {"paths": {path: {} for path in NEEDED_PATHS}},
            "/v1/models": {"data": [{"id": SERVED_NAME, "max_model_len": 256}]},
            "/weight_info": {"weight_version": self.server.version},
        }.get(self.path, {})
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header(INSTANCE_HEADER.decode(), self.server.instance)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def second(monkeypatch):
    """The engine of a second process, and its only server."""
    told = Told()
    servers = [Server(Client(told.url, "secret", "owner"), None)]
    monkeypatch.setattr(servers_engine, "start_servers", lambda *_: (servers, False))
    engine = ServerEngine("/no/model", config("/no/model"), 256, [1], 0, masks=False)
    yield engine, told
    engine.close()
    told.shutdown()


def test_a_server_that_comes_back_as_the_next_push_begins_is_waited_for_with_that_one(second):
    """The first process brings it back with the newer weights at once, so it never holds those before."""
    engine, told = second
    told.version = "1"
    engine.push_weights(lambda: iter(()), version=1)
    told.version, told.instance = "0", "second"
    asyncio.run_coroutine_threadsafe(_broken(engine.servers[0]), engine._loop).result()
    asked = told.asked
    wait_until(lambda: told.asked > asked, seconds=10)  # its keeper waits for version 1
    with ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(engine.push_weights, lambda: iter(()), 2)
        wait_until(lambda: engine.version == 2, seconds=10)
        told.version = "2"
        assert pushed.result(REQUEST_SECONDS / 2)["sync/servers"] == 1.0
    assert engine.servers[0].holds(2) and engine.servers[0].failures == 1


async def _broken(server: Server) -> None:
    server.break_off("it was started anew, with other weights")


class _Process:
    """Learner and engine of one of two processes; only the first one's push brings ``weights``, and takes its time."""

    version = 0

    def __init__(self, leads: bool, held: list[float], barrier: threading.Barrier, told: dict[bool, object]):
        self.leads, self.held, self.barrier, self.told, self.pushes = leads, held, barrier, told, 0
        self.placement = self

    def drop_gradients(self) -> None: ...

    def sleep(self) -> None: ...

    def restart(self) -> None: ...

    def push_weights(self, source: object, version: int) -> dict[str, float]:
        self.pushes += 1
        if self.leads:
            time.sleep(0.2)
            self.held[0] = -1.0 if self.pushes == 2 else -9.0  # half of the first push is lost
        return {}

    def score(self, ids: object) -> list[float]:
        return [self.held[0]]

    def gather(self, one: object) -> list[object]:
        self.told[self.leads] = one
        self.barrier.wait(REQUEST_SECONDS)
        everyone = [self.told[True], self.told[False]]
        self.barrier.wait(REQUEST_SECONDS)
        return everyone

    def over_processes(self, figures: dict[str, float]) -> dict[str, float]:
        return {"gap": fmean(one["gap"] for one in self.gather(figures))}


def test_no_process_reads_weights_that_the_first_one_is_about_to_replace():
    """A server that was sent weights it does not hold says their version all the same, until it is sent them again."""
    held, barrier, told = [-9.0], threading.Barrier(2), {}

    def push(leads: bool) -> float:
        one = _Process(leads, held, barrier, told)
        learner = SimpleNamespace(
            placement=one, score=lambda ids: [-1.0], gather=one.gather, over_processes=one.over_processes,
            named_tensors=None,
        )  # fmt: skip
        return WeightSync(one, learner, [5, 6], config("m")).push(3)["sync/probe_logp_gap"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(push, (True, False))) == [0.0, 0.0]
