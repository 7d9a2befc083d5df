"""The load-balancing loss of mixtures of experts: transformers' own over the tokens of a step, however it is cut."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import TrainingSample
from igrpo.engines import Request, Sampling, start_engine
from igrpo.engines.routes import read_routes, why_not
from igrpo.learner import batching
from igrpo.learner.experts import aux_coefficient
from igrpo.learner.packing import Limits, pack, pad
from igrpo.models.routers import Routers
from igrpo.models.saved_format import saved_tensors
from igrpo.settings import ConfigError
from igrpo_kernels.model_logits import language_model
from tests.learner.test_architectures import samples, tiny
from tests.learner.test_learner import fresh_accelerate, learner, some_samples  # noqa: F401

COEF = 2.0
CUTS = {
    "packed": {"token_budget": 10_000},
    "prompts apart": {"token_budget": 10_000, "shared_prefix": False},
    "one by one, checkpointed": {"token_budget": 1, "gradient_checkpointing": True},
}


def gradient(model, **settings) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    made = learner(model, max_grad_norm=0.0, **settings)
    if settings.get("gradient_checkpointing"):
        made.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    metrics = made.train_on(samples())
    return metrics, {name: p.grad.clone() for name, p in made.unwrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2", "jamba"])
def test_it_is_transformers_own_of_the_whole_step_however_that_is_cut(kind):
    """gpt-oss and Jamba are padded; DeepSeek-V2 balances nothing unless it is asked to."""
    model = tiny(kind)
    read = [(*s.prompt_ids, *s.completion_ids[:-1]) for s in samples()]
    ids, mask = torch.zeros(2, len(read), max(map(len, read)), dtype=torch.int64)
    for i, tokens in enumerate(read):
        ids[i, : len(tokens)], mask[i, : len(tokens)] = torch.tensor(tokens), 1
    truth = copy.deepcopy(model).train()
    out = language_model(truth)(input_ids=ids, attention_mask=mask, output_router_logits=True)
    wanted = load_balancing_loss_func(out.router_logits, 4, 2, mask)
    (COEF * wanted).backward()
    parts = {name: p.grad for name, p in truth.named_parameters() if p.grad is not None and p.grad.any()}
    scale = torch.cat([part.flatten() for part in parts.values()]).norm()
    _, without = gradient(model, router_aux_loss_coef=0.0)
    for cut, settings in CUTS.items():
        metrics, found = gradient(model, router_aux_loss_coef=COEF, **settings)
        assert metrics["aux_loss"] == pytest.approx(float(wanted.detach()), rel=1e-5), cut
        assert 0.25 < metrics["experts/busiest_share"] < 0.5 and metrics["experts/idle_share"] == 0.0
        off = torch.cat([(found[name] - without[name] - part).flatten() for name, part in parts.items()])
        assert scale > 0.1 and off.norm() < 1e-4 * scale, cut


@pytest.mark.parametrize("shared", [True, False, None])
def test_every_sequence_reads_its_tokens_once(shared):
    """By weight, and without the last token, whose prediction nobody holds against anything; None: padded."""
    weighed = [batching.replace(s, weight=0.5) for s in [*samples(), *some_samples()]]
    totals = batching.count(weighed)
    for limits in (Limits(), Limits(tokens=30), Limits(completions=1)):
        bins = pad(weighed, limits) if shared is None else pack(weighed, limits, shared=shared)
        micros = [batching.micro_batch(one, totals, "grpo", 0 if shared is None else None) for one in bins]
        assert sum(float(m.readers.sum()) for m in micros) == sum(
            0.5 * (len(s.prompt_ids) + len(s.completion_ids) - 1) for s in weighed
        )
        assert all(m.readers.numel() == m.input_ids.numel() for m in micros)


def test_the_weight_is_the_settings_or_the_models_own():
    def weight(kind: str, asked: float | None = None) -> float:
        config = TrainConfig(model_name_or_path="m", dataset_name="d", router_aux_loss_coef=asked)
        return aux_coefficient(tiny(kind).config, config)

    assert (weight("qwen3_moe"), weight("olmoe"), weight("mixtral", 0.3), weight("mixtral", 0.0)) == (
        1e-3,
        0.01,
        0.3,
        0,
    )
    assert (weight("deepseek_v3"), weight("deepseek_v3", 0.1), weight("llama"), weight("llama", 0.0)) == (0, 0.1, 0, 0)
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: 0\.1 .*llama model has no router.*write null or 0"):
        weight("llama", 0.1)
    dense = tiny("doge")  # with a weight for experts that it does not have
    assert "aux_loss" not in learner(dense).train_on(samples())
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef: 0\.1 .*doge model has no router"):
        learner(dense, router_aux_loss_coef=0.1)


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_of_router_and_experts_are_balanced_too(bf16):
    """The first gradient of the balance alone: B is 0, and A gets none through it."""
    torch.manual_seed(0)
    modules = ["gate", "gate_up_proj", "q_proj"]
    settings = {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": modules, "bf16": bf16}
    made = learner(tiny("qwen3_moe"), **settings, router_aux_loss_coef=1.0, max_grad_norm=0.0, beta=1e-9)
    quiet = [batching.replace(s, advantage=0.0) for s in samples()]
    metrics = made.train_on(quiet)
    reached = {n for n, p in made.unwrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-5}
    assert metrics["aux_loss"] > 1.9 and float(torch.tensor(metrics["aux_loss"]).bfloat16()) != metrics["aux_loss"]
    assert reached and all(".lora_B." in name for name in reached)
    assert {part for part in ("gate.", "experts.", "q_proj.") for name in reached if part in name} == {
        "gate.", "experts.", "q_proj.",
    }  # fmt: skip


def test_experts_compute_in_bf16_as_the_engine_does():
    """transformers' product of all experts is not one that autocast casts: it took the float32 weights."""
    model = tiny("qwen3_moe")
    rounded = copy.deepcopy(model)
    for name, p in rounded.named_parameters():
        if ".experts." in name:
            p.data = p.data.bfloat16().float()
    ids = (5, 9, 33, 71, 8, 64)
    scores = [learner(one, bf16=True).score(ids) for one in (model, rounded)]
    assert scores[0] == scores[1]
    exact = [learner(one).score(ids) for one in (model, rounded)]
    assert exact[0] != exact[1]


def sampled(folder, kind: str, **settings) -> tuple[Any, list[TrainingSample], Any]:
    """A model, what Hugging Face's engine sampled from its folder in bf16, and the engine."""
    model = tiny(kind)
    model.save_pretrained(folder)
    config = TrainConfig(model_name_or_path="m", dataset_name="d", use_vllm=False, use_cpu=True, bf16=True, **settings)
    engine = start_engine(str(folder), config, 64, (2,), 0, routes=True)
    for i, n in enumerate((5, 17)):
        prompt = tuple(range(20 + i, 20 + i + n))
        engine.submit(Request(str(i), prompt, 4, Sampling(temperature=1.0, max_tokens=12)))
    results, made = engine.poll(), []
    for r in results:
        for i, (ids, logps, routes) in enumerate(zip(r.token_ids, r.logprobs, r.routes, strict=True)):
            made.append(TrainingSample(r.prompt_ids, ids, logps, (-1.0) ** i, routes=routes))
    return model, made, engine


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "glm4_moe"])
def test_the_engines_experts_are_the_learners(kind, tmp_path):
    """In bf16 another one is chosen now and then; the learner in float32, packed or padded, goes with the engine."""
    model, batch, engine = sampled(tmp_path, kind)
    pushed = engine.model
    engine.push_weights(lambda: saved_tensors(model, torch.bfloat16), 1)
    assert engine.model is not pushed and engine._routers is not None  # the new model's are noted too
    gaps, gradients = {}, {}
    for replay in (True, False):
        made = learner(
            model, router_replay=replay, temperature=1.0, max_grad_norm=0.0, gradient_checkpointing=True,
            token_budget=10_000,
        )  # fmt: skip
        made.unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        gaps[replay] = made.train_on(batch)["sampling/sampling_logp_difference/mean"]
        gradients[replay] = {n: p.grad for n, p in made.unwrapped.named_parameters() if p.grad is not None}
    assert 0 < gaps[True] <= gaps[False] * 1.05
    routers = [n for n in gradients[True] if n.endswith((".gate.weight", ".router.weight"))]
    assert routers and all(gradients[True][n].abs().max() > 0 for n in routers)
    with torch.no_grad():  # routers that would choose the others
        for name, p in model.named_parameters():
            if name in routers:
                p.neg_()
    made = learner(model, router_replay=True, token_budget=10_000)
    micro = made._micro_batch(made._plan(batch)[0], batching.count(batch), made.packs)
    made.policy.routers.note()
    made._log_probs(micro)
    said = micro.readers > 0
    for layer, (chosen,) in made.policy.routers.noted.items():
        assert torch.equal(chosen[said], micro.routes[said, layer].long())


def test_what_was_noted_is_what_the_model_chooses(tmp_path):
    """Prompts of several lengths, padded in the engine; a sequence read at once is sent to the same experts."""
    _, batch, engine = sampled(tmp_path, "qwen3_moe")
    for s in batch:
        engine._routers.note()
        engine.model(input_ids=torch.tensor([[*s.prompt_ids, *s.completion_ids[:-1]]]))
        own = engine._routers.of_rows(1)[0]
        found = torch.frombuffer(bytearray(s.routes.ids), dtype=torch.int16).view(own.shape)
        assert (found.sort(-1).values == own.sort(-1).values).float().mean() > 0.95
    with pytest.raises(ConfigError, match=r"router_replay: no router of LlamaForCausalLM.*write false"):
        learner(router_replay=True)
    for kind in ("jamba", "phimoe"):  # the first chooses outside of its router, the second without topk
        with pytest.raises(ConfigError, match=r"router_replay: no router of .*write false"):
            learner(tiny(kind), router_replay=True)
    asked = TrainConfig(model_name_or_path="m", dataset_name="d", router_replay=True)
    with pytest.raises(ConfigError, match=r"router_replay: .*never tried on a CPU.*use_vllm: false"):
        asked.check_replay(why_not(asked, on_cpu=True))
    asked.check_replay(why_not(replace(asked, lora_sync="adapter"), on_cpu=False))  # of no adapter
    assert "lora_sync: adapter" in why_not(replace(asked, lora_sync="adapter", use_peft=True), on_cpu=False)


def test_a_ranking_of_groups_is_no_choice_of_experts():
    """DeepSeek's takes as many of its groups as a token takes experts."""
    model = tiny(
        "deepseek_v3", n_group=4, topk_group=2, n_routed_experts=8, num_local_experts=8, first_k_dense_replace=0
    )
    routers = Routers(model)
    routers.note()
    model(input_ids=torch.tensor([[5, 9, 33]]))
    assert routers.noted and all(len(chosen) == 1 for chosen in routers.noted.values())
    routers.given = torch.tensor([6, 7]).expand(3, routers.layers, 2)
    routers.note()
    model(input_ids=torch.tensor([[5, 9, 33]]))
    assert all((torch.cat(chosen) == torch.tensor([6, 7])).all() for chosen in routers.noted.values())


def test_vllms_experts_are_read_row_by_row():
    """It has a row for each token but the last, of bytes or of 16 bits where there are more than 256 experts."""
    said = np.arange(5 * 2 * 3).reshape(5, 2, 3)
    for dtype in (np.uint8, np.uint16):
        routes = read_routes(said.astype(dtype))
        assert (routes.layers, routes.k) == (2, 3)
        assert np.frombuffer(routes.ids, np.int16).tolist() == said.flatten().tolist()
