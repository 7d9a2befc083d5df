"""Logs and checkpoints that a kill, a full disk or an editor has left: each is gone on with, or named in a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from igrpo.run.checkpoints import MANIFEST, damage, find_checkpoint, read_manifest
from igrpo.settings import ConfigError
from tests.support.run_folders import STATE, config, make_run, sentence, start, tree


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
    monkeypatch.setattr("igrpo.run.checkpoints.PIECE", 64)
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
