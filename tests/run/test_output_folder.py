"""Folders that hold something else than a whole run: each ends as a run or as a sentence; nothing of others goes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from igrpo.run.checkpoints import MANIFEST, checkpoints, damage
from igrpo.run.folder import RunFolder
from igrpo.run.output_folder import DiskFullError, concerns
from igrpo.terminal import printable
from tests.support.run_folders import ALONE, ROOT, config, fill, foreign_checkpoint, make_run, sentence, start, tree

# --- what others wrote


def test_the_checkpoints_of_another_program_stay_and_are_named(tmp_path):
    """Two of TRL's were once removed by ``save_total_limit``, and the third reported as the trained model."""
    for step in (1, 2, 500):
        foreign_checkpoint(tmp_path / "out" / f"checkpoint-{step}")
    before = tree(tmp_path)
    assert "holds checkpoint-1, checkpoint-2, checkpoint-500, which no run" in sentence(tmp_path / "out")
    assert "has no checkpoint yet" in sentence(tmp_path / "empty", resume_from_checkpoint="last")
    assert "holds checkpoint-1" in sentence(tmp_path / "out", resume_from_checkpoint="last")
    assert tree(tmp_path) == before and not (tmp_path / "empty").exists()


STRANGERS = {
    "a config.yaml of another program": ("config.yaml", "model: resnet50\n"),
    "a config.yaml that is a list": ("config.yaml", "- 1\n- 2\n"),
    "a config.yaml that is no YAML": ("config.yaml", "{"),
    "a config.yaml of bytes": ("config.yaml", "\0\1"),
    "metrics of another program": ("metrics.jsonl", '{"step": 1}\n'),
    "a thesis": ("thesis.tex", "\\documentclass"),
    "a folder": ("notes/today.txt", "x"),
    "a folder that is called like a log": ("run.log/today.txt", "x"),
    "a name of two lines": ("a\nb", "x"),
    "a file that is called like a checkpoint": ("checkpoint-3", "x"),
    "a checkpoint without state": ("checkpoint-3/model.safetensors", "x"),
    "an odd number": ("checkpoint-²/x", "x"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_folder_with_something_unknown_is_refused_by_name(tmp_path, name):
    path = tmp_path / "out" / STRANGERS[name][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STRANGERS[name][1])
    before = tree(tmp_path)
    top = path.relative_to(tmp_path / "out").parts[0]
    assert f"holds {printable(top)}, which no run" in sentence(tmp_path / "out")
    assert tree(tmp_path) == before


def test_what_is_no_reason_not_to_begin(tmp_path):
    """Launchers write their logs into the folder, disks have a lost+found, and an empty folder may be kept in git."""
    folder = tmp_path / "out"
    (folder / "lost+found").mkdir(parents=True)
    (folder / ".cache" / "x").mkdir(parents=True)
    for name in (".gitkeep", "stop", "slurm-17.out", "job.err", "train.log", "nohup.out"):
        (folder / name).touch()
    names = set(os.listdir(folder)) - {"stop"}
    assert start(folder).set_aside is None and names < set(os.listdir(folder))
    assert start(folder).set_aside is not None and names < set(os.listdir(folder))


def test_a_second_run_beside_files_of_the_user_names_them(tmp_path):
    """They were once moved away together with the run."""
    folder = make_run(tmp_path / "run")
    (folder / "thesis.tex").write_text("x")
    foreign_checkpoint(folder / "checkpoint-500")
    before = tree(tmp_path)
    assert "holds checkpoint-500, thesis.tex, which no run" in sentence(folder)
    assert "holds checkpoint-500, which no run" in sentence(folder, resume_from_checkpoint="last")
    assert tree(tmp_path) == before
    shutil.rmtree(folder / "checkpoint-500")
    run = start(folder, resume_from_checkpoint="last", save_total_limit=1)
    run.save_checkpoint(8, fill)
    assert (folder / "thesis.tex").read_text() == "x"
    assert [c.name for c in checkpoints(folder)] == ["checkpoint-8"]


def test_only_checkpoints_of_this_run_make_room_for_new_ones(tmp_path):
    other = make_run(tmp_path / "other", steps=2)
    folder = make_run(tmp_path / "run")
    run = start(folder, resume_from_checkpoint="last", save_total_limit=1)
    shutil.copytree(other / "checkpoint-2", folder / "checkpoint-2")
    os.symlink(other / "checkpoint-2", folder / "checkpoint-3")
    run.save_checkpoint(8, fill)
    assert [c.name for c in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3", "checkpoint-8"]
    assert damage(other / "checkpoint-2") is None


def test_a_checkpoint_that_goes_loses_its_name_first(tmp_path, monkeypatch):
    """A kill inside the removal leaves a name that no reader takes for a checkpoint's, and the next run cleans up."""
    folder = make_run(tmp_path / "run")
    run = start(folder, resume_from_checkpoint="last", save_total_limit=1)

    def killed(path, **_):
        (path / MANIFEST).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("igrpo.run.folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(8, fill)
    monkeypatch.undo()
    left = [p for p in folder.glob("*checkpoint-*") if not p.name.startswith("checkpoint-")]
    assert left and all(damage(c) is None for c in checkpoints(folder))
    (folder / ".igrpo-saving-checkpoint-9" / "state").mkdir(parents=True)  # of a kill inside a save
    (folder / ".igrpo-metrics.jsonl.tmp").touch()
    (folder / ".checkpoint-7").mkdir()  # not ours
    start(folder, resume_from_checkpoint="last")
    assert [p.name for p in folder.glob(".*")] == [".checkpoint-7"]


def test_a_checkpoint_of_the_same_step_is_not_overwritten(tmp_path):
    run = RunFolder(config(tmp_path / "run"), None, ALONE)
    foreign_checkpoint(tmp_path / "run" / "checkpoint-2")
    run.save_checkpoint(2, fill)
    assert (tmp_path / "run" / "abandoned-checkpoint-2" / "optimizer.pt").is_file()
    assert damage(tmp_path / "run" / "checkpoint-2") is None


# --- where the folder is


def test_a_links_target_keeps_the_earlier_run_on_its_disk(tmp_path):
    """The link was once renamed, and the new run written beside it, on the small disk."""
    target = make_run(tmp_path / "large-disk" / "runs")
    os.symlink(target, tmp_path / "out")
    run = start(tmp_path / "out")
    assert os.readlink(tmp_path / "out") == str(target)
    assert run.set_aside.parent == target.parent
    assert [c.name for c in checkpoints(run.set_aside)] == ["checkpoint-4", "checkpoint-6"]
    assert (run.set_aside / "config.yaml").is_file() and os.listdir(target) == ["config.yaml"]


def test_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert start(".").set_aside is None
    kept = start(".").set_aside
    assert kept.parent == tmp_path and os.listdir(".") == ["config.yaml"]


def test_a_mount_point_keeps_the_earlier_run_inside(small_disk):
    assert start(small_disk).set_aside is None
    kept = start(small_disk).set_aside
    assert kept.parent == small_disk and (kept / "config.yaml").is_file()
    again = start(small_disk).set_aside
    assert again != kept and (kept / "config.yaml").is_file()


def test_a_name_that_leaves_no_room_for_a_longer_one(tmp_path):
    folder = tmp_path / ("n" * 250)
    start(folder)
    assert start(folder).set_aside.parent == folder


def test_a_move_that_was_killed_goes_on_the_next_time(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    real, moved = os.rename, []

    def killed(source, target):
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(source)
        real(source, target)

    monkeypatch.setattr("igrpo.run.output_folder.os.rename", killed)
    with pytest.raises(KeyboardInterrupt):
        start(folder)
    monkeypatch.undo()
    start(folder)
    kept = {name for part in tmp_path.glob("run-*") for name in os.listdir(part)}
    assert {"checkpoint-4", "checkpoint-6", *(f"{n}.jsonl" for n in ("metrics", "completions", "timeline"))} < kept


def read_only(tmp_path: Path) -> Path:
    folder = tmp_path / "ro"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("needs to mount a file system: root")
    return folder


def dangling(tmp_path: Path) -> Path:
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    return tmp_path / "link"


def a_loop(tmp_path: Path) -> Path:
    os.symlink("loop", tmp_path / "loop")
    return tmp_path / "loop" / "run"


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


PLACES = {
    "read-only": (read_only, "cannot be written"),
    "below read-only": (lambda t: read_only(t) / "a" / "b", "cannot be written"),
    "a file": (a_file, "is a file, no folder"),
    "below a file": (lambda t: a_file(t) / "run", "is a file, no folder"),
    "a dangling link": (dangling, "which is not there; make that folder"),
    "below a dangling link": (lambda t: dangling(t) / "run", "which is not there; make that folder"),
    "a loop of links": (a_loop, "is a link to loop, which is not there"),
    "a name too long": (lambda t: t / ("n" * 300), "File name too long"),
    "a path too long": (lambda t: t / ("n/" * 1950), "is too long for the files of a run"),
    "the root": (lambda t: Path("/"), "which no run of this program wrote"),
    "the checkout's parent": (lambda t: ROOT.parent, "which no run of this program wrote"),
    "the checkout": (lambda t: ROOT, "which no run of this program wrote"),
    "no text": (lambda t: os.fsdecode(bytes(t) + b"/\xff"), "half a character"),
    "two lines": (lambda t: f"{t}/a\nb", "holds characters that are no text"),
    "nothing": (lambda t: " ", "is empty"),
    "nobody's home": (lambda t: "~nobody-of-this-name/run", "there is no home folder"),
    "a pseudo file system": (lambda t: "/proc/run", "cannot be"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_is_a_sentence(tmp_path, name):
    make, words = PLACES[name]
    place = make(tmp_path)
    before = tree(tmp_path)
    try:
        assert words in sentence(place) and len(sentence(place)) < 400
        assert tree(tmp_path) == before
    finally:
        if "read-only" in name:
            subprocess.run(["umount", str(tmp_path / "ro")], check=True)


def test_no_room_at_all_is_a_full_disk(small_disk):
    (small_disk / ".ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(DiskFullError, match="there is no room in"):
        start(small_disk / "run")


def test_which_errors_concern_the_folder(tmp_path):
    run = start(tmp_path / "run")
    shutil.rmtree(run.path)  # while it goes on
    with pytest.raises(FileNotFoundError) as caught:
        run.log_metrics(1, {})
    assert concerns(caught.value, run.path) and not concerns(caught.value, tmp_path / "ru")
    assert not concerns(ConnectionRefusedError(111, "refused"), Path())
