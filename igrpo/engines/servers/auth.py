"""Who may speak to our servers, and where they may listen.

vLLM's ``--api-key`` guards ``/v1`` alone: whoever reaches the port can pause the server, replace its weights and call
methods of its workers. Ours demand the run's secret on every path, and listen where the internet cannot reach them.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from urllib.parse import urlsplit

from igrpo.engines.config import EngineConfig
from igrpo.engines.servers.lease import App, Lease, Message, Receive, Scope, Send, respond
from igrpo.settings import ConfigError, key_from_environment

SECRET_VARIABLE = "IGRPO_SERVER_SECRET"
"""Environment variable with the secret; never an argument, which every user of a machine can read."""
SHORTEST_SECRET = 16
INSTANCE_HEADER = b"x-igrpo-instance"
"""Header with a number drawn when the server starts: it tells an answer of the server that got the weights from one of
another that was started in its place."""


class RequireSecret:
    """ASGI middleware (vLLM: ``--middleware igrpo.engines.servers.auth.RequireSecret``): without the header
    ``Authorization: Bearer SECRET`` every HTTP path answers 401, and every websocket is closed before it opens.
    What has the secret must also have the lease (``lease.py``)."""

    def __init__(self, app: App):
        self.app, self.lease = app, Lease()
        self.expected = f"Bearer {secret_from_environment()}".encode()
        self.instance = secrets.token_hex(8).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # the server's own start and end; nobody sends it
            return await self.app(scope, receive, send)
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # Compared in constant time, so that no prefix can be guessed from how long the answer takes.
        if len(given) == 1 and hmac.compare_digest(given[0], self.expected):
            if scope["type"] == "http":
                return await self.lease.serve(self.app, scope, receive, self._signed(send))
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            await receive()
            return await send({"type": "websocket.close", "code": 1008})
        said = "this server belongs to a training run and answers only with its secret"
        await respond(send, 401, {"error": said})

    def _signed(self, send: Send) -> Send:
        async def with_instance(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (INSTANCE_HEADER, self.instance)]
            await send(message)

        return with_instance


def secret_from_environment() -> str:
    """The run's secret.

    Raises:
        ConfigError: none is set, it is short enough to guess, or no header can carry it. The message never holds it.
    """
    secret = key_from_environment(SECRET_VARIABLE)
    if len(secret) < SHORTEST_SECRET:
        raise ConfigError(
            f"{SECRET_VARIABLE} is {'too short' if secret else 'not set'}: servers and trainer share a secret of at "
            f"least {SHORTEST_SECRET} characters; on each node: export {SECRET_VARIABLE}=... (one value for all, from "
            "`openssl rand -hex 24`)"
        )
    return secret


def check_access(config: EngineConfig) -> None:
    """All that can be wrong with addresses and secret, before anything heavy loads.

    Raises:
        ConfigError: one of them cannot be used.
    """
    if not config.server_urls:
        return check_bind(config.vllm_server_host, config.vllm_server_allow_public)
    for url in config.server_urls:
        check_url(url, config.vllm_server_allow_public)
    secret_from_environment()


def check_bind(host: str, allow_public: bool) -> None:
    """Refuses an address that more than this machine or its private network can reach.

    Raises:
        ConfigError: it does, and ``allow_public`` is not set; or the name has no address.
    """
    for address in _addresses(host, "vllm_server_host"):
        if not allow_public and (address.is_unspecified or not _is_private(address)):
            raise ConfigError(
                f"vllm_server_host: {host} can be reached from outside ({address}); write 127.0.0.1, or this node's "
                "address in the private network, or set vllm_server_allow_public: true"
            )


def check_url(url: str, allow_public: bool) -> None:
    """Refuses a server to which the secret would travel in clear text over a public network.

    Raises:
        ConfigError: as ``check_bind``, or this is no URL.
    """
    try:
        parts = urlsplit(url)
        known = parts.port is None or parts.port > 0
    except ValueError:  # brackets that do not close, a port that is no number
        raise ConfigError(f"vllm_server_urls: {url!r} does not fit; write http://ADDRESS:PORT") from None
    if not known or parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ConfigError(f"vllm_server_urls: {url!r} does not fit; write http://ADDRESS:PORT")
    if parts.scheme == "https" or allow_public:
        return
    for address in _addresses(parts.hostname, "vllm_server_urls"):
        if address.is_unspecified or not _is_private(address):
            raise ConfigError(
                f"vllm_server_urls: {url} lies outside the private network ({address}), and http would show the "
                "secret on the way; write https://..., or set vllm_server_allow_public: true"
            )


def _is_private(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_private or address.is_link_local


def _addresses(host: str, key: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{key}: {host!r} has no address here ({error}); write the node's name or address") from error
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
