"""The `igrpo` command as a shell sees it: words in, text and an exit code out."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from igrpo.cli import VERBS, main

ROOT = Path(__file__).resolve().parents[1]


def shell(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_console_script_is_this_program():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"igrpo": "igrpo.cli:main"}


def test_help_names_every_verb_and_teaches_by_example(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"igrpo {verb} " in out for verb in VERBS if verb != "doctor") and "  igrpo doctor\n" in out
    assert main([]) == 2
    assert capsys.readouterr().err.strip() == out.strip()


@pytest.mark.parametrize(("typed", "said"), [("trian", "did you mean train?"), ("evaluate", "did you mean eval?"),
                                             ("fly", "verbs: train, eval, report, doctor, plan")])  # fmt: skip
def test_an_unknown_verb_names_the_nearest(typed, said, capsys):
    assert main([typed]) == 2
    assert capsys.readouterr().err == f"error: igrpo {typed}: there is no such verb; {said}\n"


def test_three_ways_to_say_the_same():
    by_module, by_package = shell("igrpo.train", "--help"), shell("igrpo", "train", "--help")
    assert by_module.returncode == by_package.returncode == 0
    assert by_module.stdout == by_package.stdout and "--num_drafts" in by_module.stdout


def test_a_verbs_exit_code_is_the_commands():
    done = shell("igrpo", "train", "--config", "recipes/no-such.yaml")
    assert done.returncode == 2 and done.stderr.startswith("error: --config recipes/no-such.yaml")


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m igrpo train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("usage:")
    # A reader that leaves when all but the end of the buffer is written, and a verb that leaves by SystemExit.
    program = "import builtins, os, sys, igrpo.cli as cli; sys.argv[1:] = ['train', '--help']; say = print; "
    program += "read, write = os.pipe(); os.dup2(write, 1); os.close(write); "
    program += "builtins.print = lambda *a, **k: (say(*a, **k), os.close(read)); sys.exit(cli.main())"
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    gone = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, env=env
    )
    assert (gone.returncode, gone.stderr) == (141, "")
