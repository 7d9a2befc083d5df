"""Folders that hold something else than a whole run: each ends as a run or as a sentence; nothing of others goes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from igrpo import run_lock
from igrpo.checkpoints import MANIFEST, checkpoints, damage, find_checkpoint, read_manifest
from igrpo.config import ConfigError, TrainConfig
from igrpo.output_folder import DiskFullError, claimed, concerns
from igrpo.run_folder import RunFolder
from igrpo.run_lock import LOCK, locked
from igrpo.terminal import printable

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

    monkeypatch.setattr("igrpo.run_folder.shutil.rmtree", killed)
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

    monkeypatch.setattr("igrpo.output_folder.os.rename", killed)
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


# --- logs


def append(path: Path, content: bytes) -> None:
    with open(path, "ab") as file:
        file.write(content)


LOGS = {
    "cut inside a character": ('{"step": 7, "text": "grö'.encode()[:-1], None),
    "cut inside a word": (b'{"step": 7, "te', None),
    "null": (b"null\n", None),
    "a list": (b"[1]\n", None),
    "no step": (b'{"text": 1}\n', None),
    "a step that is null": (b'{"step": null}\n', None),
    "a step that is text": (b'{"step": "7"}\n', None),
    "a step that is not finite": (b'{"step": NaN}\n{"step": Infinity}\n', None),
    "a number of many digits": (b'{"step": ' + b"9" * 5000 + b"}\n", None),
    "deep nesting": (b'{"step": ' + b"[" * 100_000 + b"\n", None),
    "zeros of a power cut": (bytes(4096), None),
    "bytes": (bytes(range(256)) * 4 + b"\n", None),
    "empty lines": (b"\n\n\r\n", None),
    "steps twice": (b'{"step": 5}\n{"step": 6}\n', None),
}


@pytest.mark.parametrize("log", ["metrics.jsonl", "completions.jsonl", "timeline.jsonl"])
@pytest.mark.parametrize("name", LOGS)
def test_a_resume_goes_on_after_a_broken_log(tmp_path, caplog, name, log):
    folder = make_run(tmp_path / "run")
    path = folder / log
    good = path.read_bytes()
    append(path, LOGS[name][0])
    start(folder, resume_from_checkpoint="last")
    kept = path.read_bytes()
    assert kept.startswith(good) and all(json.loads(line)["step"] <= 6 for line in kept.splitlines())
    assert caplog.messages == []
    # The same between lines that stay: it is named, and it stays where it is.
    path.write_bytes(good + LOGS[name][0] + b"\n" + good)
    start(folder, resume_from_checkpoint="last")
    assert path.read_bytes().startswith(good) and path.read_bytes().endswith(good)
    said = "".join(caplog.messages)
    assert (f"{path}: what is no JSON object was left out, in line " in said) == (
        name not in ("steps twice", "empty lines", "zeros of a power cut")
    )


def test_logs_that_an_editor_has_saved(tmp_path):
    folder = make_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n").rstrip())
    start(folder, resume_from_checkpoint=str(folder / "checkpoint-4"))
    lines = path.read_bytes().decode("utf-8-sig").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    path.write_bytes(b"")
    start(folder, resume_from_checkpoint="last")


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "stop"])
def test_a_folder_in_the_place_of_a_file(tmp_path, name):
    folder = make_run(tmp_path / "run")
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    for settings in ({}, {"resume_from_checkpoint": "last"}):
        assert f"{name} is no file that a run can read and write" in sentence(folder, **settings)


@pytest.mark.parametrize("content", ["", "{", "- 1\n", "model: other\n", "\0"])
def test_a_resume_keeps_a_config_that_it_does_not_know(tmp_path, content):
    folder = make_run(tmp_path / "run")
    (folder / "config.yaml").write_text(content)
    start(folder, resume_from_checkpoint="last")
    assert (folder / "config.yaml.old").read_text() == content
    assert start(folder).set_aside is not None and os.listdir(folder) == ["config.yaml"]


# --- checkpoints


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def hang(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "missing": (Path.unlink, "is missing"),
    "empty": (lambda p: p.write_bytes(b""), "has 0 bytes"),
    "cut": (lambda p: os.truncate(p, 10), "has 10 bytes"),
    "longer": (lambda p: append(p, b"x"), "bytes, "),
    "one bit": (flip, "is not as it was written (its hash differs)"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "is missing"),
    "a pipe": (hang, "is missing"),
}


@pytest.mark.parametrize("file", [*(f"state/{name}" for name in STATE), "model.safetensors"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_one_before_it_that_is_whole(tmp_path, name, file):
    folder = make_run(tmp_path / "run", steps=6)
    break_it, words = DAMAGES[name]
    break_it(folder / "checkpoint-6" / file)
    before = tree(folder)
    said = sentence(folder, resume_from_checkpoint="last")
    assert f"checkpoint-6 is damaged: {file} " in said and words in said
    assert f"checkpoint-4 is whole: write --resume_from_checkpoint {folder}/checkpoint-4" in said
    assert tree(folder) == before
    (folder / "checkpoint-4" / MANIFEST).unlink()
    assert "no checkpoint before it is whole" in sentence(folder, resume_from_checkpoint="last")


MANIFESTS = {
    "empty": "", "cut": '{"igrpo_', "null": "null", "a list": "[]", "no files": '{"run": "a", "processes": 1}',
    "files of nothing": '{"run": "a", "processes": 1, "files": {"state/loop.pt": null}}',
    "a file elsewhere": '{"run": "a", "processes": 1, "files": {"../../x": {"bytes": 0, "sha256": ""}}}',
    "deep": "[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_damaged_manifest(tmp_path, name):
    folder = make_run(tmp_path / "run")
    (folder / "checkpoint-6" / MANIFEST).write_text(MANIFESTS[name])
    assert f"is damaged: {MANIFEST} cannot be read; checkpoint-4" in sentence(folder, resume_from_checkpoint="last")
    (folder / "checkpoint-6" / MANIFEST).unlink()
    assert f"is damaged: {MANIFEST} is missing; checkpoint-4" in sentence(folder, resume_from_checkpoint="last")


def test_each_of_several_processes_compares_its_share(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run") / "checkpoint-6"
    (name, *_) = read_manifest(folder)["files"]
    flip(folder / name)
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        try:
            find_checkpoint(config(folder.parent, resume_from_checkpoint="last"))
            found.append("whole")
        except ConfigError as error:
            found.append(str(error))
    assert "whole" in found and any(f"{name} is not as it was written" in one for one in found)


def test_a_large_file_is_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("igrpo.checkpoints.PIECE", 64)
    folder = make_run(tmp_path / "run")
    assert damage(folder / "checkpoint-6") is None
    path = folder / "checkpoint-6" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[64:128] + data[:64] + data[128:])
    assert "model.safetensors is not as" in damage(folder / "checkpoint-6")


def test_what_is_no_checkpoint(tmp_path):
    for asked in (tmp_path, tmp_path / "nowhere", tmp_path / ("n" * 300), "", "/dev/null"):
        assert "is no checkpoint folder" in sentence(tmp_path / "run", resume_from_checkpoint=str(asked))
    assert not (tmp_path / "run").exists()


# --- two runs


def hold(folder: Path, *, and_fork: bool = False) -> tuple[subprocess.Popen[str], int]:
    """A process that holds the folder, and the child that it has forked (0: none)."""
    code = "import os, sys, time; from pathlib import Path; from igrpo.run_lock import locked\n"
    code += "with locked(Path(sys.argv[1])):\n"
    code += " child = os.fork() if len(sys.argv) > 2 else 0\n"
    code += " child or len(sys.argv) < 3 or time.sleep(60)\n os.write(1, f'{child}\\n'.encode())\n time.sleep(60)"
    words = [sys.executable, "-c", code, str(folder), *["fork"] * and_fork]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_the_second_run_in_a_folder_is_told_who_holds_it(tmp_path):
    folder = make_run(tmp_path / "run")
    before = tree(folder)
    first, _ = hold(folder)
    try:
        said = sentence(folder, resume_from_checkpoint="last")
        assert f"is in use by process {first.pid} on " in said and " since 20" in said
        os.symlink(folder, tmp_path / "link")
        assert f"process {first.pid} " in sentence(tmp_path / "link")
        assert find_checkpoint(config(folder, resume_from_checkpoint="last")) is not None  # reading is allowed
    finally:
        first.kill()
        first.wait()
    assert (folder / LOCK).is_file()  # nobody took it away; the kernel knows better
    start(folder, resume_from_checkpoint="last")
    assert tree(folder).keys() == before.keys()


def test_a_forked_child_of_a_killed_run_does_not_hold_the_folder(tmp_path):
    first, child = hold(tmp_path, and_fork=True)
    first.kill()
    first.wait()
    try:
        os.kill(child, 0)
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def elsewhere(folder: Path) -> None:
    words = {"host": "node7", "process": "17", "since": "2026-01-01 10:00:00", "boot": "another"}
    (folder / LOCK).write_text(json.dumps(words))


def test_a_run_on_another_machine_holds_the_folder_as_long_as_it_touches_the_lock(tmp_path, monkeypatch):
    """Where the file system does not share the kernel's locks."""
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    elsewhere(tmp_path)
    with locked(tmp_path):  # it has ended
        pass
    elsewhere(tmp_path)
    beating = multiprocessing.get_context("spawn").Process(target=_touch, args=(str(tmp_path / LOCK),))
    beating.start()
    try:
        time.sleep(0.5)
        began = (tmp_path / LOCK).stat().st_mtime_ns
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime_ns == began and time.monotonic() < deadline:
            time.sleep(0.05)
        monkeypatch.setattr(run_lock, "BEAT_SECONDS", 1.0)
        with pytest.raises(ConfigError, match="is in use by process 17 on node7 since 2026-01-01 10:00:00"), \
                locked(tmp_path):  # fmt: skip
            pass
    finally:
        beating.kill()
        beating.join()


def _touch(path: str) -> None:
    while True:
        os.utime(path)
        time.sleep(0.05)


def test_a_file_system_without_locks_is_locked_by_touch(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock.fcntl, "flock", unknown)
    with locked(tmp_path), pytest.raises(ConfigError, match=rf"process {os.getpid()} on"), locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []
    elsewhere(tmp_path)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"[" * 100_000, b'{"host": "\x1b[2J"}'])
def test_a_lock_of_odd_content_holds_nobody_up(tmp_path, content, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.02)
    (tmp_path / LOCK).write_bytes(content)
    with locked(tmp_path):
        pass
