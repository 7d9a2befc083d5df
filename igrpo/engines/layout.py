"""Where the engine may live beside the learner on GPUs. What cannot work is refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from igrpo.engines.config import EngineConfig
from igrpo.settings import ConfigError

C = TypeVar("C", bound=EngineConfig)


def visible_gpus(use_cpu: bool) -> list[str]:
    """Those that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them; none where the run is on the CPU."""
    import torch

    count = 0 if use_cpu or not torch.cuda.is_available() else torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = [str(i) for i in range(count)]
    return numbers if named is None else [one.strip() for one in named.split(",")][:count]


def beside_the_learner(config: C, gpus: Sequence[str], local: int, processes: int) -> C:
    """The config with GPUs for the servers that the trainer starts.

    Args:
        gpus: ``visible_gpus``.
        local: learner processes on this machine; they use the first ones of ``gpus``.
        processes: learner processes on all machines.

    Raises:
        ConfigError: an engine that cannot get its weights from this learner.
    """
    if not gpus or not config.use_vllm:
        return config
    if config.vllm_mode == "colocate":
        config.check_in_process()
        return config
    backend = config.weight_backend(on_cpu=False)
    if backend == "ipc":
        _check_ipc(config, gpus, processes)
    if config.server_urls or backend == "ipc":
        return config
    used, free = gpus[:local], gpus[local:]
    placed = with_own_gpus(config, free)
    named = named_devices(placed)
    if named is None:
        if backend == "nccl":
            needed = config.vllm_num_servers * config.vllm_tensor_parallel_size
            raise ConfigError(
                f"vllm_server_devices: the servers take {needed} GPU{'s' * (needed > 1)} that no learner process uses, "
                f"and of the {len(gpus)} that the trainer sees {len(free)} are free; name others, start fewer learner "
                "processes, or write vllm_weight_transfer: file to share GPUs"
            )
    elif backend == "nccl" and (taken := [one for one in named if any(_same(one, other) for other in used)]):
        raise ConfigError(
            f"vllm_server_devices: {', '.join(taken)} belongs to a learner process, and NCCL takes a GPU once only; "
            "name others, or write vllm_weight_transfer: file to share GPUs"
        )
    return placed


def with_own_gpus(config: C, free: Sequence[str]) -> C:
    """The config whose started servers have GPUs of ``free``, where none are named and these are enough."""
    needed = config.vllm_num_servers * config.vllm_tensor_parallel_size
    if not config.uses_servers or config.server_urls or config.vllm_server_devices is not None or len(free) < needed:
        return config
    return replace(config, vllm_server_devices=",".join(free[:needed]))


def named_devices(config: EngineConfig) -> list[str] | None:
    """GPUs of all servers that the trainer starts; None where nobody named any.

    Raises:
        ConfigError: too few or too many, or one of them twice.
    """
    if config.vllm_server_devices is None:
        return None
    named = [one.strip() for one in config.vllm_server_devices.split(",")]
    each, servers = config.vllm_tensor_parallel_size, config.vllm_num_servers
    if len(named) != each * servers:
        raise ConfigError(
            f"vllm_server_devices names {len(named)} GPUs; {servers} servers with vllm_tensor_parallel_size: {each} "
            f"take {each * servers}"
        )
    for i, one in enumerate(named):
        if not one or any(_same(one, other) for other in named[:i]):
            raise ConfigError(
                f"vllm_server_devices: {config.vllm_server_devices!r} names {one or 'nothing'!r} where another GPU is "
                'wanted; write each one once, as "4,5,6,7"'
            )
    return named


def _check_ipc(config: EngineConfig, gpus: Sequence[str], processes: int) -> None:
    """A handle of the learner's memory opens on the learner's own GPU only."""
    if processes > 1:
        raise ConfigError(
            f"vllm_weight_transfer: ipc has one learner process, and {processes} were started; write nccl or file"
        )
    named = named_devices(config) or []
    if config.vllm_tensor_parallel_size > 1 or not all(_same(one, gpus[0]) for one in named):
        raise ConfigError(
            f"vllm_weight_transfer: ipc reaches servers on the learner's own GPU only ({gpus[0]}), each on that one "
            "alone; write nccl"
        )


def _same(one: str, other: str) -> bool:
    """Whether two names may mean one GPU: a number and an identifier may, and identifiers may be cut short."""
    if one.isdigit() and other.isdigit():
        return int(one) == int(other)
    return one.isdigit() or other.isdigit() or one.startswith(other) or other.startswith(one)


def launched_with_others() -> dict[str, str]:
    """Options for an engine beside those of other processes: by itself vLLM takes the first GPU it sees, and every
    process of torchrun or accelerate sees all of them. With this it takes that of LOCAL_RANK."""
    return {"distributed_executor_backend": "external_launcher"} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}


def among_others() -> bool:
    """Whether other processes learn too. Reading the weights may then be a collective, which none of them would join
    for the sake of this one's engine."""
    from torch import distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
