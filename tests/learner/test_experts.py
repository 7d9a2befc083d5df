"""The load-balancing loss of mixtures of experts: transformers' own over the tokens of a step, however it is cut."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from igrpo.config.train_config import TrainConfig
from igrpo.learner import batching
from igrpo.learner.experts import aux_coefficient
from igrpo.learner.packing import Limits, pack, pad
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
    assert metrics["aux_loss"] > 1.9
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
