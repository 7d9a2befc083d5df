"""Real ``vllm serve`` processes: weights, aborts, and every way to break one while requests run."""

from __future__ import annotations

import asyncio
import contextlib
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
    """Two servers that the engine started itself; two others where a test has used them up."""
    engines = []

    def both():
        if not engines or any(server.given_up for server in engines[-1].servers):
            close(engines)
            settings = config(model, vllm_num_servers=2)
            engines.append(start_engine(model, settings, max_model_length=256, stop_token_ids=[1], seed=0, masks=True))
        return engines[-1]

    yield both
    close(engines)


def close(engines: list) -> None:
    while engines:
        engine, left = engines.pop(), []
        for server in engine.servers:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended a moment ago
                left += psutil.Process(server.process.pid).children(recursive=True) if server.process.pid else []
        engine.close()
        wait_until(lambda left=left: all(map(ended, left)), seconds=30)


@pytest.fixture
def engine(started):
    """Both servers up with the same weights, and nothing of a test that failed left for the next one to find."""
    engine = started()
    with engine._news:
        left = {*engine._tasks, *(result.request_id for result in engine._finished)}
    engine.abort(left)
    wait_until(lambda: all(server.holds(engine.version) for server in engine.servers))
    return engine


def push(engine) -> tuple[int, dict[str, float]]:
    """The next version, whose number is also the seed that its weights were made with."""
    version = engine.version + 1
    return version, engine.push_weights(source(version), version)


def test_servers_share_the_requests_and_sample_from_what_was_pushed(engine):
    version, figures = push(engine)
    assert figures["sync/servers"] == 2.0 and figures["sync/tensors_compared"] == 12.0
    samples = []
    for _ in range(2):
        engine.seed(7)
        for i in range(8):
            engine.submit(Request(f"{i}", PROMPT[i:], 3, SAMPLING))
        wait_until(lambda: all(s.load for s in engine.servers) or not engine._tasks)
        results = drain(engine, 8)
        assert all(r.version == version and r.prompt_ids == PROMPT[int(i) :] for i, r in results.items())
        assert max(logprob_gap(version, r) for r in results.values()) < 1e-4
        samples.append({i: r.token_ids for i, r in results.items()})
    assert samples[0] == samples[1]  # a request's seed decides, not its server and not what ran beside it
    assert len(set(samples[0].values())) == 8


def test_servers_say_what_a_bounded_top_k_kept(engine):
    push(engine)
    sampling = dataclasses.replace(SAMPLING, top_k=20, top_p=0.9)
    for top_k in (20, 280):  # of the second one, all of the vocabulary's 288
        engine.submit(Request("r", PROMPT, 2, dataclasses.replace(sampling, top_k=top_k)))
        result = drain(engine, 1)["r"]
        assert logprob_gap(engine.version, result) < 1e-4
        assert all(1 <= len(own) <= top_k for kept in result.kept for own in kept.sets())
    engine.submit(Request("r", PROMPT, 1, dataclasses.replace(sampling, top_k=0)))
    assert drain(engine, 1)["r"].kept is None


def test_prefixes_are_found_again_until_the_next_push(engine):
    prompt = tuple(range(100, 196))
    cached = []
    for pushes in (True, False, True):
        if pushes:
            push(engine)
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
    version, _ = push(engine)
    still = set(engine._tasks)
    assert still
    wait_until(lambda: any(name not in engine._tasks for name in still))
    engine.abort(set(engine._tasks))
    results = engine.poll()
    ended = {r.request_id for r in results} & still
    assert ended and all(r.version == version for r in results if r.request_id in ended)
    assert {r.version for r in results} <= {version - 1, version}
    assert all(len(ids) <= 180 for r in results for ids in r.token_ids)


def test_score_is_the_models_log_probability(engine):
    version, _ = push(engine)
    assert engine.score(PROMPT) == pytest.approx(log_probs(version), abs=1e-4)


def test_a_bit_that_flips_on_the_way_is_found(engine, tmp_path):
    """The server refuses all of it, and takes the next push without being replaced."""
    version = engine.version + 1
    weights = publish(source(version), version, tmp_path)
    shard = weights.folder / weights.files[0]
    data = bytearray(shard.read_bytes())
    size = int.from_bytes(data[:8], "little")
    # In one half of a layer that vLLM keeps as one: had the other half stayed behind, the next push would go wrong.
    (begin, _) = json.loads(data[8 : 8 + size])["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    data[8 + size + begin] ^= 1
    shard.write_bytes(data)
    sent = push_files(engine.servers[1].client, weights, timeout=60.0)
    with pytest.raises(
        ServerError, match=rf"version {version}, phase send: .*up_proj.*is not the tensor that was sent"
    ):
        asyncio.run_coroutine_threadsafe(sent, engine._loop).result()
    _, figures = push(engine)
    assert figures["sync/servers"] == 2.0 and figures["sync/restarts"] == 0.0
    for i in range(4):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    wait_until(lambda: all(s.load for s in engine.servers) or not engine._tasks)
    assert max(logprob_gap(version, r) for r in drain(engine, 4).values()) < 1e-4


def test_a_server_killed_in_a_push_is_replaced_and_gets_the_weights(engine):
    victim, version = engine.servers[0], engine.version + 1
    core = processes(victim)[1]
    killer = threading.Timer(1.0, core.kill)

    def stops_it():
        yield from source(version)()
        core.suspend()  # its engine: the front end takes the push and waits, until the engine is killed
        killer.start()

    figures = engine.push_weights(stops_it, version)
    assert figures["sync/seconds"] > 1.0 and figures["sync/servers"] == 1.0 and not victim.holds(version)
    for i in range(4):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    assert max(logprob_gap(version, r) for r in drain(engine, 4).values()) < 1e-4
    wait_until(lambda: victim.holds(version))  # what was pushed last, once it is back


def test_when_a_server_hangs_it_is_replaced_and_another_takes_its_requests(engine, monkeypatch):
    """Stopped, not killed: connections stay open and the front end says that all is well."""
    version, _ = push(engine)
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, vllm_request_timeout=4.0))
    core = processes(engine.servers[0])[1]
    core.suspend()
    for i in range(6):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    results = drain(engine, 6)
    assert max(logprob_gap(version, r) for r in results.values()) < 1e-4
    assert {r.version for r in results.values()} == {version}
    wait_until(lambda: ended(core))  # replaced; a stopped process dies of SIGKILL alone


def test_weights_are_kept_while_a_server_that_comes_back_reads_them(engine):
    push(engine)
    before, slow = engine._weights, engine.servers[0]
    asyncio.run_coroutine_threadsafe(slow.lock.acquire(), engine._loop).result()
    slow.up = False  # as its keeper has it while it sends
    push(engine)
    time.sleep(0.3)
    assert before.folder.is_dir()
    slow.up = True
    engine._loop.call_soon_threadsafe(slow.lock.release)
    wait_until(lambda: not before.folder.exists(), seconds=10)
    push(engine)  # no keeper does it: the server was never really away


def test_a_server_that_cannot_come_back_is_given_up_and_the_other_goes_on(engine):
    """As one whose GPU has gone: its process ends whenever it is started. Last here, since it takes both."""
    gone, left = engine.servers
    for i in range(4):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    drain(engine, 4)
    assert gone.failures == 0  # it is at work, so that what it did before counts no more
    broken = [sys.executable, "-c", "raise SystemExit('the GPU has fallen off the bus')"]
    gone.process.command = broken
    gone.process.stop()
    wait_until(lambda: gone.given_up, seconds=60)
    assert "the GPU has fallen off the bus" in gone.given_up
    version, _ = push(engine)
    for i in range(4):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    assert max(logprob_gap(version, r) for r in drain(engine, 4).values()) < 1e-4
    left.process.command = broken
    processes(left)[1].kill()
    engine.submit(Request("a", PROMPT, 2, SAMPLING))
    with pytest.raises(EngineError, match=r"no server is left: (?s:.)*has fallen(?s:.)*; (?s:.)*has fallen"):
        drain(engine, 1)
