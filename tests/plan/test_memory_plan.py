"""The plan's arithmetic against real models: parameters counted, activations measured, verdicts that follow."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
)

from igrpo.config.train_config import TrainConfig
from igrpo.learner.experts import follow_autocast
from igrpo.machine import Machine, this_machine
from igrpo.models.loading import blank, model_sizes
from igrpo.plan.memory import (
    CHUNK_BYTES,
    GIB,
    activation_bytes_per_token,
    largest_context,
    memory_plan,
    trained_parameters,
)
from igrpo.plan.models import counted, with_adapters
from igrpo.plan.shapes import has_experts, model_shape
from igrpo_kernels import lm_head
from tests.support.architectures import tiny_config

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
A100 = Machine("cuda", 80 * GIB)


def config(**settings) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_name="d", **settings)


@pytest.mark.parametrize(
    ("model", "made"),
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES)),
        (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True)),
        (Qwen2ForCausalLM, Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
        (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
        (Gemma2ForCausalLM, Gemma2Config(**SIZES)),
        (Gemma3ForCausalLM, Gemma3TextConfig(**SIZES)),
        (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_parameters_are_counted_as_the_model_has_them(model, made):
    with torch.device("meta"):
        real = sum(p.numel() for p in model(made).parameters())
    assert model_shape(made.to_dict()).parameters == real


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_moe", "glm4_moe", "olmoe"])
def test_experts_are_counted_once_for_memory_and_by_choice_for_a_token(kind):
    """2 of 4 are chosen: half of their parameters. Shared ones and dense first layers are met by every token."""
    made = tiny_config(kind, num_hidden_layers=3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    real = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(n for name, n in real.items() if ".experts." in name)
    layers = [sum(n for name, n in real.items() if name.startswith(f"model.layers.{i}.")) for i in range(3)]
    sizes = model_sizes(made)
    shape = model_shape(sizes, counted(made.to_dict()))
    assert (shape.parameters, shape.layer_parameters) == (sum(real.values()), max(layers))
    assert has_experts(sizes) and shape.active_parameters == shape.parameters - routed // 2 and routed
    assert (shape.experts, shape.experts_per_token) == (4, 2)
    for chosen in (["all-linear"], ["q_a_proj" if kind == "deepseek_v3" else "q_proj"], ["gate_up_proj"]):
        made_so = config(
            use_peft=True,
            lora_r=2,
            lora_dropout=0.0,
            lora_target_modules=chosen,
            bf16=True,
            gradient_checkpointing=False,
        )
        adapted = with_adapters(shape, model, made_so)
        assert trained_parameters(adapted, made_so) == sum(p.numel() for p in model.parameters() if p.requires_grad)
        copies = [i.bytes for i in memory_plan(adapted, made_so, A100, context=64).learning if i.name == "compute copy"]
        assert copies == ([2 * adapted.adapted_experts] if adapted.adapted_experts else []) and (
            (chosen == ["gate_up_proj"]) <= (0 < adapted.adapted_experts < routed)
        )
        model = blank(made)
    rounded = memory_plan(shape, config(use_peft=True, load_in_4bit=True, bf16=True), A100, context=64)
    assert next(i.bytes for i in rounded.items if i.name == "base weights") > 2 * routed
    assert memory_plan(shape, config(), A100, context=64).certain > 16 * shape.parameters


@pytest.mark.parametrize("kind", ["qwen3_vl_moe_text", "mistral4"])
def test_the_text_half_of_another_model_is_counted_by_its_config_alone(kind):
    sizes = tiny_config(kind).to_dict()
    assert counted(sizes) is None and model_shape(sizes).experts == 4


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sizes", [(128, 256, 4, 2), (192, 640, 6, 2), (128, 384, 4, 4)])
def test_activations_are_what_autograd_keeps_of_a_layer(sizes, bf16):
    hidden, inner, heads, kv_heads = sizes
    made = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=32,
    )  # fmt: skip
    tokens = 250  # unlike any side of a weight, whose compute copies do not count
    chosen = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": inner // 4}
    for one in (made, Qwen3MoeConfig(**(made.to_dict() | chosen | {"model_type": "qwen3_moe"}))):
        two, four = (_kept_bytes(one, layers, tokens, bf16) for layers in (2, 4))
        measured = (four - two) / 2 / tokens
        assert activation_bytes_per_token(model_shape(one.to_dict()), bf16) == pytest.approx(measured, rel=0.2)


def _kept_bytes(made: LlamaConfig, layers: int, tokens: int, bf16: bool) -> int:
    made.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(made).train()
    follow_autocast(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    copies = {tuple(p.shape) for p in model.parameters()}
    copies |= {tuple(p.mT.shape) for p in model.parameters() if p.ndim > 1}
    kept: dict[int, torch.Tensor] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights and tuple(t.shape) not in copies:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", enabled=bf16):
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_the_chunk_is_the_kernels():
    assert CHUNK_BYTES == lm_head.CHUNK_BYTES


def sizes_of(plan) -> dict[str, float]:
    return {item.name: item.bytes / GIB for item in plan.items}


def test_a_7b_model_does_not_fit_one_gpu_and_the_plan_says_what_would():
    shape = model_shape(QWEN_7B)
    assert shape.parameters == 7_615_616_512
    awake = config(vllm_gpu_memory_utilization=0.3, draft_policy_lag=1)
    plan = memory_plan(shape, awake, A100, context=4096)
    sizes = sizes_of(plan)
    billion = shape.parameters / GIB
    assert sizes["master weights"] == pytest.approx(4 * billion) and sizes["optimiser"] == pytest.approx(8 * billion)
    assert sizes["engine weights"] + sizes["KV cache"] == pytest.approx(0.3 * 80)
    assert not plan.fits and "fsdp2.yaml" in plan.advice() and "use_peft" in plan.advice()
    assert f"{plan.total / GIB:.2f} GiB  of 80.0 GiB" in plan.lines()[-1]

    eight = replace(A100, processes=8)
    assert not memory_plan(shape, config(), eight, context=4096).fits  # DDP: every GPU holds it all
    split = memory_plan(shape, config(token_budget=4096), eight, context=4096, sharded=True)
    assert split.fits and not split.tight and sizes_of(split)["optimiser"] == pytest.approx(billion)
    assert memory_plan(shape, config(use_peft=True, token_budget=4096), A100, context=4096).fits
    on_host = memory_plan(shape, config(token_budget=4096), replace(eight, offloads=True), context=4096, sharded=True)
    assert split.learner - on_host.learner == pytest.approx(16 * shape.parameters / 8)


def test_an_engine_that_sleeps_is_not_counted_beside_the_learner():
    """The share that TRL's recipes write was planned at 90 GiB of a GPU with 74.5, which TRL trains on."""
    shape, one, eight = model_shape(QWEN_7B), Machine("cuda", 80 * 10**9), Machine("cuda", 80 * 10**9, 8)
    settings = {"vllm_gpu_memory_utilization": 0.85, "token_budget": 16_384}
    plan = memory_plan(shape, config(**settings), eight, context=4096, sharded=True)
    assert plan.items == plan.generating and plan.fits and not plan.tight
    assert plan.total == 12 * shape.parameters // 8 + round(0.85 * eight.memory)
    assert f"({plan.learner / GIB + 1:.2f} GiB then, {plan.total / GIB:.2f} GiB else)" in plan.lines()[-1]
    for stays in ({"draft_policy_lag": 1}, {"vllm_enable_sleep_mode": False}):
        awake = memory_plan(shape, config(**settings, **stays), eight, context=4096, sharded=True)
        assert awake.total == plan.learner + round(0.85 * eight.memory) and awake.learner == plan.learner
        assert awake.tight and "vllm_enable_sleep_mode" in awake.advice() and not awake.generating
    alone = memory_plan(shape, config(token_budget=16_384), one, context=4096)
    assert alone.items == alone.learning and alone.between == 12 * shape.parameters
    assert memory_plan(shape, config(**settings), eight, context=4096).between == 16 * shape.parameters  # DDP's buckets
    for elsewhere in ({"vllm_mode": "server"}, {"use_vllm": False}):
        assert not memory_plan(shape, config(**elsewhere), eight, context=4096).generating
    assert not memory_plan(shape, config(), Machine("cpu", 80 * GIB), context=4096).generating


def test_each_setting_moves_its_own_line():
    shape = model_shape(QWEN_7B)
    base = sizes_of(memory_plan(shape, config(), A100, context=2048))

    def with_(**settings):
        return sizes_of(memory_plan(shape, config(**settings), A100, context=2048))

    assert with_(optim="adamw_8bit")["optimiser"] == pytest.approx(base["optimiser"] / 4)
    assert with_(optim="paged_adamw_8bit")["optimiser"] == 0
    assert with_(gradient_checkpointing=False)["activations"] > 4 * base["activations"]
    assert with_(activation_offloading=True)["activations"] < base["activations"]
    assert with_(token_budget=2048)["activations"] == pytest.approx(base["activations"] / 8)  # batch size 8
    assert with_(beta=0.1)["reference model"] == base["master weights"]
    assert "reference model" not in with_(beta=0.1, use_peft=True)
    on_cpu = sizes_of(memory_plan(shape, config(vllm_cpu_kvcache_gib=3.0), Machine("cpu", 64 * GIB), context=2048))
    assert on_cpu["KV cache"] == 3.0


def test_the_largest_context_is_the_last_that_fits():
    shape, settings, eight = model_shape(QWEN_7B), config(), replace(A100, processes=8)
    longest = largest_context(shape, settings, eight, sharded=True)
    alone = replace(settings, token_budget=1)
    assert longest > 16_384
    assert not memory_plan(shape, alone, eight, context=longest, sharded=True).tight
    assert memory_plan(shape, alone, eight, context=longest + 1, sharded=True).tight
    assert largest_context(shape, settings, A100) == 0


def test_this_machine_has_memory(monkeypatch):
    whole = this_machine(use_cpu=True)
    assert whole.device == "cpu" and GIB < whole.memory < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert this_machine(use_cpu=True, processes=2).memory == whole.memory // 2


PARENT = """
import subprocess, sys
ballast = b"x" * 2**29
child = "from igrpo.machine import peak_resident; y = b'x' * 2**26; print(peak_resident())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
"""


def test_the_peak_is_the_process_own_and_not_that_of_who_started_it():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    assert 2**26 < int(done.stdout) < 2**28
