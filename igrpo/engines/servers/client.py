"""One ``vllm serve`` server as seen from the trainer: every call has a deadline and carries the run's secret."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import httpx

from igrpo.data_types import Kept
from igrpo.engines.base import Request, Result
from igrpo.engines.masks import read_kept
from igrpo.engines.servers.auth import INSTANCE_HEADER, SECRET_VARIABLE
from igrpo.engines.servers.launch import SERVED_NAME
from igrpo.engines.servers.lease import LEASE_PATH, LOCKED, OWNER_HEADER, RESTART_PATH

NEEDED_PATHS = (
    "/v1/completions", "/health", "/collective_rpc", "/reset_prefix_cache", "/pause", "/resume", "/abort_requests",
    "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update",
    "/update_weight_version", "/weight_info",
)  # fmt: skip
LOAD_PATH = "/v1/load_lora_adapter"
"""Of servers that keep a base and take adapters alone; the others do not have it."""
SHORT_SECONDS = 30.0
"""Deadline of calls that do no work to speak of."""
PATIENCE_SECONDS = 5.0
"""Deadline of calls to a server that may well be gone."""
IDLE_SECONDS = 5.0
"""This end closes an idle connection, much earlier than the server would (``launch.KEEP_ALIVE_SECONDS``): one that the
server closes under a request on its way looks like a server that died."""


class ServerError(RuntimeError):
    """One server did not do what it was asked to."""


class ConnectionLost(ServerError):
    """No answer, or none whole: the server is gone, or only the connection."""


class ServerHung(ServerError):
    """It did not answer in time."""


class SecretRefused(ServerError):
    """It belongs to another run."""


class RequestRefused(ServerError):
    """The request cannot be served, here or elsewhere."""


class InUse(ServerError):
    """Another trainer holds its lease, or held it since this one did."""

    def __init__(self, url: str, state: dict[str, Any]):
        holder, hint = state["holder"], "start a server for this one (python -m igrpo.serve)"
        if state["alive"] or not state["busy"]:
            what = f"{url} is in use by another trainer ({holder}), and two cannot feed one server: end it, or {hint}"
        else:
            what = f"{url} does not end what a trainer that is gone ({holder}) asked of it: start it again"
        super().__init__(what)
        self.state = state


class Client:
    """Calls to one server. Runs inside an event loop.

    Args:
        owner: who calls, as the server's lease knows it (see ``lease.py``); without one, a caller that only looks.
    """

    def __init__(self, url: str, secret: str, owner: str = ""):
        self.url, self._secret = url.rstrip("/"), secret
        self.model = SERVED_NAME
        """That requests name: the base, or the adapter beside it."""
        self.instance: str | None = None
        """Of the process that gave the last answer (see ``auth.INSTANCE_HEADER``)."""
        self.http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {secret}", **({OWNER_HEADER: owner} if owner else {})},
            limits=httpx.Limits(max_connections=None, keepalive_expiry=IDLE_SECONDS),
            timeout=None,  # one deadline over the whole call instead
            trust_env=False,  # no proxy gets to see the secret
        )

    async def call(self, method: str, path: str, timeout: float, **options: Any) -> Any:
        """The answer's JSON (None where there is none).

        Raises:
            ServerHung: no whole answer within ``timeout`` seconds.
            RequestRefused: the server understood it and says no.
            InUse: another trainer has the server.
            ServerError: no connection, or an answer other than 200.
        """
        try:
            async with asyncio.timeout(timeout):
                response = await self.http.request(method, path, **options)
        except TimeoutError:
            raise ServerHung(f"{self.url}{path} gave no answer in {timeout:g} s") from None
        except httpx.HTTPError as error:
            raise ConnectionLost(f"{self.url}{path}: {str(error) or type(error).__name__}") from error
        if response.status_code == 401:
            raise SecretRefused(f"{self.url} refused the secret: {SECRET_VARIABLE} differs between trainer and server")
        if response.status_code == LOCKED:
            raise InUse(self.url, response.json())
        if response.status_code != 200:
            kind = RequestRefused if response.status_code in (400, 422) else ServerError
            raise kind(f"{self.url}{path} answered {response.status_code}: {self._said(response)}")
        self.instance = response.headers.get(INSTANCE_HEADER.decode())
        try:
            return response.json() if response.content and path != LOAD_PATH else None
        except ValueError:
            raise ServerError(f"{self.url}{path} answered something that is no JSON: {self._said(response)}") from None

    def _said(self, response: httpx.Response) -> str:
        """The answer's text for a message, without the secret, which a proxy on the way may repeat."""
        return response.text.replace(self._secret, "***")[:300]

    async def check(self, max_model_length: int, adapter: bool) -> None:
        """Whether this server can do all that a run needs; asks for abilities, not for a version.

        Args:
            adapter: it will be sent adapters alone. Whoever sends whole weights would change their base.

        Raises:
            ServerError: it cannot; says what is missing.
        """
        paths = (await self.call("GET", "/openapi.json", SHORT_SECONDS))["paths"]
        missing = [path for path in NEEDED_PATHS if path not in paths]
        if missing:
            raise ServerError(
                f"{self.url} has no {', '.join(missing)}; run vLLM 0.28 to 0.33 through `python -m igrpo.serve`"
            )
        if self.instance is None:
            raise ServerError(
                f"{self.url} was started without the secret, or by another version of igrpo; start it with "
                "`python -m igrpo.serve`"
            )
        if adapter != (LOAD_PATH in paths):
            takes, other = ("whole weights", "adapter") if adapter else ("adapters alone", "merged")
            raise ServerError(
                f"{self.url} takes {takes}: write the same use_peft and lora_sync where it starts and here, such as "
                f"lora_sync: {other} there"
            )
        model = (await self.call("GET", "/v1/models", SHORT_SECONDS))["data"][0]  # adapters stand behind it
        if model["id"] != SERVED_NAME or model["max_model_len"] < max_model_length:
            raise ServerError(
                f"{self.url} serves {model['id']} with a context of {model['max_model_len']} tokens; this run needs "
                f"{SERVED_NAME} with {max_model_length}: set vllm_max_model_length: {max_model_length} where it starts"
            )

    async def lease(self, wish: str, holder: str = "", timeout: float = SHORT_SECONDS) -> dict[str, Any]:
        """Takes, keeps or leaves the server; the state of its lease.

        Raises:
            InUse: another trainer has it.
        """
        return await self.call("POST", LEASE_PATH, timeout, json={"wish": wish, "holder": holder})

    async def restart(self) -> None:
        """Ends the server's process, which whoever supervises it starts again (``serve.py``)."""
        with contextlib.suppress(ServerError):
            await self.call("POST", RESTART_PATH, PATIENCE_SECONDS)

    async def tokens_done(self) -> float:
        """Tokens read and written since its start: a server whose count moves is busy and does not hang."""
        try:
            async with asyncio.timeout(SHORT_SECONDS):
                text = (await self.http.get("/metrics")).text
        except (TimeoutError, httpx.HTTPError):
            return 0.0
        return sum(map(float, re.findall(r"^vllm:(?:prompt|generation)_tokens_total(?:\{[^}]*\})? (\S+)", text, re.M)))

    async def abandon_push(self) -> None:
        """Ends a push that its trainer began and did not end: vLLM refuses to start another one until then.

        An update that cannot be carried out closes it; without one open it is refused, and nothing has changed.
        """
        nothing = {"folder": "", "files": [], "checksums": {"no such tensor": ""}}
        alone = {"Connection": "close"}  # the server drops it after an error, and the next call would have reused it
        with contextlib.suppress(ServerError):
            await self.call("POST", "/update_weights", SHORT_SECONDS, json={"update_info": nothing}, headers=alone)

    async def complete(
        self, request: Request, stop_token_ids: list[int], seed: int, salt: str, timeout: float, asked: int = 0
    ) -> tuple[Result, str | None]:
        """The finished request, its version still open, and the instance id of the server that answered.

        Closing the connection (cancelling this call, or the deadline) makes the server abort the request. Of ``asked``
        log-probabilities per token, the largest, is read what the sampler kept.
        """
        sampling = request.sampling
        body = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            "n": request.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": stop_token_ids,
            "seed": seed,
            "cache_salt": salt,
            "logprobs": asked,  # 0: the sampled token's and no other
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        answer = await self.call("POST", "/v1/completions", timeout, json=body)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        reasons = tuple("length" if c["finish_reason"] == "length" else c["finish_reason"] for c in choices)
        if len(choices) != request.n or not {"stop", "length"}.issuperset(reasons):
            raise ServerError(f"{self.url} broke {request.request_id} off ({len(choices)} outputs, {set(reasons)})")
        details = answer["usage"].get("prompt_tokens_details") or {}
        result = Result(
            request_id=request.request_id,
            prompt_ids=tuple(choices[0]["prompt_token_ids"]),
            token_ids=tuple(tuple(c["token_ids"]) for c in choices),
            logprobs=tuple(tuple(c["logprobs"]["token_logprobs"]) for c in choices),
            finish_reasons=reasons,
            version=-1,
            cached_tokens=details.get("cached_tokens") or 0,
            kept=tuple(map(_kept, choices)) if asked else None,
        )
        return result, self.instance

    async def score(self, token_ids: list[int], salt: str, timeout: float) -> list[float]:
        """Log-probability of each id after the first at temperature 1 (nats)."""
        body = {
            "model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0,
            "cache_salt": salt, "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = await self.call("POST", "/v1/completions", timeout, json=body)
        (choice,) = answer["choices"]
        if choice["finish_reason"] == "abort":  # before its prompt was read: log-probabilities are missing
            raise ServerError(f"{self.url} broke the reading of a prompt off")
        entries = choice["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for token, entry in zip(token_ids[1:], entries, strict=True)]

    async def close(self) -> None:
        await self.http.aclose()


def _kept(choice: dict[str, Any]) -> Kept:
    """Of one completion."""
    steps = choice["logprobs"]["top_logprobs"]  # {"token_id:5": -0.1}
    return read_kept({int(name.rpartition(":")[2]): p for name, p in step.items()} for step in steps)
