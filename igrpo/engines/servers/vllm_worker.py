"""The part of a server that runs inside vLLM's workers: takes weights from files, and reads them back.

``vllm serve --worker-extension-cls igrpo.engines.servers.vllm_worker.ReadsBack --weight-transfer-config '{"backend":
"igrpo_file"}'``. Importing this module tells vLLM the name of the backend: vLLM imports the extension when it makes a
worker, and looks the backend up when it has loaded the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.lora.request import LoRARequest

from igrpo.engines.adapter_files import NAME, NUMBER, loaded
from igrpo.engines.weights import FILE_BACKEND, checksum, forget_packed_experts, repack_tied_head, twins


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    folder: str
    """Where the shards lie: a folder that trainer and server both see."""
    files: list[str]
    checksums: dict[str, str]
    """Of each tensor, by name: what ``weights.checksum`` gave where it was written."""


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Weights through safetensors files: in shared memory on one machine, on a shared file system between machines."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Raises ValueError at the first tensor that is not what was written.

        All are checked before the first is loaded: vLLM loads layer by layer, and a layer that got one of its tensors
        (``gate_proj`` without ``up_proj``) takes the next push for the rest of this one and fails again.
        """
        for _ in _checked(update_info):
            pass
        self.model.load_weights(_checked(update_info))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        pass


def _checked(info: FileUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
    missing = set(info.checksums)
    for file in info.files:
        with safe_open(Path(info.folder) / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                tensor = shard.get_tensor(name)
                if checksum(tensor) != info.checksums.get(name):
                    raise ValueError(f"{name} in {file} is not the tensor that was sent")
                yield name, tensor
                missing.discard(name)
    if missing:
        raise ValueError(f"{len(missing)} tensors are in no file, {min(missing)} for one")


class ReadsBack:
    """Methods that the trainer calls by name through ``/collective_rpc``."""

    model_runner: Any
    add_lora: Any

    def igrpo_checksums(self, shapes: dict[str, list[int]]) -> dict[str, str]:
        """Checksums of the parameters this worker keeps as they were sent (see ``weights.twins``)."""
        sent = {name: tuple(shape) for name, shape in shapes.items()}
        return {name: checksum(tensor) for name, tensor in twins(self.model_runner.model, sent)}

    def igrpo_load(self, folder: str) -> None:
        """The adapter in ``folder`` takes the place of the one before, under requests that run as well."""
        self.add_lora(LoRARequest(NAME, NUMBER, folder, load_inplace=True))

    def igrpo_factors(self) -> list[str]:
        """Marks of the adapter's factors (see ``adapter_files.loaded``)."""
        return loaded(self)


WeightTransferEngineFactory.register_engine(FILE_BACKEND, FileWeightTransferEngine)
