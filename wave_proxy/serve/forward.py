"""Everything that is not the registry's goes to the api process, over its Unix socket, streaming both ways."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from posixpath import normpath
from time import monotonic
from urllib.parse import unquote

import aiohttp
from yarl import URL

from wave_proxy.cache.flight import Flights
from wave_proxy.errors import NotFound, UpstreamUnavailable
from wave_proxy.serve.absence import Absence
from wave_proxy.serve.messages import Reply, Request, Terms
from wave_proxy.serve.tunnel import Tunnels
from wave_proxy.upstream.egress import Session

# RFC 9110 §7.6.1: these are between two neighbours, and we are one.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
)
_CLIENT_HEADER = "x-wave-client"
# From the api, and for us alone: for so many seconds, while that token lives and those jobs stay as they are, who asks
# for the same gets this answer. Seconds, then names of tokens and jobs, between blanks.
_REPEAT_HEADER = "x-wave-repeat"
_REPEATED = "/status"  # what these targets end with: thousands ask for them several times a second
_REPEATED_BYTES = 1 << 14

_REASON_HEADER = "x-wave-reason"  # from the api, for our log: why the answer is an error

_OURS = frozenset({"content-length", "date", _REPEAT_HEADER, _REASON_HEADER})

_SMALL_BYTES = 1 << 18
_SMALL_BODY_S = 60.0
_LARGE_BODIES = 32  # at once, of one worker
_LARGE_BODY_S = 900.0
_UNANSWERED = 256  # at once, of one worker: more connections at the same time than the api's socket takes would fail


class Forwarder:
    """Hands requests on, with the client's address in ``X-Wave-Client``, which no client can set itself."""

    def __init__(self, session: Session, tunnels: Tunnels, absence: Absence) -> None:
        self._session = session
        self._absence = absence
        self._tunnels = tunnels
        self._large = asyncio.Semaphore(_LARGE_BODIES)
        # Answers that are under way do not count: a log is followed for as long as its build runs.
        self._unanswered = asyncio.Semaphore(_UNANSWERED)
        self._repeats: Flights[str, Reply | None] = Flights()

    async def answer(self, request: Request) -> Reply:
        """The api's reply. Raises NotFound for what is between us and the api; UpstreamUnavailable."""
        if _is_internal(request.target):
            raise NotFound("Page Not Found")
        headers = [
            (name, value.decode("latin-1"))
            for key, value in request.headers
            if (name := key.decode("latin-1")) not in _HOP_BY_HOP and name != _CLIENT_HEADER
        ]
        headers.append((_CLIENT_HEADER, request.client))
        if request.rest is not None and self._tunnels.lead_to(request.target):
            return await self._tunnels.open(request, request.rest, headers)
        if request.body.error is not None:
            raise request.body.error
        # A small body is awaited before a connection to the api is taken, and of large ones only some are let in: who
        # sends slowly keeps nobody else from the api.
        if request.body.complete or int(request.header(b"content-length") or _SMALL_BYTES + 1) <= _SMALL_BYTES:
            async with asyncio.timeout(_SMALL_BODY_S):
                body = b"".join([chunk async for chunk in request.body.chunks()])
            if request.method == "GET" and not body and request.target.endswith(_REPEATED):
                return await self._ask_for_all(request, headers)
            return _reply(await self._ask(request, headers, body or None))
        async with self._large, asyncio.timeout(_LARGE_BODY_S):
            return _reply(await self._ask(request, headers, request.body.chunks()))

    async def _ask_for_all(self, request: Request, headers: list[tuple[str, str]]) -> Reply:
        """The reply, and the same for all who ask meanwhile, if it may be repeated."""
        reply = await self._repeats.run(request.target, lambda: self._ask_repeatable(request, headers))
        if reply is None:
            return _reply(await self._ask(request, headers, None))
        return replace(reply, headers=[*reply.headers])

    async def _ask_repeatable(self, request: Request, headers: list[tuple[str, str]]) -> Reply | None:
        """The reply, with its terms; None for one that is for a single request, which has to ask again."""
        response = await self._ask(request, headers, None)
        try:
            terms, length = _terms(response), response.content_length
            if terms is None or length is None or length > _REPEATED_BYTES:
                return None
            return replace(_reply(response), body=await response.read(), length=None, terms=terms)
        except aiohttp.ClientError as err:
            raise UpstreamUnavailable("the API ended its answer early") from err
        finally:
            response.release()

    async def _ask(
        self, request: Request, headers: list[tuple[str, str]], body: bytes | AsyncIterator[bytes] | None
    ) -> aiohttp.ClientResponse:
        try:
            async with self._unanswered:
                answer = await self._session.request(
                    request.method,
                    URL(f"http://api{request.target}", encoded=True),  # else it would fold `%2e%2e`
                    headers=headers,
                    data=body,
                    allow_redirects=False,
                    skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                )
            self._absence.end()
            return answer
        except aiohttp.ClientError as err:
            if request.body.error is not None:  # what ended the sending was not the api
                raise request.body.error from None
            raise UpstreamUnavailable(self._absence.explain()) from err

    async def close(self) -> None:
        """Close the connections to the api."""
        await self._repeats.close()
        await self._session.close()


def _is_internal(target: str) -> bool:
    """Whether the path is, however it is spelled, one of those by which our own parts ask the api."""
    path = target.partition("?")[0]
    for _ in range(3):  # the client library decodes it, and so does the server at the other end
        path = unquote(path, errors="replace")
    return normpath("/" + path.replace("\\", "/")).lower().lstrip("/").partition("/")[0] == "internal"


def _reply(response: aiohttp.ClientResponse) -> Reply:
    headers = [
        (name, value)
        for name, value in response.headers.items()
        if name.lower() not in _HOP_BY_HOP and name.lower() not in _OURS
    ]
    reason = unquote(response.headers.get(_REASON_HEADER, ""), errors="replace")
    return Reply(response.status, headers, _Stream(response), length=response.content_length, reason=reason)


def _terms(response: aiohttp.ClientResponse) -> Terms | None:
    """On which terms the api lets us repeat its answer; None when it does not."""
    seconds, *names = response.headers.get(_REPEAT_HEADER, "").split() or [""]
    if response.status != 200 or not seconds:
        return None
    return Terms(until=monotonic() + float(seconds), token="", kind="api", state="hit", ended_by=tuple(names))


class _Stream:
    """The body of the api's answer."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except aiohttp.ClientError as err:
            raise UpstreamUnavailable("the API ended its answer early") from err

    async def aclose(self) -> None:
        """Give the connection back, or close it when the body was not read to its end."""
        self._response.release()
