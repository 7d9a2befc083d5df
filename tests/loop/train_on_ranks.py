"""Two learner steps on this process's share of fixed samples; run by ``torchrun`` from test_learner_ranks.py."""

from __future__ import annotations

import sys

import torch

from igrpo.config import TrainConfig
from igrpo.learner import Learner
from igrpo.types import TrainingSample
from tests.tiny import tiny_llama


def samples() -> list[TrainingSample]:
    """Twelve ragged sequences; those with advantage 0 leave the second of two processes with less to do."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(12):
        prompt = torch.randint(5, 280, (3 + i,), generator=generator).tolist()
        completion = torch.randint(5, 280, (1 + (5 * i) % 11,), generator=generator).tolist()
        advantage = 0.0 if i % 2 and i > 3 else (-1.0) ** (i // 2) * (1.0 + i / 10)
        made.append(TrainingSample(tuple(prompt), tuple(completion), (-5.0,) * len(completion), advantage))
    return made


def main(loss_type: str, output: str) -> None:
    config = TrainConfig(
        model_name_or_path="m", dataset_name="d", use_cpu=True, bf16=False, gradient_checkpointing=False,
        learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_generations=2,
        loss_type=loss_type, max_completion_length=16, vllm_importance_sampling_correction=False,
    )  # fmt: skip
    learner = Learner(tiny_llama(), None, config, pad_token_id=0)
    learner.set_schedule(10)
    accelerator = learner.accelerator
    own = samples()[accelerator.process_index :: accelerator.num_processes]
    metrics = [learner.train_on(own) for _ in range(2)]
    if accelerator.is_main_process:
        weights = {name: p.detach().clone() for name, p in learner.unwrapped.named_parameters()}
        figures = [{name: m[name] for name in ("loss", "grad_norm")} for m in metrics]
        torch.save({"processes": accelerator.num_processes, "figures": figures, "weights": weights}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
