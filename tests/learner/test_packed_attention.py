"""Packed, shared-prefix micro-batches give the gradient of one big padded batch, for every kind of model."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from igrpo.data_types import TrainingSample
from igrpo.learner.batching import Denominators, micro_batch
from igrpo.learner.packed_attention import (
    KERNELS,
    Layout,
    packed_attention,
    packed_kernel,
    use_packed_attention,
    why_not_packable,
)
from igrpo.learner.packing import prefix_groups
from tests.learner.test_learner import fresh_accelerate, learner  # noqa: F401

SIZES = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip
# A window of 5 ends inside the prompt for some tokens and reaches over its end for others.
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral, window": MistralConfig(**SIZES, sliding_window=5),
    "gemma2, window and caps": Gemma2Config(
        **SIZES, head_dim=16, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
        query_pre_attn_scalar=16,
    ),
}  # fmt: skip


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    # Eager: the one implementation of transformers that applies every model's score cap.
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").eval()
    model.config.use_cache = False
    return model


def groups_of_samples(prompts: int = 3, group: int = 4) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for p in range(prompts):
        prompt = tuple(torch.randint(5, 280, (4 + 9 * p,), generator=generator).tolist())
        for j in range(group):
            completion = torch.randint(5, 280, (1 + (5 * j + 3 * p) % 13,), generator=generator).tolist()
            logps = (-5.6 + 0.3 * torch.randn(len(completion), generator=generator)).tolist()
            made.append(TrainingSample(prompt, tuple(completion), tuple(logps), (1.0, -1.0, 0.5, -0.5)[j] * (p + 1)))
    return made


def gradient(name: str, samples: list[TrainingSample], *, padded: bool = False, **settings: Any):
    model = tiny(name)
    if settings.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made = learner(model, max_grad_norm=0.0, vllm_importance_sampling_correction=True, **settings)
    assert made.packs
    if padded:  # transformers' own attention and masks
        made.packs = False
        made.unwrapped.set_attn_implementation("eager")
    metrics = made.train_on(samples)
    return metrics, torch.cat([p.grad.flatten() for p in made.policy.parameters()])


PLANS = {
    "one micro-batch": {"token_budget": 100_000},
    "nothing shared": {"token_budget": 100_000, "shared_prefix": False},
    "groups split": {"token_budget": 25},
    "one sequence each": {"token_budget": 1},
    "by completions": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("name", MODELS)
def test_any_plan_and_order_has_the_gradient_of_one_padded_batch(name):
    samples = groups_of_samples()
    whole, expected = gradient(name, samples, padded=True, token_budget=100_000)
    assert whole["learner/micro_batches"] == 1.0 and float(expected.norm()) > 1e-3
    for i, plan in enumerate(PLANS.values()):
        metrics, found = gradient(name, random.Random(i).sample(samples, len(samples)), **plan)
        assert float((found - expected).norm() / expected.norm()) <= 1e-6
        assert metrics["loss"] == pytest.approx(whole["loss"], abs=1e-6)


def test_tokens_are_counted_before_and_after_sharing():
    samples = groups_of_samples()
    metrics, _ = gradient("llama", samples, token_budget=100_000)
    prompts = {s.prompt_ids for s in samples}
    unique = sum(map(len, prompts)) + sum(len(s.completion_ids) - 1 for s in samples)
    assert metrics["learner/unique_tokens"] == unique
    assert metrics["learner/raw_tokens"] == sum(len(s.prompt_ids) + len(s.completion_ids) for s in samples)
    flat = [TrainingSample(s.prompt_ids, s.completion_ids, s.sampling_logprobs, 0.0) for s in samples[:4]]
    metrics, _ = gradient("llama", [*flat, *samples[4:]], token_budget=100_000)
    assert (metrics["learner/groups_skipped"], metrics["learner/sequences_skipped"]) == (1.0, 4.0)


@pytest.mark.parametrize("offloading", [False, True])
def test_checkpointing_and_offloading_change_nothing(offloading):
    samples = groups_of_samples()
    _, plain = gradient("llama", samples, token_budget=100_000)
    options = {"gradient_checkpointing": True, "activation_offloading": offloading}
    _, found = gradient("llama", samples, token_budget=100_000, **options)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral, window", "gemma2, window and caps"])
@torch.no_grad()
def test_flex_attention_computes_the_same_forward(name, bf16):
    """flex_attention has no backward on the CPU: this runs its block mask, the gradient needs a GPU.

    Under autocast queries and keys come out of the rotation in float32, values in bfloat16.
    """
    model = tiny(name).requires_grad_(False)
    batch = micro_batch(tuple(prefix_groups(groups_of_samples())), Denominators(1.0, 1.0), "grpo")

    def hidden(kernel: str) -> torch.Tensor:
        use_packed_attention(model, kernel)
        out = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, packed_layout=batch.layout)
        return out.last_hidden_state

    tolerance = 0.05 if bf16 else 1e-5
    with torch.compiler.set_stance("force_eager"), torch.autocast("cpu", enabled=bf16):
        torch.testing.assert_close(hidden("flex_attention"), hidden("sdpa"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 40, 200, 5000])
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [
        ((5,), (None,)), ((128,), (None,)), ((1000,), (None,)), ((256, 128, 384), (None, 0, 0)),
        ((300, 70, 1, 500, 129, 640, 3, 200), (None, 0, 0, 0, None, 4, 4, None)),
    ],
)  # fmt: skip
def test_the_block_mask_reads_the_blocks_that_looking_at_every_pair_finds(lengths, parents, window):
    mask = Layout(lengths, parents).block_mask(torch.device("cpu"), window)
    total = sum(lengths)
    exact = create_block_mask(mask.mask_mod, None, None, total, total, device="cpu")

    def sets(listed, counts):
        return [set(row[:n].tolist()) for row, n in zip(listed[0, 0], counts[0, 0].tolist(), strict=True)]

    partial, whole = sets(mask.kv_indices, mask.kv_num_blocks), sets(mask.full_kv_indices, mask.full_kv_num_blocks)
    needed, full = sets(exact.kv_indices, exact.kv_num_blocks), sets(exact.full_kv_indices, exact.full_kv_num_blocks)
    for ours, ours_whole, theirs, theirs_whole in zip(partial, whole, needed, full, strict=True):
        if window is None:
            assert (ours, ours_whole) == (theirs, theirs_whole)
        assert ours_whole <= theirs_whole and not ours & ours_whole
        assert (ours | ours_whole) >= (theirs | theirs_whole)
    assert (mask.seq_lengths, mask.BLOCK_SIZE) == (exact.seq_lengths, exact.BLOCK_SIZE)
    assert mask.kv_indices.dtype == exact.kv_indices.dtype and mask.q_indices.shape == exact.q_indices.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral, window", "gemma2, window and caps"])
@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
def test_the_gpu_kernels_have_the_gradient_of_sdpa(name, kernel):
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn")
    half = kernel == "flash_attention_2"
    model = tiny(name).to("cuda", torch.bfloat16 if half else torch.float32)
    batch = micro_batch(tuple(prefix_groups(groups_of_samples())), Denominators(1.0, 1.0), "grpo").to(model.device)

    def gradients(kernel: str) -> torch.Tensor:
        use_packed_attention(model, kernel)
        model.zero_grad()
        out = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, packed_layout=batch.layout)
        out.last_hidden_state.float().square().sum().backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    expected, found = gradients("sdpa"), gradients(kernel)
    assert float((found - expected).norm() / expected.norm()) <= (0.03 if half else 1e-3)


def test_what_the_variable_length_kernel_is_told():
    layout = Layout(lengths=(3, 2, 1, 4), parents=(None, 0, 0, None))
    queries, keys, index = layout.ragged(torch.device("cpu"))
    assert queries.tolist() == [0, 3, 5, 6, 10] and keys.tolist() == [0, 3, 8, 12, 16]
    assert index.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert layout.positions().tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("asked", "device", "kernel"),
    [
        ("sdpa", "cpu", "sdpa"), ("flash_attention_2", "cpu", "sdpa"), ("sdpa", "cuda", "flex_attention"),
        ("flash_attention_2", "cuda", "flash_attention_2"), ("eager", "cuda", "sdpa"),
    ],
)  # fmt: skip
def test_the_kernel_for_each_device(asked, device, kernel):
    assert packed_kernel(asked, torch.device(device)) == kernel


@pytest.mark.parametrize("kernel", KERNELS)
def test_transformers_takes_every_kernel_and_no_checkpoint_names_it(kernel, tmp_path):
    model = tiny("llama")
    use_packed_attention(model, kernel)
    assert model.config._attn_implementation == KERNELS[kernel]
    model.save_pretrained(tmp_path)
    assert "igrpo" not in (tmp_path / "config.json").read_text()


def test_a_model_with_other_layers_is_padded_and_says_so(capsys):
    hybrid = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"], conv_L_cache=3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hybrid)
    assert "conv" in why_not_packable(model)
    big, small = (learner(model, max_grad_norm=0.0, token_budget=budget) for budget in (100_000, 30))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("padded, not packed: Lfm2ForCausalLM" in line for line in lines)
    assert not big.packs
    samples = groups_of_samples()
    whole, split = big.train_on(samples), small.train_on(samples)
    assert whole["learner/micro_batches"] == 1.0 and split["learner/micro_batches"] > 3.0
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_a_kernel_without_a_backward_pass_is_found_out_before_the_first_step(capsys, monkeypatch):
    """flex_attention is such a one on a CPU: its forward pass is right, and the first step would end the run."""
    monkeypatch.setattr("igrpo.learner.learner.packed_kernel", lambda asked, device: "flex_attention")
    made = learner(tiny("llama"))
    said = capsys.readouterr().out
    assert said.startswith("packed attention does without flex_attention: ") and "backward" in said
    assert made.packs and made.unwrapped.config._attn_implementation == KERNELS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS[KERNELS["sdpa"]].func is packed_attention
    made.train_on(groups_of_samples())


def test_a_model_that_ignores_the_layout_is_found_out(capsys):
    model = tiny("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # so that reading a stranger's tokens shows
    forward = model.model.forward
    model.model.forward = lambda packed_layout=None, **arguments: forward(**arguments)  # as hub code may do
    made = learner(model)
    assert not made.packs
    said = capsys.readouterr().out
    assert "packed attention does without sdpa" in said and "padded, not packed: LlamaForCausalLM" in said


def test_dropout_is_not_lost_with_a_kernel_that_has_none():
    module = torch.nn.Module()
    query = torch.randn(1, 2, 24, 16)
    layout = Layout((8, 16), (None, None))

    def out(dropout: float) -> torch.Tensor:
        torch.manual_seed(0)
        options = {"kernel": "flex_attention", "packed_layout": layout, "dropout": dropout}
        return packed_attention(module.train(), query, query, query, None, **options)[0]

    assert not torch.equal(out(0.5), out(0.0))
