"""LoRA on any layer: the loss trains the adapter, and what is pushed and saved is what was trained."""

from __future__ import annotations

import copy
import shutil
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

from igrpo.config.recipe import build_config
from igrpo.config.train_config import TrainConfig
from igrpo.learner.adapters import Adapters, sent_name
from igrpo.learner.placements import Zero3
from igrpo.models.loading import skeleton
from igrpo.settings import ConfigError
from tests.learner.test_learner import fresh_accelerate, learner, some_samples  # noqa: F401
from tests.support.tiny import tiny_tokenizer
from tests.support.training import kill, run, same_weights, steps, untimed, words

SIZES = {
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
DRY = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
UNTIED = {"tie_word_embeddings": False}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, **UNTIED),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    # As wide as it is long: a transposed weight would fit as well.
    "gpt2": GPT2Config(
        vocab_size=288, n_embd=32, n_layer=2, n_head=2, n_inner=32, n_positions=64, initializer_range=0.2, **DRY, **IDS,
        **UNTIED,
    ),
    "qwen3 moe": Qwen3MoeConfig(**SIZES, **UNTIED, **EXPERTS, num_experts=4),
    "mixtral": MixtralConfig(**SIZES, **UNTIED, num_local_experts=4),
    "opt": OPTConfig(
        vocab_size=288, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=64, init_std=0.2, dropout=0.0, **IDS, **UNTIED,
    ),
    "gemma3": Gemma3TextConfig(**SIZES, **UNTIED, final_logit_softcapping=5.0, query_pre_attn_scalar=16),
}  # fmt: skip
CASES = [
    ("llama", ["lm_head"], {"lm_head"}),
    ("llama", ["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ("llama", ["all-linear", "lm_head", "embed_tokens"], {"lm_head", "embed_tokens", "q_proj", "down_proj"}),
    ("llama", [r".*\.1\.self_attn\.(q|v)_proj"], {"1.self_attn.q_proj", "1.self_attn.v_proj"}),
    ("llama", ["embed_tokens", r".*k_proj"], {"embed_tokens", "k_proj"}),
    ("llama, tied", ["layers.0.mlp.up_proj"], {"0.mlp.up_proj"}),
    ("gpt2", ["all-linear"], {"c_attn", "c_proj", "c_fc"}),
    ("gpt2", ["c_proj", "lm_head", "wte", "wpe"], {"c_proj", "lm_head", "wte", "wpe"}),
    ("qwen3 moe", ["all-linear"], {"gate_up_proj", "experts.down_proj", "mlp.gate", "q_proj"}),
    ("qwen3 moe", ["gate_up_proj", "q_proj"], {"gate_up_proj", "q_proj"}),
    ("mixtral", ["w1", "w2", "w3", "lm_head"], {"gate_up_proj", "down_proj", "lm_head"}),
    ("opt", ["all-linear", "lm_head", "embed_tokens"], {"fc1", "out_proj", "lm_head", "embed_tokens"}),
    ("gemma3", ["lm_head", "embed_tokens", "o_proj"], {"lm_head", "embed_tokens", "o_proj"}),
]
PROMPT = (5, 6, 7, 8, 9, 40, 41)


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager").eval()
    model.config.use_cache = False
    return model


def adapted(name: str, chosen: list[str], **settings: Any) -> Any:
    """A learner whose adapters have left their start, where they add nothing."""
    options = {"use_peft": True, "lora_r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "max_grad_norm": 0.0,
               "router_aux_loss_coef": 0.0, **settings}  # fmt: skip
    made = learner(tiny(name), lora_target_modules=chosen, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def log_probs(model: Any, ids: tuple[int, ...] = PROMPT, temperature: float = 1.0) -> torch.Tensor:
    tokens = torch.tensor([ids])
    logps = (model(input_ids=tokens).logits.float()[0, :-1] / temperature).log_softmax(-1)
    return logps.gather(-1, tokens[0, 1:, None])[:, 0]


def plain_gradients(made: Any) -> dict[str, torch.Tensor]:
    """Of the same loss with peft's own forward pass and whole logits."""
    samples = some_samples()
    loss = torch.zeros(())
    for s in samples:
        logps = log_probs(made.adapters.wrapper, s.prompt_ids + s.completion_ids, made.config.temperature)
        own = logps[len(s.prompt_ids) - 1 :]
        loss = loss - s.advantage * torch.exp(own - own.detach()).mean() / len(samples)
    names, trained = zip(*((n, p) for n, p in made.policy.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, trained, allow_unused=True), strict=True))


@pytest.mark.parametrize(("name", "chosen", "expected"), CASES, ids=[f"{n}: {c}" for n, c, _ in CASES])
def test_an_adapter_anywhere_trains_and_is_sent_and_saved_as_it_was_trained(name, chosen, expected, tmp_path):
    made = adapted(name, chosen)
    start = {name: p.detach().clone() for name, p in tiny(name).named_parameters()}
    with torch.no_grad():
        before = log_probs(made.adapters.wrapper)
        base = log_probs(tiny(name))
        assert made.score(PROMPT) == pytest.approx(before.tolist(), abs=1e-4)
        with made.adapters.disabled():  # the KL term's reference
            assert made.score(PROMPT) == pytest.approx(base.tolist(), abs=1e-4)
    assert float((before - base).abs().mean()) > 0.01

    wanted = plain_gradients(made)
    made.train_on(some_samples())
    for parameter_name, p in made.policy.named_parameters():
        if p.requires_grad:
            assert float(p.grad.norm()) > 0.0, parameter_name
            torch.testing.assert_close(p.grad, wanted[parameter_name], rtol=2e-3, atol=1e-5, msg=parameter_name)
    after = made.score(PROMPT)
    assert float((torch.tensor(after) - before).abs().mean()) > 1e-3

    whole = copy.deepcopy(made.adapters.wrapper).merge_and_unload()
    merged = {name: tensor.clone() for name, tensor in made.adapters.merged(made._full_tensors())}
    assert merged.keys() == start.keys()
    for parameter_name, p in whole.named_parameters():
        torch.testing.assert_close(merged[parameter_name], p.detach(), rtol=1e-5, atol=1e-6, msg=parameter_name)
    changed = {name for name in merged if not torch.equal(merged[name], start[name])}
    assert all(any(part in name for name in changed) for part in expected), changed
    made.save(tmp_path / "saved", tiny_tokenizer(), {})
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    beside = PeftModel.from_pretrained(tiny(name), tmp_path / "saved" / "adapter").eval()
    with torch.no_grad():
        assert log_probs(reloaded).tolist() == pytest.approx(after, abs=1e-4)
        assert log_probs(beside).tolist() == pytest.approx(after, abs=1e-4)


REFUSED = [
    ("llama, tied", ["lm_head"], {}, r"lm_head shares its weight .*tie_word_embeddings.*leave it out"),
    ("llama, tied", ["embed_tokens"], {}, "model.embed_tokens shares its weight"),
    ("llama, tied", ["all-linear", "lm_head"], {}, "lm_head shares its weight"),
    ("llama, tied", [".*"], {}, "lora_target_modules: a LlamaModel can have no adapter"),
    ("llama", ["q_proj", "v_porj"], {}, "no layer is called v_porj; write all-linear, or names such as down_proj, "),
    ("llama", [".*(q_proj"], {}, r".*\(q_proj is no regular expression"),
    ("llama", ["q_proj", r".*\.self_atn\..*"], {}, "no layer is called .*self_atn"),
    ("llama", ["self_attn"], {}, "lora_target_modules: a LlamaAttention can have no adapter"),
    ("llama", ["input_layernorm"], {}, "a LlamaRMSNorm can have no adapter"),
    ("opt", ["embed_positions"], {}, "embed_positions .*wrong rows"),
    ("qwen3 moe", None, {"lora_dropout": 0.1}, "lora_dropout: 0.1 cannot be had beside the fused experts.*write 0"),
    ("mixtral", ["w1"], {"lora_dropout": 0.0}, "lora_target_modules: .*w1.*w3"),
]


@pytest.mark.parametrize(("name", "chosen", "settings", "sentence"), REFUSED, ids=[f"{n}: {c}" for n, c, *_ in REFUSED])
def test_what_cannot_be_merged_is_refused_by_name_before_any_weight_is_loaded(
    name, chosen, settings, sentence, tmp_path, capsys
):
    MODELS[name].save_pretrained(tmp_path)
    options = {"model_name_or_path": str(tmp_path), "dataset_name": "d", "use_peft": True}
    config = TrainConfig(**options, lora_target_modules=chosen, **settings)
    with pytest.raises(ConfigError, match=sentence) as refused:
        Adapters(skeleton(str(tmp_path), config), config)  # there is no file with weights
    assert "\n" not in str(refused.value)


def test_deepspeed_and_an_engine_with_one_base_refuse_what_they_were_never_tried_with():
    for chosen, sentence in ((["q_proj"], None), (["q_proj", "gate_up_proj"], r"mlp\.experts holds fused")):
        options = {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": chosen}
        adapters = Adapters(tiny("qwen3 moe"), TrainConfig(model_name_or_path="m", dataset_name="d", **options))
        with nullcontext() if sentence is None else pytest.raises(ConfigError, match=sentence):
            Zero3.check_adapters(adapters)
        with nullcontext() if sentence is None else pytest.raises(ConfigError, match=r"lora_sync: .*write merged"):
            assert "model.layers.0.self_attn.q_proj" in adapters.described()["target_modules"]
    config = TrainConfig(model_name_or_path="m", dataset_name="d", use_peft=True, lora_target_modules=["lm_head"])
    adapters = Adapters(tiny("llama"), config)
    assert adapters.described(vllm=False)["target_modules"] == ["lm_head"]
    with pytest.raises(ConfigError, match=r"lora_sync: .*lm_head has an adapter; leave it out.*, or write merged"):
        adapters.described()


def test_a_layer_that_is_never_called_is_said_and_a_router_gets_no_adapter(capsys):
    routed = AutoModelForCausalLM.from_config(Llama4TextConfig(**SIZES, num_local_experts=4, intermediate_size_mlp=48))
    made = learner(routed, use_peft=True, lora_dropout=0.0, lora_target_modules=["all-linear"])
    assert made.adapters.layers and not any("router" in name for name in made.adapters.layers)
    made.train_on(some_samples())
    assert "no gradient" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"router \(Llama4Router\) cannot be merged"):
        learner(routed, use_peft=True, lora_dropout=0.0, lora_target_modules=["router"])
    settings = {"mamba_d_state": 4, "mamba_dt_rank": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    hybrid = JambaConfig(**SIZES, **settings, num_experts=1, use_mamba_kernels=False)
    made = learner(AutoModelForCausalLM.from_config(hybrid), use_peft=True, lora_dropout=0.0)
    for samples in ([], some_samples(), some_samples()):  # a first step without samples says nothing yet
        made.train_on(samples)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no gradient" in line]
    assert "adapters of model.layers.0.mamba.dt_proj:" in line


def test_what_travels_alone_is_in_the_engines_dtype_and_what_trains_is_not():
    """The engine would compute an adapter in another dtype than its layers, or refuse it."""
    made = adapted("llama", ["q_proj"], bf16=True)
    trained = {sent_name(name): p for name, p in made.unwrapped.named_parameters() if p.requires_grad}
    sent = dict(made.adapter_tensors())
    assert sent.keys() == trained.keys() and {p.dtype for p in trained.values()} == {torch.float32}
    for name, tensor in sent.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, trained[name].to(torch.bfloat16))


@pytest.mark.parametrize("written", ["all-linear", ["all-linear"], "ALL-LINEAR", None])
def test_every_spelling_of_all_linear(written):
    values = {"model_name_or_path": "m", "dataset_name": "d", "use_peft": True, "lora_target_modules": written}
    adapters = Adapters(tiny("llama, tied"), build_config(values))
    assert len(adapters.layers) == 2 * 7 and "lm_head" not in adapters.layers


def test_the_engine_gets_an_adapted_head_and_embedding_merged(questions, tmp_path):
    """A Phi-3 whose rotary factors are the long ones for the engine, and the short ones for each prompt alone."""
    torch.manual_seed(0)
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0 + i for i in range(16)]}
    sizes = {**SIZES, "hidden_size": 64, "head_dim": 32, "max_position_embeddings": 1024}
    rope = {**factors, "rope_theta": 1e4, "original_max_position_embeddings": 40}
    AutoModelForCausalLM.from_config(Phi3Config(**sizes, **UNTIED, rope_parameters=rope)).save_pretrained(
        tmp_path / "m"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    settings = {
        "use_peft": True, "lora_target_modules": "[all-linear, lm_head, embed_tokens]", "learning_rate": 0.05,
        "beta": 0.01, "max_steps": 2, "weight_sync_tolerance": 1e-3, "lora_dropout": 0.0,
    }  # fmt: skip
    said = run(words(str(tmp_path / "m"), questions, tmp_path / "run", **settings))
    assert "not packed" not in said
    first, second = steps(tmp_path / "run")
    # Each push is checked against the learner; the next step's samples come from what was pushed.
    for step in (first, second):
        assert step["sync/probe_logp_gap"] < 1e-3 and step["sampling/sampling_logp_difference/max"] < 2e-3
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and second["kl"] > 1e-3
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "run/checkpoint-2"))
    assert before.keys() == after.keys()
    assert {name for name in after if torch.equal(after[name], before[name])} == {n for n in after if "norm" in n}


def test_adapters_that_travel_alone_or_merged_count_once_after_a_kill(model, questions, tmp_path):
    """A run with adapters beside vLLM's base ends as it does when it is killed and resumed, and counts them once
    where they travel merged from then on, and alone again."""
    lora = {"use_peft": True, "lora_dropout": 0.0, "learning_rate": 0.03, "save_steps": 1, "max_steps": 6}
    whole, again, other = (tmp_path / name for name in ("whole", "adapter", "merged"))
    run(words(model, questions, whole, lora_sync="adapter", **lora))
    kill(words(model, questions, again, lora_sync="adapter", **lora), again, after=2)
    shutil.copytree(again, other)
    run(words(model, questions, again, lora_sync="adapter", resume_from_checkpoint="last", **lora))
    assert [untimed(step) for step in steps(again)] == [untimed(step) for step in steps(whole)]
    same_weights(whole / "checkpoint-6", again / "checkpoint-6")
    assert (again / "completions.jsonl").read_bytes() == (whole / "completions.jsonl").read_bytes()

    lora |= {"use_vllm": False, "resume_from_checkpoint": "last"}  # another engine as well, with a base of its own
    run(words(model, questions, other, lora_sync="merged", **lora))
    run(words(model, questions, other, lora_sync="adapter", **lora | {"max_steps": 7}))
    for step in steps(other):  # engine and learner, by the probe and by what was sampled
        assert step["sync/probe_logp_gap"] < 1e-4 and step["sampling/sampling_logp_difference/max"] < 1e-3
    factors = load_file(other / "checkpoint-7" / "adapter" / "adapter_model.safetensors")
    assert max(float(t.abs().max()) for name, t in factors.items() if "lora_B" in name) > 0.02
