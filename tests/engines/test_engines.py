"""Engines in this process, real vLLM and Hugging Face generate: weights that must arrive, samplers that break."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from igrpo.config.train_config import TrainConfig
from igrpo.engines import EngineError, Request, Result, Sampling, start_engine
from igrpo.engines.base import UNKNOWN_VERSION, NoRoomError
from tests.support.tiny import save_tiny, tiny_llama

PROMPT = tuple(range(40, 90))
SAMPLING = Sampling(temperature=0.7, max_tokens=8)


def source(seed: int):
    model = tiny_llama(seed)
    return lambda: model.named_parameters()


def breaks_half_way(seed: int, fails: int):
    """Weights that stop coming after two tensors, the first ``fails`` times."""
    left = [fails]

    def named_tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i, pair in enumerate(source(seed)()):
            if i == 2 and left[0]:
                left[0] -= 1
                raise OSError("the line went dead")
            yield pair

    return named_tensors


def lose_the_weights(loaded: torch.nn.Module) -> None:
    """The engine's next step fails."""
    loaded.to("meta")


def no_room_for_the_cache(wake_up):
    def wake(tags: list[str]) -> None:
        if tags == ["kv_cache"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        wake_up(tags)

    return wake


def drain(engine, count: int) -> dict[str, Result]:
    results = {}
    while len(results) < count:
        for result in engine.poll():
            assert result.request_id not in results
            results[result.request_id] = result
    return results


@torch.no_grad()
def log_probs(seed: int) -> list[float]:
    """Of the prompt, under the model made with ``seed``."""
    ids = torch.tensor([PROMPT])
    return tiny_llama(seed)(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()


@torch.no_grad()
def logprob_gap(seed: int, result: Result, temperature: float = SAMPLING.temperature) -> float:
    """Largest |log p - log p_engine| over the sampled tokens, p being the model made with ``seed``, over what was
    kept."""
    model, gap = tiny_llama(seed), 0.0
    for i, (ids, logprobs) in enumerate(zip(result.token_ids, result.logprobs, strict=True)):
        logits = model(torch.tensor([[*result.prompt_ids, *ids]])).logits[0, len(result.prompt_ids) - 1 : -1]
        for row, kept in zip(logits, result.kept[i].sets() if result.kept else (), strict=False):
            left = row[list(kept)]
            row.fill_(-torch.inf)[list(kept)] = left
        chosen = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        gap = max(gap, (chosen - torch.tensor(logprobs)).abs().max().item())
    return gap


@pytest.fixture(scope="module", params=["vllm", "hf"])
def engine(request, tmp_path_factory):
    path = save_tiny(tmp_path_factory.mktemp("model"), seed=0)
    config = TrainConfig(
        model_name_or_path=path, dataset_name="d", use_vllm=request.param == "vllm", use_cpu=True, bf16=False
    )
    engine = start_engine(path, config, max_model_length=128, stop_token_ids=[1], seed=0)
    yield engine
    engine.close()


def test_a_push_replaces_every_weight_and_version(engine):
    engine.push_weights(source(1), version=5)
    engine.submit(Request("a", PROMPT, 3, SAMPLING))
    result = drain(engine, 1)["a"]
    assert result.version == 5 and result.prompt_ids == PROMPT
    assert logprob_gap(1, result) < 1e-4 < logprob_gap(0, result)


def test_log_probs_are_those_of_the_truncated_distribution(engine):
    """Temperature, then the 5 likeliest, then those of them that hold 80 %: what is sampled from is what is told."""
    engine.push_weights(source(1), version=5)
    sampling = Sampling(temperature=0.7, max_tokens=8, top_k=5, top_p=0.8)
    engine.submit(Request("a", PROMPT, 3, sampling))
    result, model = drain(engine, 1)["a"], tiny_llama(1)
    for ids, logprobs in zip(result.token_ids, result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1]
        for token, logp, row in zip(ids, logprobs, logits / 0.7, strict=True):
            best, order = row.topk(5)
            p = best.softmax(-1)
            kept = p.cumsum(-1) - p < 0.8  # up to and with the one that reaches it
            place = order.tolist().index(token)
            assert kept[place] and logp == pytest.approx(float((p[place] / p[kept].sum()).log()), abs=1e-3)


def test_an_aborted_request_never_comes_back_and_its_name_may(engine):
    for name in ("a", "b", "c"):
        engine.submit(Request(name, PROMPT, 2, SAMPLING))
    engine.abort(["b", "never seen"])
    engine.submit(Request("b", PROMPT[:7], 1, SAMPLING))
    results = drain(engine, 3)
    assert results.keys() == {"a", "b", "c"} and results["b"].prompt_ids == PROMPT[:7]
    assert engine.poll() == []


def test_requests_that_run_go_on_under_new_weights(engine):
    """Drafts may: they carry no gradient. Whatever was cached of the old weights is read anew."""
    engine.submit(Request("a", PROMPT, 1, Sampling(temperature=0.0, max_tokens=20)))
    engine.push_weights(source(2), version=6)
    result = drain(engine, 1)["a"]
    assert result.version == 6 and logprob_gap(2, result, temperature=1.0) < 1e-4
    if not hasattr(engine, "llm"):  # generate ends what it begins
        return
    # Each token keeps the log-probability, and the version, of the weights that sampled it.
    engine.submit(Request("b", PROMPT, 2, SAMPLING))
    for _ in range(3):
        engine.poll()
    engine.push_weights(source(3), version=7)
    for _ in range(3):
        engine.poll()
    engine.push_weights(source(4), version=8)
    result = drain(engine, 1)["b"]
    for i, (ids, runs) in enumerate(zip(result.token_ids, result.versions, strict=True)):
        assert [version for version, _ in runs] == [6, 7, 8][: len(runs)] and sum(n for _, n in runs) == len(ids)
        begin = 0
        for (version, n), seed in zip(runs, (2, 3, 4), strict=False):
            before = result.prompt_ids + ids[:begin]
            part = replace(result, prompt_ids=before, token_ids=(ids[begin : begin + n],),
                           logprobs=(result.logprobs[i][begin : begin + n],))  # fmt: skip
            assert logprob_gap(seed, part) < 1e-4, version
            begin += n
    assert any(len(runs) == 3 for runs in result.versions)


@pytest.fixture
def sleeper(engine, monkeypatch):
    """As on a GPU: the CPU build stops and starts its scheduler too, and has no pool to release."""
    from vllm.device_allocator.cumem import CuMemAllocator

    pools = types.SimpleNamespace(released=0)
    pools.release_pools = lambda: setattr(pools, "released", pools.released + 1)
    monkeypatch.setattr(CuMemAllocator, "get_instance", lambda: pools)
    monkeypatch.setattr(engine, "_sleeps", True)
    engine.pools = pools
    return engine


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_an_engine_sleeps_when_nothing_runs_and_a_push_wakes_it(sleeper, monkeypatch):
    sleeper.push_weights(source(1), version=5)
    sleeper.submit(Request("a", PROMPT, 1, SAMPLING))
    assert not sleeper.sleep() and drain(sleeper, 1)["a"].version == 5
    assert sleeper.sleep() and sleeper.sleep() and sleeper.version == UNKNOWN_VERSION
    for use in (lambda: sleeper.submit(Request("b", PROMPT, 1, SAMPLING)), lambda: sleeper.score(PROMPT)):
        with pytest.raises(EngineError, match="the engine sleeps and has forgotten its weights"):
            use()
    with monkeypatch.context() as full:  # the CPU has no room to run out of
        full.setattr(sleeper.llm, "wake_up", no_room_for_the_cache(sleeper.llm.wake_up))
        with pytest.raises(NoRoomError, match=r"^vLLM's kv cache finds no room .* vllm_gpu_memory_utilization$"):
            sleeper.push_weights(source(2), version=6)
    sleeper.push_weights(source(2), version=6)
    sleeper.submit(Request("b", PROMPT, 1, SAMPLING))
    result = drain(sleeper, 1)["b"]
    assert result.version == 6 and logprob_gap(2, result) < 1e-4


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_a_push_that_breaks_half_way_is_repeated_on_a_new_engine(sleeper, monkeypatch):
    engine = sleeper
    engine.sleep()
    with monkeypatch.context() as full:
        full.setattr(engine.llm, "wake_up", no_room_for_the_cache(engine.llm.wake_up))
        with pytest.raises(NoRoomError, match=r"failed half-way: .*went dead.*kv cache finds no room .*\(CUDA out"):
            engine.push_weights(breaks_half_way(2, fails=1), version=6)
    figures = engine.push_weights(breaks_half_way(2, fails=1), version=7)
    assert figures["sync/restarts"] == 1.0 == engine.pools.released and not engine.llm.llm_engine.is_sleeping()
    engine.submit(Request("a", PROMPT, 3, SAMPLING))
    result = drain(engine, 1)["a"]
    assert result.version == 7 and logprob_gap(2, result) < 1e-4
    with pytest.raises(EngineError, match="failed half-way"):
        engine.push_weights(breaks_half_way(2, fails=2), version=8)
    engine.restart()
    engine.push_weights(source(3), version=9)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_an_engine_that_dies_while_it_scores_is_replaced_too(engine):
    """The probe after a push once ended the run where a request would have been sent again."""
    engine.push_weights(source(3), version=9)
    engine.llm.apply_model(lose_the_weights)
    assert engine.score(PROMPT) == pytest.approx(log_probs(3), abs=1e-3) and engine.version == 9


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_an_engine_that_dies_among_requests_is_replaced_and_they_start_over(engine):
    model = tiny_llama(4)
    engine.push_weights(lambda: model.named_parameters(), version=10)
    for name in ("a", "b"):
        engine.submit(Request(name, PROMPT, 2, SAMPLING))
    engine.poll()
    engine.llm.apply_model(lose_the_weights)
    results = drain(engine, 2)
    assert all(r.version == 10 and logprob_gap(4, r) < 1e-4 for r in results.values())

    # The same again after the learner has moved on: the weights of version 10 are nowhere, and no others will do.
    engine.submit(Request("a", PROMPT, 2, SAMPLING))
    engine.llm.apply_model(lose_the_weights)
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    with pytest.raises(EngineError, match="whose weights are gone"):
        drain(engine, 1)


def test_several_servers_form_one_group_for_a_direct_transfer():
    from igrpo.engines.servers.vllm_nccl import FanOut

    together = threading.Barrier(3, timeout=30)  # each call returns only when all servers have been called
    seen: dict[int, list] = {0: [], 1: [], 2: []}

    def post(i: int):
        def send(path: str, body: dict | None) -> None:
            together.wait()
            seen[i].append((path, body))

        return send

    group = FanOut([post(i) for i in range(3)], world_sizes=[1, 2, 4])
    group.init_weight_transfer_engine({"master_port": 7, "rank_offset": 1, "world_size": 8})
    group.start_weight_update()
    group.update_weights({"names": ["a"]})
    group.finish_weight_update()
    assert [calls[0][1]["init_info"]["rank_offset"] for calls in seen.values()] == [1, 2, 4]
    phases = ["init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]
    assert all([path for path, _ in calls] == [f"/{p}" for p in phases] for calls in seen.values())


def test_weights_are_offered_in_the_shape_the_installed_vllm_wants():
    from vllm.distributed.weight_transfer.base import ModuleSource, ParamMeta, WeightSource

    from igrpo.engines.servers.vllm_nccl import vllm_source

    model = tiny_llama(1)
    declared = [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()]
    ours, theirs = vllm_source(lambda: model.named_parameters(), declared), ModuleSource(model)
    assert isinstance(ours, WeightSource)
    for _ in range(2):  # a fresh pass each time
        pairs = [list(s.iter_full() if hasattr(s, "iter_full") else s) for s in (ours, theirs)]
        assert [name for name, _ in pairs[0]] == [name for name, _ in pairs[1]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*pairs, strict=True))
    metadata = [s.metadata() if callable(s.metadata) else s.metadata for s in (ours, theirs)]
    assert metadata[0] == metadata[1]
