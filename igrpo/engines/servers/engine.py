"""Any number of ``vllm serve`` servers behind the engine protocol.

One thread runs an event loop with all the talking; the trainer's thread hands requests in and takes results out. Each
server has a keeper: it brings the server up (starts it, or waits for it), makes it hold the weights of the engine's
version, watches it, and begins again when it breaks. Requests go to the least loaded server that is up and holds the
right version; one whose server breaks starts over elsewhere, with the seed it had.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import torch

from igrpo.engines.base import UNKNOWN_VERSION, EngineError, Request, Result, WeightSource, request_seed
from igrpo.engines.config import EngineConfig
from igrpo.engines.masks import logprobs_to_ask
from igrpo.engines.servers.client import ConnectionLost, InUse, RequestRefused, ServerError, ServerHung
from igrpo.engines.servers.lease import LEASE_SECONDS
from igrpo.engines.servers.process import address_towards
from igrpo.engines.servers.push import Published, publish, push_directly, push_files
from igrpo.engines.servers.server import Server, start_servers
from igrpo.engines.weight_folder import weight_folder
from igrpo.engines.weights import FILE_BACKEND
from igrpo.models.loading import vocabulary

T = TypeVar("T")

POLL_SECONDS, WATCH_SECONDS = 0.05, 0.5
HEALTH_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 10.0, LEASE_SECONDS / 5, 1.0
MAX_FAILURES = 3
"""Failures of one server in a row, without a finished request between them, before it is given up."""
MAX_ATTEMPTS = 3
"""Times one request may hang before the run is ended."""
MAX_LOSSES = 6
"""Times one request may lose its server before it is taken for what breaks them, and the run is ended."""


class ServerEngine:
    """See ``igrpo.engines.base.Engine``. Where several processes train, the first one starts and feeds the servers.

    Args:
        path: folder or hub id of the model.
        max_model_length: tokens of prompt + completion.
        stop_ids: tokens that end a completion.
        adapter: peft's description of the adapter that pushes will bring, in place of weights.

    Raises:
        ConfigError: an address or a secret that cannot be used.
        EngineError: a server did not come up in ``vllm_server_timeout`` seconds.
    """

    def __init__(
        self,
        path: str,
        config: EngineConfig,
        max_model_length: int,
        stop_ids: Sequence[int],
        seed: int,
        masks: bool,
        adapter: Mapping[str, Any] | None = None,
    ):
        self.config, self.max_model_length, self.stop_token_ids = config, max_model_length, list(stop_ids)
        self.on_cpu = config.use_cpu or not torch.cuda.is_available()
        self.servers, self.leads = start_servers(config, path, max_model_length, self.on_cpu, adapter)
        self.version = UNKNOWN_VERSION if config.server_urls else 0
        self._rank_seed = self._seed = seed
        self._adapter, self._most = adapter, (vocabulary(path, config) or sys.maxsize) if masks else 0
        self._weights: Published | None = None
        self._source: WeightSource | None = None
        backend = config.weight_backend(self.on_cpu)
        self._direct_backend = None if backend == FILE_BACKEND else backend
        self._direct: Any = None
        writes = self.leads and self._direct_backend is None
        self._folder = weight_folder(config.vllm_weight_dir) if writes else None
        self._finished: list[Result] = []
        self._fatal: str | None = None
        self._news = threading.Condition()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._restarts, self._pushing = 0, False
        self._removals: list[asyncio.Task[None]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="igrpo-servers", daemon=True)
        self._thread.start()
        self._changed = asyncio.Event()
        try:
            self._wait_for(self._start())
        except ServerError as error:
            self.close()
            raise EngineError(str(error)) from error

    # --- the trainer's thread

    def submit(self, request: Request) -> None:
        if self.version == UNKNOWN_VERSION:
            raise EngineError("the servers were running before this trainer and hold unknown weights: push first")
        seed = request_seed(self._rank_seed, self._seed, request.request_id)
        self._loop.call_soon_threadsafe(self._spawn, request, seed)

    def poll(self) -> list[Result]:
        with self._news:
            if not self._finished and self._fatal is None:
                self._news.wait(POLL_SECONDS)
            if self._fatal is not None:
                raise EngineError(self._fatal)
            finished, self._finished = self._finished, []
        return finished

    def abort(self, request_ids: Collection[str]) -> None:
        async def cancel() -> None:
            for name in request_ids:
                if task := self._tasks.pop(name, None):
                    task.cancel()  # closes the connection, and the server aborts the request

        self._wait_for(cancel())
        with self._news:
            self._finished = [result for result in self._finished if result.request_id not in request_ids]

    def seed(self, seed: int) -> None:
        self._seed = seed

    def sleep(self) -> bool:
        return False

    def push_weights(self, source: WeightSource, version: int) -> dict[str, float]:
        start = time.perf_counter()
        if self._folder is not None:
            published = publish(source, version, self._folder, self._adapter)
        else:
            published = Published(version, None, (), {}, {}, self._adapter is not None)
            # Where weights are sharded, reading them is a collective: all processes make the leading one's passes.
            for _ in range(0 if self.leads else 2 if self._direct_backend and self._source is None else 1):
                for _ in source():
                    pass
        written, self._source = time.perf_counter() - start, source
        try:
            compared = self._wait_for(self._push(published))
        except ServerError as error:
            raise EngineError(f"no server holds version {version}: {error}") from error
        return {
            "sync/seconds": time.perf_counter() - start,
            "sync/write_seconds": written,
            "sync/tensors_compared": float(compared),
            "sync/servers": float(sum(server.holds(version) for server in self.servers)),
            "sync/restarts": float(self._restarts) * self.leads,  # of the servers that all processes share
        }

    def restart(self) -> None:
        async def drop() -> None:
            self._weights, self.version = None, UNKNOWN_VERSION
            for server in self.servers:
                server.break_off("its weights are not to be trusted")

        self._wait_for(drop())

    def score(self, token_ids: Sequence[int]) -> list[float]:
        async def ask() -> list[list[float]]:
            while True:
                await self._until_usable()
                usable = [server for server in self.servers if server.holds(self.version)]
                salt, timeout = self._salt(), self.config.vllm_sync_timeout
                asked = (s.unless_broken(s.client.score(list(token_ids), salt, timeout)) for s in usable)
                scores: list[list[float]] = []
                for server, answer in zip(usable, await asyncio.gather(*asked, return_exceptions=True), strict=True):
                    if isinstance(answer, ServerError):
                        server.break_off(str(answer), isinstance(answer, ServerHung))
                    elif isinstance(answer, BaseException):
                        raise answer
                    else:
                        scores.append(answer)
                if scores:
                    return scores

        try:
            first, *others = self._wait_for(ask())
        except ServerError as error:
            raise EngineError(str(error)) from error
        for other in others:
            gap = sum(abs(a - b) for a, b in zip(first, other, strict=True)) / len(first)
            if not gap <= self.config.probe_tolerance:
                raise EngineError(f"servers that were sent the same weights differ by {gap:.3f} nats per token")
        return first

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._wait_for(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- the event loop's thread: requests

    def _spawn(self, request: Request, seed: int) -> None:
        self._tasks[request.request_id] = self._guarded(self._run(request, seed))

    def _guarded(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose unforeseen end ends the run instead of leaving it waiting."""

        def report(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                self._give_up(f"talking to the servers failed: {task.exception()!r}")

        task = asyncio.ensure_future(work)
        task.add_done_callback(report)
        return task

    async def _run(self, request: Request, seed: int) -> None:
        hung = lost = 0
        timeout, asked = self.config.vllm_request_timeout, min(logprobs_to_ask(request.sampling), self._most)
        while True:
            try:
                await self._until_usable()
            except ServerError:
                return
            server = min((s for s in self.servers if s.holds(self.version)), key=lambda s: s.load)
            try:
                result = await server.complete(request, self.stop_token_ids, seed, self._salt(), timeout, asked)
                break
            except ServerHung as error:
                hung += 1
                if hung == MAX_ATTEMPTS:
                    return self._give_up(f"{request.request_id} hung {hung} times: {error}")
                await server.probe(str(error), self._salt(), timeout)
            except (RequestRefused, EngineError) as error:
                return self._give_up(str(error))
            except ServerError as error:
                lost += 1
                if lost == MAX_LOSSES:
                    return self._give_up(f"{request.request_id} lost its server {lost} times, the last time: {error}")
                if isinstance(error, ConnectionLost):  # perhaps no more than that, and a new server is dear
                    await server.probe(str(error), self._salt(), timeout)
                else:
                    server.break_off(str(error))
        del self._tasks[request.request_id]
        with self._news:
            self._finished.append(result)
            self._news.notify_all()

    def _salt(self) -> str:
        return f"v{self.version}"  # prefixes of one version are never found by another

    async def _until_usable(self) -> None:
        while self._fatal is not None or not self._any_usable():
            if all(server.given_up for server in self.servers):
                self._give_up("no server is left: " + "; ".join(server.given_up or "" for server in self.servers))
            if self._fatal is not None:
                raise ServerError(self._fatal)
            self._changed.clear()
            await self._changed.wait()

    def _any_usable(self) -> bool:
        return any(server.holds(self.version) for server in self.servers)

    def _give_up(self, reason: str) -> None:
        with self._news:
            self._fatal = self._fatal or reason
            self._news.notify_all()
        self._changed.set()

    # --- the event loop's thread: servers

    async def _start(self) -> None:
        for server in self.servers:
            server.keeper = self._guarded(self._keep(server))
        while not all(server.up for server in self.servers):
            for reason in (self._fatal, *(server.given_up for server in self.servers)):
                if reason:
                    raise ServerError(reason)
            self._changed.clear()
            await self._changed.wait()

    async def _stop(self) -> None:
        tasks = [*self._tasks.values(), *self._removals, *(s.keeper for s in self.servers if s.keeper)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(server.stop(self.leads) for server in self.servers))

    async def _keep(self, server: Server) -> None:
        worked = False
        while True:
            pause = 5 * RETRY_SECONDS  # for one that is about to end and answers with errors until then
            try:
                limits = self.max_model_length, self.config.vllm_server_timeout
                await server.come_up(*limits, self.leads, self._adapter is not None)
                pause = RETRY_SECONDS
                # Watched from here on: one that dies under the push would let it wait for its whole deadline.
                every = RENEW_SECONDS if self.leads else HEALTH_SECONDS
                watching = asyncio.ensure_future(server.watch(WATCH_SECONDS, every, self.leads))
                try:
                    await self._send(server)
                    while self._outdated(server):  # a newer push came meanwhile
                        await self._send(server)
                    worked, server.up = True, True
                    self._changed.set()
                    self._check_direct()
                    reason = await watching
                    self._restarts += 1
                finally:
                    watching.cancel()
            except InUse as error:  # its weights are not ours any more
                return self._give_up(str(error))
            except ServerError as error:
                reason = str(error)
                server.hung |= isinstance(error, ServerHung)
            server.failures += 1
            # One that does not come at the start has never worked: waiting again would not help.
            over = not worked or server.failures >= MAX_FAILURES
            if worked:
                what = f"failed {server.failures} times in a row and is given up" if over else "bringing it back"
                print(f"server {server.client.url}: {reason}; {what}", file=sys.stderr, flush=True)
            await server.renew(self.leads)
            if over:
                server.given_up = f"{server.client.url}: {reason}"
                return self._changed.set()
            await asyncio.sleep(pause)

    def _check_direct(self) -> None:
        """Only the learner's next push feeds a server directly: without one that holds the version there is none."""
        if self._weights is not None and self._direct_backend and not self._pushing and not self._any_usable():
            sends = f"{self._direct_backend} only sends what the learner has now"
            self._give_up(f"no server holds version {self.version} any more, and {sends}")

    async def _send(self, server: Server) -> int:
        """Makes the server hold the engine's weights; nothing to do before the first push."""
        async with server.lock:
            weights, compared = self._weights, 0
            if weights is None:
                server.version = self.version
            elif server.version != weights.version and not self.leads:
                newest = server.wait_for_version(lambda: self._weights or weights, self.config.vllm_request_timeout)
                await server.unless_broken(newest)
            elif server.version != weights.version and weights.folder is not None:
                work = push_files(server.client, weights, self.config.vllm_sync_timeout)
                compared = await server.unless_broken(work)
                server.version = weights.version
            # Else up, but empty, if the transfer is a direct one, which reaches it with the next push.
            return compared

    def _outdated(self, server: Server) -> bool:
        weights = self._weights
        return weights is not None and server.version != weights.version and not (self.leads and self._direct_backend)

    async def _push(self, published: Published) -> int:
        before, self._weights, self.version = self._weights, published, published.version
        self._pushing = True

        async def send(server: Server) -> int:
            try:
                return await self._send(server)
            except ServerError as error:  # half loaded: its keeper brings it back and sends again
                server.break_off(str(error), isinstance(error, ServerHung))
                return 0

        up = [server for server in self.servers if server.up]
        if self._direct_backend and self.leads:
            compared = await self._send_directly(published, up)
        else:
            compared = sum(await asyncio.gather(*map(send, up)))
        await self._until_usable()
        self._pushing = False
        self._changed.set()
        if before is not None and before.folder != published.folder:
            self._removals = [task for task in self._removals if not task.done()]
            self._removals.append(asyncio.ensure_future(self._remove(before)))
        return compared

    async def _remove(self, weights: Published) -> None:
        for server in self.servers:
            async with server.lock:  # one that comes back may just be reading them
                pass
        weights.remove()

    async def _send_directly(self, weights: Published, servers: list[Server]) -> int:
        """Raises ServerError, which ends the run: a send that fails may leave a collective hanging, and nothing in this
        process mends that."""
        from igrpo.engines.servers.vllm_nccl import DirectTransfer

        assert self._source is not None and self._direct_backend is not None
        if self._direct is None:
            address = address_towards(servers[0].client.url)
            self._direct = DirectTransfer(self._direct_backend, address, self.config.vllm_group_port)
        clients = [server.client for server in servers]
        compared = await push_directly(self._direct, self._source, clients, weights, self.config.vllm_sync_timeout)
        for server in servers:
            server.version = weights.version
        return compared
