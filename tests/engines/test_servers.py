"""Real ``vllm serve`` processes: weights, aborts, and every way to break one while requests run."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import threading
import time

import psutil
import pytest

from igrpo.engines import EngineError, Request, start_engine
from igrpo.engines.servers.client import ServerError
from igrpo.engines.servers.push import publish, push_files
from tests.engines.test_auth import ended
from tests.engines.test_engines import PROMPT, SAMPLING, drain, log_probs, logprob_gap, source
from tests.support.servers import LONG, config, is_idle, own_http, processes, running, wait_until
from tests.support.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def started(model):
    """Two servers that the engine started itself."""
    engine = start_engine(model, config(model, vllm_num_servers=2), max_model_length=256, stop_token_ids=[1], seed=0)
    yield engine
    left = [p for s in engine.servers if s.process.pid for p in psutil.Process(s.process.pid).children(recursive=True)]
    engine.close()
    wait_until(lambda: all(map(ended, left)), seconds=10)


@pytest.fixture
def engine(started):
    """With nothing of a test that failed left for the next one to find."""
    yield started
    with started._news:
        left = {*started._tasks, *(result.request_id for result in started._finished)}
    started.abort(left)


def test_servers_share_the_requests_and_sample_from_what_was_pushed(engine):
    figures = engine.push_weights(source(1), version=1)
    assert figures["sync/servers"] == 2.0 and figures["sync/tensors_compared"] == 12.0
    samples = []
    for _ in range(2):
        engine.seed(7)
        for i in range(8):
            engine.submit(Request(f"{i}", PROMPT[i:], 3, SAMPLING))
        wait_until(lambda: all(s.load for s in engine.servers) or not engine._tasks)
        results = drain(engine, 8)
        assert all(r.version == 1 and r.prompt_ids == PROMPT[int(i) :] for i, r in results.items())
        assert max(logprob_gap(1, r) for r in results.values()) < 1e-4
        samples.append({i: r.token_ids for i, r in results.items()})
    assert samples[0] == samples[1]  # a request's seed decides, not its server and not what ran beside it
    assert len(set(samples[0].values())) == 8


def test_prefixes_are_found_again_until_the_next_push(engine):
    prompt = tuple(range(100, 196))
    cached = []
    for version in (2, 2, 3):
        if version != engine.version:
            engine.push_weights(source(version), version)
        for name in ("a", "b"):  # one for each server
            engine.submit(Request(name, prompt, 1, SAMPLING))
        cached.append([r.cached_tokens for r in drain(engine, 2).values()])
    assert cached == [[0, 0], [64, 64], [0, 0]]


def test_an_aborted_request_leaves_the_server_and_never_comes_back(engine):
    """So many that none is near its end when both servers are seen at work, however fast they are."""
    servers = [own_http(server) for server in engine.servers]
    aborted = ["a", *(f"a{i}" for i in range(99))]
    for name in [*aborted, "f"]:
        engine.submit(Request(name, PROMPT, 16, LONG))
    wait_until(lambda: all(running(http) > 1 for http in servers))
    engine.abort([*aborted, "never seen"])
    engine.submit(Request("a", PROMPT[:9], 1, SAMPLING))
    results = drain(engine, 2)
    assert results.keys() == {"a", "f"} and results["a"].prompt_ids == PROMPT[:9]
    wait_until(lambda: all(map(is_idle, servers)), seconds=10)
    assert engine.poll() == []


def test_requests_that_run_go_on_under_new_weights(engine):
    """So many that some run through the push, however fast the servers are."""
    for i in range(40):
        engine.submit(Request(f"{i}", PROMPT, 16, LONG))
    wait_until(lambda: all(s.load for s in engine.servers))
    engine.push_weights(source(4), version=4)
    still = set(engine._tasks)
    assert still
    wait_until(lambda: any(name not in engine._tasks for name in still))
    engine.abort(set(engine._tasks))
    results = engine.poll()
    ended = {r.request_id for r in results} & still
    assert ended and all(r.version == 4 for r in results if r.request_id in ended)
    assert {r.version for r in results} <= {3, 4}
    assert all(len(ids) <= 180 for r in results for ids in r.token_ids)


def test_score_is_the_models_log_probability(engine):
    assert engine.score(PROMPT) == pytest.approx(log_probs(4), abs=1e-4)


def test_a_bit_that_flips_on_the_way_is_found(engine, tmp_path):
    """The server refuses all of it, and takes the next push without being replaced."""
    weights = publish(source(5), 5, tmp_path)
    shard = weights.folder / weights.files[0]
    data = bytearray(shard.read_bytes())
    size = int.from_bytes(data[:8], "little")
    # In one half of a layer that vLLM keeps as one: had the other half stayed behind, the next push would go wrong.
    (begin, _) = json.loads(data[8 : 8 + size])["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    data[8 + size + begin] ^= 1
    shard.write_bytes(data)
    push = push_files(engine.servers[1].client, weights, timeout=60.0)
    with pytest.raises(ServerError, match=r"version 5, phase send: .*up_proj.*is not the tensor that was sent"):
        asyncio.run_coroutine_threadsafe(push, engine._loop).result()
    figures = engine.push_weights(source(5), version=5)
    assert figures["sync/servers"] == 2.0 and figures["sync/restarts"] == 0.0
    for i in range(4):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    wait_until(lambda: all(s.load for s in engine.servers) or not engine._tasks)
    assert max(logprob_gap(5, r) for r in drain(engine, 4).values()) < 1e-4


def test_a_server_killed_in_a_push_is_replaced_and_gets_the_weights(engine):
    victim = engine.servers[0]
    core = processes(victim)[1]
    killer = threading.Timer(1.0, core.kill)

    def stops_it():
        yield from source(6)()
        core.suspend()  # its engine: the front end takes the push and waits, until the engine is killed
        killer.start()

    figures = engine.push_weights(stops_it, version=6)
    assert figures["sync/seconds"] > 1.0 and figures["sync/servers"] == 1.0 and not victim.holds(6)
    for i in range(4):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    assert max(logprob_gap(6, r) for r in drain(engine, 4).values()) < 1e-4


def test_the_replaced_server_holds_the_weights_and_when_it_hangs_another_takes_its_requests(engine, monkeypatch):
    """Stopped, not killed: connections stay open and the front end says that all is well. So late in this file because
    the server needs a while to come back, which the tests in between make use of."""
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, vllm_request_timeout=4.0))
    wait_until(lambda: all(s.holds(6) for s in engine.servers))  # the killed one is back, with what was pushed last
    core = processes(engine.servers[0])[1]
    core.suspend()
    for i in range(6):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    results = drain(engine, 6)
    assert max(logprob_gap(6, r) for r in results.values()) < 1e-4 and {r.version for r in results.values()} == {6}
    wait_until(lambda: ended(core))  # replaced; a stopped process dies of SIGKILL alone


def test_weights_are_kept_while_a_server_that_comes_back_reads_them(engine):
    engine.push_weights(source(10), version=10)
    before, slow = engine._weights, engine.servers[0]
    was_up = slow.up
    asyncio.run_coroutine_threadsafe(slow.lock.acquire(), engine._loop).result()
    slow.up = False  # as its keeper has it while it sends
    engine.push_weights(source(11), version=11)
    time.sleep(0.3)
    assert before.folder.is_dir()
    slow.up = slow.up or was_up
    engine._loop.call_soon_threadsafe(slow.lock.release)
    wait_until(lambda: not before.folder.exists(), seconds=10)


def test_a_server_that_cannot_come_back_is_given_up_and_the_other_goes_on(engine):
    """As one whose GPU has gone: its process ends whenever it is started. The last test here, since it takes both."""
    gone, left = engine.servers
    wait_until(lambda: gone.holds(11) and left.holds(11))  # the one that hung is back,
    for i in range(4):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    drain(engine, 4)
    assert gone.failures == 0  # and at work again, so that what it did before counts no more
    broken = [sys.executable, "-c", "raise SystemExit('the GPU has fallen off the bus')"]
    gone.process.command = broken
    gone.process.stop()
    wait_until(lambda: gone.given_up, seconds=60)
    assert "the GPU has fallen off the bus" in gone.given_up
    engine.push_weights(source(12), version=12)
    for i in range(4):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    assert max(logprob_gap(12, r) for r in drain(engine, 4).values()) < 1e-4
    left.process.command = broken
    processes(left)[1].kill()
    engine.submit(Request("a", PROMPT, 2, SAMPLING))
    with pytest.raises(EngineError, match=r"no server is left: (?s:.)*has fallen(?s:.)*; (?s:.)*has fallen"):
        drain(engine, 1)
