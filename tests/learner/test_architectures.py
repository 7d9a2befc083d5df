"""Every causal architecture of transformers that a tiny config can build: in the form of micro-batch that the learner
chooses, log-probabilities are those of the model itself on one sequence at a time.

A model that can be packed is packed; the others stand here by name.
"""

from __future__ import annotations

import copy
import inspect
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PhimoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import TrainingSample
from igrpo.learner import batching
from igrpo.learner.batching import Denominators
from igrpo.models.loading import load_policy
from igrpo.models.rotary import pin_rotary, varies_with_length
from igrpo.settings import ConfigError
from tests.learner.test_learner import fresh_accelerate, learner  # noqa: F401

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "moe_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "word_embed_proj_dim": 32, "initializer_range": 0.3, "init_std": 0.3, "sliding_window": 5,
    "attention_chunk_size": 8, "n_group": 1, "topk_group": 1, "mamba_chunk_size": 8, "mamba_d_state": 8,
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
"""Keys that a config does not have are left out."""
LATENT = {
    "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16,
    "kv_lora_rank": 16, "head_dim": 4,
}  # fmt: skip
DECODER = {
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
}  # fmt: skip
HYBRID = {"mamba_n_heads": 4, "mamba_d_head": 16}
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "laurel_rank": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), LATENT),
    **dict.fromkeys(("minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp"), DECODER),
    **dict.fromkeys(("pegasus", "plbart", "trocr", "whisper"), DECODER),
    "bamba": HYBRID | {"attn_layer_indices": [1]}, "falcon_h1": HYBRID | {"mamba_d_ssm": 64},
    "granitemoehybrid": HYBRID | {"layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4}, "xlnet": {"d_head": 8}, "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "gemma3n_text": GEMMA | {"activation_sparsity_pattern": None}, "gemma4_text": GEMMA | {"global_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_dense_layers": 1},
    "nemotron_h": {"chunk_size": 8, "n_groups": 1, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8},
    "dots1": {"n_shared_experts": 1}, "bert-generation": {"is_decoder": True},
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 2, "local_attn_chunk_length": 8,
        "attention_head_size": 8,
    },
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
}  # fmt: skip

# A state, a convolution or a token shift runs over the border of two sequences.
STATES = {
    "bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "mamba",
    "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zaya",
}  # fmt: skip
# Positions are counted from the row's start, or the attention is the model's own: sinks, chunks, biases by distance.
OTHER_ATTENTION = {
    "axk2", "bart", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small", "bloom", "codegen", "deepseek_v32",
    "doge", "falcon", "glm_moe_dsa", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa",
    "hy_v4", "inkling_text", "llama4_text", "marian", "mbart", "mimo_v2_flash", "moshi", "mpt", "mvp", "nemotron",
    "openai-gpt", "pegasus", "phimoe", "plbart", "reformer", "stablelm", "trocr", "whisper", "xglm",
}  # fmt: skip
# The head of a masked language model has layers of its own, or the model reads what it should predict.
REFUSED = {
    "bert", "big_bird", "camembert", "cpmant", "data2vec-text", "electra", "ernie", "megatron-bert",
    "modernbert-decoder", "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm",
    "xlm-roberta", "xlm-roberta-xl", "xlnet",
}  # fmt: skip
# Images and sound beside the text, helpers of another model, or no small size; kimi_linear and longcat_flash: minutes.
NOT_TRIED = {
    "axk1", "blt", "cohere_compass_text", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant",
    "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2", "kimi_linear", "llama4", "longcat_flash", "mllama",
    "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "xmod", "zamba", "zamba2",
}  # fmt: skip
NOISY = {"hrm_text": 2e-3}
"""Sixteen passes through the same layers multiply the rounding."""


def tiny(kind: str, **others: Any) -> Any:
    config = CONFIG_MAPPING[kind]
    known = set(config.attribute_map)
    for base in config.__mro__:
        known |= set(vars(base).get("__annotations__", {}))
        known |= set(inspect.signature(base.__init__).parameters) if "__init__" in vars(base) else set()
    own = OWN.get(kind, {}) | others
    torch.manual_seed(0)
    settings = config(**{key: value for key, value in (SMALL | own).items() if key in known or key in own})
    model = AutoModelForCausalLM.from_config(settings).eval()
    model.config.use_cache = False
    return model


def samples(prompts: tuple[int, ...] = (5, 17), completions: tuple[int, ...] = (2, 13)) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(7)

    def some(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 96, (count,), generator=generator).tolist())

    return [TrainingSample(p, some(c), (0.0,) * c, 1.0) for p in map(some, prompts) for c in completions]


@torch.no_grad()
def gap(made: Any, model: Any, batch: list[TrainingSample]) -> float:
    """Largest difference to ``model`` on each sequence alone (nats)."""
    model.set_attn_implementation("eager")  # the one that leaves nothing out
    own = {}
    for s in batch:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logps = model(input_ids=ids, use_cache=False).logits[0, len(s.prompt_ids) - 1 : -1].log_softmax(-1)
        own[s] = logps.gather(-1, torch.tensor(s.completion_ids)[:, None])[:, 0]
    worst = 0.0
    for contents in made._plan(batch):
        micro = made._micro_batch(contents, Denominators(1.0, 1.0), made.packs)
        wanted = torch.cat([own[s] for s in chain.from_iterable(group.samples for group in contents)])
        worst = max(worst, float((made._log_probs(micro, temperature=1.0) - wanted).abs().max()))
    return worst


@pytest.mark.parametrize("kind", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_TRIED))
def test_log_probs_are_those_of_each_sequence_alone(kind, capsys):
    model = tiny(kind)
    if kind in REFUSED:
        with pytest.raises(ConfigError, match=f"model_name_or_path: {type(model).__name__} "):
            learner(model)
        return
    for shared in (True, False) if kind not in STATES | OTHER_ATTENTION else (False,):
        made = learner(model, token_budget=100_000, shared_prefix=shared)
        assert made.packs == (kind not in STATES | OTHER_ATTENTION) and made.pads
        assert gap(made, model, samples()) <= NOISY.get(kind, 1e-4)
    said = capsys.readouterr().out
    assert ("micro-batches are padded, not packed" in said) != made.packs


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "jamba", "gemma4_text", "longrope"])
def test_gradients_are_those_of_each_sequence_alone(kind):
    """Packed, padded and one by one, in the attention that the checks before the first step have left."""
    model = varying(kind) if kind == "longrope" else tiny(kind)
    made = learner(model, token_budget=100_000, vllm_importance_sampling_correction=False, temperature=0.7)
    forms = {"gpt_oss": (False, True), "jamba": (False, True), "longrope": (False, False)}
    assert (made.packs, made.pads) == forms.get(kind, (True, True))
    made.unwrapped.eval()
    batch, totals = samples(), batching.count(samples())
    for contents in made._plan(batch):
        micro = made._micro_batch(contents, totals, made.packs)
        (made.placement(micro, num_items_in_batch=totals.tokens).loss * micro.scale).backward()
    got = {name: p.grad.clone() for name, p in made.unwrapped.named_parameters() if p.grad is not None}
    model.set_attn_implementation("eager")
    for s in batch:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logps = (model(input_ids=ids, use_cache=False).logits[0, len(s.prompt_ids) - 1 : -1] / 0.7).log_softmax(-1)
        own = logps.gather(-1, torch.tensor(s.completion_ids)[:, None]).mean()
        (-s.advantage * own / len(batch)).backward()  # on-policy: the ratio is 1, its gradient that of logp
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    assert all(float(grad.abs().max()) > 0 for name, grad in wanted.items() if "proj.weight" in name)
    for name, grad in wanted.items():
        assert float((got[name] - grad).norm()) <= 1e-3 * float(grad.norm()) + 1e-6, name


def test_what_is_not_tried_exists():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= (NOT_TRIED | REFUSED | STATES | OTHER_ATTENTION)


SIZES = {key: SMALL[key] for key in SMALL if not key.startswith(("linear", "mamba", "sliding", "attention_chunk"))}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 8.0, 9.0],
    "original_max_position_embeddings": 16, "short_mscale": 1.0, "long_mscale": 1.3,
}  # fmt: skip
VARYING = {
    "longrope": Phi3Config(**SIZES, rope_parameters=LONG, original_max_position_embeddings=16),
    "longrope, moe": PhimoeConfig(**SIZES, rope_parameters=LONG),
    "dynamic": LlamaConfig(
        **SIZES | {"max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
}  # fmt: skip


def varying(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(VARYING[name]).eval()
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("name", VARYING)
def test_without_an_engine_rotary_factors_are_those_of_each_sequence(name, capsys):
    """Of 7, 18, 19 and 30 tokens, where pre-training ended at 16: together they would all have the long factors."""
    model = varying(name)
    made = learner(model, token_budget=100_000)
    assert not made.packs and not made.pads
    assert "one sequence each" in capsys.readouterr().out
    for batch in (samples(), samples()[::-1]):  # dynamic NTK once went on with the factors of the longest ever met
        pin_rotary(model, None)
        assert gap(made, model, batch) <= 1e-4
    made.packs = True
    assert gap(made, model, samples()) > 0.01  # what was trained before


@pytest.mark.parametrize(("name", "context"), [("longrope", 64), ("longrope", 16), ("dynamic", 16)])
def test_rotary_factors_are_pinned_to_the_engines(name, context):
    model = varying(name)
    made = learner(model, token_budget=100_000, context=context)
    assert made.packs
    short = samples((3, 5), (2, 9))
    if context == 16:  # vLLM has the short factors, too
        assert gap(made, model, short) <= 1e-4
        return
    # Long for every sequence, however short: as if pre-training had ended at once.
    rope = {**LONG, "short_factor": LONG["long_factor"]}
    truth = copy.deepcopy(VARYING[name])
    truth.rope_parameters = rope
    always = AutoModelForCausalLM.from_config(truth).eval()
    always.load_state_dict(model.state_dict())
    assert gap(made, always, samples() + short) <= 1e-4
    assert gap(made, model, short) > 0.01
    assert not varies_with_length(made.unwrapped, context)


def test_a_composite_model_is_packed_and_its_language_model_keeps_no_cache(tmp_path):
    """Its config has a part for the language model, whose forward pass once made a cache of every micro-batch."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CONFIG_MAPPING["gemma3"](
        text_config={name: SIZES[name] for name in names} | {"sliding_window": 5, "initializer_range": 0.3},
        vision_config=sight | {"image_size": 28, "patch_size": 14},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_policy(
        str(tmp_path), TrainConfig(model_name_or_path="m", dataset_name="d", gradient_checkpointing=False)
    )
    assert not model.config.use_cache and not model.config.text_config.use_cache
    made = learner(model.eval(), token_budget=100_000)
    assert made.packs and gap(made, model, samples()) <= 1e-4
