"""What a run goes on from: nothing in it runs code, and what cannot be read is a sentence."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from safetensors.torch import save_file

from igrpo.learner.learner import Learner
from igrpo.learner.placements.fsdp2 import read_plain
from igrpo.settings import ConfigError
from tests.support.tiny import save_tiny, tiny_tokenizer
from tests.support.train_on_ranks import build, train, weights

STATE = ("loop.pt", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin")
EXTRA = {"step": 1, "sampler": {"returned": [3]}, "drafts": [{"row": 1, "drafts": {0: {"text": "x"}}}]}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def learner() -> Learner:
    return build()


@pytest.fixture(scope="module")
def once(learner, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint-1"
    train(learner)
    learner.save(folder, tiny_tokenizer(), EXTRA)
    return folder


@pytest.fixture
def saved(once, tmp_path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "checkpoint-1"))


def hostile(path: Path, mark: Path, kind: str) -> None:
    """What a file looks like that runs code when it is unpickled, in each of the ways that torch reads."""
    path.parent.mkdir(exist_ok=True)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Touch(mark)))
    else:
        torch.save({"state": Touch(mark)}, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["pickle", "zip", "old"])
@pytest.mark.parametrize("name", STATE)
def test_a_file_that_would_run_code_is_refused(learner, saved, tmp_path, name, kind):
    hostile(saved / "state" / name, tmp_path / "ran", kind)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint: .*checkpoint-1") as caught:
        learner.load(saved)
    assert not (tmp_path / "ran").exists() and "\n" not in str(caught.value)
    if name != "model.safetensors":
        assert "write trust_checkpoint: true" in str(caught.value)


def test_files_that_no_checkpoint_of_ours_has_are_not_read(learner, saved, tmp_path):
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "sampler.bin", "dl_state_dict.bin",
                 "custom_checkpoint_1.pkl", "shards/.metadata", "zero3/mp_rank_00_model_states.pt"):  # fmt: skip
        hostile(saved / "state" / name, tmp_path / "ran", "pickle")
    assert learner.load(saved) == EXTRA and not (tmp_path / "ran").exists()


def test_an_older_schedule_that_would_run_code_is_refused(learner, saved, tmp_path):
    """accelerate read it with ``weights_only=False``."""
    (saved / "state" / "scheduler.bin").unlink()
    hostile(saved / "state" / "custom_checkpoint_0.pkl", tmp_path / "ran", "zip")
    with pytest.raises(ConfigError, match=r"custom_checkpoint_0\.pkl is damaged, or holds objects"):
        learner.load(saved)
    assert not (tmp_path / "ran").exists()


def test_a_shards_metadata_is_not_unpickled(tmp_path):
    hostile(tmp_path / "shards" / ".metadata", tmp_path / "ran", "pickle")
    with pytest.raises(ConfigError, match=r"was pickled by an older version.*go on with that version"):
        read_plain(tmp_path / "shards")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_checkpoint_is_read_as_it_is(saved, tmp_path):
    hostile(saved / "state" / "loop.pt", tmp_path / "ran", "zip")
    build(trust_checkpoint=True).load(saved)
    assert (tmp_path / "ran").is_dir()


def test_weights_schedule_and_random_numbers_come_back(learner, tmp_path):
    saved = tmp_path / "checkpoint-1"
    learner.save(saved, tiny_tokenizer(), EXTRA)
    before, rate = weights(learner), learner.scheduler.get_last_lr()
    numbers = random.random(), numpy.random.random(), torch.rand(1)
    train(learner)
    resumed = build()
    assert resumed.load(saved) == EXTRA and resumed.scheduler.get_last_lr() == rate
    assert (random.random(), numpy.random.random(), torch.rand(1)) == numbers
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(resumed).items())


def test_a_checkpoint_of_the_version_before(learner, tmp_path):
    """accelerate wrote it: the schedule as a custom object, numpy's state as an array."""
    train(learner)
    folder = tmp_path / "checkpoint-1"
    learner.accelerator.prepare(learner.policy, learner.placement.optimizer)
    learner.accelerator.register_for_checkpointing(learner.scheduler)
    learner.accelerator.save_state(str(folder / "state"))
    torch.save(EXTRA, folder / "state" / "loop.pt")
    before, rate = weights(learner), learner.scheduler.get_last_lr()
    numbers = random.random(), numpy.random.random(), torch.rand(1)
    resumed = build()
    assert resumed.load(folder) == EXTRA and resumed.scheduler.get_last_lr() == rate
    assert (random.random(), numpy.random.random(), torch.rand(1)) == numbers
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(resumed).items())


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "text":
        path.write_text("{}")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "another's":
        tensors = {"weight": torch.zeros(3)}
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "zeros", "text", "folder", "another's"])
@pytest.mark.parametrize("name", STATE)
def test_without_a_manifest_what_cannot_be_read_is_a_sentence(learner, saved, name, how):
    """As in a checkpoint of the version before; a missing random_states_0.pkl was once taken in silence."""
    damaged(saved / "state" / name, how)
    if (name, how) == ("loop.pt", "another's"):
        assert "weight" in learner.load(saved)  # whoever asked for it looks into it
        return
    with pytest.raises(ConfigError, match="resume_from_checkpoint: ") as caught:
        learner.load(saved)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_model_folder_runs_no_code_of_its_own(tmp_path):
    """Its config may name files of its own, and its weights may be pickles."""
    from igrpo.config.train_config import TrainConfig
    from igrpo.models.loading import load_policy, load_tokenizer

    folder, mark = Path(save_tiny(tmp_path / "model")), tmp_path / "ran"
    settings = TrainConfig(model_name_or_path=str(folder), dataset_name="d", bf16=False, gradient_checkpointing=False)
    text = (folder / "config.json").read_text()
    code = f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n"
    (folder / "own.py").write_text(code)
    named = '"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},'
    (folder / "config.json").write_text(text.replace('"llama"', '"own"').replace("{", f"{{{named}", 1))
    with pytest.raises(ConfigError, match="model_name_or_path: cannot load"):
        load_policy(str(folder), settings)
    (folder / "config.json").write_text(text)
    words = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(
        words.replace("{", '{"auto_map": {"AutoTokenizer": ["own.Own", null]},', 1)
    )
    load_tokenizer(str(folder), settings)
    (folder / "model.safetensors").unlink()
    hostile(folder / "pytorch_model.bin", mark, "zip")
    with pytest.raises(ConfigError, match="model_name_or_path: cannot load"):
        load_policy(str(folder), settings)
    assert not mark.exists()


def test_adapters_beside_another_base_in_four_bits_or_in_other_places_are_refused(tmp_path):
    lora = {"use_peft": True, "lora_dropout": 0.0, "load_in_4bit": True, "lora_target_modules": ["q_proj"]}
    made = build(**lora)
    made.save(tmp_path, tiny_tokenizer(), EXTRA)
    assert build(**lora).load(tmp_path) == EXTRA
    for other, words in {
        "bnb_4bit_quant_type: fp4": "beside a base in nf4, and this one is in fp4",
        "use_bnb_nested_quant: true": "this one is in nf4 with nested scales; write the bnb_4bit_quant_type",
        "lora_target_modules: [q_proj, v_proj]": r"other adapters than this run \(.*v_proj.*; write the lora_target",
        "lora_target_modules: [v_proj]": r"other adapters than this run \(",
    }.items():
        with pytest.raises(ConfigError, match=words):
            build(**lora | yaml.safe_load(other)).load(tmp_path)
