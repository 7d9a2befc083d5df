"""FSDP2 with torch's ``fully_shard``: every process keeps 1/W of each weight, gradient and optimiser moment.

accelerate launches it (``recipes/accelerate/fsdp2.yaml``) and holds its settings. The wrapping itself is done here,
because accelerate leaves it out on a CPU, and what is not tested there would be tested nowhere: one path for both.

Each decoder layer is one unit, gathered when it computes, and so is an embedding that is not the head as well. The root
unit holds what is left, last norm and ``lm_head``: its weights are whole inside ``Policy.forward``, which is where the
fused loss reads the head. Files are read in the same parts (``divider``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from igrpo.learner.config import LearnerConfig
from igrpo.learner.optimizer import build_optimizer
from igrpo.learner.placement import Placement
from igrpo.learner.policy import Policy
from igrpo.settings import ConfigError
from igrpo_kernels import GRPOLossOutput

FILE_BYTES = 2**31
"""Of whole tensors; each process writes its share."""
SHARDS, PLAIN = "shards", "plain.json"
"""The folder of both, and the file of the optimiser's learning rates and the like."""


class Fsdp2(Placement):
    divides = True

    def __init__(self, policy: Policy, config: LearnerConfig, accelerator: Any, trains: bool = True):
        """accelerate's FSDP settings are used as far as ``reshard_after_forward`` and ``cpu_offload``."""
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
            "mp_policy": MixedPrecisionPolicy(  # of what is gathered; the shards stay float32
                param_dtype=torch.bfloat16 if config.bf16 else None,
                reduce_dtype=torch.float32,
                cast_forward_inputs=False,
            ),
            "offload_policy": getattr(plugin, "cpu_offload", None) or OffloadPolicy(),
        }
        if trains:
            _check_optimizer(config, options["mesh"])
        # What FSDP divides are shapes, so that no whole weight goes to the device.
        offloaded = isinstance(options["offload_policy"], CPUOffloadPolicy)
        shards = _each(policy, lambda p: _shard(p, options["mesh"]).to("cpu" if offloaded else accelerator.device))
        policy.load_state_dict(_each(policy, _shape), strict=False, assign=True)
        for unit in _units(policy.model):
            fully_shard(unit, reshard_after_forward=getattr(plugin, "reshard_after_forward", True), **options)
        fully_shard(policy, reshard_after_forward=False, **options)
        policy.load_state_dict(shards, strict=False, assign=True)
        self.module: Any = policy
        if trains:
            self.optimizer = build_optimizer(policy, config)

    @staticmethod
    def divider(config: LearnerConfig) -> Callable[[torch.nn.Module], None]:
        processes = PartialState(cpu=config.use_cpu).num_processes
        mesh = init_device_mesh("cpu", (processes,))

        def divide(model: Any) -> None:
            # Tied weights that are both in the files are compared, and NCCL has no collective for what lies on the CPU;
            # of 8 experts over 16 processes, transformers cannot read none.
            tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
            shards = {
                name: torch.nn.Parameter(_shard(p.detach(), mesh), requires_grad=p.requires_grad)
                for name, p in model.named_parameters()
                if name not in tied and p.ndim and len(p.chunk(processes)) == processes
            }
            model.load_state_dict(shards, strict=False, assign=True)

        return divide

    @staticmethod
    def asked_for() -> bool:
        """Whether ``accelerate launch`` was given an FSDP configuration.

        Raises:
            ConfigError: with weights that transformers would load in the first process only.
        """
        asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if asked and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
            raise ConfigError(
                "fsdp_cpu_ram_efficient_loading: every process reads its part of the model itself; write false in the "
                "file given to accelerate launch --config_file, or take recipes/accelerate/fsdp2.yaml"
            )
        return asked

    def __call__(self, *args: Any, exact: bool = False, **named: Any) -> GRPOLossOutput | torch.Tensor:
        return self.module(*args, **named)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """The head stays gathered until the step's last micro-batch.

        Gradients are summed over the processes after each one (FSDP2's default): waiting for the last would keep every
        process's whole fp32 gradient where shards of it are enough (of 7B over 8 processes, 24.8 GiB more, by
        arithmetic).
        """
        self.module.set_reshard_after_backward(last, recurse=False)
        return nullcontext()

    def settle(self) -> None:
        self.module.reshard()

    def whole(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Cast before it is gathered: half the bytes."""
        tensor = super().whole(tensor, dtype)
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def write(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        writer = dcp.HuggingFaceStorageWriter(str(folder), _files(tensors), save_distributed=True)
        with _one_error():
            dcp.save(tensors, storage_writer=writer)

    def read(self, tensors: dict[str, torch.Tensor], folder: Path) -> None:
        with _one_error():
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))

    def save(self, state: Path) -> None:
        """Every process writes its shards, as safetensors; the first one what is no tensor, as JSON."""
        folder, values = state / SHARDS, _state(self.module, self.optimizer)
        self.write(_once(values, self.module), folder)
        plain = {k: v for k, v in values.items() if not isinstance(v, torch.Tensor)}
        if torch.distributed.get_rank() == 0:
            (folder / PLAIN).write_text(json.dumps(plain), encoding="utf-8")

    def load(self, state: Path, trust: bool) -> None:
        """Unpickles nothing, whoever is to be trusted."""
        folder = state / SHARDS
        self.settle()
        values, plain = _state(self.module, self.optimizer), read_plain(folder)
        self.read(_once(values, self.module), folder)
        parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
        for name, value in (values | plain).items():
            part, _, key = name.partition("/")
            parts[part][key] = value
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
            options=StateDictOptions(flatten_optimizer_state_dict=True),
        )


def _units(model: Any) -> list[torch.nn.Module]:
    """What is gathered on its own: each decoder layer, and an embedding that is not the head as well."""
    names = set(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = {id(p) for p in head.parameters()} & {id(p) for p in embedding.parameters()}
    return layers if shared else [embedding, *layers]


def _each(module: torch.nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """A parameter made of each, by name; tied ones stay tied."""
    made = {p: torch.nn.Parameter(make(p.detach()), requires_grad=p.requires_grad) for p in module.parameters()}
    return {name: made[p] for name, p in module.named_parameters(remove_duplicate=False)}


def _shape(p: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")


def _shard(p: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This process's part of a weight, as FSDP2 divides it, on the mesh's kind of device or the meta device."""
    if not p.ndim:
        return p  # which FSDP2 refuses by its name
    if isinstance(p, DTensor):  # was read so
        own = p.to_local()
    else:
        parts, rank = p.chunk(mesh.size()), mesh.get_local_rank()
        own = parts[rank].clone() if rank < len(parts) else p[:0]
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=p.shape, stride=p.stride())


def _check_optimizer(config: LearnerConfig, mesh: DeviceMesh) -> None:
    """Steps once on a small weight: not every optimiser can on a divided one (the factors of transformers' Adafactor
    are plain tensors, which do not mix with shards).

    Raises:
        ConfigError: it cannot.
    """
    # 4096 numbers in each process, since some optimisers treat smaller weights otherwise, and a vector.
    small = torch.nn.Module()
    for shape in ((16 * mesh.size(), 256), (16 * mesh.size(),)):
        small.register_parameter(f"of_{len(shape)}", torch.nn.Parameter(torch.zeros(shape, device=mesh.device_type)))
    fully_shard(small, mesh=mesh)
    optimizer = build_optimizer(small, config)
    for p in small.parameters():
        p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except Exception as error:  # whatever an optimiser raises
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"optim: {config.optim} cannot step on weights that FSDP divides ({reason}); write adamw_torch_fused, or "
            "take recipes/accelerate/ddp.yaml"
        ) from error


def read_plain(folder: Path) -> dict[str, Any]:
    """What ``save`` wrote as JSON. Raises ConfigError where a version wrote the folder that pickled."""
    if (folder / ".metadata").is_file() and not (folder / PLAIN).is_file():
        raise ConfigError(
            f"resume_from_checkpoint: {folder} was pickled by an older version, and loading it may run code; go on "
            "with that version, or start from the model that lies beside it"
        )
    return json.loads((folder / PLAIN).read_text(encoding="utf-8"))


def _state(policy: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Tensors and plain values by ``model/NAME`` and ``optimizer/NAME``."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, moments = get_state_dict(policy, optimizer, options=options)
    return {f"model/{k}": v for k, v in model.items()} | {f"optimizer/{k}": v for k, v in moments.items()}


def _once(state: dict[str, Any], policy: Any) -> dict[str, torch.Tensor]:
    """The tensors, a tied one under one of its names."""
    named = policy.named_parameters
    tied = {f"model/{name}" for name, _ in named(remove_duplicate=False)} - {f"model/{name}" for name, _ in named()}
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and name not in tied}


def _files(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Name -> number of the file, from 1. A file is put together in memory, so there are many of them."""
    numbers, written = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + written // FILE_BYTES
        written += tensor.numel() * tensor.element_size()
    return numbers


@contextmanager
def _one_error() -> Iterator[None]:
    """torch collects the errors of all processes in one that is no ``Exception``; one of them says enough."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise RuntimeError(str(first)) from error
