"""Weights from GPU to GPU through vLLM's own transfer engines: NCCL between machines, CUDA IPC on one.

Written against vLLM 0.28 to 0.33 and not yet run on a GPU; what runs on the CPU is the source and the fan-out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from vllm.distributed.weight_transfer import base
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from igrpo.engines.base import EngineError, WeightSource
from igrpo.engines.weights import checksum

Post = Callable[[str, dict[str, Any] | None], None]
"""POSTs to a path of one server with the run's secret, under a deadline; raises where it fails."""


class _OneServer(HTTPVLLMWeightSyncClient):
    """vLLM's client, with our way of sending."""

    def __init__(self, post: Post):
        self.post = post

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        self.post(f"/{path}", json)


class FanOut:
    """Drives several servers as one group of workers: server i holds the ranks behind those of the servers before it.

    Args:
        world_sizes: workers of each server.
    """

    def __init__(self, posts: Sequence[Post], world_sizes: Sequence[int]):
        self.servers = [_OneServer(post) for post in posts]
        self.offsets = [1 + sum(world_sizes[:i]) for i in range(len(posts))]

    def _all(self, call: Callable[[_OneServer, int], None]) -> None:
        # Together, not one after the other: all of them wait for each other inside the same collective.
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(call, self.servers, self.offsets))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def call(server: _OneServer, offset: int) -> None:
            moved = {**init_info, "rank_offset": offset} if "rank_offset" in init_info else init_info
            server.init_weight_transfer_engine(moved)

        self._all(call)

    def start_weight_update(self) -> None:
        self._all(lambda server, _: server.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self._all(lambda server, _: server.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(lambda server, _: server.finish_weight_update(weight_version))


def vllm_source(source: WeightSource, declared: list[base.ParamMeta]) -> base.WeightSource:
    """Our source in the shape that the installed vLLM wants; ``declared`` is what it will yield."""
    if hasattr(base.WeightSource, "iter_full"):  # vLLM 0.33

        class Source(base.WeightSource):
            @cached_property
            def metadata(self) -> list[base.ParamMeta]:
                return declared

            def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
                return iter(source())

        return Source()

    class OldSource(base.WeightSource):
        def metadata(self) -> list[base.ParamMeta]:
            return declared

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(source())

    return OldSource()


class DirectTransfer:
    """The trainer's end. One group over all servers, made anew when they change.

    Args:
        backend: ``nccl`` or ``ipc``.
        port: of the rendezvous; each new group takes the next one.
    """

    def __init__(self, backend: str, address: str, port: int):
        self.backend, self.address, self.port = backend, address, port
        self.checksums: dict[str, str] = {}
        """Of the vectors in the last send: norms and biases, which every server keeps under their own names."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._declared: list[base.ParamMeta] = []
        self._source: WeightSource | None = None
        self._members: tuple[str, ...] = ()
        self._engine: Any = None

    def send(self, source: WeightSource, members: Sequence[str], posts: Sequence[Post], sizes: Sequence[int]) -> None:
        """All weights to all servers: start, send, finish.

        Args:
            members: names of the running servers; another set of names means another group.

        Raises:
            EngineError: this vLLM has no such transfer, or it failed. The group is gone then.
        """
        self._source = source
        if not self._declared:  # one pass more, before the first send only: see ServerEngine.push_weights
            self._declared = [base.ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source()]
        try:
            if tuple(members) != self._members:
                self._join(members, posts, sizes)
            self._engine.send_weights()
        except Exception as error:
            self._members = ()
            raise EngineError(f"the {self.backend} transfer failed: {error}") from error

    def _recorded(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._source is not None
        self.checksums, self.shapes = {}, {}
        for name, tensor in self._source():
            if tensor.dim() == 1:
                self.checksums[name], self.shapes[name] = checksum(tensor), tuple(tensor.shape)
            yield name, tensor

    def _join(self, members: Sequence[str], posts: Sequence[Post], sizes: Sequence[int]) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        if self.backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            info: Any = NCCLTrainerInitInfo(
                master_address=self.address, master_port=self.port, world_size=1 + sum(sizes), rank=0
            )
        else:
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            info = IPCTrainerInitInfo(rank=0)
        self.port += 1  # the old group's store may still hold the port
        self._engine = WeightTransferTrainerFactory.trainer_init(
            info, client=FanOut(posts, sizes), source=vllm_source(self._recorded, self._declared)
        )
        self._members = tuple(members)
