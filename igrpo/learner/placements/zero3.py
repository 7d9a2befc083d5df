"""DeepSpeed ZeRO-3: the same division as ``fsdp2.py``, by DeepSpeed's engine. The only file that knows deepspeed.

accelerate launches it (``recipes/accelerate/zero3.yaml``) and holds its settings. The engine is made here and not by
``Accelerator.prepare``, which leaves DeepSpeed out on a CPU: one path for both, so that the one on a GPU is tested.

The engine owns gradients and the optimiser step: it averages over processes, clips and steps in one call. Every weight
is whole only inside the forward pass of the module that owns it. The fused loss reads the head in ``Policy.forward``,
which does not own it, so the head is declared to the engine as a weight that this forward needs.
"""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin

from igrpo.learner import state as learner_state
from igrpo.learner.adapters import Adapters
from igrpo.learner.config import LearnerConfig
from igrpo.learner.optimizer import build_optimizer
from igrpo.learner.placement import Placement
from igrpo.learner.policy import Policy
from igrpo.settings import ConfigError
from igrpo_kernels import GRPOLossOutput


class Zero3(Placement):
    """DeepSpeed's settings are taken as accelerate read them; what the loop decides itself is replaced."""

    divides = True
    least_micro_batches = 1  # the engine cannot step without a backward pass

    def __init__(self, policy: Policy, config: LearnerConfig, accelerator: Any, trains: bool = True):
        import deepspeed

        self.module = answers = _Answers(policy.to(accelerator.device))
        for weight in policy.model.get_output_embeddings().parameters():  # an adapter's among them
            deepspeed.zero.register_external_parameter(answers, weight)
        self.optimizer = build_optimizer(policy, config) if trains else None
        launched = settings(DeepSpeedPlugin().deepspeed_config, config)
        self.engine, *_ = deepspeed.initialize(model=answers, optimizer=self.optimizer, config=launched)

    @staticmethod
    def asked_for() -> bool:
        """Whether ``accelerate launch`` was given a DeepSpeed configuration.

        Raises:
            ConfigError: without deepspeed, at another stage, or with weights that transformers would divide while it
                loads them.
        """
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
            return False
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                "distributed_type: DEEPSPEED: the deepspeed package is not installed; pip install deepspeed, or take "
                "recipes/accelerate/fsdp2.yaml, which divides what ZeRO-3 divides"
            )
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        if stage != "3":
            raise ConfigError(f"zero_stage: {stage}: only 3 is supported; write 3, or take recipes/accelerate/ddp.yaml")
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT", "").lower() == "true":
            raise ConfigError(
                "zero3_init_flag: every process reads the model itself; write false in the file given to accelerate "
                "launch --config_file, or take recipes/accelerate/zero3.yaml"
            )
        return True

    @staticmethod
    def check_adapters(adapters: Adapters) -> None:
        for name in adapters.fused_experts():
            raise ConfigError(
                f"lora_target_modules: {name} holds fused experts, which were never tried with DeepSpeed; take "
                "recipes/accelerate/fsdp2.yaml, or layers without them"
            )

    def __call__(self, *args: Any, exact: bool = False, **named: Any) -> GRPOLossOutput | torch.Tensor:
        out = self.engine(*args, **named)
        return GRPOLossOutput(**out) if isinstance(out, dict) else out

    def drop_gradients(self) -> None:
        if self.optimizer is not None:
            self.engine.optimizer.zero_grad(set_to_none=True)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """The engine steps after the ``last`` one of the optimiser step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clips, to the ``max_norm`` of its settings, and steps: the engine does both in one call."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def step(self, norm: float) -> None:
        """Has been taken, and cannot be taken back.

        Raises:
            FloatingPointError: the norm was not finite.
        """
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm {norm}: go on from a checkpoint (--resume_from_checkpoint last)")

    def whole(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        import deepspeed

        divided = [tensor] if hasattr(tensor, "ds_id") else []  # a buffer never is
        with deepspeed.zero.GatheredParameters(divided, enabled=bool(divided)):
            return tensor.detach().to(dtype or tensor.dtype, copy=True)

    def local_parameters(self) -> list[torch.Tensor]:
        return []

    def save(self, state: Path) -> None:
        self.engine.save_checkpoint(str(state), tag="zero3")

    def load(self, state: Path, trust: bool) -> None:
        """With the same number of processes.

        Raises:
            OSError: there is nothing to read.
            ConfigError: it holds objects of which some may run code, and ``trust`` is not given.
        """
        own = self.engine.checkpoint_engine
        self.engine.checkpoint_engine = _Reader(own, trust)
        try:
            path, _ = self.engine.load_checkpoint(str(state), tag="zero3")
        finally:
            self.engine.checkpoint_engine = own
        if path is None:
            raise OSError(f"no ZeRO-3 state in {state}")


class _Reader:
    """DeepSpeed's reader of files, which unpickles whatever they hold, with ours in its place."""

    def __init__(self, own: Any, trust: bool):
        self._own, self._trust = own, trust

    def load(self, path: str, map_location: Any = None) -> Any:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        return learner_state.read(Path(path), self._trust, [LossScaler, ZeroStageEnum])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class _Answers(torch.nn.Module):
    """The policy, which here returns its output as a dict.

    DeepSpeed's engine looks for tensors in tuples and dicts only. Without having found one, it would not gather the
    head's weight again for the backward pass.
    """

    def __init__(self, policy: Any):
        super().__init__()
        self.policy = policy

    def forward(self, *args: Any, **named: Any) -> dict[str, Any] | torch.Tensor:
        out = self.policy(*args, **named)
        return out if isinstance(out, torch.Tensor) else {f.name: getattr(out, f.name) for f in fields(out)}


def settings(launched: dict[str, Any], config: LearnerConfig) -> dict[str, Any]:
    """One call of the engine is one micro-batch of any size, the loss is scaled by the loop, sums are fp32."""
    return _without_auto(launched) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _without_auto(launched: dict[str, Any]) -> dict[str, Any]:
    """accelerate's "auto" stands for what a Trainer fills in; DeepSpeed has a default for each."""
    kept = {}
    for name, value in launched.items():
        if isinstance(value, dict):
            kept[name] = _without_auto(value)
        elif value not in ("auto", None) and name != "train_batch_size":
            kept[name] = value
    return kept
