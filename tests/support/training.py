"""Small runs of the whole program, as a user starts them, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from igrpo.log_lines import read_records
from tests.support.metrics_page import undocumented

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
"""The same number of threads everywhere: sums of another split differ in their last bits."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LOW_BYTES = "tests.support.reward_functions:low_bytes"


def words(model: str, data: str, output: Path, **settings) -> list[str]:
    options = {
        "model_name_or_path": model, "dataset_name": data, "dataset_prompt_column": "question",
        "dataset_solution_column": "answer", "output_dir": output, "system_prompt": "null", "use_cpu": True,
        "bf16": False, "num_drafts": 3, "num_generations": 4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "max_completion_length": 10, "temperature": 1.0, "learning_rate": 1e-3,
        "reward_funcs": f"[{LOW_BYTES}]", "gradient_checkpointing": False, "full_determinism": True,
        "max_steps": 3, "save_steps": 2, "save_total_limit": "null", "draft_template": " [{draft}]", **settings,
    }  # fmt: skip
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def run(arguments: list[str], code: int = 0, launcher: tuple[str, ...] = ("-m", "igrpo.train")) -> str:
    command, environment = [sys.executable, *launcher, *arguments], {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def kill(arguments: list[str], folder: Path, after: int) -> None:
    """Starts a run and ends it with SIGKILL when it has written so many steps."""
    command = [sys.executable, "-m", "igrpo.train", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.DEVNULL)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= after):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    found = list(read_records(folder / name, []))
    if name == "metrics.jsonl":
        assert not undocumented({key for line in found for key in line}), "write these into docs/metrics.md"
    return found


def steps(folder: Path) -> list[dict]:
    return [r for r in records(folder) if "reward" in r]


TIMED = ("seconds", "per_second", "step_time", "core_hours", "peak_memory_gib")


def untimed(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.endswith(TIMED)}


def same_weights(a: Path, b: Path) -> None:
    left, right = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
