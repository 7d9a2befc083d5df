"""The lease as the server's middleware keeps it: who may change a server, and whose completions count."""

from __future__ import annotations

import asyncio
import json

import pytest

from igrpo.engines.servers import lease
from igrpo.engines.servers.auth import SECRET_VARIABLE, RequireSecret
from igrpo.engines.servers.lease import LEASE_PATH, OWNER_HEADER, RESTART_PATH
from tests.engines.test_auth import SECRET

COMPLETE, PUSH = "/v1/completions", "/update_weights"
CHANGES = [
    "/start_weight_update", PUSH, "/finish_weight_update", "/init_weight_transfer_engine", "/update_weight_version",
    "/pause", "/resume", "/abort_requests", "/reset_prefix_cache", "/collective_rpc", "/sleep", "/v1/load_lora_adapter",
    "/v1/completions/",
]  # fmt: skip


class Server:
    """A server whose requests end when they are told to; notes what was carried out."""

    def __init__(self):
        self.carried_out: list[tuple[str, bytes]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.middleware = RequireSecret(self.inner)

    async def inner(self, scope, receive, send):
        body = (await receive()).get("body", b"")
        self.carried_out.append((scope["path"], body))
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def ask(self, owner: str | None, path: str, body: bytes = b"{}", method: str = "POST", parts=None):
        """Status and JSON of the answer; ``parts`` are messages instead of one body."""
        sent: list[dict] = []
        parts = parts or [{"type": "http.request", "body": body, "more_body": False}]
        messages = iter(parts)

        async def receive():
            message = next(messages)
            return await message if asyncio.isfuture(message) else message

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {SECRET}".encode())]
        if owner is not None:
            headers.append((OWNER_HEADER.encode(), owner.encode()))
        scope = {"type": "http", "path": path, "method": method, "headers": headers}
        await self.middleware(scope, receive, send)
        if not sent:
            return None
        assert [m["type"] for m in sent].count("http.response.start") == 1
        answer = json.loads(b"".join(m.get("body", b"") for m in sent[1:]) or b"null")
        return sent[0]["status"], answer

    async def lease(self, owner: str | None, wish: str):
        return await self.ask(owner, LEASE_PATH, json.dumps({"wish": wish, "holder": f"host of {owner}"}).encode())


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.5)

    def runs(scenario):
        async def whole():
            await scenario(Server())

        asyncio.run(whole())

    return runs


def test_one_trainer_at_a_time(run):
    async def scenario(server):
        assert (await server.ask("elder", PUSH))[0] == 200  # nobody has taken it yet
        assert (await server.lease("elder", "take"))[0] == 200
        for path in CHANGES:
            assert (await server.ask("elder", path))[0] == 200
            for other in ("younger", "", None):
                status, said = await server.ask(other, path)
                assert status == 423 and said["holder"] == "host of elder" and said["alive"]
        assert (await server.ask("elder", COMPLETE))[0] == (await server.ask(None, COMPLETE))[0] == 200
        assert (await server.ask("younger", COMPLETE))[0] == 423
        assert (await server.ask("younger", "/health", method="GET"))[0] == 200
        status, said = await server.lease("younger", "take")
        assert status == 423 and said["renewals"] > 0
        for wish in ("keep", "leave", "seize", None):
            await server.lease("younger", wish)
        assert (await server.lease(None, "take"))[0] == (await server.ask("elder", LEASE_PATH, b"[]"))[0] == 400
        assert (await server.ask("elder", PUSH))[0] == 200
        assert (await server.lease("elder", "leave"))[0] == 200
        assert (await server.lease("younger", "take"))[0] == 200  # at once
        assert (await server.lease("elder", "keep"))[0] == (await server.ask("elder", PUSH))[0] == 423

    run(scenario)


def test_a_lease_that_nobody_renews_ends_and_its_trainer_must_not_go_on(run):
    async def scenario(server):
        await server.lease("elder", "take")
        for _ in range(6):  # any request renews it
            await asyncio.sleep(0.1)
            assert (await server.ask("elder", COMPLETE))[0] == 200
            assert (await server.lease("younger", "take"))[0] == 423
        await asyncio.sleep(0.6)
        assert (await server.ask("elder", COMPLETE))[0] == 200  # nobody came: it goes on
        assert (await server.lease("elder", "keep"))[0] == 200
        await asyncio.sleep(0.6)
        assert (await server.lease("younger", "take"))[0] == 200
        await asyncio.sleep(0.6)  # the younger one is gone, too; its weights are there all the same
        for path in (COMPLETE, PUSH):
            assert (await server.ask("elder", path))[0] == 423
        assert (await server.lease("elder", "keep"))[0] == 423
        assert (await server.lease("elder", "take"))[0] == 200
        for path in (PUSH, "/collective_rpc"):
            assert (await server.ask("elder", COMPLETE))[0] == 409  # from any of its processes: not its weights yet
            assert (await server.ask("elder", path))[0] == 200
        assert (await server.ask("elder", "/finish_weight_update"))[0] == 200
        assert (await server.ask("elder", COMPLETE))[0] == 200

    run(scenario)


def test_what_was_sampled_under_a_takeover_is_thrown_away(run):
    async def scenario(server):
        await server.lease("elder", "take")
        server.go.clear()
        running = asyncio.ensure_future(server.ask("elder", COMPLETE))
        await asyncio.sleep(0.6)
        assert (await server.lease("younger", "take"))[0] == 200
        server.go.set()
        assert (await running)[0] == 423

    run(scenario)


def test_nobody_takes_a_server_under_a_change(run):
    async def scenario(server):
        await server.lease("elder", "take")
        server.go.clear()
        pushing = asyncio.ensure_future(server.ask("elder", PUSH))
        await asyncio.sleep(0.6)
        status, said = await server.lease("younger", "take")
        assert status == 423 and said["busy"] and not said["alive"]
        server.go.set()
        assert (await pushing)[0] == 200
        assert (await server.lease("younger", "take"))[0] == 200

    run(scenario)


def test_a_change_that_arrives_slowly_is_judged_when_it_is_there(run):
    """And one whose client goes in between is not carried out at all."""

    async def scenario(server):
        await server.lease("elder", "take")
        rest = asyncio.get_running_loop().create_future()
        slow = [{"type": "http.request", "body": b'{"a"', "more_body": True}, rest]
        push = asyncio.ensure_future(server.ask("elder", PUSH, parts=slow))
        await asyncio.sleep(0.6)
        assert (await server.lease("younger", "take"))[0] == 200
        rest.set_result({"type": "http.request", "body": b": 1}", "more_body": False})
        assert (await push)[0] == 423 and server.carried_out == []
        gone = [{"type": "http.request", "body": b'{"a"', "more_body": True}, {"type": "http.disconnect"}]
        assert await server.ask("younger", PUSH, parts=gone) is None and server.carried_out == []
        whole = [{"type": "http.request", "body": part, "more_body": part != b"}"} for part in (b'{"a"', b": 1", b"}")]
        assert (await server.ask("younger", PUSH, parts=whole))[0] == 200
        assert server.carried_out == [(PUSH, b'{"a": 1}')]

    run(scenario)


def test_only_its_trainer_ends_a_server(run, monkeypatch):
    killed = []
    monkeypatch.setattr(lease.os, "kill", lambda *what: killed.append(what))

    async def scenario(server):
        await server.lease("elder", "take")
        for other in ("younger", None):
            assert (await server.ask(other, RESTART_PATH))[0] == 423 and not killed
        assert (await server.ask("elder", RESTART_PATH, method="GET"))[0] == 200 and not killed  # passed on
        assert (await server.ask("elder", RESTART_PATH))[0] == 200 and len(killed) == 1

    run(scenario)
