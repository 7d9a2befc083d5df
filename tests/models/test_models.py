"""What is read beside the weights: the ids that end a completion, and sampling defaults that must not count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from igrpo.config.train_config import TrainConfig
from igrpo.engines import Request, Sampling
from igrpo.engines.hf_engine import HFEngine
from igrpo.engines.layout import launched_with_others
from igrpo.learner.packed_attention import packed_kernel
from igrpo.models.loading import attention, load_tokenizer, stop_token_ids
from tests.support.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("model")))


def generation_settings(folder: Path, **settings) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def config(model: str, **settings) -> TrainConfig:
    return TrainConfig(model_name_or_path=model, dataset_name="d", use_cpu=True, bf16=False, **settings)


def test_a_hub_id_stops_where_its_folder_does(model, tmp_path, monkeypatch):
    """An end-of-turn id may stand in generation_config.json alone; of a hub id that file was once not read."""
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    refs = tmp_path / "models--acme--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    generation_settings(snapshot, eos_token_id=[1, 7])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = {
        name: stop_token_ids(name, load_tokenizer(name, config(name)), config(name))
        for name in ("acme/tiny", str(snapshot))
    }
    assert found["acme/tiny"] == found[str(snapshot)] and 7 in found["acme/tiny"]


def test_a_models_own_sampling_settings_do_not_change_the_policy(model, tmp_path):
    """A repetition penalty of the model's generation settings once shaped what was sampled and not what was learned."""
    penalised = tmp_path / "penalised"
    shutil.copytree(model, penalised)
    generation_settings(penalised, repetition_penalty=1.3, top_k=3)
    answers = []
    for path in (str(model), str(penalised)):
        engine = HFEngine(path, config(path, use_vllm=False), 64, (1,), seed=0)
        engine.submit(Request("a", (10, 20, 30, 30, 30), 2, Sampling(1.0, 24)))
        (result,) = engine.poll()
        ids = result.prompt_ids + result.token_ids[0]
        scored = engine.score(ids)[len(result.prompt_ids) - 1 :]
        assert result.logprobs[0] == pytest.approx(scored, abs=1e-3)
        answers.append(result.token_ids)
    assert answers[0] == answers[1]


def test_engines_of_several_processes_take_the_gpu_of_their_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_with_others() == {}
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launched_with_others() == {"distributed_executor_backend": "external_launcher"}


def test_without_flash_attn_a_gpu_packs_with_flex_attention_and_says_so(monkeypatch, capsys):
    asked = TrainConfig(model_name_or_path="m", dataset_name="d", attn_implementation="flash_attention_2")
    assert attention(asked) == "sdpa" and "needs a GPU; packed sequences use sdpa" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    loaded = attention(asked)
    (line,) = capsys.readouterr().out.splitlines()
    assert packed_kernel(loaded, torch.device("cuda")) == "flex_attention"
    assert line.startswith("warning: attn_implementation flash_attention_2: the flash-attn package is not installed")
    assert line.endswith("packed sequences use flex_attention instead")
