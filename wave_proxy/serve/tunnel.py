"""WebSockets to the api: a connection that goes through as it is, both ways, once the api has agreed to it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress

from wave_proxy.errors import Overloaded, UpstreamUnavailable
from wave_proxy.serve.absence import Absence
from wave_proxy.serve.messages import Body, Reply, Request
from wave_proxy.state.networks import network_of
from wave_proxy.upstream.egress import unix_connection

MAX_TUNNELS = 64  # at once, of one worker
MAX_OF_CLIENT = 16  # of these, from one address (IPv6: /64): who is not let in must not keep others out
_PREFIX = "/pairing/"
_ANSWER_S = 30.0
_READ_BYTES = 1 << 16

Headers = list[tuple[str, str]]


class Tunnels:
    """The WebSockets of one worker; ``path`` is the api's socket."""

    def __init__(self, path: str, absence: Absence) -> None:
        self._path = path
        self._absence = absence
        self._open: Counter[str] = Counter()  # by the client's network

    def lead_to(self, target: str) -> bool:
        """Whether a WebSocket may be opened there: for all else the wish to is ignored."""
        return target.startswith(_PREFIX)

    async def open(self, request: Request, rest: Body, headers: Headers) -> Reply:
        """The api's reply; when that has status 101, its body and ``rest`` are the two directions from then on.

        Raises Overloaded when too many are open, UpstreamUnavailable when the api does not answer.
        """
        client = network_of(request.client)
        if self._open.total() >= MAX_TUNNELS or self._open[client] >= MAX_OF_CLIENT:
            raise Overloaded("too many WebSockets are open here, and no more are taken; try again later")
        self._open[client] += 1
        try:
            reader, writer = await unix_connection(self._path)
        except BaseException as err:
            self.forget(client)
            if not isinstance(err, OSError):
                raise
            raise UpstreamUnavailable(self._absence.explain()) from err
        tunnel = _Tunnel(self, client, reader, writer, rest)
        try:
            return await tunnel.ask(request, headers)
        except BaseException:
            await tunnel.aclose()
            raise

    def forget(self, client: str) -> None:
        """One from that network is closed."""
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]


class _Tunnel:
    """One connection to the api."""

    def __init__(
        self, owner: Tunnels, client: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rest: Body
    ) -> None:
        self._owner = owner
        self._client = client
        self._reader = reader
        self._writer = writer
        self._rest = rest
        self._sender: asyncio.Task[None] | None = None

    async def ask(self, request: Request, headers: Headers) -> Reply:
        """Hand the request on."""
        self._writer.write(_format_request(request, headers))
        try:
            async with asyncio.timeout(_ANSWER_S):
                head = await self._reader.readuntil(b"\r\n\r\n")
        except (OSError, EOFError, asyncio.LimitOverrunError) as err:
            raise UpstreamUnavailable("the API does not take this WebSocket; try again in a moment") from err
        status, answered = _parse_head(head)
        if status == 101:
            return Reply(101, answered, self)
        await self.aclose()
        return Reply(status, [("Content-Type", "text/plain")], b"no WebSocket is opened here\n", close=True)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._sender = asyncio.create_task(self._send())
        while piece := await self._reader.read(_READ_BYTES):
            yield piece

    async def _send(self) -> None:
        """Hand on what the client sends; when it ends, is cut off or sends nothing for long, so does the other side."""
        try:
            with suppress(OSError, TimeoutError):
                async for chunk in self._rest.chunks():
                    self._writer.write(chunk)
                    await self._writer.drain()
        finally:
            self._writer.close()

    async def aclose(self) -> None:
        """Close the connection to the api."""
        sender, self._sender = self._sender, None
        self._owner.forget(self._client)
        self._writer.close()
        if sender is not None:
            sender.cancel()
            await asyncio.wait([sender])


def _format_request(request: Request, headers: Headers) -> bytes:
    """The request's head; none of its parts has a line's end in it, as the parser of the port saw to it."""
    lines = [f"{request.method} {request.target} HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def _parse_head(head: bytes) -> tuple[int, Headers]:
    """Status and headers of our own api's answer."""
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return int(first.split(" ")[1]), [
        (name, value.strip()) for name, _, value in fields if name.lower() not in ("date", "content-length")
    ]
