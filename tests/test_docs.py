"""Documentation that cannot go stale: commands are run or parsed, quoted messages are looked up in the source.

``igrpo plan`` and ``--help`` are run as written. Commands that train, evaluate or serve take minutes, GPUs or several
machines: they are read by the program's own parser, down to the recipe's keys, and what they do is tested beside the
programs. Only commands of other programs are taken on trust, each with its reason in ``FOREIGN``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from igrpo.cli import VERBS, main_of
from igrpo.config.recipe import parse_args, split_args

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOREIGN = {
    "pip install": "needs a package index; scripts/setup_env.py installs the pinned set in CI",
    "export": "sets a variable of the reader's shell",
    "git clone": "needs the network",
    "nsys": "NVIDIA's profiler, needs a GPU",
    "ncu": "NVIDIA's profiler, needs a GPU",
    "nvidia-smi": "needs a GPU",
    "openssl rand": "makes a secret",
}


def commands(page: Path) -> list[str]:
    """Lines of the page's shell blocks; a backslash joins lines, comments and a prompt sign go."""
    found = []
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line.removeprefix("$ "), comments=True):
                found.append(shlex.join(words))
    return found


COMMANDS = [(page.relative_to(ROOT), command) for page in PAGES for command in commands(page)]


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 20 and {str(page) for page, _ in COMMANDS} >= {"README.md", "docs/evaluation.md"}


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: str(value)[:70])
def test_a_command_of_the_docs_is_one_that_works(page, command):
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        words.pop(0)
    if any(command.startswith(prefix) for prefix in FOREIGN):
        return
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True, timeout=60)
    elif words[:2] == ["accelerate", "launch"]:
        check_accelerate(words[2:])
    elif words[0] == "igrpo":
        check_verb(words[1], words[2:])
    elif words[0] == "sbatch" or words[0].endswith(".sh"):
        check_script([word for word in words if word != "sbatch" and not word.startswith("--nodes=")])
    elif words[0] == "pytest":
        check_python(["-m", *words])
    elif words[0] in ("python", ".venv/bin/python", "python3"):
        check_python(words[1:])
    else:
        pytest.fail(f"{page}: nobody checks `{command}`; see FOREIGN in this file")


def check_script(words: list[str]) -> None:
    """``SCRIPT RECIPE [ADDRESS] [--key value …]``"""
    subprocess.run(["bash", "-n", str(ROOT / words[0])], check=True, timeout=60)
    keys = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    parse_args(["--config", str(ROOT / words[1]), *words[keys:]])


def check_python(words: list[str]) -> None:
    if words[0] == "-m" and words[1].startswith("igrpo.") and words[1] != "igrpo.report.timeline":
        verb = words[1].removeprefix("igrpo.")
        check_verb("train" if verb == "serve" else verb, words[2:])
    elif words[0] == "-m" and words[1] == "pytest":
        for word in words[2:]:
            if word.startswith(("tests", "benchmarks")):
                assert (ROOT / word.partition("::")[0]).exists(), word
    elif words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, words[1]
    else:
        assert (ROOT / words[0]).is_file(), words[0]


def check_verb(verb: str, words: list[str]) -> None:
    """A page's own files need not exist; keys, flags and recipes must, but for the placeholder ``recipe.yaml``."""
    assert verb in VERBS, verb
    words = ["recipes/quickstart.yaml" if word == "recipe.yaml" else word for word in words]
    if "--help" in words or verb in ("report", "doctor"):
        known = help_of(verb)
        assert all(word in known for word in words if word.startswith("-")), known
    elif verb == "train":
        parse_args(words)
    elif verb == "eval":
        from igrpo.eval.benchmarks import BENCHMARKS, HELD_OUT
        from igrpo.eval.command import _parser

        arguments, rest = _parser().parse_known_args(words)
        split_args(rest)
        for name in (n.partition("@")[0] for word in arguments.benchmarks for n in word.split(",")):
            assert name in (*BENCHMARKS, HELD_OUT) or name.endswith(".jsonl"), name
    elif verb == "plan":
        from igrpo.plan.command import main

        if "--calibrate" in words:  # a run that the reader has
            at = words.index("--calibrate")
            words = words[:at] + words[at + 2 :]
        words = [word for word in words if word != "--rehearse"]  # wants a process; tests/plan/test_rehearsal.py
        assert main(words) == 0


def help_of(verb: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            assert main_of(verb)(["--help"]) == 0
        except SystemExit as ended:  # argparse's way
            assert ended.code == 0
    return output.getvalue() + "--help"


def check_accelerate(words: list[str]) -> None:
    arguments = launch_command_parser().parse_args(words)
    assert (ROOT / arguments.training_script).is_file(), arguments.training_script
    if arguments.config_file:
        assert "distributed_type" in yaml.safe_load((ROOT / arguments.config_file).read_text(encoding="utf-8"))
    parse_args([str(ROOT / w) if w.startswith("recipes/") else w for w in arguments.training_script_args])


# --- messages


@cache
def source_texts() -> list[str]:
    """Every text in the program, adjacent pieces joined as Python joins them, with … for what f-strings fill in."""
    texts = []
    for path in (p for package in ("igrpo", "igrpo_kernels") for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value.replace("%s", "…"))
    return texts


MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: m[:60])
def test_a_message_of_the_troubleshooting_page_is_still_printed(message):
    pattern = re.compile(".*?".join(map(re.escape, message.strip("…").split("…"))), re.DOTALL)
    assert any(pattern.search(text) for text in source_texts()), "reworded? change docs/troubleshooting.md with it"


def test_the_troubleshooting_page_is_no_stub():
    assert len(MESSAGES) >= 30 and len(set(MESSAGES)) == len(MESSAGES)


# --- the algorithm


def test_the_algorithm_of_the_page_stands_in_the_program():
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "algorithm.md").read_text("utf-8"), re.DOTALL)
    assert lines in (ROOT / "igrpo" / "rollout" / "algorithm.py").read_text("utf-8")
