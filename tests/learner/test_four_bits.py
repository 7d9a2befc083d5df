"""Adapters beside a frozen base in 4 bits: what is trained, pushed and saved are the same weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from igrpo.config.train_config import TrainConfig
from igrpo.learner.learner import Learner
from igrpo.models.four_bits import check_four_bits
from igrpo.models.loading import load_policy
from igrpo.settings import ConfigError
from tests.learner.test_learner import fresh_accelerate, some_samples  # noqa: F401
from tests.support.training import run, same_weights, steps, untimed, words

SETTINGS = {"use_peft": True, "load_in_4bit": True, "lora_dropout": 0.0, "bf16": False, "use_cpu": True}


def config(path: str = "m", **settings) -> TrainConfig:
    return TrainConfig(**{"model_name_or_path": path, "dataset_name": "d", **SETTINGS, **settings})


def test_what_cannot_be_had_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"load_in_4bit: .*cannot be trained; write use_peft: true"):
        config(use_peft=False)
    with pytest.raises(ConfigError, match=r"load_in_4bit: .*not divided.*--multi_gpu|bitsandbytes package is not"):
        check_four_bits(LlamaConfig(), config(), divides=True)
    packed = LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ConfigError, match="model_name_or_path: m is in 4 or 8 bits already"):
        check_four_bits(packed, config(load_in_4bit=False), divides=False)
    check_four_bits(LlamaConfig(), config(load_in_4bit=False), divides=True)
    assert config().probe_tolerance == 0.2 and config(lora_sync="adapter").probe_tolerance == 1.0


@pytest.mark.needs_package("bitsandbytes")
@pytest.mark.parametrize("settings", [{}, {"bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True, "bf16": True}])
def test_the_base_is_in_four_bits_and_what_is_sent_and_saved_is_what_was_trained(settings, model, tmp_path):
    torch.manual_seed(0)
    chosen = config(model, learning_rate=0.02, **settings)
    learner = Learner(load_policy(model, chosen), None, chosen, pad_token_id=0)
    kinds = {p.dtype for n, p in learner.unwrapped.named_parameters() if n.endswith("proj.base_layer.weight")}
    assert kinds == {torch.uint8}
    before = dict(learner.named_tensors())
    learner.set_schedule(4)
    learner.train_on(some_samples())
    learner.train_on(some_samples())
    sent = {name: tensor.clone() for name, tensor in learner.named_tensors()}
    original = load_file(f"{model}/model.safetensors")
    assert sent.keys() == original.keys()
    assert all(sent[name].shape == tensor.shape for name, tensor in original.items())
    assert {n for n in sent if not torch.equal(sent[n], before[n])} == {n for n in sent if "proj" in n}
    prompt, own = (5, 6, 7, 8, 9, 40), learner.score((5, 6, 7, 8, 9, 40))
    from tests.support.tiny import tiny_tokenizer

    learner.save(tmp_path / "saved", tiny_tokenizer(), {})
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "saved"), "quantization_config")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    logps = loaded(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    theirs = logps.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert theirs.tolist() == pytest.approx(own, abs=0.15 if chosen.bf16 else 1e-4)


@pytest.mark.needs_package("bitsandbytes")
def test_a_run_on_a_base_in_four_bits_with_vllm_and_its_resume(model, questions, tmp_path):
    """Merged, the engine has the learner's weights; alone, the adapter stands beside the base as it was."""
    lora = {"use_peft": True, "load_in_4bit": True, "lora_dropout": 0.0, "learning_rate": 0.03, "save_steps": 1}
    run(words(model, questions, tmp_path / "merged", **lora, max_steps=2))
    for step in steps(tmp_path / "merged"):
        assert step["sync/probe_logp_gap"] < 1e-4 and step["sampling/sampling_logp_difference/max"] < 1e-3
    lora |= {"use_vllm": False, "lora_sync": "adapter", "vllm_importance_sampling_correction": False}
    said = run(words(model, questions, tmp_path / "whole", **lora))
    assert "warning: the engine samples with other weights than load_in_4bit's" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-3")
    run(words(model, questions, tmp_path / "again", **lora, resume_from_checkpoint="last"))
    assert untimed(steps(tmp_path / "again")[-1]) == untimed(steps(tmp_path / "whole")[-1])
    same_weights(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    assert 1e-4 < steps(tmp_path / "whole")[-1]["sync/probe_logp_gap"] < 1.0
