"""``vllm serve`` processes that run before the trainer and after it, and the whole program beside one."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from igrpo.engines import EngineError, Request, start_engine
from igrpo.engines.servers.auth import SECRET_VARIABLE
from igrpo.engines.servers.client import IDLE_SECONDS
from igrpo.engines.servers.engine import MAX_FAILURES
from igrpo.engines.servers.launch import KEEP_ALIVE_SECONDS
from igrpo.engines.servers.lease import OWNER_HEADER
from igrpo.engines.servers.process import free_port
from igrpo.settings import ConfigError
from tests.engines.test_auth import ended
from tests.engines.test_engines import PROMPT, SAMPLING, drain, log_probs, logprob_gap, source
from tests.support.servers import LONG, Network, Served, config, http_of, is_idle, running, wait_until
from tests.support.training import ROOT, records, words


@pytest.fixture(scope="module")
def dead_start(model):
    """The end of an engine whose own server cannot start; comes beside the other tests."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(start_engine, "/no/such/model", config(model), 256, [1], 0)


@pytest.fixture(scope="module")
def served(model, dead_start, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "recipe.yaml").write_text(
        f"{{model_name_or_path: {model}, dataset_name: d, use_cpu: true, bf16: false, vllm_max_model_length: 256}}\n"
    )
    server = Served(folder / "recipe.yaml", folder / "server.log")
    server.start()
    try:
        wait_until(server.answers)
        yield server
    finally:
        server.stop()


def test_every_route_of_the_real_server_is_closed(served):
    url, secret = served.url, served.secret
    with httpx.Client(base_url=url, timeout=60) as anybody:
        good = {"Authorization": f"Bearer {secret}"}
        paths = anybody.get("/openapi.json", headers=good).json()["paths"]
        assert {"/collective_rpc", "/pause", "/update_weights", "/v1/completions", "/health", "/sleep"} <= paths.keys()
        tried = [(method.upper(), path) for path, methods in paths.items() for method in methods]
        tried += [("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/metrics", "/metrics/", "/", "/x")]
        for method, path in tried:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-Request-Id": secret}):
                answer = anybody.request(method, path, headers=headers, json={})
                assert answer.status_code == 401, (method, path)
                assert "x-igrpo-instance" not in answer.headers
        assert anybody.post("/collective_rpc", headers=good, json={"method": "igrpo_checksums",
                            "kwargs": {"shapes": {}}}).status_code == 200  # fmt: skip
        assert anybody.get("/is_paused", headers=good).json() == {"is_paused": False}
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                   "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
        assert anybody.get("/v1/realtime", headers=upgrade).status_code in (401, 403)
    everyone = served.everyone()
    assert len(everyone) >= 3
    for process in everyone:
        assert secret not in " ".join(process.cmdline())
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1"), connection
    assert secret not in served.log.read_text()


def test_a_new_trainer_takes_over_servers_that_an_old_one_left_busy(served, model, tmp_path, monkeypatch):
    url, secret = served.url, served.secret
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    code = (
        "import sys; from igrpo.engines import EngineError, Request, start_engine;"
        "from tests.support.servers import LONG, config; from tests.engines.test_engines import PROMPT, source;"
        "path, url, folder = sys.argv[1:];"
        "e = start_engine(path, config(path, vllm_server_urls=[url], vllm_weight_dir=folder), 256, [1], 0);"
        "e.push_weights(source(3), 3);"
        "[e.submit(Request(f'{i}', PROMPT, 64, LONG)) for i in range(40)];"
        "print(e.servers[0].client.http.headers['x-igrpo-owner'], flush=True)\n"
        "try:\n while True: e.poll()\nexcept EngineError as error: sys.exit(str(error))"
    )
    old = subprocess.Popen(
        [sys.executable, "-c", code, model, url, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    server = http_of(url, secret)
    try:
        wait_until(lambda: running(server) > 100 or old.poll() is not None)
        assert old.poll() is None
        owner = old.stdout.readline().strip()
        os.kill(old.pid, signal.SIGSTOP)  # its connections stay open, as behind a dead network
        for phase in ("/pause?mode=keep", "/start_weight_update"):  # and so does the push it was about to make
            assert server.post(phase).status_code == 423
            assert server.post(phase, headers={OWNER_HEADER: owner}).status_code == 200
        new = start_engine(model, config(model, vllm_server_urls=[url]), 256, [1], 0)
        try:
            with pytest.raises(EngineError, match="push first"):
                new.submit(Request("a", PROMPT, 1, SAMPLING))
            new.push_weights(source(8), version=8)
            assert is_idle(server)  # nobody waits for the old ones any more
            new.submit(Request("a", PROMPT, 3, SAMPLING))
            assert logprob_gap(8, drain(new, 1)["a"]) < 1e-4
            os.kill(old.pid, signal.SIGCONT)  # it is told, and stops
            _, said = old.communicate(timeout=60)
            assert (
                old.returncode == 1
                and f"in use by another trainer ({socket.gethostname()}, process {os.getpid()}" in said
            )
            new.submit(Request("b", PROMPT, 3, SAMPLING))
            assert logprob_gap(8, drain(new, 1)["b"]) < 1e-4 and new._restarts == 0
        finally:
            new.close()
    finally:
        old.kill()
        old.wait()
    assert server.get("/health").status_code == 200  # not ours to stop


@pytest.fixture
def far(served, model, monkeypatch):
    """An engine whose only server is at a URL, behind a network that can break."""
    monkeypatch.setenv(SECRET_VARIABLE, served.secret)
    with Network(served.url) as network:
        engine = start_engine(model, config(model, vllm_server_urls=[network.url]), 256, [1], 0)
        yield engine, network
        engine.close()
        network.shutdown()


def test_a_second_trainer_is_refused_while_the_first_one_lives(far, served, model):
    """And changes nothing of what the first one has there."""
    engine, _ = far
    engine.push_weights(source(14), version=14)
    engine.submit(Request("long", PROMPT, 16, LONG))
    with pytest.raises(EngineError, match=rf"in use by another trainer \(.*process {os.getpid()}, started "):
        start_engine(model, config(model, vllm_server_urls=[served.url]), 256, [1], 0)
    engine.submit(Request("a", PROMPT, 3, SAMPLING))
    results = drain(engine, 2)
    assert all(r.version == 14 and logprob_gap(14, r) < 1e-4 for r in results.values()) and engine._restarts == 0


def test_a_push_to_a_urls_server_that_fails_half_way_is_made_again(far):
    """Its process is not ours to replace: what it took of the push is undone, and it gets all of it again."""
    engine, network = far
    lost = [("broken", "/update_weights"), ("deaf", "/update_weights"), ("broken", "/finish_weight_update"),
            ("deaf", "/finish_weight_update"), ("broken", "/collective_rpc"), ("broken", "/resume")]  # fmt: skip
    for version, (how, path) in enumerate(lost, start=20):
        # The first /resume is not the push's own, but of the takeover after it failed.
        setattr(network, how, {path: 1} if path != "/resume" else {"/finish_weight_update": 1, path: 1})
        figures = engine.push_weights(source(version), version)
        assert network.dropped[-1] == path and figures["sync/servers"] == 1.0
        engine.submit(Request("a", PROMPT, 3, SAMPLING))
        result = drain(engine, 1)["a"]
        assert result.version == version and logprob_gap(version, result) < 1e-4, (how, path)
    assert figures["sync/restarts"] == len(lost)
    network.broken = {"/v1/completions": 1}
    assert engine.score(PROMPT) == pytest.approx(log_probs(version), abs=1e-4)  # so when it breaks after the push
    assert engine._restarts == len(lost) + 1


def test_a_prompt_whose_reading_was_broken_off_is_read_again(far):
    """As another learner process's was, by the one that takes the server over."""
    engine, server = far[0], far[0].servers[0]
    engine.push_weights(source(29), version=29)

    def call(path: str, **options) -> None:
        asyncio.run_coroutine_threadsafe(server.client.call("POST", path, 30.0, **options), engine._loop).result()

    call("/pause", params={"mode": "keep"})
    with ThreadPoolExecutor(1) as pool:
        scores = pool.submit(engine.score, PROMPT)
        while server.up and not scores.done():  # until it has come there
            call("/abort_requests", json={})
    assert scores.result() == pytest.approx(log_probs(29), abs=1e-4) and engine._restarts == 1


def test_a_connection_that_ends_is_not_a_server_that_died(far, served):
    engine, network = far
    engine.push_weights(source(30), version=30)
    network.broken, network.deaf = {"/v1/completions": 2}, {"/v1/completions": 1}
    for i in range(6):
        engine.submit(Request(f"{i}", PROMPT, 2, SAMPLING))
    assert max(logprob_gap(30, r) for r in drain(engine, 6).values()) < 1e-4
    assert len(network.dropped) == 3 and engine._restarts == 0
    # The usual reason: the server closes an idle connection under a request. So it must not be the one to close it.
    assert IDLE_SECONDS < KEEP_ALIVE_SECONDS / 2
    (front,) = [p for p in served.everyone() if "vllm.entrypoints.openai.api_server" in p.cmdline()]
    assert float(front.environ()["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) == KEEP_ALIVE_SECONDS


def test_a_server_that_comes_back_only_to_fail_again_is_given_up(far):
    """It answers everything but requests: as one whose GPU breaks under the first real work."""
    engine, network = far
    engine.push_weights(source(31), version=31)
    network.broken = {"/v1/completions": math.inf}
    engine.submit(Request("a", PROMPT, 2, SAMPLING))
    with pytest.raises(EngineError, match=r"no server is left: http://127.*/v1/completions"):
        drain(engine, 1)
    assert engine._restarts == MAX_FAILURES


def test_what_is_wrong_with_a_server_is_said(served, dead_start, model, monkeypatch):
    url, secret = served.url, served.secret
    with pytest.raises(ConfigError, match=SECRET_VARIABLE):
        start_engine(model, config(model, vllm_server_urls=[url]), 256, [1], 0)
    monkeypatch.setenv(SECRET_VARIABLE, "another-run's-secret")
    with pytest.raises(EngineError, match="refused the secret"):
        start_engine(model, config(model, vllm_server_base_url=url), 256, [1], 0)
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    with pytest.raises(EngineError, match="vllm_max_model_length: 300"):
        start_engine(model, config(model, vllm_server_urls=[url]), 300, [1], 0)
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(EngineError, match=r"no vLLM server came up at .* in 1 s.*vllm_server_timeout"):
        start_engine(model, config(model, vllm_server_urls=[url, nobody], vllm_server_timeout=1.0), 256, [1], 0)
    with pytest.raises(ConfigError, match="vllm_weight_dir"):
        start_engine(model, config(model, vllm_server_urls=["http://10.0.0.2:8000"]), 256, [1], 0)
    with pytest.raises(EngineError, match="ended while starting"):
        dead_start.result()


@pytest.fixture(scope="module")
def back_from_the_dead(served, model):
    """The ends of two pushes under which a URL's server broke while its process lived on: its engine stood still, or
    died, so that it closed its port and waited. Nobody starts it again by hand; comes beside the next test."""
    os.environ[SECRET_VARIABLE] = served.secret
    settings = config(model, vllm_server_urls=[served.url], vllm_sync_timeout=15.0)
    far = start_engine(model, settings, 256, [1], 0)
    del os.environ[SECRET_VARIABLE]

    def pushes(version: int, kills: bool) -> None:
        (core,) = [p for p in served.everyone() if "EngineCore" in "".join(p.cmdline())]

        def breaks_it():
            yield from source(version)()
            core.suspend()
            if kills:
                threading.Timer(1.0, core.kill).start()

        assert far.push_weights(breaks_it, version)["sync/servers"] == 1.0 and ended(core)

    with ThreadPoolExecutor(1) as pool:
        yield far, pool.submit(pushes, 9, False), pool.submit(pushes, 10, True)
    far.close()


# --- the whole program


def train(arguments: list[str], secret: str | None = None) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {SECRET_VARIABLE: secret} if secret else {}
    command = [sys.executable, "-m", "igrpo.train", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def settings(**more) -> dict:
    return {
        "vllm_mode": "server", "max_completion_length": 100, "save_steps": 1, "full_determinism": False,
        "vllm_max_model_length": 256, **more,
    }  # fmt: skip


def logged(folder: Path) -> list[dict]:
    """Steps whose line is whole: the trainer may be writing the next one."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [r for r in (json.loads(line) for line in lines if line.endswith("\n")) if "reward" in r]


def assert_whole(folder: Path, count: int) -> None:
    """Every step once, sampled from that step's weights; every prompt of an epoch once."""
    found = logged(folder)
    assert [r["step"] for r in found] == list(range(1, count + 1))
    for r in found:
        assert r["sync/version"] == r["step"] and r["sync/probe_logp_gap"] < 1e-4
        assert r["sampling/sampling_logp_difference/max"] < 1e-3
    groups = records(folder, "completions.jsonl")
    rows = [g["row"] for g in groups]
    assert len(rows) == 2 * count and len(set(rows[:20])) == min(20, len(rows))
    assert all(len(g["drafts"]) == 3 and len(g["refinements"]) == 4 for g in groups)


def test_a_server_killed_under_a_learner_costs_no_prompt(model, questions, tmp_path, back_from_the_dead):
    """Two processes, learner and server; the server is killed while it generates."""
    folder = tmp_path / "run"
    trainer = train(words(model, questions, folder, max_steps=8, **settings()))
    wait_until(lambda: len(logged(folder)) >= 1 or trainer.poll() is not None)
    (front,) = [
        p for p in psutil.Process(trainer.pid).children(recursive=True)
        if "vllm.entrypoints.openai.api_server" in p.cmdline() and p.ppid() != trainer.pid
    ]  # fmt: skip
    everyone = [front, *front.children(recursive=True)]
    secret = front.environ()[SECRET_VARIABLE]
    (address,) = {c.laddr for c in front.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    server = http_of(f"http://{address.ip}:{address.port}", secret)
    wait_until(lambda: running(server) > 0)
    front.kill()
    output, _ = trainer.communicate(timeout=240)
    assert trainer.returncode == 0, output
    assert "bringing it back" in output and logged(folder)[-1]["sync/restarts"] == 1.0
    assert_whole(folder, 8)
    wait_until(lambda: all(map(ended, everyone)), seconds=10)
    assert not list(Path("/dev/shm").glob(f"igrpo-weights-{trainer.pid}-*"))
    assert secret not in output and not any(secret in f.read_text() for f in folder.glob("*.*"))


def test_a_urls_server_that_broke_in_a_push_is_started_again_and_gets_it(served, back_from_the_dead):
    far, stood_still, died = back_from_the_dead
    stood_still.result()
    died.result()
    assert far._restarts >= 2
    far.submit(Request("a", PROMPT, 3, SAMPLING))
    assert logprob_gap(10, drain(far, 1)["a"]) < 1e-4
    assert served.log.read_text().count("starting it again") >= 2
    far.close()


def test_a_trainer_killed_beside_its_server_resumes_with_it(served, model, questions, tmp_path):
    """And so does one that its server left, which ends by itself and says how to go on."""
    folder = tmp_path / "run"
    with Network(served.url) as network:
        options = settings(vllm_server_base_url=network.url)
        trainer = train(words(model, questions, folder, max_steps=200, **options), served.secret)
        server = http_of(served.url, served.secret)
        wait_until(lambda: len(logged(folder)) >= 2 and running(server) > 0)
        trainer.kill()
        trainer.communicate()
        done = len(logged(folder))
        options["resume_from_checkpoint"] = "last"
        trainer = train(words(model, questions, folder, max_steps=200, **options), served.secret)
        wait_until(lambda: len(logged(folder)) > done)
        network.broken = {"/v1/completions": math.inf}
        output, _ = trainer.communicate(timeout=240)
        assert trainer.returncode == 3 and "error: no server is left: http://127" in output, output
        done = len(logged(folder))
        saved = folder / f"checkpoint-{done}"
        assert f"{saved} is whole; go on with the same command and --resume_from_checkpoint last" in output
        network.broken = {}
        trainer = train(words(model, questions, folder, max_steps=done + 2, **options), served.secret)
        output, _ = trainer.communicate(timeout=240)
        network.shutdown()
    assert trainer.returncode == 0 and f"resuming after step {done}" in output, output
    assert_whole(folder, done + 2)


def test_two_learner_processes_of_another_node_share_a_server(served, model, questions, tmp_path):
    """``recipes/nodes/learn.sh``: the doctor, then two ranks that shard the model; groups come two steps ahead."""
    folder = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    own = settings(max_steps=4, save_steps=0, policy_lag=2, draft_template="' [{draft}]'")
    del own["vllm_mode"]
    pairs = iter(words(model, questions, folder, **own))
    recipe.write_text("".join(f"{key.removeprefix('--')}: {next(pairs)}\n" for key in pairs))
    environment = served.environment | {
        "GPUS_PER_NODE": "2", "SERVERS": "1", "MAIN_PORT": str(free_port("127.0.0.1")), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        ["recipes/nodes/learn.sh", str(recipe), "127.0.0.1"], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = logged(folder)
    assert [r["step"] for r in found] == [1, 2, 3, 4] and all(r["sync/version"] == r["step"] for r in found)
    assert all(r["sync/probe_logp_gap"] < 1e-4 and r["sync/tensors_compared"] == 6.0 for r in found)
    assert found[0]["sampling/sampling_logp_difference/max"] < 1e-3
    groups = records(folder, "completions.jsonl")
    assert [g["step"] for g in groups] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert len({g["row"] for g in groups}) == 16
    for r in found:
        ages = [r["step"] - 1 - one["version"] for g in groups if g["step"] == r["step"] for one in g["refinements"]]
        assert 0 <= min(ages) <= max(ages) == r["staleness/max"] <= 2
    assert max(r["staleness/max"] for r in found) > 0
