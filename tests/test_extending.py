"""docs/extending.md, tried: its changes are made to a copy of the packages, which then trains with all of them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
LOSS = """
import torch
from igrpo_kernels import GRPOLossConfig, grpo_loss
logits = torch.randn(2, 5, 11, requires_grad=True)
ids, advantages = torch.randint(11, (2, 5)), torch.tensor([1.0, -0.5])
for impl in ("torch", "auto"):
    out = grpo_loss(logits, ids, advantages, config=GRPOLossConfig(loss_type="reinforce"), impl=impl)
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    wanted = -(advantages[:, None] * logps).mean()
    torch.testing.assert_close(out.loss, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (out.loss, wanted)))
"""


def change(path: Path, hunk: list[str]) -> None:
    """Applies lines of a diff: runs of kept and taken lines must each be in the file once, added ones follow them."""
    text = path.read_text(encoding="utf-8")
    for kept, added in re.findall(r"((?:^[ -].*\n)+)((?:^\+.*\n|^\+$\n)*)", "\n".join(hunk) + "\n", re.MULTILINE):
        old = "".join(line[1:] for line in kept.splitlines(keepends=True))
        new = "".join(line[1:] for line in kept.splitlines(keepends=True) if line.startswith(" "))
        assert text.count(old) == 1, f"{path}: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new + "".join(line[1:] for line in added.splitlines(keepends=True)))
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the packages with the page's changes."""
    folder = tmp_path_factory.mktemp("extended")
    for package in ("igrpo", "igrpo_kernels", "csrc"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for language, block in re.findall(r"```(diff|python)\n(.*?)```", PAGE, re.DOTALL):
        lines = block.splitlines()
        name = re.match(r"(?:---|#) (\S+\.py)$", lines[0])
        assert name, f"this block does not say to which file it belongs:\n{block}"
        if language == "diff":
            change(folder / name[1], lines[1:])
        else:
            (folder / name[1]).write_text(block)
    return folder


def python(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_new_loss_is_its_equation_on_every_path(extended):
    python(extended, "-c", LOSS)


def test_a_run_trains_with_the_new_loss_reward_engine_and_schedule(extended, tmp_path):
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": save_tiny(tmp_path / "model"), "dataset_name": tmp_path / "rows.jsonl",
        "dataset_prompt_column": "question", "dataset_solution_column": "answer", "output_dir": tmp_path / "run",
        "vllm_mode": "plain", "loss_type": "reinforce", "reward_funcs": "[my_rewards:variety]",
        "rollout_schedule": "half", "num_drafts": 2, "num_generations": 2, "per_device_train_batch_size": 8,
        "max_completion_length": 24, "max_steps": 2, "use_cpu": "true", "bf16": "false", "system_prompt": "null",
    }  # fmt: skip
    python(
        extended, "-m", "igrpo.train", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))
    )
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert all(0.5 < step["rewards/variety/mean"] < 1 and step["sync/probe_logp_gap"] < 0.01 for step in steps)


def test_every_part_says_which_files_it_touches():
    parts = PAGE.split("\n## ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["A loss", "A reward", "An engine", "A schedule"]
    for part in parts:
        touched = set(re.findall(r"^\| `([^`]+\.py)` \|", part, re.MULTILINE))
        changed = set(re.findall(r"^(?:---|#) (igrpo\S*\.py)$", part, re.MULTILINE))
        assert touched == changed, part.splitlines()[0]
