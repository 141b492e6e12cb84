"""The way out of a box: an HTTP proxy that connects through the guard, and relays to what it may reach on loopback.

Nothing else leads out of a box's network. All of it listens inside the box, on sockets that were made there, and runs
here.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hmac import compare_digest
from re import compile as compile_pattern
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from builder.forward import Connection, Forward, variables
from builder.places import DEFAULT_PORTS, Place
from wave_proxy.errors import AddressRefused, Offline, UpstreamTimeout, WaveError, clip
from wave_proxy.upstream.bearer import basic_authorization
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import Egress

_MAX_CONNECTIONS = 256
_IDLE_S = 300.0
_HEAD_S = 30.0
_MAX_HEAD_BYTES = 64 << 10
_CHUNK_BYTES = 64 << 10
_PROXY_PORT = 3128
_OTHER_WAY_OUT = "where a proxy is the only way out of this network, the operator names it in [build] proxy"
_GREETING = (  # of a registry, which has clients send the login that they have
    b'HTTP/1.1 200 OK\r\nWWW-Authenticate: Basic realm="wave-proxy"\r\nDocker-Distribution-Api-Version: registry/2.0'
    b"\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
)
# What servers agree on (RFC 9112): one that also takes a line feed alone would find other requests in the text.
_FIRST_LINE = compile_pattern(r"([A-Za-z-]+) ([!-~\x80-\xff]+) HTTP/1\.[0-9]")
_FIELD_LINE = compile_pattern(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")
_NOT_PASSED_ON = ("connection:", "keep-alive:", "proxy-", "host:", "x-forwarded-", "x-real-ip:", "forwarded:")

Log = Callable[[bytes], None]
_Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _Refused(Exception):
    """An answer other than the connection that was asked for: a status line's end, and one line of text."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Head:
    """A request without its body: the lines of the head but the first, without what is not passed on."""

    method: str
    target: str
    lines: tuple[str, ...]

    def brings(self, login: Login) -> bool:
        """Whether the request has that login."""
        expected = f"authorization: {basic_authorization(login)}"
        return any(compare_digest(line.encode("latin-1"), expected.encode()) for line in self._authorizations())

    def _authorizations(self) -> Iterator[str]:
        for line in self.lines:
            name, colon, value = line.partition(":")
            if name.lower() == "authorization":
                yield f"authorization{colon} {value.strip()}"

    def encode(self, target: str, host: str) -> bytes:
        """The same request to ``target``, the only one on its connection."""
        lines = (f"{self.method} {target} HTTP/1.1", f"Host: {host}", *self.lines, "Connection: close", "", "")
        return "\r\n".join(lines).encode("latin-1")


@dataclass(frozen=True, slots=True)
class Writable:
    """A repository on wave-proxy that a build may push to.

    ``login`` is good for that at the gate alone: the tool that builds has it, and what its steps run has not.
    """

    repository: str
    login: Login


class Gate:
    """What builds may reach: public addresses, those of ``allow_private`` (``host:port``), and wave-proxy at ``url``.

    Of wave-proxy a build sees what it needs to pull images by token, and the repository that it may push to. The
    ``login`` for that stays here: with it, one could do more than push there. ``forward`` leads to all but those named.
    """

    def __init__(
        self,
        egress: Egress,
        url: str,
        allow_private: Iterable[str] = (),
        login: Login | None = None,
        forward: Forward | None = None,
    ) -> None:
        self._login = login
        self._egress = egress
        self._forward = forward
        parts = urlsplit(url)
        self._tls = parts.scheme == "https"
        self._proxy = Place.parse(parts.netloc, DEFAULT_PORTS[parts.scheme])
        self._authority = parts.netloc
        self._allowed = {Place.parse(text) for text in allow_private}
        self._relays = sorted({Place(place.loopback, place.port) for place in self._allowed if place.loopback}, key=str)
        taken = {place.port for place in self._relays}
        self._wave = Place("127.0.0.1", _free_port(self._proxy.port, taken))
        self._gate = Place("127.0.0.1", _free_port(_PROXY_PORT, {*taken, self._wave.port}))

    @property
    def registry(self) -> str:
        """``host:port`` of wave-proxy inside of a box."""
        return str(self._wave)

    @property
    def listen(self) -> list[tuple[str, int]]:
        """Where to listen in a box, in the order in which ``serve`` wants the sockets."""
        return [(place.host, place.port) for place in (self._gate, self._wave, *self._relays)]

    @property
    def environment(self) -> dict[str, str]:
        """What tells a build's programs of the proxy."""
        return variables(f"http://{self._gate}")

    @asynccontextmanager
    async def serve(
        self, sockets: Sequence[socket.socket], log: Log, writable: Writable | None = None, registry: str = ""
    ) -> AsyncIterator[None]:
        """Answer on these sockets until the block ends; all connections end with it.

        ``log`` gets a line for what is refused. Of configured registries the build reaches ``registry`` alone, whose
        table says whether it may be at a private address.
        """
        needed = Place.parse(registry, 443) if registry else None
        handlers: list[_Handler] = [partial(self._serve_proxy, log, needed), partial(self._serve_wave, writable)]
        handlers += [partial(self._serve_relay, place) for place in self._relays]
        crowd = _Crowd()
        servers = []
        try:
            for item, handler in zip(sockets, handlers, strict=True):
                accept = partial(crowd.take, handler)
                servers.append(await asyncio.start_server(accept, sock=item, limit=_MAX_HEAD_BYTES))
            yield
        finally:
            for server in servers:
                server.close()
            await crowd.disperse()

    async def _serve_proxy(
        self, log: Log, registry: Place | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await _read_head(reader)
        parts = None if head.method == "CONNECT" else _split_url(head.target)
        place = _place_of(parts.netloc, 80) if parts else _place_of(head.target, 443)
        forward = None if self._is_near(place, registry) else self._forward
        if forward is None:
            connecting = self._connect(place, strict=place != registry or place == self._proxy)
        else:
            connecting = (forward.connect if parts else forward.tunnel)(place)
        with _Closing(await self._connected(place, log, connecting)) as (upstream, sender):
            if parts:
                sender.write(_passed_on(head, parts, forward))
            else:
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await _tunnel(reader, writer, upstream, sender)

    def _is_near(self, place: Place, registry: Place | None) -> bool:
        """Whether a place is in our own network, so that no proxy leads there."""
        name = place.host if place.port == DEFAULT_PORTS["https"] else str(place)
        return place in self._allowed or (place == registry and self._egress.endpoint(name).allow_private)

    async def _connect(self, place: Place, *, strict: bool) -> Connection:
        return await self._egress.connect(place.host, place.port, allow_private=place in self._allowed, strict=strict)

    async def _connected(self, place: Place, log: Log, connecting: Awaitable[Connection]) -> Connection:
        """The connection to a place; when there is none, the log and the build are told why."""
        try:
            return await connecting
        except AddressRefused as err:
            text = f"refused by wave-proxy: {place} is at a private or loopback address; to let builds reach it, add "
            text += f'"{place}" to [build] allow_private'
            log(f"network: {text}\n".encode())
            raise _Refused("403 Forbidden", text) from err
        except WaveError as err:
            has_hint = self._forward is None and place not in self._allowed and not isinstance(err, Offline)
            text = f"{err}; {_OTHER_WAY_OUT}" if has_hint else str(err)
            log(f"network: {text}\n".encode())
            status = "504 Gateway Timeout" if isinstance(err, UpstreamTimeout) else "502 Bad Gateway"
            raise _Refused(status, text) from err

    async def _serve_wave(
        self, writable: Writable | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await _read_head(reader)
        path = head.target.partition("?")[0]
        is_pull = head.method in ("GET", "HEAD") and (path == "/v2/" or path.startswith("/v2/wt/"))
        if path == "/v2/" and is_pull and writable is not None:
            writer.write(_GREETING)
            return
        is_cache = writable is not None and path.startswith(f"/v2/{writable.repository}/")
        if writable is not None and is_cache and not head.brings(writable.login):
            raise _Refused("403 Forbidden", "refused by wave-proxy: only the build itself writes to its cache")
        if not (is_pull or is_cache) or "/.." in path or "%" in path:
            raise _Refused("403 Forbidden", f"refused by wave-proxy: a build may not {head.method} {clip(path)}")
        try:
            connection = await self._egress.connect(
                self._proxy.host, self._proxy.port, allow_private=True, tls=self._tls
            )
        except WaveError as err:
            raise _Refused("502 Bad Gateway", f"wave-proxy can't be reached by the builder: {err}") from err
        with _Closing(connection) as (upstream, sender):
            sender.write(self._authorised(head) if is_cache else head.encode(head.target, self._authority))
            await _tunnel(reader, writer, upstream, sender)

    def _authorised(self, head: _Head) -> bytes:
        """A request with our login, which must not bring a blob over from a repository that others don't read."""
        path, _, query = head.target.partition("?")
        asked = [one for one in parse_qsl(query, keep_blank_values=True) if one[0] not in ("mount", "from")]
        lines = [line for line in head.lines if not line.lower().startswith("authorization:")]
        if self._login is not None:
            lines.append(f"Authorization: {basic_authorization(self._login)}")
        target = f"{path}{'?' if asked else ''}{urlencode(asked)}"
        return replace(head, lines=tuple(lines)).encode(target, self._authority)

    async def _serve_relay(self, place: Place, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = await self._egress.connect(place.host, place.port, allow_private=True)
        with _Closing(connection) as (upstream, sender):
            await _tunnel(reader, writer, upstream, sender)


class _Crowd:
    """The connections of one box: so many at the same time, more wait."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, handler: _Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection in a task of its own."""
        task = asyncio.create_task(self._serve(handler, reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, handler: _Handler, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        broken = (OSError, TimeoutError, WaveError, EOFError, asyncio.LimitOverrunError)
        with suppress(*broken), _Closing((reader, writer)):
            async with self._room:
                try:
                    await handler(reader, writer)
                except _Refused as refused:
                    writer.write(_answer(refused))
                    async with asyncio.timeout(_HEAD_S):
                        await writer.drain()

    async def disperse(self) -> None:
        """End all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _free_port(wanted: int, taken: set[int]) -> int:
    while wanted in taken:
        wanted = wanted + 1 if wanted < 65535 else 1024
    return wanted


def _place_of(text: str, default_port: int) -> Place:
    try:
        return Place.parse(text, default_port)
    except ValueError as err:
        raise _Refused("400 Bad Request", str(err)) from None


def _answer(refused: _Refused) -> bytes:
    body = f"{refused}\n".encode()
    head = f"HTTP/1.1 {refused.status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    """Raises _Refused, TimeoutError, and what StreamReader.readuntil raises."""
    async with asyncio.timeout(_HEAD_S):
        begin = await reader.readexactly(1)
        if not begin.isalpha():  # clients try TLS first, and would wait for an answer in it
            raise _Refused("400 Bad Request", "this is a proxy for plain HTTP/1.1")
        text = begin + await reader.readuntil(b"\r\n\r\n")
    first, *lines = text.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    request = _FIRST_LINE.fullmatch(first)
    if request is None or not all(map(_FIELD_LINE.fullmatch, lines)):
        raise _Refused("400 Bad Request", "this is a proxy for HTTP/1.1")
    kept = tuple(line for line in lines if not line.lower().startswith(_NOT_PASSED_ON))
    return _Head(request[1], request[2], kept)


def _split_url(text: str) -> SplitResult:
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme != "http" or not parts.netloc:
        raise _Refused("400 Bad Request", f"{clip(text)} is not an address that begins with http://")
    return parts


def _passed_on(head: _Head, parts: SplitResult, forward: Forward | None) -> bytes:
    """A request as the server is to get it, or the proxy on the way there."""
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    if forward is None:
        return head.encode(path, parts.netloc)
    return replace(head, lines=(*head.lines, *forward.fields)).encode(f"http://{parts.netloc}{path}", parts.netloc)


class _Closing:
    """A connection that is closed with the block."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> Connection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection[1].close()


async def _tunnel(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    upstream: asyncio.StreamReader,
    sender: asyncio.StreamWriter,
) -> None:
    """Carry bytes both ways until the upstream has no more. Raises OSError, TimeoutError when none comes for long."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_IDLE_S) as idle:

        async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while chunk := await source.read(_CHUNK_BYTES):
                idle.reschedule(loop.time() + _IDLE_S)
                target.write(chunk)
                await target.drain()
            if target.can_write_eof():
                target.write_eof()

        up = asyncio.create_task(carry(reader, sender))
        try:
            await carry(upstream, writer)
        finally:
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)
