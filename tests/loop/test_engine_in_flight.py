"""The real vLLM with requests in flight: abort, a weight push, and a learner that steps meanwhile."""

from __future__ import annotations

import pytest

from igrpo.config import TrainConfig
from igrpo.engines import Request, Sampling, start_engine
from tests.tiny import save_tiny, tiny_llama

SETTINGS = {
    "dataset_name": "d", "use_cpu": True, "bf16": False, "system_prompt": None, "draft_template": " [{draft}]",
    "gradient_checkpointing": False, "max_completion_length": 40, "temperature": 1.0,
}  # fmt: skip
LONG = Sampling(1.0, 40)
NO_STOP = (287,)
"""An id the byte tokenizer never writes: requests run to their limit."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    config = TrainConfig(model_name_or_path="m", **SETTINGS)
    engine = start_engine(save_tiny(tmp_path_factory.mktemp("model")), config, 256, NO_STOP, seed=0)
    yield engine
    engine.close()


def finish(engine) -> list:
    results = []
    for _ in range(200):
        results += engine.poll()
    return results


def test_an_aborted_request_never_comes_out_and_its_siblings_do(engine):
    for name in ("a", "b", "c"):
        engine.submit(Request(name, (5, 6, 7), 2, LONG))
    assert engine.poll() == []
    engine.abort(["b", "never submitted"])
    assert sorted(r.request_id for r in finish(engine)) == ["a", "c"]
    engine.submit(Request("b", (5, 6, 7), 1, LONG))  # the name is free again
    assert [r.request_id for r in finish(engine)] == ["b"]


def test_requests_go_on_under_the_weights_pushed_while_they_run(engine):
    new = tiny_llama(seed=1)
    greedy = Sampling(0.0, 40)
    engine.submit(Request("across", (5, 6, 7), 1, greedy))
    for _ in range(10):
        engine.poll()
    probe = list(range(5, 30))
    engine.push_weights(new.named_parameters, version=1)
    scores = engine.score(probe)  # steps the running request too, and must not swallow it
    (across,) = finish(engine)
    assert (across.request_id, across.version, len(across.token_ids[0])) == ("across", 1, 40)
    assert scores == pytest.approx(reference_scores(new, probe), abs=1e-4)
    # Its last tokens are those of the new weights, given the ones before: nothing of the old cache is left.
    ids = (5, 6, 7, *across.token_ids[0])
    assert new(input_ids=as_batch(ids)).logits[0, 30:42].argmax(-1).tolist() == list(ids[31:])
    old = tiny_llama(seed=0)
    assert old(input_ids=as_batch(ids)).logits[0, 30:42].argmax(-1).tolist() != list(ids[31:])
    engine.push_weights(old.named_parameters, version=0)


def as_batch(ids):
    import torch

    return torch.tensor([ids])


def reference_scores(model, ids) -> list[float]:
    logprobs = model(input_ids=as_batch(ids)).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, as_batch(ids)[0, 1:, None])[:, 0].tolist()
