"""Trainers on the processes of one `torchrun`; run from test_trl_two_stage.py. Every process writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, PrinterCallback

from igrpo.integrations.trl import IGRPOTrainer
from igrpo_kernels.integrations.trl import FusedGRPOTrainer
from tests.integrations.test_trl import made_up_reward, made_up_rollout, settings
from tests.integrations.test_trl_two_stage import Watched, digits

SPREAD = {"per_device_train_batch_size": 2, "max_steps": 3, "loss_type": "dapo", "delta": 1.3, "beta": 0.04}


def logs_of(trainer: Any) -> list[dict]:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def gradients(trainer: Any, model: Any) -> dict[str, list[float]]:
    """Norm of each parameter's gradient, and of the loss, through the trainer's way into the model's forward pass."""
    ids = torch.randint(5, 280, (3, 12), generator=torch.Generator().manual_seed(0))
    inputs = {
        "prompt_ids": ids[:, :6], "prompt_mask": torch.ones(3, 6, dtype=torch.long), "completion_ids": ids[:, 6:],
        "completion_mask": torch.ones(3, 6, dtype=torch.long), "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "num_items_in_batch": torch.tensor(18.0), "ref_per_token_logps": torch.full((3, 6), -5.0),
        "old_per_token_logps": torch.full((3, 6), -5.5),
    }  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    norms = {name: p.grad for name, p in model.named_parameters()}
    norms = {name: float((g.full_tensor() if isinstance(g, DTensor) else g).norm()) for name, g in norms.items()}
    return {"loss": float(loss), **norms}


def sharded(folder: str) -> LlamaForCausalLM:
    """FSDP2 by hand: accelerate does not shard on a CPU."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = LlamaForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


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
    fused = FusedGRPOTrainer(folder, made_up_reward, settings(folder, **SPREAD), data)
    seen["whole"] = gradients(fused, LlamaForCausalLM.from_pretrained(folder))
    seen["sharded"] = gradients(fused, sharded(folder))
    seen["processes"] = two_stage.accelerator.num_processes
    Path(f"{output}.{rank}").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
