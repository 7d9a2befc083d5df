"""FSDP2 with torch's ``fully_shard``: every process keeps 1/W of each weight, gradient and optimiser moment.

accelerate launches it (``recipes/accelerate/fsdp2.yaml``) and holds its settings. The wrapping itself is done here,
because accelerate leaves it out on a CPU, and what is not tested there would be tested nowhere: one path for both.

Each decoder layer is one unit, gathered when it computes. The root unit holds what is left, embedding, last norm and
``lm_head``, tied or not: its weights are whole inside ``Policy.forward``, which is where the fused loss reads the head.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from igrpo.config import ConfigError


def asked_for() -> bool:
    """Whether ``accelerate launch`` was given an FSDP configuration."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_settings() -> None:
    """Refuses launch settings that cannot work.

    Raises:
        ConfigError: weights that transformers would load in the first process only.
    """
    if asked_for() and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading: every process reads the model itself; write false in the file given to "
            "accelerate launch --config_file, or take recipes/accelerate/fsdp2.yaml"
        )


def shard(policy: Any, device: torch.device, processes: int, bf16: bool, plugin: Any = None) -> None:
    """Shards a ``Policy`` in place.

    Args:
        bf16: weights are gathered, and activations computed, in bfloat16; the shards stay float32.
        plugin: accelerate's FSDP settings, of which ``reshard_after_forward`` and ``cpu_offload`` are used.
    """
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
        "offload_policy": getattr(plugin, "cpu_offload", None) or OffloadPolicy(),
    }
    names = set(policy.model._no_split_modules or ())
    layers = [m for m in policy.modules() if type(m).__name__ in names]
    for layer in layers:
        fully_shard(layer, reshard_after_forward=getattr(plugin, "reshard_after_forward", True), **options)
    fully_shard(policy, reshard_after_forward=False, **options)


def begin_micro_batch(policy: FSDPModule, last: bool) -> None:
    """Gradients are summed over the processes once per step, and the head and embedding gathered once per step."""
    policy.set_requires_gradient_sync(last)
    policy.set_reshard_after_backward(last, recurse=False)


def release(policy: FSDPModule) -> None:
    """Drops gathered weights that a forward pass without backward has left, so that parameters are shards again."""
    policy.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save(policy: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Every process writes its shards."""
    model, moments = get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optimizer": moments}, checkpoint_id=folder)


def load(policy: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Reads what ``save`` wrote."""
    release(policy)
    model, moments = get_state_dict(policy, optimizer)
    state = {"model": model, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
