"""Small folders as a run leaves them, and what starting in one of them says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.run.checkpoints import find_checkpoint
from igrpo.run.folder import RunFolder
from igrpo.run.output_folder import claimed
from igrpo.settings import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
STATE = ("model.safetensors", "optimizer.bin", "scheduler.bin", "loop.pt", "random_states_0.pkl")


def config(folder, **settings) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_name="d", output_dir=str(folder), **settings)


def fill(path: Path) -> None:
    (path / "state").mkdir(parents=True)
    for name in STATE:
        (path / "state" / name).write_bytes(name.encode() * 100)
    (path / "model.safetensors").write_bytes(b"weights" * 100)


def make_run(folder: Path, steps: int = 6, every: int = 2) -> Path:
    """As a run leaves it, with the checkpoints 4 and 6."""
    run = RunFolder(config(folder), None, ALONE)
    for step in range(1, steps + 1):
        run.log_metrics(step, {"reward": step / 10})
        run.log_completions([{"step": step, "row": step, "text": "größer"}])
        with open(folder / "timeline.jsonl", "a") as file:
            file.write(json.dumps({"t": step, "step": step}) + "\n")
        if step % every == 0:
            run.save_checkpoint(step, fill)
    return folder


def start(folder: Path | str, **settings) -> RunFolder:
    """What ``igrpo train`` does with the folder before and after it loads the model."""
    asked = config(folder, **settings)
    with claimed(asked, main_process=True):
        found = find_checkpoint(asked)
        return RunFolder(asked, None if found is None else int(found.name.rpartition("-")[2]), ALONE)


def sentence(folder: Path | str, kind: type[Exception] = ConfigError, **settings) -> str:
    with pytest.raises(kind) as caught:
        start(folder, **settings)
    text = str(caught.value)
    assert text.isprintable() and text.startswith(("output_dir: ", "resume_from_checkpoint: "))
    return text


def tree(folder: Path) -> dict[str, bytes | str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def foreign_checkpoint(folder: Path) -> None:
    """As TRL writes one."""
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_text(name)
