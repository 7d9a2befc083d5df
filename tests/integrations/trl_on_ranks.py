"""Trainers on the processes of one `torchrun`; run from test_trl_two_stage.py. Every process writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import PrinterCallback

from igrpo_kernels.integrations.trl import FusedGRPOTrainer, IGRPOTrainer
from tests.integrations.test_trl import made_up_reward, made_up_rollout, settings
from tests.integrations.test_trl_two_stage import Watched, digits

SPREAD = {"per_device_train_batch_size": 2, "max_steps": 3, "loss_type": "dapo", "delta": 1.3, "beta": 0.04}


def logs_of(trainer: Any) -> list[dict]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def main(folder: str, output: str) -> None:
    """Groups of four over processes of two rows each: every group spans two processes."""
    data = Dataset.from_dict({"prompt": [f"question {i}" for i in range(8)], "solution": [2, 3, 4, 5] * 2})
    seen = {}
    for cls in (trl.GRPOTrainer, FusedGRPOTrainer):
        args = settings(folder, num_iterations=2, **SPREAD)
        seen[cls.__name__] = logs_of(cls(folder, made_up_reward, args, data, rollout_func=made_up_rollout))
    try:
        IGRPOTrainer(folder, digits, settings(folder, **SPREAD), data, num_drafts=3)
    except ValueError as error:
        seen["refused"] = str(error)
    two_stage = Watched(folder, digits, settings(folder, **SPREAD), data, num_drafts=2)
    assert isinstance(two_stage, IGRPOTrainer)
    seen["IGRPOTrainer"] = logs_of(two_stage)
    seen["stages"] = two_stage.stages
    rank = two_stage.accelerator.process_index
    seen["processes"] = two_stage.accelerator.num_processes
    Path(f"{output}.{rank}").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
