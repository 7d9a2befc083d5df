"""Engines are sent what ``save_pretrained`` writes, for every architecture that transformers and vLLM share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from igrpo.config.train_config import TrainConfig
from igrpo.learner.learner import Learner
from igrpo.models.loading import load_policy
from igrpo.models.saved_format import SavedFormat, saved_tensors, tensors_of
from igrpo.settings import ConfigError
from tests.support.architectures import NOT_BUILT, SIZES, shared, tiny_config, tiny_model
from tests.support.tiny import tiny_llama, tiny_tokenizer


def written(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert not [n for n, w in wanted.items() if found[n].dtype != w.dtype or not torch.equal(found[n], w)]


def test_every_architecture_sends_what_it_saves(tmp_path):
    """Fused experts and newer names went out under the names of modules in 43 of them, which no engine knows."""
    not_built, changed = {}, set()
    for kind in shared():
        try:
            model = tiny_model(tiny_config(kind))
        except Exception as error:  # whatever a config or a model raises: the list below says which may
            not_built[kind] = f"{type(error).__name__}: {error}"
            continue
        sent = dict(saved_tensors(model, torch.float32))
        assert_same(sent, written(model, tmp_path / kind))
        changed |= {kind} if sent.keys() - dict(model.named_parameters()) else set()
    assert not_built.keys() == NOT_BUILT.keys() & shared().keys(), not_built
    assert {"mixtral", "qwen3_moe", "olmoe", "ernie4_5_moe", "deepseek_v3"} <= changed


def learner_of(folder: Path, **settings: Any) -> Learner:
    settings = {"bf16": False, "temperature": 1.0, **settings}
    config = TrainConfig(model_name_or_path=str(folder), dataset_name="d", use_cpu=True, **settings)
    made = Learner(load_policy(str(folder), config), None, config, pad_token_id=0)
    made.set_schedule(10)
    return made


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
def test_a_checkpoint_is_what_was_sent_and_loads_again(kind, tmp_path):
    """Rules undone twice would rename twice; a router's correction is a buffer in float32, whatever is computed in."""
    wanted = written(tiny_model(tiny_config(kind)), tmp_path / "model")
    learner = learner_of(tmp_path / "model")
    assert_same(dict(learner.named_tensors()), wanted)
    learner.save(tmp_path / "saved", tiny_tokenizer(), {})
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), wanted)
    again = learner_of(tmp_path / "saved")
    assert again.score(range(3, 20)) == learner.score(range(3, 20))
    halves = dict(saved_tensors(again.unwrapped, torch.bfloat16))
    assert halves.keys() == wanted.keys()
    kept = {name for name, tensor in halves.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in wanted if name.endswith("e_score_correction_bias")}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_text_model_of_a_composite_folder_is_sent_under_the_folders_names(name, tmp_path):
    text = SIZES | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = CONFIG_MAPPING[name](text_config=text, vision_config=vision | {"num_position_embeddings": 4})
    folder = written(transformers.AutoModelForImageTextToText.from_config(config), tmp_path)
    sent = dict(learner_of(tmp_path).named_tensors())
    assert_same(sent, {n: tensor for n, tensor in folder.items() if not n.startswith("model.visual.")})


def test_tied_weights_go_under_the_name_that_loading_wants():
    model = tiny_llama()
    assert "lm_head.weight" not in dict(saved_tensors(model, torch.float32))
    first, second = model.model.layers
    first.mlp.up_proj.weight = second.mlp.up_proj.weight
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot be saved"):
        SavedFormat(model)


def test_a_rule_waits_for_its_own_tensors_only():
    """Experts of one layer at a time: nothing of the model is held twice."""
    model = tiny_model(tiny_config("qwen3_moe"))
    saved, held = SavedFormat(model), []
    taken: list[str] = []

    def source():
        for name, tensor in tensors_of(model):
            if saved.keeps(name):
                taken.append(name)
                yield name, tensor.detach()

    for _, tensor in saved.convert(source()):
        held.append((len(taken), tensor.numel()))
    counts = [sum(n for at, n in held if at == i + 1) for i in range(len(taken))]
    assert counts == [model.get_parameter(name).numel() for name in taken]
