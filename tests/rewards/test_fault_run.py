"""scripts/fault_run.py finds what it is to kill, and tells when it found none."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from scripts import fault_run

ROOT = Path(__file__).resolve().parents[2]
TRAINER = """
from igrpo.data_types import Completion, Problem
from igrpo.rewards.functions import load_reward_functions
from igrpo.rewards.workers.pool import RewardPool
with RewardPool(load_reward_functions(["format"]), weights=[1.0], num_workers=1) as pool:
    pool.submit(Problem(0, "2 + 2?", "4"), [Completion((1,), (-0.5,), "4", "stop", 0)], "2 + 2?").result()
    print("scored", flush=True)
    input()
"""


def test_reward_workers_are_found_and_a_kind_that_was_never_killed_is_told(tmp_path):
    command = [sys.executable, "-c", TRAINER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "scored\n"
        everyone = set()
        fronts, workers = fault_run.processes(trainer, everyone)
        assert fronts == [] and len(workers) == 2 and set(workers) <= everyone, "a keeper and its worker"
        trainer.communicate("\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(9)))
    with subprocess.Popen(["sleep", "3"]) as bare:
        kills, missed = fault_run.kill_now_and_then(bare, tmp_path, 1, random.Random(0), set())
    assert not kills and set(missed) == {"server", "reward worker"}
