"""One weight push: by files to one server, phase by phase (start -> send -> finish -> verify), or directly to all."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from igrpo.engines.base import EngineError, WeightSource
from igrpo.engines.servers.client import Client, InUse, ServerError
from igrpo.engines.weights import checksum
from igrpo.settings import ConfigError

if TYPE_CHECKING:
    from igrpo.engines.servers.vllm_nccl import DirectTransfer

GIB = 1 << 30
SHARD_BYTES = 2 * GIB
SHARED_MEMORY = Path("/dev/shm")
PREFIX = "igrpo-weights-"


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

    def remove(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def weight_folder(chosen: str | None) -> Path:
    """A new private folder for the weights of this run: in ``chosen``, else in shared memory, else on disk.

    Raises:
        ConfigError: no folder can be made there.
    """
    in_memory = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    base = Path(chosen).expanduser() if chosen else SHARED_MEMORY if in_memory else Path(tempfile.gettempdir())
    try:
        base.mkdir(parents=True, exist_ok=True)
        if chosen:
            return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))
        _remove_leftovers(base)
        # Under a name that nobody clears away until it is locked.
        new = Path(tempfile.mkdtemp(prefix=".igrpo-new-", dir=base))
        _lock(new)
        return new.rename(base / f"{PREFIX}{os.getpid()}-{new.name.rpartition('-')[2]}")
    except OSError as error:
        raise ConfigError(
            f"vllm_weight_dir: no folder for the weights can be made in {base} ({error.strerror}); write a folder that "
            "trainer and servers can use"
        ) from error


def _lock(folder: Path) -> int:
    """Holds the folder until this process ends, however it ends, or closes the descriptor it gets.

    The kernel keeps the lock with the folder itself, so that other containers see it, to whom a process number of ours
    says nothing. Raises OSError: somebody holds it, or it is no folder or only a link to one.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_leftovers(base: Path) -> None:
    """Folders of runs of this user that were killed: memory that nobody else would free."""
    for folder in base.glob(f"{PREFIX}*"):
        try:
            descriptor = _lock(folder)
        except OSError:
            continue
        if os.fstat(descriptor).st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def publish(source: WeightSource, version: int, folder: Path) -> Published:
    """Writes every tensor of ``source`` in shards of ``SHARD_BYTES`` at most, so that little is held twice.

    Raises:
        EngineError: there is no room, or the folder is gone.
    """
    target = folder / f"{version}"
    shutil.rmtree(target, ignore_errors=True)
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


def not_written(version: int, target: Path, error: Exception) -> EngineError:
    """What to enlarge; ``target`` makes way."""
    written = sum(file.stat().st_size for file in target.glob("*")) / GIB
    shutil.rmtree(target, ignore_errors=True)
    return EngineError(
        f"the weights of version {version} could not be written to {target.parent.parent} (after {written:.2f} GiB: "
        f"{error}); it needs room for two versions: enlarge it (docker run --shm-size) or write another folder as "
        "vllm_weight_dir"
    )


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

    async def phase(name: str, method: str, path: str, **options: object) -> object:
        try:
            return await client.call(method, path, timeout, **options)
        except InUse:
            raise
        except ServerError as error:
            raise type(error)(f"pushing version {weights.version}, phase {name}: {error}") from error

    await phase("pause", "POST", "/pause", params={"mode": "keep"})
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
    rpc = {"method": "igrpo_checksums", "kwargs": {"shapes": {n: list(s) for n, s in weights.shapes.items()}}}
    answer = await client.call("POST", "/collective_rpc", timeout, json=rpc)
    compared = 0
    for kept in answer["results"]:  # one entry per worker
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
