"""Multipliers, divisors and caps of a model's logits, whatever its config calls them: fused log-probs are its own."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from igrpo.config.train_config import TrainConfig
from igrpo.learner.learner import Learner
from igrpo.learner.policy import loss_config
from igrpo.models.loading import context_limit, model_sizes, stop_token_ids
from igrpo.plan.shapes import model_shape
from igrpo_kernels import linear_selective_log_softmax
from igrpo_kernels.model_logits import CAPS, DIVISORS, MULTIPLIERS, language_model, logit_transform_of, text_config
from tests.learner.test_learner import some_samples
from tests.support.architectures import NOT_BUILT, NOT_RUN, shared, tiny_config, tiny_model
from tests.support.tiny import tiny_tokenizer

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.25},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "RecurrentGemma": {"logits_soft_cap": 3.0, "lru_width": 32, "attention_window_size": 8},
    "Llama": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_fused_log_probs_are_the_models_own(name):
    """A RecurrentGemma's cap and a Granite's divisor were once left out, and log-probs were off by up to 86 nats."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    ids = torch.randint(3, 50, (2, 6))
    with torch.no_grad():
        head = model.get_output_embeddings().weight.mul_(20.0)  # far enough out for a cap to bite
        expected = model(input_ids=ids).logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        hidden = model.base_model(input_ids=ids).last_hidden_state
        transform = logit_transform_of(config)
        found = linear_selective_log_softmax(hidden, head, ids, **transform)
        plain = linear_selective_log_softmax(hidden, head, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (name == "Llama") == torch.allclose(plain, expected, atol=1e-2)
    settings = loss_config(TrainConfig(model_name_or_path="m", dataset_name="d"), config)
    assert transform == {key: getattr(settings, key) for key in transform}


def spread(model) -> None:
    """Weights that matter, and a head far enough out for a cap to bite."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
        model.get_output_embeddings().weight.mul_(20.0)


@torch.no_grad()
def own_log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def test_every_architectures_log_probs_are_its_own(tmp_path):
    """Each with whatever multiplier, divisor or cap its config knows; Inkling's divisor was not known."""
    torch.manual_seed(0)
    ids, off, not_run, found = torch.randint(3, 48, (1, 9)), {}, {}, set()
    for kind in shared().keys() - NOT_BUILT.keys():
        config = tiny_config(kind)
        part = text_config(config)
        for name, value in [*((n, 2.0) for n in MULTIPLIERS + DIVISORS), *((n, 3.0) for n in CAPS)]:
            if getattr(part, name, None) is not None or (name in CAPS and hasattr(part, name)):
                with contextlib.suppress(AttributeError):  # worked out of other settings
                    setattr(part, name, value)
                found.add(name)
        model = tiny_model(config)
        spread(model)
        try:
            own = own_log_probs(model, ids)
        except Exception as error:  # whatever its code raises where a tiny size does not suit it
            not_run[kind] = f"{type(error).__name__}: {error}"
            continue
        with torch.no_grad():
            hidden = language_model(model)(input_ids=ids, use_cache=False).last_hidden_state
            head = model.get_output_embeddings()
            fused = linear_selective_log_softmax(
                hidden, head.weight, ids, lm_head_bias=head.bias, **logit_transform_of(model.config)
            )
        gap = float((fused - own).abs().max())
        if not gap < 1e-3:
            off[kind] = gap
    assert not_run.keys() == NOT_RUN.keys() & shared().keys(), not_run
    assert not off
    assert {"logit_scale", "lm_head_multiplier", "logits_mup_width_multiplier", "final_logit_softcapping"} <= found


TEXT = {
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 7, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 288, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "intermediate_size_mlp": 48,
    "num_local_experts": 2,
}  # fmt: skip
SIGHT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "embed_dim": 16, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 4,
}  # fmt: skip
CAP, MROPE = {"final_logit_softcapping": 3.0}, {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
COMPOSITES: dict[str, tuple[dict, dict | None]] = {
    "gemma3": (CAP, SIGHT),
    "gemma4": (CAP, None),
    "gemma4_unified": (CAP, None),
    "qwen2_vl": ({"rope_parameters": MROPE, "layer_types": None}, SIGHT),
    "qwen3_vl": ({"rope_parameters": MROPE}, SIGHT),
    "llama4": ({"layer_types": None}, SIGHT),
    "mistral3": ({"model_type": "mistral"}, {**SIGHT, "model_type": "pixtral"}),
    "aya_vision": ({"model_type": "cohere2", "logit_scale": 0.25}, {**SIGHT, "model_type": "siglip_vision_model"}),
}


def composite(kind: str):
    text, sight = COMPOSITES[kind]
    parts = {} if sight is None else {"vision_config": sight}
    return CONFIG_MAPPING[kind](text_config={k: v for k, v in (TEXT | text).items() if v is not None}, **parts)


@pytest.mark.parametrize("kind", COMPOSITES)
def test_a_composite_models_log_probs_are_its_own(kind, tmp_path):
    """Gemma 3n's and 4's cap stands in the text config: it was left out, 92 nats with a cap of 3. Gemma 3 beside images
    and Aya have no use for theirs."""
    config = composite(kind)
    try:
        model = transformers.AutoModelForImageTextToText.from_config(config)
    except ValueError:
        model = transformers.AutoModelForCausalLM.from_config(config)
    spread(model.eval())
    ids = list(range(3, 20))
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
    own = logps.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    settings = TrainConfig(model_name_or_path=str(tmp_path), dataset_name="d", use_cpu=True, bf16=False)
    model.config.use_cache = False
    made = Learner(model, None, settings, pad_token_id=0)
    assert made.score(ids) == pytest.approx(own.tolist(), abs=1e-3)
    made.set_schedule(1)
    assert math.isfinite(made.train_on(some_samples())["loss"])
    config.save_pretrained(tmp_path)
    assert context_limit(str(tmp_path), settings) == 64
    assert 7 in stop_token_ids(str(tmp_path), tiny_tokenizer(), settings)
    shape = model_shape(model_sizes(config))
    assert (shape.vocab_size, shape.hidden_size, shape.num_layers, shape.head_dim) == (288, 32, 2, 8)
    assert shape.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
