"""One weight push: by files to one server, phase by phase (start -> send -> finish -> verify), or directly to all."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from igrpo.engines.adapter_files import NAME as ADAPTER
from igrpo.engines.adapter_files import as_loaded, not_there, write_adapter
from igrpo.engines.base import EngineError, WeightSource
from igrpo.engines.servers.client import LOAD_PATH, Client, InUse, ServerError
from igrpo.engines.weight_folder import GIB, not_written
from igrpo.engines.weights import checksum

if TYPE_CHECKING:
    from igrpo.engines.servers.vllm_nccl import DirectTransfer

SHARD_BYTES = 2 * GIB


@dataclass(frozen=True)
class Published:
    """All weights of one version, written where the servers can read them; kept until the next version replaces it."""

    version: int
    folder: Path | None
    """None with a direct transfer, and in a process that does not feed the servers."""
    files: tuple[str, ...]
    checksums: dict[str, str]
    """By name; with a direct transfer, of the vectors only."""
    shapes: dict[str, tuple[int, ...]]
    adapter: bool = False
    """An adapter beside a base that stays; then ``checksums`` are of its factors as vLLM keeps them."""

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def publish(source: WeightSource, version: int, folder: Path, adapter: Mapping[str, Any] | None = None) -> Published:
    """Writes every tensor of ``source`` in shards of ``SHARD_BYTES`` at most, so that little is held twice.

    Args:
        adapter: what ``adapter_config.json`` says of it, where ``source`` gives its factors alone.

    Raises:
        EngineError: there is no room, or the folder is gone.
    """
    target = folder / f"{version}"
    shutil.rmtree(target, ignore_errors=True)
    if adapter is not None:
        factors = {name: tensor.detach().cpu().contiguous() for name, tensor in source()}
        write_adapter(factors, adapter, version, target)
        return Published(version, target, (), as_loaded(factors, adapter), {}, adapter=True)
    files: list[str] = []
    checksums: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    shard: dict[str, torch.Tensor] = {}
    held = 0

    def write() -> None:
        files.append(f"{len(files):05d}.safetensors")
        save_file(shard, target / files[-1])
        shard.clear()

    try:
        target.mkdir()
        for name, tensor in source():
            tensor = tensor.detach().cpu().contiguous()
            size = tensor.numel() * tensor.element_size()
            if shard and held + size > SHARD_BYTES:
                write()
                held = 0
            shard[name], checksums[name], shapes[name] = tensor, checksum(tensor), tuple(tensor.shape)
            held += size
        if shard:
            write()
    except (OSError, SafetensorError) as error:
        raise not_written(version, target, error) from error
    return Published(version, target, tuple(files), checksums, shapes)


async def push_files(client: Client, weights: Published, timeout: float) -> int:
    """Makes the server hold ``weights``; returns how many tensors were read back and compared.

    Requests in flight are frozen meanwhile and go on under the new weights, with prompt and tokens so far read again.

    Args:
        timeout: seconds that each phase may take.

    Raises:
        ServerError: a phase failed or ran out of time. What the server holds is then nobody's weights: only a new
            server, or a whole push, mends it.
    """
    info = {"folder": str(weights.folder), "files": list(weights.files), "checksums": weights.checksums}

    async def phase(name: str, method: str, path: str, **options: object) -> Any:
        try:
            return await client.call(method, path, timeout, **options)
        except InUse:
            raise
        except ServerError as error:
            raise type(error)(f"pushing version {weights.version}, phase {name}: {error}") from error

    await phase("pause", "POST", "/pause", params={"mode": "keep"})
    if weights.adapter:
        await phase(
            "send", "POST", "/collective_rpc", json={"method": "igrpo_load", "kwargs": {"folder": info["folder"]}}
        )
        if ADAPTER not in {one["id"] for one in (await phase("name", "GET", "/v1/models"))["data"]}:
            # Requests name it from now on. Its path is never read again, and without ``load_inplace``: each request
            # would carry that along and load what lies there once more.
            named = {"lora_name": ADAPTER, "lora_path": info["folder"]}
            await phase("name", "POST", LOAD_PATH, json=named)
        await phase("finish", "POST", "/update_weight_version", json={"new_version": str(weights.version)})
        compared = await settle(client, weights, timeout)
        client.model = ADAPTER
        return compared
    await phase("start", "POST", "/start_weight_update")
    await phase("send", "POST", "/update_weights", json={"update_info": info})
    await phase("finish", "POST", "/finish_weight_update", json={"weight_version": str(weights.version)})
    return await settle(client, weights, timeout)


async def push_directly(
    transfer: DirectTransfer, source: WeightSource, clients: Sequence[Client], weights: Published, timeout: float
) -> int:
    """From GPU to GPU, to all servers at once; returns how many tensors were read back and compared.

    Raises:
        ServerError: it failed, or took longer than ``timeout`` seconds. A collective may then hang for ever.
    """
    loop = asyncio.get_running_loop()

    def post(client: Client, path: str, json: dict[str, Any] | None) -> None:  # called from the sending thread
        asyncio.run_coroutine_threadsafe(client.call("POST", path, timeout, json=json), loop).result()

    sizes = [(await client.call("GET", "/get_world_size", timeout))["world_size"] for client in clients]
    await asyncio.gather(*(client.call("POST", "/pause", timeout, params={"mode": "keep"}) for client in clients))
    members = [f"{client.url} {client.instance}" for client in clients]
    sending = asyncio.to_thread(transfer.send, source, members, [partial(post, client) for client in clients], sizes)
    try:
        await asyncio.wait_for(sending, timeout)
    except (EngineError, TimeoutError) as error:
        raise ServerError(f"{error or 'the transfer'} did not end in {timeout:g} s") from error
    sent = replace(weights, checksums=transfer.checksums, shapes=transfer.shapes)
    compared = 0
    for client in clients:
        body = {"new_version": str(weights.version)}
        await client.call("POST", "/update_weight_version", timeout, json=body)
        compared += await settle(client, sent, timeout)
    return compared


async def settle(client: Client, weights: Published, timeout: float) -> int:
    """After new weights, however they came: verifies them, forgets every prefix of the old ones, lets requests go on.

    Raises:
        ServerError: as ``push_files``.
    """
    compared = await verify(client, weights, timeout)
    reset = await client.call("POST", "/reset_prefix_cache", timeout, params={"reset_running_requests": "true"})
    if isinstance(reset, dict) and reset.get("success") is False:
        raise ServerError(f"{client.url} still holds prefixes of the old weights")
    await client.call("POST", "/resume", timeout)
    return compared


async def verify(client: Client, weights: Published, timeout: float) -> int:
    """What the workers keep under its own name and shape must equal what was sent, and the version must be the new one.

    Raises:
        ServerError: it does not.
    """
    rpc: dict[str, Any] = {"method": "igrpo_factors"}
    if not weights.adapter:
        shapes = {name: list(shape) for name, shape in weights.shapes.items()}
        rpc = {"method": "igrpo_checksums", "kwargs": {"shapes": shapes}}
    answer = await client.call("POST", "/collective_rpc", timeout, json=rpc)
    compared = 0
    for kept in answer["results"]:  # one entry per worker
        if weights.adapter:
            wrong = not_there(weights.checksums, [kept])
        else:
            wrong = [name for name, value in kept.items() if value != weights.checksums[name]]
        if wrong or not kept:
            raise ServerError(
                f"{client.url} differs from version {weights.version} in {', '.join(wrong[:3]) or 'every tensor'}"
            )
        compared += len(kept)
    held = (await client.call("GET", "/weight_info", timeout))["weight_version"]
    if held != str(weights.version):
        raise ServerError(f"{client.url} says that it holds version {held}, not {weights.version}")
    return compared
