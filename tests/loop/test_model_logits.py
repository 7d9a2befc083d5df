"""Multipliers, divisors and caps of a model's logits, whatever its config calls them: fused log-probs are its own."""

from __future__ import annotations

import pytest
import torch
import transformers

from igrpo.config import TrainConfig
from igrpo.policy import loss_config
from igrpo_kernels import linear_selective_log_softmax
from igrpo_kernels.model_logits import logit_transform_of

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
