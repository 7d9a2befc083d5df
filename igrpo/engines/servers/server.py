"""One server as its keeper sees it: brought up, watched, replaced."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch

from igrpo.engines.adapter_files import NAME as ADAPTER
from igrpo.engines.base import UNKNOWN_VERSION, Request, Result
from igrpo.engines.config import EngineConfig
from igrpo.engines.layout import named_devices
from igrpo.engines.servers.auth import check_access, secret_from_environment
from igrpo.engines.servers.client import (
    PATIENCE_SECONDS,
    SHORT_SECONDS,
    Client,
    InUse,
    SecretRefused,
    ServerError,
    ServerHung,
)
from igrpo.engines.servers.launch import SERVED_NAME, server_command, server_environment
from igrpo.engines.servers.process import ServerProcess, free_port
from igrpo.settings import ConfigError

if TYPE_CHECKING:
    from igrpo.engines.servers.push import Published

T = TypeVar("T")

PROBE_SECONDS = 0.5


class Server:
    """State of one server; lives in the engine's event loop.

    Args:
        process: of a server that this process starts and may replace; None for one that runs elsewhere.
    """

    def __init__(self, client: Client, process: ServerProcess | None):
        self.client, self.process = client, process
        self.up = False
        self.version: int | None = None
        """Of the weights it holds; None while nobody can tell."""
        self.failures = 0
        self.given_up: str | None = None
        """Why it is no longer waited for."""
        self.lock = asyncio.Lock()
        self.keeper: asyncio.Task[None] | None = None
        self.instance: str | None = None
        """Of the process that came up; another one holds other weights."""
        self.hung = False
        """Whether it stopped answering without having ended."""
        self._work: dict[asyncio.Task[Any], int] = {}
        self._broken: asyncio.Future[str] | None = None

    @property
    def load(self) -> int:
        """Sequences it is working on."""
        return sum(self._work.values())

    def holds(self, version: int) -> bool:
        return self.up and self.version == version != UNKNOWN_VERSION

    async def complete(
        self, request: Request, stop_token_ids: list[int], seed: int, salt: str, timeout: float, asked: int
    ) -> Result:
        """As ``Client.complete``; fails as soon as the server is known to be broken."""
        begun = self.version
        post = self.client.complete(request, stop_token_ids, seed, salt, timeout, asked)
        result, instance = await self.unless_broken(post, request.n)
        if instance != self.instance or self.version is None:
            raise ServerError(f"{self.client.url} was started anew, with other weights")
        self.failures = 0
        if begun is None or begun == self.version:
            return dataclasses.replace(result, version=self.version)
        versions = tuple(((begun, len(ids)),) for ids in result.token_ids)  # the answer does not tell them apart
        return dataclasses.replace(result, version=self.version, versions=versions)

    async def unless_broken(self, work: Coroutine[Any, Any, T], load: int = 0) -> T:
        """What ``work`` gives; fails as soon as the server is known to be broken.

        Args:
            load: sequences that it makes the server work on.
        """
        task = asyncio.ensure_future(work)
        self._work[task] = load
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():  # the caller gave it up
                raise
            assert self._broken is not None
            raise ServerError(f"{self.client.url} broke: {self._broken.result()}") from None
        finally:
            del self._work[task]

    def break_off(self, reason: str, hung: bool = False) -> None:
        """Tells the keeper; what runs here fails and starts over."""
        self.up, self.version, self.hung = False, None, self.hung or hung
        if self._broken is not None and not self._broken.done():
            self._broken.set_result(reason)
        for task in self._work:
            task.cancel()

    async def come_up(self, max_model_length: int, timeout: float, leads: bool, adapter: bool) -> None:
        """Starts it where it is ours, waits until it answers, and takes it over: requests and a push that
        an earlier trainer left there are aborted.

        Raises:
            ServerError: it did not come up in ``timeout`` seconds, ended, or cannot do what a run needs.
            InUse: another trainer has it.
        """
        if self.process is not None and not self.process.alive():
            await asyncio.to_thread(self.process.start)
        deadline = time.monotonic() + timeout
        while True:
            try:
                await self.client.call("GET", "/health", min(SHORT_SECONDS, timeout))
                break
            except ServerError as error:
                self._check_waiting(error, deadline, timeout)
                await asyncio.sleep(PROBE_SECONDS)
        await self.client.check(max_model_length, adapter)
        self.client.model = SERVED_NAME
        if leads:
            await self._take(timeout)
            await self.client.call("POST", "/abort_requests", SHORT_SECONDS, json={})
            if self.process is None:
                await self.client.abandon_push()
            await self.client.call("POST", "/resume", SHORT_SECONDS)
        self.instance, self._broken = self.client.instance, asyncio.get_running_loop().create_future()

    def _check_waiting(self, error: ServerError, deadline: float, timeout: float) -> None:
        if self.process is not None and not self.process.alive():
            raise ServerError(f"the vLLM server ended while starting; its last lines ({self.process.log}):\n"
                              f"{self.process.tail()}") from error  # fmt: skip
        if isinstance(error, SecretRefused):
            raise error
        if time.monotonic() > deadline:
            hint = (
                f"see {self.process.log}"
                if self.process
                else "check that it runs (python -m igrpo.serve), its address, its port, and the firewall"
            )
            raise ServerError(
                f"no vLLM server came up at {self.client.url} in {timeout:g} s ({error}); {hint}; vllm_server_timeout "
                "sets the wait"
            ) from error

    async def _take(self, timeout: float) -> None:
        """Waits until the lease of a trainer that died has ended, but not for one that lives."""
        holder = f"{socket.gethostname()}, process {os.getpid()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
        seen, deadline = None, time.monotonic() + timeout
        while True:
            try:
                await self.client.lease("take", holder)
                return
            except InUse as error:
                if seen not in (None, error.state["renewals"]) or time.monotonic() > deadline:
                    raise
                seen = error.state["renewals"]
            await asyncio.sleep(PROBE_SECONDS)

    async def watch(self, pause: float, health_every: float, leads: bool) -> str:
        """Returns when the server is broken, with the reason; keeps its lease until then."""
        assert self._broken is not None
        asked = time.monotonic()
        while True:
            done, _ = await asyncio.wait([self._broken], timeout=pause)
            if done:
                return self._broken.result()
            if self.process is not None and not self.process.alive():
                self.break_off("its process ended")
            elif time.monotonic() - asked > health_every:
                asked = time.monotonic()
                try:
                    await self.client.call("GET", "/health", SHORT_SECONDS)
                    if leads:
                        await self.client.lease("keep")
                except ServerError as error:
                    self.break_off(str(error), hung=isinstance(error, ServerHung))
                else:
                    if self.client.instance != self.instance:
                        self.break_off("it was started anew, with other weights")

    async def probe(self, reason: str, salt: str, timeout: float) -> None:
        """After a request hung or lost its connection: a server that cannot do one token either is broken."""
        instance, done = self.instance, await self.client.tokens_done()
        try:
            await self.client.score([0, 0], salt, min(SHORT_SECONDS, timeout))
        except ServerError as error:
            hung = isinstance(error, ServerHung)
            # Else it has been replaced meanwhile, or is only long at work on others.
            if self.instance == instance and not (hung and await self.client.tokens_done() > done):
                self.break_off(reason, hung)

    async def wait_for_version(self, wanted: Callable[[], Published], timeout: float) -> None:
        """For a process that does not feed the servers: until the one that does has.

        Args:
            wanted: the newest, which a push that begins meanwhile replaces: a server that comes back gets that one
                alone, and never holds the one before.
        """
        deadline = time.monotonic() + timeout
        while True:
            held = (await self.client.call("GET", "/weight_info", SHORT_SECONDS))["weight_version"]
            weights = wanted()
            if held == str(weights.version):
                break
            if time.monotonic() > deadline:
                raise ServerError(f"{self.client.url} did not get version {weights.version} in {timeout:g} s")
            await asyncio.sleep(PROBE_SECONDS)
        self.client.model = ADAPTER if weights.adapter else SERVED_NAME
        self.version = weights.version

    async def renew(self, leads: bool) -> None:
        """Ends what is left of it; ``come_up`` starts it again, or waits until somebody has."""
        self.up, self.version = False, None
        if self.process is not None:
            await asyncio.to_thread(self.process.stop)
        elif self.hung and leads:
            await self.client.restart()
        self.hung = False

    async def stop(self, leads: bool) -> None:
        """Ends it where it is ours, else leaves it to the next trainer."""
        self.hung = False
        await self.renew(leads)
        if self.process is None and leads and self.instance is not None:
            with contextlib.suppress(ServerError):
                await self.client.lease("leave", timeout=PATIENCE_SECONDS)
        await self.client.close()
        if self.process is not None:
            shutil.rmtree(self.process.log.parent, ignore_errors=True)


def start_servers(
    config: EngineConfig, path: str, length: int, on_cpu: bool, adapter: Mapping[str, Any] | None
) -> tuple[list[Server], bool]:
    """The run's servers, and whether this process leads: the first of those that train starts and feeds them.

    Args:
        adapter: peft's description of those that they get in place of weights.

    Raises:
        ConfigError: an address that is refused, or no secret.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    leads = not distributed or torch.distributed.get_rank() == 0
    check_access(config)
    # One owner for all processes of the run: they share the servers' leases.
    owners = [secrets.token_hex(16)]
    if distributed:
        torch.distributed.broadcast_object_list(owners, src=0)
    if config.server_urls:
        secret = secret_from_environment()
        if config.weight_backend(on_cpu) == "igrpo_file" and config.vllm_weight_dir is None:
            for url in config.server_urls:
                _check_same_machine(url, "lora_sync: merged with " if config.sends_adapter else "")
        return [Server(Client(url, secret, owners[0]), None) for url in config.server_urls], leads
    known: list[tuple[list[int], str]] = [([], "")]
    if leads:
        host, first = config.vllm_server_host, config.vllm_server_port
        count = range(config.vllm_num_servers)
        known = [([first + i if first else free_port(host) for i in count], secrets.token_hex(24))]
    if distributed:
        torch.distributed.broadcast_object_list(known, src=0)
    ports, secret = known[0]
    host = f"[{config.vllm_server_host}]" if ":" in config.vllm_server_host else config.vllm_server_host
    devices, each = named_devices(config), config.vllm_tensor_parallel_size
    servers = []
    for i, port in enumerate(ports):
        process = None
        if leads:
            # One seed for all: a request's own seed decides what it samples, wherever it lands.
            command = server_command(config, path, length, port, config.seed, on_cpu, adapter)
            own = None if devices is None else ",".join(devices[i * each : (i + 1) * each])
            log = Path(tempfile.mkdtemp(prefix="igrpo-servers-"), "server.log")
            process = ServerProcess(command, server_environment(config, secret, on_cpu, own), log)
        servers.append(Server(Client(f"http://{host}:{port}", secret, owners[0]), process))
    return servers, leads


def _check_same_machine(url: str, beside: str) -> None:
    host = urlsplit(url).hostname or ""
    local = host == "localhost"
    with contextlib.suppress(ValueError):  # a name, not an address
        local = local or ipaddress.ip_address(host).is_loopback
    if not local:
        raise ConfigError(
            f"vllm_weight_dir: {url} is on another machine; write a folder of a file system that both see, or "
            f"set {beside}vllm_weight_transfer: nccl"
        )
