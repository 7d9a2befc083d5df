"""Changed weights reach a real engine whole, whatever the architecture; one that keeps some of its old ones is refused
before the first step, by name."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from igrpo.config.train_config import TrainConfig
from igrpo.engines import EngineError, Request, Result, Sampling, start_engine, weights
from igrpo.engines.adapter_files import as_loaded
from igrpo.engines.base import TRIAL_VERSION, UNKNOWN_VERSION, NoRoomError
from igrpo.engines.hf_engine import HFEngine
from igrpo.engines.servers.client import ServerError
from igrpo.engines.servers.push import publish, push_files
from igrpo.engines.sync import WeightSync, disturbed
from igrpo.engines.weights import differing, fingerprint, recorded, twins
from igrpo.learner.learner import Learner
from igrpo.models.loading import load_policy
from igrpo.settings import ConfigError
from igrpo.training_run import TrainingRun
from tests.engines.test_engines import drain, lose_the_weights
from tests.support.servers import processes, wait_until
from tests.support.tiny import save_tiny, tiny_tokenizer

EVERY = pytest.mark.applies("IGRPO_EVERY_ENGINE" in os.environ)
"""Twenty seconds each: they run where somebody asks for them."""
SIZES = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
CASES = {
    "Qwen3Moe, tied": ("Qwen3MoeConfig", EXPERTS | {"tie_word_embeddings": True}),
    "GPT2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "Olmoe": ("OlmoeConfig", EXPERTS),
    "Mixtral": ("MixtralConfig", EXPERTS),
    "Qwen2Moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "GraniteMoe": ("GraniteMoeConfig", EXPERTS),
    "Glm4Moe": ("Glm4MoeConfig", ROUTED),
    "Llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "Gemma3": ("Gemma3TextConfig", {}),
    "Phi3": ("Phi3Config", {}),
}
IN_THE_SUITE = ("Qwen3Moe, tied", "GPT2")
IDS = tuple(range(40, 90))


def written(folder: Path, name: str) -> str:
    torch.manual_seed(0)
    kind, own = CASES[name]
    config = getattr(transformers, kind)(**SIZES | own)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def settings(path: str, **more) -> TrainConfig:
    return TrainConfig(**{"model_name_or_path": path, "dataset_name": "d", "use_cpu": True, "bf16": False, **more})


def stir(learner: Learner, seed: int) -> None:
    """Every parameter and every router's correction."""
    torch.manual_seed(seed)
    model = learner.unwrapped
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))]
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn_like(tensor) * 0.05)


@pytest.mark.parametrize("name", [n if n in IN_THE_SUITE else pytest.param(n, marks=EVERY) for n in CASES])
def test_changed_weights_reach_vllm(name, tmp_path):
    """Unchanged experts moved it by 4.4 nats: reloaded, they were not packed for the CPU's kernel again."""
    path = written(tmp_path, name)
    config = settings(path)
    learner = Learner(load_policy(path, config), None, config, pad_token_id=0)
    engine = start_engine(path, config, max_model_length=128, stop_token_ids=[1], seed=0)
    try:
        sync = WeightSync(engine, learner, IDS, config)
        sync.prove(0)
        assert engine.version == TRIAL_VERSION
        for version in (1, 2):
            before = learner.score(IDS)
            stir(learner, version)
            figures = sync.push(version)
            assert torch.tensor(learner.score(IDS)).sub(torch.tensor(before)).abs().mean() > 0.3
            assert torch.tensor(engine.score(IDS)).sub(torch.tensor(learner.score(IDS))).abs().max() < 1e-3
            assert figures["sync/restarts"] == 0
    finally:
        engine.close()


def gap(learner: Learner, result: Result) -> float:
    """Largest difference of the sampled tokens' log-probabilities at temperature 1 from the learner's (nats)."""
    both = zip(result.token_ids, result.logprobs, strict=True)
    return max(
        (torch.tensor(learner.score((*IDS, *i))[-len(i) :]) - torch.tensor(p)).abs().max().item() for i, p in both
    )


@pytest.mark.parametrize("way", ["server", "here", "generate"])
def test_an_adapter_travels_alone_beside_one_base(way, tmp_path):
    path, everywhere = written(tmp_path, "Llama"), ["all-linear", "embed_tokens", *["lm_head"] * (way == "generate")]
    use_vllm, served = way != "generate", way == "server"
    alone = {"use_peft": True, "lora_sync": "adapter", "lora_r": 4, "lora_dropout": 0.0, "use_vllm": use_vllm}
    alone |= {"lora_target_modules": everywhere, "vllm_weight_dir": str(tmp_path / "on its way")}
    alone |= {"vllm_mode": "server" if served else "colocate", "vllm_request_timeout": 20.0}
    config = settings(path, **alone)
    learner = Learner(load_policy(path, config), None, config, pad_token_id=0)
    engine = start_engine(path, config, 128, [1], 0, adapter=learner.adapters.described(way != "generate"))
    before = [p.detach().clone() for p in learner.unwrapped.parameters()]
    try:
        sync = WeightSync(engine, learner, IDS, config)
        sync.prove(0)
        assert all(torch.equal(a, b) for a, b in zip(before, learner.unwrapped.parameters(), strict=True))
        for version in (1, 2):  # a second adapter takes the place of the first
            own = learner.score(IDS)
            with torch.no_grad():
                for name, p in learner.unwrapped.named_parameters():
                    if ".lora_B." in name:
                        p.add_(torch.randn_like(p) * 0.1)
            trained = [p for p in learner.unwrapped.parameters() if p.requires_grad]
            for p in trained:
                p.grad = torch.zeros_like(p)
            if served and version == 2:  # requests of the old adapter go on under the new one and do not bring it back
                for i in range(20):
                    engine.submit(Request(f"{i}", IDS, 8, Sampling(temperature=1.0, max_tokens=70)))
                wait_until(lambda: engine.servers[0].load)
            figures = sync.push(version)
            if engine_left := set(getattr(engine, "_tasks", ())):
                ended = {r.request_id: r.version for r in drain(engine, 20).values()}
                assert {ended[name] for name in engine_left} == {2}
            assert trained and all(p.grad is None for p in trained), "the engine wakes in their room"
            assert torch.tensor(learner.score(IDS)).sub(torch.tensor(own)).abs().mean() > 0.3
            assert torch.tensor(engine.score(IDS)).sub(torch.tensor(learner.score(IDS))).abs().max() < 1e-3
            if served and version == 2:  # one that comes back has the adapter, too
                processes(engine.servers[0])[1].kill()  # now: the requests might end before it
            for request in ("a", "b"):
                engine.submit(Request(request, IDS, 2, Sampling(temperature=1.0, max_tokens=6)))
            if use_vllm and not served and version == 2:
                engine.poll()
                engine.llm.apply_model(lose_the_weights)
            assert max(gap(learner, result) for result in drain(engine, 2).values()) < 1e-3
        assert not use_vllm or figures["sync/tensors_compared"] == 2 * (2 * 7 + 1)
        if served:
            check_a_flipped_bit(engine, learner, tmp_path)
            return
        stranger = [("base_model.model.model.layers.0.nowhere.lora_A.weight", torch.ones(4, 4))]
        push = engine._push if use_vllm else engine.push_weights  # which would try again on a new engine
        with pytest.raises(EngineError):
            push(lambda: stranger, 3)
        folders = [*tmp_path.glob("on its way/*")]
        assert len(folders) == use_vllm and not any(any(folder.iterdir()) for folder in folders)
    finally:
        engine.close()
    assert not any(tmp_path.glob("on its way/*"))


def check_a_flipped_bit(engine: Any, learner: Learner, folder: Path) -> None:
    """It is found, and the server takes the next push."""
    own = [(name, tensor.clone()) for name, tensor in learner.adapter_tensors()]
    (damaged := [(name, tensor.clone()) for name, tensor in own])[5][1].view(torch.int32)[0, 0] ^= 1
    for number, factors in ((8, damaged), (9, own)):
        sent = publish(lambda factors=factors: factors, number, folder, engine._adapter)
        expected = dataclasses.replace(sent, checksums=as_loaded(dict(own), engine._adapter))
        pushing = push_files(engine.servers[0].client, expected, timeout=60.0)
        with nullcontext() if factors is own else pytest.raises(ServerError, match=f"version 8 in {own[5][0]}"):
            compared = asyncio.run_coroutine_threadsafe(pushing, engine._loop).result()
    assert compared == len(own)


def test_rounded_weights_are_judged_by_their_format(tmp_path):
    """And with an argument that only vLLM knows."""
    path = save_tiny(tmp_path)
    rounded = {
        "bf16": True,
        "vllm_quantization": "fp8_per_channel",
        "vllm_engine_args": {"max_num_batched_tokens": 256},
    }
    with pytest.raises(ConfigError, match=r"vllm_engine_args: .*max_batched.* EngineArgs takes"):
        start_engine(path, settings(path, vllm_engine_args={"max_batched": 1}), 128, [1], 0)
    config = settings(path, **rounded)
    AcceleratorState._reset_state(True)
    learner = Learner(load_policy(path, config), None, config, pad_token_id=0)
    engine = start_engine(path, config, max_model_length=128, stop_token_ids=[1], seed=0)
    try:
        assert engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 256
        sync = WeightSync(engine, learner, IDS, config)
        sync.prove(0)
        stir(learner, 1)
        figures = sync.push(1)
        assert 0.05 < figures["sync/probe_logp_gap"] < 0.5 and figures["sync/restarts"] == 0
        assert figures["sync/tensors_compared"] > 0  # embedding and norms are not rounded
    finally:
        AcceleratorState._reset_state(True)
        engine.close()


class KeepsItsHead(HFEngine):
    """What vLLM's CPU backend once did with a tied head."""

    def push_weights(self, source, version):
        head = self.model.lm_head.weight.detach().clone()
        figures = super().push_weights(source, version)
        self.model.lm_head.weight = torch.nn.Parameter(head)
        return figures


class ComputesOtherwise(HFEngine):
    def score(self, token_ids):
        return [value - 1.0 for value in super().score(token_ids)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (HFEngine, None),
        (KeepsItsHead, r"LlamaForCausalLM does not reach the engine whole.*use_vllm: false"),
        (ComputesOtherwise, r"LlamaForCausalLM computes differently in the engine.* 1\.00 nats"),
    ],
)
def test_an_engine_that_cannot_be_trusted_is_refused_by_name(kind, message, tmp_path):
    path = save_tiny(tmp_path)
    config = settings(path)
    learner = Learner(load_policy(path, config), None, config, pad_token_id=0)
    before = [p.detach().clone() for p in learner.unwrapped.parameters()]
    sync = WeightSync(kind(path, config, 128, [1], 0), learner, IDS, config)
    if message is None:
        sync.prove(0)
        assert sync.push(0)["sync/probe_logp_gap"] < 1e-4
    else:
        with pytest.raises(ConfigError, match=message):
            sync.prove(0)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.unwrapped.parameters(), strict=True))


class FindsNoRoom(HFEngine):
    def push_weights(self, source, version):
        raise NoRoomError("vLLM's weights find no room beside the learner")


def test_no_room_to_wake_in_is_not_the_models_fault(tmp_path):
    path = save_tiny(tmp_path)
    config = settings(path)
    learner = Learner(load_policy(path, config), None, config, pad_token_id=0)
    with pytest.raises(NoRoomError, match=r"^vLLM's weights find"):
        WeightSync(FindsNoRoom(path, config, 128, [1], 0), learner, IDS, config).prove(0)


def test_who_samples_after_a_checkpoint_pushes_first_and_nobody_else():
    """After a signal, the push took its time from what is left to save in."""
    pushed = []
    parts = {"learner.gather": lambda one: [one], "rollout.state_dict": list, "rollout.run": lambda *_: ([], None)}
    run = MagicMock(step=3, held_out=[], **parts)
    run.engine = SimpleNamespace(version=3, sleep=lambda: setattr(run.engine, "version", UNKNOWN_VERSION))
    run.push_weights = lambda version: (pushed.append(version), setattr(run.engine, "version", version))
    run._awake = partial(TrainingRun._awake, run)
    TrainingRun.save(run)
    TrainingRun.evaluate(run, "after training")  # of nothing
    assert pushed == []
    TrainingRun.sample(run, 4)
    TrainingRun.sample(run, 5)
    assert pushed == [3]
    run.learner.gather = lambda one: [one, True]  # another process's engine slept
    TrainingRun.sample(run, 6)
    assert pushed == [3, 3]


class IgnoresAdapters(HFEngine):
    def _push_adapter(self, source, version):
        pass


def test_a_trained_adapter_that_is_ignored_is_refused(tmp_path):
    """As after a resume: the trial once took little more than the trained adapter away."""
    path = save_tiny(tmp_path)
    config = settings(path, use_peft=True, lora_sync="adapter", lora_dropout=0.0)
    learner = Learner(load_policy(path, config), None, config, pad_token_id=0)
    with torch.no_grad():
        for name, p in learner.unwrapped.named_parameters():
            if ".lora_B." in name:
                p.add_(torch.randn_like(p) * 1e-4)
    before = [p.detach().clone() for p in learner.unwrapped.parameters()]
    adapter = learner.adapters.described()
    WeightSync(HFEngine(path, config, 128, [1], 0, adapter=adapter), learner, IDS, config).prove(7)
    ignores = IgnoresAdapters(path, config, 128, [1], 0, adapter=adapter)
    with pytest.raises(ConfigError, match=r"lora_sync: .*does not reach the engine whole"):
        WeightSync(ignores, learner, IDS, config).prove(7)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.unwrapped.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disturbed_weights_are_a_few_percent_off_and_come_back(dtype, tmp_path):
    config = settings(save_tiny(tmp_path))
    learner = Learner(load_policy(config.model_name_or_path, config).to(dtype), None, config, pad_token_id=0)
    before = [p.detach().clone() for p in learner.unwrapped.parameters()]
    with disturbed(learner):
        for old, new in zip(before, learner.unwrapped.parameters(), strict=True):
            share = (new / old - 1).abs()[old != 0]
            assert ((share > 0.06) & (share < 0.13)).all()
    assert all(torch.equal(a, b) for a, b in zip(before, learner.unwrapped.parameters(), strict=True))


def test_what_an_engine_keeps_under_another_prefix_is_compared():
    """vLLM turns ``model.language_model.`` round: nothing was found to compare, and every push was refused."""
    from vllm.model_executor.models.utils import WeightsMapper

    shapes = {"embed_tokens": (7, 4), "norm": (4,), "o_proj": (4, 4), "q_proj": (6, 4)}
    inner = torch.nn.Module()
    inner.embed_tokens, inner.norm = torch.nn.Embedding(8, 4), torch.nn.LayerNorm(4, bias=False)
    inner.qkv_proj, inner.o_proj = torch.nn.Linear(4, 12, bias=False), torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.ModuleDict({"language_model": torch.nn.ModuleDict({"model": inner})})
    model.hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model."}, orig_to_new_substr={"q_proj": "qkv_proj"}
    )
    sent = {f"model.language_model.{name}.weight": shape for name, shape in shapes.items()}
    found = {name: tuple(tensor.shape) for name, tensor in twins(model, sent)}
    assert found == {f"model.language_model.{name}.weight": shapes[name] for name in ("embed_tokens", "norm")}


def test_a_fingerprint_knows_every_bit_and_its_place(monkeypatch):
    for dtype in (torch.bfloat16, torch.float32, torch.bool, torch.int64):
        tensor = (100 * torch.randn(7, 5)).to(dtype)
        tensor[0, 0], tensor[3, 3] = 0, 1
        whole = fingerprint(tensor)
        changed, swapped = tensor.clone(), tensor.clone()
        changed.reshape(-1).view(torch.uint8)[11] ^= 1
        swapped[0, 0], swapped[3, 3] = tensor[3, 3], tensor[0, 0]
        assert fingerprint(changed) != whole and fingerprint(swapped) != whole
        monkeypatch.setattr(weights, "PIECE", 4)  # the tensor in pieces
        assert fingerprint(tensor) == whole == fingerprint(tensor.t().contiguous().t())
        monkeypatch.undo()
    assert fingerprint(torch.zeros(0)) == 0


def test_a_push_keeps_none_of_the_weights_and_finds_one_flipped_bit():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7)).to(torch.bfloat16)
    model.register_parameter("correction", torch.nn.Parameter(torch.randn(9)))  # float32, as it is sent
    model.register_parameter("wider", torch.nn.Parameter(torch.randn(9, 2)))  # sent in bfloat16
    with torch.no_grad():
        model.wider.copy_(model.wider.bfloat16())
    sent, alive = {}, []

    def source():
        for name, parameter in model.named_parameters():
            tensor = parameter.detach().bfloat16() if name == "wider" else parameter.detach().clone()
            alive.append(weakref.ref(tensor))
            yield name, tensor

    for _ in recorded(source(), sent, torch.bfloat16):
        pass
    del _
    assert [ref() is not None for ref in alive] == [name == "correction" for name in sent]
    assert differing(model, sent) == (len(sent), [])
    for name, parameter in model.named_parameters():
        parameter.data.view(torch.int16).view(-1)[1] ^= 64
        assert differing(model, sent) == (len(sent), [name])
        parameter.data.view(torch.int16).view(-1)[1] ^= 64
