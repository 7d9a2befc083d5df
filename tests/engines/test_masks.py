"""What a sampler with top-p, top-k or min-p kept, from the engine to the learner's gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput, SamplingMask

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import Completion, Kept, Problem, RolloutGroup, Scored
from igrpo.engines import EngineError, Request, Sampling, masks, start_engine
from igrpo.engines import vllm_engine as vllm_engine_module
from igrpo.engines.vllm_engine import WHOLE_VOCABULARY, VLLMEngine
from igrpo.learner.batching import training_samples
from igrpo.learner.learner import Learner
from igrpo.rollout.pump import _check
from igrpo.settings import ConfigError
from igrpo.training_run import _placed
from tests.support.tiny import save_tiny, tiny_llama

TOKENS = 120
PROMPT = tuple(range(40, 60))
STEP = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "num_generations": 4, "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_vllm": False}  # fmt: skip


def config(path="m", **settings) -> TrainConfig:
    return TrainConfig(model_name_or_path=path, dataset_name="d", **{**STEP, **settings})


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = save_tiny(tmp_path_factory.mktemp("model"))
    return start_engine(model, config(model), 512, (999,), 0, masks=True)


@pytest.fixture(scope="module")
def vllm_engine(tmp_path_factory):
    """vLLM's CPU build, which has no way to say what it kept but its log-probabilities."""
    model = save_tiny(tmp_path_factory.mktemp("model"))
    for path in Path(model).glob("*config.json"):
        path.write_text(path.read_text().replace('"eos_token_id": 1', '"eos_token_id": null'))
    engine = start_engine(model, config(model, use_vllm=True), 512, (), 0, masks=True)
    yield engine
    engine.close()


def sampled(engine, tokens: int = TOKENS, **truncation):
    """One request of four completions that never stop early."""
    engine.submit(Request("r", PROMPT, 4, Sampling(1.0, tokens, **truncation)))
    while not (results := engine.poll()):
        pass
    (result,) = results
    return result


def trained(result, iterations: int = 1, **settings) -> dict[str, float]:
    """Figures of one learner step on the completions, half of them good."""
    AcceleratorState._reset_state(True)
    settings = config(temperature=1.0, num_iterations=iterations, learning_rate=1e-9, **settings)
    made = Learner(tiny_llama(), tiny_llama() if settings.beta else None, settings, pad_token_id=0)
    made.set_schedule(10)
    kept = result.kept or [None] * 4
    parts = zip(result.token_ids, result.logprobs, kept, strict=True)
    scored = tuple(Scored(Completion(ids, p, "", "length", 0, k), {"r": 1.0}, 1.0) for ids, p, k in parts)
    group = RolloutGroup(Problem(0, "q", "1"), (), None, PROMPT, scored, (1.0, -1.0, 1.0, -1.0))
    try:
        return made.train_on(training_samples([group], settings))
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()


@pytest.mark.parametrize("name, bound", [("engine", 0), ("vllm_engine", 288)])
def test_truncated_sampling_trains_as_whole_sampling_does(request, name, bound):
    """Without what was kept the sampler's correction leaves no gradient; with it learner and sampler agree. A top-k of
    the whole vocabulary leaves the cutting to top-p."""
    engine = request.getfixturevalue(name)
    engine.seed(0)
    whole = trained(sampled(engine))
    cut = sampled(engine, top_p=0.9, top_k=bound)
    blind = trained(replace(cut, kept=None))
    seeing = trained(cut, beta=0.1, iterations=2)
    assert blind["grad_norm"] < 1e-3 * whole["grad_norm"]
    assert 0.3 < seeing["grad_norm"] / whole["grad_norm"] < 3.0
    assert trained(cut, beta=0.1, iterations=2, shared_prefix=False)["loss"] == pytest.approx(seeing["loss"], abs=1e-5)
    for figures in (whole, seeing):
        assert figures["sampling/sampling_logp_difference/max"] < 1e-4
        assert figures["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-3)
    assert seeing["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is over the same sets, too
    assert blind["sampling/sampling_logp_difference/mean"] > 0.03
    assert 1 < seeing["sampling/kept_tokens/mean"] < 200 and "sampling/kept_tokens/mean" not in whole


def check_kept(result, top_k: int = 288) -> None:
    """Each set is the head of the model's distribution, and what its token's log-probability is over."""
    net = tiny_llama()
    for ids, logprobs, kept in zip(result.token_ids, result.logprobs, result.kept, strict=True):
        logits = net(torch.tensor([[*PROMPT, *ids]])).logits[0, len(PROMPT) - 1 : -1].detach()
        for token, logprob, own, row in zip(ids, logprobs, kept.sets(), logits, strict=True):
            assert token in own and 1 <= len(own) <= top_k
            assert row[list(own)].log_softmax(-1)[own.index(token)].item() == pytest.approx(logprob, abs=1e-4)
            assert row[list(own)].min() >= row.sort(descending=True).values[len(own) - 1] - 1e-4


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.5, "top_k": 9}, {"top_k": 1}])
def test_generate_says_what_it_kept(engine, monkeypatch, truncation):
    check_kept(sampled(engine, 20, **truncation), truncation.get("top_k", 288))
    assert sampled(engine, 2).kept is None
    monkeypatch.setattr(engine, "masks", False)
    assert sampled(engine, 2, **truncation).kept is None


def test_what_a_bounded_top_k_kept_is_read_from_log_probabilities(vllm_engine):
    for truncation in ({"top_k": 1}, {"top_k": 9, "min_p": 0.2}, {"top_k": 288, "top_p": 0.5}):
        check_kept(sampled(vllm_engine, 20, **truncation), truncation["top_k"])
    assert sampled(vllm_engine, 2).kept is None and sampled(vllm_engine, 2, top_p=0.9).kept is None
    vllm_engine.submit(Request("greedy", PROMPT, 1, Sampling(0.0, 2, top_k=5)))
    while not (results := vllm_engine.poll()):
        pass
    assert results[0].kept is None


def test_tokens_that_equal_the_last_of_top_k_are_kept_too():
    tied = [{7: math.log(0.5), 3: math.log(0.25), 9: math.log(0.25), 4: -math.inf, 5: masks.NOTHING}]
    assert masks.read_kept(tied) == Kept.of([[7, 3, 9]])
    assert masks.logprobs_to_ask(Sampling(1.0, 8, top_k=2)) == 18
    with pytest.raises(EngineError, match=r"^position 1: the 2 most likely tokens hold 0.75000 .* write another top_k"):
        masks.read_kept([*tied, {7: math.log(0.5), 3: math.log(0.25)}])


def test_what_vllm_says_it_kept():
    """vLLM's own message; its engine gives it on a GPU, or with Triton's CPU backend."""
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.masks, engine.version = True, 3
    request = Request("a", (5, 6), 2, Sampling(0.7, 8, top_p=0.9))
    engine._running = {"0": (request, None, 3), "1": (replace(request, sampling=Sampling(0.7, 8)), None, 3)}

    def output(name):
        outputs = [
            CompletionOutput(i, "", ids, 0.0, [{t: Logprob(-0.5)} for t in ids], finish_reason="stop",
                             sampling_mask=SamplingMask(sets))
            for i, (ids, sets) in enumerate([([7, 8], [[7, 9], [8]]), ([9], [[1, 2, 9]])])
        ]  # fmt: skip
        return RequestOutput(name, None, [5, 6], None, outputs, finished=True)

    result = engine._result(output("0"))
    assert result.kept == (Kept.of([[7, 9], [8]]), Kept.of([[1, 2, 9]]))
    assert engine._result(output("1")).kept is None  # nothing was left out
    assert engine._chosen(Sampling(0.7, 8, top_p=0.9)) == {"temperature": 0.7, "top_k": WHOLE_VOCABULARY}
    assert engine._chosen(Sampling(0.7, 8, top_k=20))["top_k"] == 20
    assert engine._chosen(Sampling(0.0, 8)) == {"temperature": 1.0, "top_k": 1}
    call = SimpleNamespace(problem=Problem(4, "q", "1"), stage="draft", sent_at=3)
    _check(result, request, call, mixes=False)
    for kept in (Kept.of([[7, 9], [9]]), Kept.of([[7]])):
        with pytest.raises(EngineError, match=r"row 4: the engine kept . sets of tokens for the 2 .* position 1"):
            _check(replace(result, kept=(kept, result.kept[1])), request, call, mixes=False)


def test_too_many_ties_end_the_run_though_they_came_while_the_engine_scored():
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.masks, engine.reads_masks, engine.on_cpu, engine.version = False, True, True, 3
    engine._asleep, engine._finished, engine._restarts = [], [], 0
    engine._running = {"0": (Request("a", (5, 6), 1, Sampling(1.0, 8, top_k=2)), None, 3)}
    step = {7: Logprob(math.log(0.5)), 3: Logprob(math.log(0.25))}
    outputs = [CompletionOutput(0, "", [7], 0.0, [step], finish_reason="stop")]
    done = [RequestOutput("0", None, [5, 6], None, outputs, finished=True)]
    engine.engine = SimpleNamespace(add_request=lambda *_, **__: None, step=lambda: done)
    with pytest.raises(EngineError, match="too many equal the last of top_k"):
        engine.score((5, 6))
    assert engine._restarts == 0


def test_of_training_with_top_k_log_probabilities_tell_what_was_kept(monkeypatch):
    monkeypatch.setattr(vllm_engine_module, "why_no_option", lambda on_cpu: None)
    monkeypatch.setattr(VLLMEngine, "_start", lambda self: None)
    for top_k in (0, 20):
        made = VLLMEngine("m", config(use_vllm=True), 64, (1,), 0, masks=True, top_k=top_k)
        assert (made.masks, made.reads_masks) == (not top_k, bool(top_k))
        assert "return_sampling_mask" in made._options() or made._options()["max_logprobs"] == -1


def test_a_vllm_without_the_second_runner_is_told_so(tmp_path, monkeypatch):
    """The real CPU build, past the check before the run."""
    path = save_tiny(tmp_path)
    monkeypatch.setattr(vllm_engine_module, "why_no_option", lambda on_cpu: None)
    with pytest.raises(ConfigError, match=r"^top_p, min_p: .* export VLLM_USE_V2_MODEL_RUNNER=1, or write a top_k"):
        VLLMEngine(path, config(path, use_vllm=True), 64, (1,), 0, masks=True)


WAYS_OUT = {
    "top_p: 0.9": ({"top_p": 0.9}, "correction: false, or bound what is kept .top_k: 64., .* or take"),
    "min_p: 0.1": ({"min_p": 0.1, "kl_tau": 0.1, "vllm_importance_sampling_correction": False}, "or kl_tau: 0, or"),
    "top_p: 0.8": ({"top_p": 0.8, "off_policy_mask_threshold": 0.1, "rollout_rs": "token_k2"},
                   "correction: false, off_policy_mask_threshold: null, rollout_rs: null, or bound"),
}  # fmt: skip


@pytest.mark.parametrize("key", WAYS_OUT)
@pytest.mark.parametrize("where", [{}, {"vllm_mode": "server"}])
def test_where_nobody_says_what_was_kept_truncation_is_refused(key, where):
    settings, words = WAYS_OUT[key]
    wanted = config(
        use_vllm=True, rollout_rs_threshold="1.0" if "rollout_rs" in settings else None, **settings, **where
    )
    reason = masks.why_not(wanted, 0, on_cpu=True)
    with pytest.raises(ConfigError, match=f"^{key} cannot be trained with here: .*{words}"):
        wanted.check_sampler(reason)
    with pytest.raises(ConfigError, match=f"^{key} .* trained behind another prompt .*, or refinement_context: draft"):
        replace(wanted, use_vllm=False, refinement_context="both").check_sampler(None)
    replace(wanted, use_vllm=False).check_sampler(masks.why_not(replace(wanted, use_vllm=False), 0, on_cpu=True))
    replace(wanted, top_k=20).check_sampler(masks.why_not(wanted, 20, on_cpu=True))
    if not where:
        wanted.check_sampler(masks.why_not(wanted, 0, on_cpu=False))
        with pytest.raises(ConfigError, match=f"^{key} cannot be trained with here"):
            _placed(wanted)
    off = {"vllm_importance_sampling_correction": False, "off_policy_mask_threshold": None, "rollout_rs": None,
           "rollout_rs_threshold": None, "kl_tau": 0.0}  # fmt: skip
    replace(wanted, **off).check_sampler(reason)
    replace(wanted, top_p=1.0, top_k=0, min_p=0.0).check_sampler(reason)


def test_an_older_vllm_is_told_by_what_it_lacks(tmp_path, monkeypatch):
    (tmp_path / "vllm" / "config").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "config" / "model.py").write_text("enforce_eager: bool = False")
    monkeypatch.setattr(masks, "package_folder", lambda name: tmp_path / name)
    why = masks.why_not(config(use_vllm=True), 0, on_cpu=False)
    assert "has no return_sampling_mask, which 0.28 and later have" in why
    assert masks.why_not(config(), 0, on_cpu=False) is None
