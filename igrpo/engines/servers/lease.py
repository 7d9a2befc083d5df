"""Who feeds a server: one trainer at a time, checked by the server itself, with each request.

Two trainers on one server would sample from each other's weights and see nothing wrong. So a trainer takes the server's
lease before it changes anything, sends its owner id with every request, and renews the lease while it lives. The server
refuses (status 423) what comes from anybody but its last owner: changes before they are carried out, completions also
when they are done, since they may have been sampled after somebody else took the server.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OWNER_HEADER = "x-igrpo-owner"
LEASE_PATH = "/igrpo/lease"
RESTART_PATH = "/igrpo/restart"
LEASE_SECONDS = 15.0
"""A lease that was not renewed for so long is anybody's: its trainer died, or stands still."""
LOCKED = 423
_READS = ("/v1/completions",)
"""POSTs that change nothing; they pass without an owner id, too."""
_PUSHED = ("/finish_weight_update", "/update_weight_version")
"""The ends of a push by file and of a direct one."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Lease:
    """One server's; lives in its front end, which answers from a single thread: no await, no race."""

    def __init__(self) -> None:
        self.owner: str | None = None
        """Its last owner, also when the lease has ended: whoever came before it must not go on."""
        self.holder = ""
        """The owner in words."""
        self.renewals = 0
        self.foreign = False
        """Whether the weights are still those of the owner before this one."""
        self._until = 0.0
        self._changing = 0
        """Changes that are being carried out: nobody takes the server under them."""

    def alive(self) -> bool:
        return time.monotonic() < self._until

    def refusal(self, owner: str | None, changes: bool) -> tuple[int, dict[str, Any]] | None:
        """Status and body for a request that is refused; None for one that may pass.

        One without an owner id may look, and may change a server that nobody holds.
        """
        if (changes and self.alive()) if owner is None else self.owner not in (None, owner):
            return LOCKED, self.state()
        if owner is not None and not changes and self.foreign:
            return 409, {"error": "the weights are still those of the trainer before this one"}
        return None

    async def serve(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on what the lease allows; answers requests for the lease itself."""
        path, reading = scope["path"], scope["method"] in ("GET", "HEAD", "OPTIONS")
        owner = next(
            (value.decode("latin-1") for name, value in scope["headers"] if name == OWNER_HEADER.encode()), None
        )
        if path == LEASE_PATH:
            status, answer = (200, self.state()) if reading else self._asked(owner, await _body(receive) or b"")
            return await respond(send, status, answer)
        changes = not reading and path not in _READS
        if changes:  # read whole, so that nothing lies between the look at the lease and the call
            body = await _body(receive)
            if body is None:
                return
            receive = _again(body, receive)
        if not reading and (refusal := self.refusal(owner, changes)):
            return await respond(send, *refusal)
        if owner == self.owner and self.alive():
            self._renew()
        if path == RESTART_PATH and changes:
            await respond(send, 200, {})
            # Whoever supervises the server takes the rest of it down and starts it again.
            return os.kill(os.getpid(), signal.SIGKILL)
        self._changing += changes
        try:
            await app(scope, receive, send if reading or changes else self._if_still_held(owner, send))
        finally:
            self._changing -= changes
            self.foreign &= not (changes and path in _PUSHED and owner == self.owner)

    def state(self) -> dict[str, Any]:
        return {"holder": self.holder, "alive": self.alive(), "busy": self._changing > 0, "renewals": self.renewals}

    def _asked(self, owner: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        try:
            asked = json.loads(body)
            wish, holder = asked["wish"], str(asked["holder"])
        except (ValueError, TypeError, KeyError):
            wish, holder = None, ""
        if not owner or wish not in ("take", "keep", "leave"):
            return 400, {"error": "a lease is taken, kept or left, by an owner"}
        if owner != self.owner:
            if wish == "leave":
                return 200, {}
            if (wish == "keep" and self.owner is not None) or self.alive() or self._changing:
                return LOCKED, self.state()
            self.foreign = self.owner is not None
            self.owner, self.holder = owner, holder[:300]
        self._until = 0.0 if wish == "leave" else self._until
        if wish != "leave":
            self._renew()
        return 200, self.state()

    def _renew(self) -> None:
        self._until, self.renewals = time.monotonic() + LEASE_SECONDS, self.renewals + 1

    def _if_still_held(self, owner: str | None, send: Send) -> Send:
        refused = False

        async def checked(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and (refusal := self.refusal(owner, changes=False)):
                refused = True
                await respond(send, *refusal)
            elif not refused:
                await send(message)

        return checked


async def respond(send: Send, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


async def _body(receive: Receive) -> bytes | None:
    """None where the client goes before it has sent all."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read once more, then whatever comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
