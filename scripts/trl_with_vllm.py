"""Trains a random two-layer Llama for three steps with TRL's trainers and a real vLLM in the same process, on the CPU.

VLLM_CPU_KVCACHE_SPACE=1 python scripts/trl_with_vllm.py igrpo      # or fused

One thing is not TRL's: how weights reach the engine. TRL hands them to the model's `load_weights`, which vLLM's CPU
backend cannot take any more, since it has packed its layers; here they go through vLLM's own `reload_weights`. What is
checked: one push per step, for both stages; and that log-probabilities of the engine and the trainer agree as well as
the engine's bf16 allows at every step, while the learning rate is so high that an engine that missed a push would not.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS, MOST = 3, 0.05


def divisible(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def build(name: str, folder: str) -> Any:
    """FusedGRPOTrainer or IGRPOTrainer on a tiny model, with vLLM beside it."""
    from datasets import Dataset
    from trl import GRPOConfig

    from igrpo.integrations.trl import IGRPOTrainer
    from igrpo_kernels.integrations.trl import FusedGRPOTrainer
    from tests.support.tiny import save_tiny

    config = GRPOConfig(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.05, vllm_max_model_length=256, use_cpu=True,
        bf16=False, logging_steps=1, learning_rate=1e-2, temperature=1.0, report_to="none", save_strategy="no",
        gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(16)]})
    trainer = {"fused": FusedGRPOTrainer, "igrpo": IGRPOTrainer}[name]
    return trainer(save_tiny(Path(folder)), divisible, args=config, train_dataset=data)


def main(argv: list[str]) -> int:
    from trl.generation.vllm_generation import VLLMGeneration

    from igrpo.engines.weights import repack_tied_head

    pushed_at: list[int] = []

    class PushedByReload(VLLMGeneration):
        def sync_weights(self) -> None:
            pushed_at.append(trainer.state.global_step)
            weights = [(name, p.data) for name, p in self.model.named_parameters()]
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
            self.llm.apply_model(repack_tied_head)
            self.llm.reset_prefix_cache()

    with tempfile.TemporaryDirectory() as folder:
        trainer = build(argv[0], folder)
        trainer.vllm_generation.__class__ = PushedByReload
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    differences = [log["sampling/sampling_logp_difference/mean"] for log in logs]
    print(f"pushed at steps {pushed_at}; mean difference of log-probabilities {differences}")
    good = pushed_at == list(range(STEPS)) and len(logs) == STEPS and max(differences) < MOST
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["igrpo"]))
