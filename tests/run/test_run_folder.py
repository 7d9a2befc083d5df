"""The run's folder: nothing overwritten, nothing half-written, no step logged twice after a resume."""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from igrpo.config.train_config import TrainConfig
from igrpo.log_lines import read_records
from igrpo.run.checkpoints import checkpoints, find_checkpoint
from igrpo.run.folder import DiskFullError, RunFolder
from igrpo.settings import ConfigError

ALONE = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


def config(folder, **settings) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_name="d", output_dir=str(folder), **settings)


def fill(path):
    (path / "state").mkdir(parents=True)
    (path / "state" / "loop.pt").write_text("x")


def test_an_earlier_run_is_kept_under_another_name(tmp_path):
    first = RunFolder(config(tmp_path / "run"), None, ALONE)
    first.log_metrics(1, {"reward": 0.5})
    second = RunFolder(config(tmp_path / "run"), None, ALONE)
    third = RunFolder(config(tmp_path / "run"), None, ALONE)
    assert json.loads((second.set_aside / "metrics.jsonl").read_text()) == {"step": 1, "reward": 0.5}
    assert len({str(second.set_aside), str(third.set_aside), str(third.path)}) == 3
    assert not (third.path / "metrics.jsonl").exists()


def test_a_killed_save_leaves_the_previous_checkpoint(tmp_path):
    run = RunFolder(config(tmp_path / "run", resume_from_checkpoint="last"), None, ALONE)
    run.save_checkpoint(2, fill)

    def killed(path):
        fill(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(4, killed)
    assert find_checkpoint(config(tmp_path / "run", resume_from_checkpoint="last")).name == "checkpoint-2"
    RunFolder(config(tmp_path / "run"), 2, ALONE)
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoint-2", "config.yaml"]


def by_torch(path):
    torch.save(torch.zeros(10**6), path / "optimizer.bin")


def by_safetensors(path):
    save_file({"weight": torch.zeros(10**6)}, path / "model.safetensors")


@pytest.mark.parametrize("write", [by_torch, by_safetensors])
def test_a_full_disk_is_said_and_leaves_the_previous_checkpoint(small_disk, write):
    """torch's own words for it are `unexpected pos 576 vs 534`."""
    run = RunFolder(config(small_disk / "run"), None, ALONE)
    run.save_checkpoint(2, fill)

    def too_large(path):
        fill(path)
        write(path)

    with pytest.raises(
        DiskFullError, match=r"the disk of .*run was full after 0.00 GiB of checkpoint 4; make room, or"
    ):
        run.save_checkpoint(4, too_large)
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoint-2", "config.yaml"]
    run.save_checkpoint(6, fill)  # there is room again


@pytest.mark.parametrize(
    "error", [OSError(errno.EDQUOT, "quota"), OSError(errno.ENOSPC, "full"), RuntimeError("other")]
)
def test_only_a_full_disk_is_called_one(tmp_path, error):
    run = RunFolder(config(tmp_path / "run"), None, ALONE)

    def fails(path):
        fill(path)
        raise error

    with pytest.raises(DiskFullError if isinstance(error, OSError) else RuntimeError) as caught:
        run.save_checkpoint(1, fails)
    assert isinstance(error, OSError) == isinstance(caught.value, DiskFullError)


def test_old_checkpoints_go_and_the_order_is_by_number(tmp_path):
    run = RunFolder(config(tmp_path / "run", save_total_limit=2), None, ALONE)
    for step in (8, 9, 10):
        run.save_checkpoint(step, fill)
    assert [p.name for p in checkpoints(run.path)] == ["checkpoint-9", "checkpoint-10"]


def test_resuming_drops_the_lines_that_will_be_written_again(tmp_path):
    run = RunFolder(config(tmp_path / "run"), None, ALONE)
    for step in (1, 2, 3):
        run.log_metrics(step, {"reward": step})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')  # cut by a kill
    RunFolder(config(tmp_path / "run"), 2, ALONE)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_whatever_a_model_writes_a_record_stays_one_line(tmp_path):
    """A resume used to drop completions with U+2028 or U+0085 in them: ``splitlines`` takes these for ends of lines."""
    run = RunFolder(config(tmp_path / "run"), None, ALONE)
    texts = ["a\u2028b", "a\x85b", "a\x0c\x1cb", "a\r\nb"]
    run.log_completions({"step": 1, "text": text} for text in texts)
    RunFolder(config(tmp_path / "run"), 1, ALONE)
    assert [record["text"] for record in read_records(run.path / "completions.jsonl", [])] == texts


def test_asking_for_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        find_checkpoint(config(tmp_path / "run", resume_from_checkpoint="last"))
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        find_checkpoint(config(tmp_path / "run", resume_from_checkpoint=str(tmp_path)))


def test_only_the_main_process_touches_the_folder(tmp_path):
    other = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: None)
    RunFolder(config(tmp_path / "run"), None, other)
    assert os.listdir(tmp_path) == []


def test_going_back_keeps_the_abandoned_checkpoints_and_every_new_one(tmp_path):
    """A run gone back to step 100 once pruned its own new checkpoint 150 in favour of the 200 it had left."""
    run = RunFolder(config(tmp_path / "run", save_total_limit=None), None, ALONE)
    for step in (100, 200):
        run.save_checkpoint(step, fill)
    settings = {"resume_from_checkpoint": str(run.path / "checkpoint-100"), "save_total_limit": 1}
    again = RunFolder(config(tmp_path / "run", **settings), 100, ALONE)
    saved = again.save_checkpoint(150, fill)
    assert checkpoints(run.path) == [saved] and saved.name == "checkpoint-150"
    assert (run.path / "abandoned-checkpoint-200" / "state" / "loop.pt").is_file()
    assert find_checkpoint(config(tmp_path / "run", resume_from_checkpoint="last")) == saved


def test_a_checkpoint_of_another_run_leaves_the_run_of_this_folder_alone(tmp_path):
    source = RunFolder(config(tmp_path / "a"), None, ALONE)
    source.save_checkpoint(10, fill)
    here = RunFolder(config(tmp_path / "b"), None, ALONE)
    here.log_metrics(50, {"reward": 1.0})
    here.save_checkpoint(50, fill)
    settings = {"resume_from_checkpoint": str(source.path / "checkpoint-10")}
    new = RunFolder(config(tmp_path / "b", **settings), 10, ALONE)
    assert json.loads((new.set_aside / "metrics.jsonl").read_text())["step"] == 50
    assert [p.name for p in checkpoints(new.set_aside)] == ["checkpoint-50"] and not checkpoints(new.path)
