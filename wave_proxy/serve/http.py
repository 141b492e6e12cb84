"""HTTP/1.1 on ``asyncio.Protocol``: parsing, the order of answers, backpressure and time limits.

Knows nothing of registries: a handler turns each Request into a Reply. One connection answers its requests one after
the other, in order; while one is answered, a few more may wait parsed, and after that the socket is not read.
"""

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from re import IGNORECASE
from re import compile as compile_pattern
from typing import cast

import httptools
import structlog

from wave_proxy.errors import BodyTooLarge, RequestInvalid, WaveError
from wave_proxy.serve.messages import Body, FileBody, Reply, Request, Stream, format_head
from wave_proxy.serve.origin import ClientAddress
from wave_proxy.serve.ready import ReadyReplies, Wire
from wave_proxy.serve.sendfile import send_file

_log = structlog.get_logger()

READ_BYTES = 1 << 16  # one read where sendfile can't be used (TLS)
SMALL_BYTES = 1 << 15  # bodies up to this go out in one write with their head
_SWEEP_S = 1.0  # so much later than its time a connection may be closed
PARSE_BYTES = 1 << 14  # at once; some hundred requests fit in, and take twenty times as much memory when they wait
MAX_WAITING = 16  # parsed requests that wait behind the one being answered
TUNNEL_IDLE_S = 300.0  # a client that has gone on with something else than HTTP sends at least its heartbeats
LINGER_S = 5.0  # a client that is still sending when it was answered may do so for this long, unread

_BODILESS = frozenset({204, 304})
_ABSOLUTE = compile_pattern(r"https?://[^/?#]*", IGNORECASE)
_NO_LIMIT = 1 << 62


Handler = Callable[[Request], Awaitable[Reply]]
BodyLimit = Callable[[str, str], int]
"""The most bytes of a request's body, by method and target."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, sizes in bytes."""

    header_timeout_s: float = 15.0
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 120.0
    max_header_bytes: int = 65536
    max_body_bytes: int = 64_000_000


class Server:
    """All connections of one worker, and how they end."""

    def __init__(
        self,
        handler: Handler,
        limits: Limits,
        addresses: ClientAddress | None = None,
        ready: ReadyReplies | None = None,
        body_limit: BodyLimit | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Without ``body_limit``, that of ``limits`` is for every request.

        ``headers`` go with the answers to what is no request, which no handler sees.
        """
        self.headers = list((headers or {}).items())
        self.body_limit = body_limit or (lambda method, target: limits.max_body_bytes)
        self.handler = handler
        self.limits = limits
        self.addresses = addresses or ClientAddress(())
        self.ready = ready
        self.connections: set[Connection] = set()
        self.closing = False
        self._empty = asyncio.Event()
        self._sweep_s = min(limits.header_timeout_s / 2, _SWEEP_S)
        self._sweeper: asyncio.TimerHandle | None = None

    def __call__(self) -> "Connection":
        """A protocol for a new connection: the factory that ``create_server`` wants."""
        return Connection(self)

    def add(self, connection: "Connection") -> None:
        """A connection is there. One timer looks after all of them: one each would cost more than some answers do."""
        self.connections.add(connection)
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(self._sweep_s, self._sweep)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.connections):
            connection.close_if_due(now)
        self._sweeper = loop.call_later(self._sweep_s, self._sweep) if self.connections else None

    def forget(self, connection: "Connection") -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        if self.closing and not self.connections:
            self._empty.set()

    async def shut_down(self, grace_s: float) -> None:
        """Close idle connections, give the others ``grace_s`` seconds, then cut them off."""
        self.closing = True
        for connection in list(self.connections):
            connection.close_if_idle()
        if self.connections:
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        tasks = [connection.task for connection in self.connections if connection.task]
        for connection in list(self.connections):
            connection.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._limits = server.limits
        self._large_head = f"the request's head is over {server.limits.max_header_bytes} bytes"
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made
        self._secure = False
        self._peer = ""
        self._is_peer_the_client = True
        self._ready = server.ready
        self._parser: httptools.HttpRequestParser = None  # type: ignore[assignment]  # made by what it has to parse
        self._begun = 0  # requests, in the data that is being parsed
        self._answered: Wire | None = None  # the last of them
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._body: Body | None = None
        self._rest: Body | None = None  # of a client that no longer speaks HTTP, what it sends
        self._framing = b""
        self._reframing = False
        self._unparsed = b""  # what had arrived when reading was paused
        self._waiting: deque[Request] = deque()
        self.task: asyncio.Task[None] | None = None
        self._deadline = 0.0
        self._read_paused = False
        self._client_done = False
        self._endless = False  # what is being sent, as far as one can tell
        self._lingering = False
        self._drained: asyncio.Future[None] | None = None

    # --- transport ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._secure = transport.get_extra_info("sslcontext") is not None
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else ""
        self._is_peer_the_client = not self._server.addresses.is_trusted(self._peer)
        self._server.add(self)
        self._set_deadline(self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.forget(self)
        if self._body is not None:
            self._body.fail(ConnectionResetError("the client closed the connection"))
        self.resume_writing()
        if self.task is not None:
            self.task.cancel()

    def eof_received(self) -> bool:
        self._client_done = True
        if self._body is not None:
            self._body.fail(ConnectionResetError("the client ended its request early"))
        # Keep the sending side open for the answers still due, but not for one whose end may be hours away: a client
        # that is gone looks the same as one that has only ended its sending.
        return self.task is not None and not self._secure and not self._endless

    def pause_writing(self) -> None:
        if self._drained is None:
            self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def pause_reading(self) -> None:
        if not self._read_paused:
            self._read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._read_paused and not self._transport.is_closing():
            self._read_paused = False
            unparsed, self._unparsed = self._unparsed, b""
            if unparsed:
                self._parse(unparsed)
            if not self._read_paused:
                self._transport.resume_reading()

    def write(self, content: bytes) -> None:
        self._transport.write(content)

    def abort(self) -> None:
        self._transport.abort()

    def close_if_idle(self) -> None:
        """Close now when no answer is due, or one without an end; else it closes after the answer that is."""
        if self.task is None or self._rest is not None:
            self._transport.close()

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds

    def close_if_due(self, now: float) -> None:
        """Close when the client has not done in time what it has to do next; while it is answered, that is nothing."""
        if self.task is not None or now < self._deadline:
            return
        if self._head_bytes and not self._lingering:
            self._refuse(408, "the request's head did not arrive in time")
        elif self._transport.is_closing() or self._transport.get_write_buffer_size():
            self._transport.abort()  # it does not take what it asked for
        else:
            self._transport.close()

    # --- parsing -----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        if self._head_bytes or self.task is not None or self._ready is None or not self._is_peer_the_client:
            self._parse(data)
            return
        wire = self._ready.answer_bytes(data, self._peer) if self._may_answer_now() else None
        if wire is not None:
            self._write_ready(wire)
            return
        self._parse(data)
        if self._answered is not None and self._begun == 1 and not self._head_bytes and not self._lingering:
            self._ready.remember(data, self._answered)

    def _may_answer_now(self) -> bool:
        """Whether nothing is due before, and the client takes what it is sent."""
        return (
            self.task is None
            and self._drained is None
            and not self._server.closing
            and not self._transport.is_closing()
        )

    def _write_ready(self, wire: Wire) -> None:
        self._transport.write(wire.content)
        self._set_deadline(self._limits.idle_timeout_s)
        if wire.close:
            self._transport.close()

    def _parse(self, data: bytes) -> None:
        if self._rest is not None:
            self._rest.feed(data)
            return
        if not self._head_bytes and self.task is None:
            self._set_deadline(self._limits.header_timeout_s)
        self._begun, self._answered = 0, None
        for at in range(0, len(data), PARSE_BYTES):
            if self._lingering:
                break
            if self._read_paused:
                self._unparsed += data[at:]
                break
            self._feed(data[at : at + PARSE_BYTES])

    def _feed(self, data: bytes) -> None:
        while data:
            self._head_bytes += len(data)
            if not self._parser:
                self._parser = httptools.HttpRequestParser(self)
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                self._ignore_upgrade()
                data = data[upgrade.args[0] :]
                continue
            except httptools.HttpParserError as err:
                self._refuse(400, f"not a request in HTTP/1.1: {err}")
            else:
                if self._body is None and self._head_bytes > self._limits.max_header_bytes:
                    self._refuse(431, self._large_head)
            return

    def _ignore_upgrade(self) -> None:
        # To the parser it is an ordinary request (RFC 9110 §7.8): who answers it may do so with 101. The parser has
        # skipped its body, so that a fresh one reads that, behind a head which only says how it is framed.
        self._parser = httptools.HttpRequestParser(self)
        if self._body is not None:
            self._reframing = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % self._framing)
            self._reframing = False

    def _refuse(self, status: int, message: str) -> None:
        self._head_bytes = 0
        self._lingering = True
        if self._body is None:
            body = Body(self, 0, 0, False)
            self._enqueue(Request("GET", "", [], body, self._peer, False, False, malformed=f"{status} {message}"))
            return
        if self._waiting and self._waiting[-1].body is self._body:
            self._waiting[-1].malformed = f"{status} {message}"
        self._body.fail(RequestInvalid(message))

    def on_message_begin(self) -> None:
        self._begun += 1
        self._head_bytes = max(self._head_bytes, 1)  # it may begin behind another one, in the same data
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self._reframing:
            return
        expects = any(key == b"expect" and value.lower() == b"100-continue" for key, value in self._headers)
        method, target = self._parser.get_method().decode("ascii"), _origin_form(self._target.decode("latin-1"))
        most = self._limits.max_body_bytes if method == "GET" else self._server.body_limit(method, target)
        self._body = Body(self, most, self._limits.idle_timeout_s, expects)
        request = Request(
            method=method,
            target=target,
            headers=self._headers,
            body=self._body,
            client=self._server.addresses.find(self._peer, self._headers),
            keep_alive=self._parser.should_keep_alive(),
            http_1_0=self._parser.get_http_version() == "1.0",
        )
        limit = self._limits.max_header_bytes
        if self._head_bytes > limit and sum(len(key) + len(value) for key, value in self._headers) > limit:
            request.malformed = f"431 {self._large_head}"  # it came in one piece
        self._framing = b""
        for key, value in self._headers:
            if key == b"transfer-encoding" or (key == b"content-length" and int(value)):  # Java says 0 with a GET
                self._framing = b"%b: %b" % (key, value)
            if key == b"content-length" and int(value) > most:
                self._body.fail(BodyTooLarge(f"the request's body is over the limit of {most} bytes"))
        if not self._framing and not request.http_1_0 and self._wants_websocket():
            request.rest = Body(self, _NO_LIMIT, TUNNEL_IDLE_S, False)
        self._headers = []  # trailers, which nobody asked for, are none of the request's headers
        if self._ready is not None and not self._framing and not request.malformed and self._may_answer_now():
            self._answered = self._ready.answer(request)
            if self._answered is not None:
                self._write_ready(self._answered)
                return
        self._enqueue(request)

    def _wants_websocket(self) -> bool:
        return self._parser.should_upgrade() and any(
            key == b"upgrade" and value.lower() == b"websocket" for key, value in self._headers
        )

    def on_body(self, chunk: bytes) -> None:
        if self._body is not None:
            self._body.feed(chunk)

    def on_message_complete(self) -> None:
        if self._framing and self._parser.should_upgrade():
            return  # its body is yet to come, see _ignore_upgrade
        if self._body is not None:
            self._body.end()
        self._body = None
        self._head_bytes = 0

    def _enqueue(self, request: Request) -> None:
        self._waiting.append(request)
        if self.task is None:
            self.task = self._loop.create_task(self._answer_all())
        elif len(self._waiting) >= MAX_WAITING:
            self.pause_reading()

    # --- answering ---------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        try:
            while self._waiting and not self._transport.is_closing():
                request = self._waiting.popleft()
                if not await self._answer(request):
                    break
                if len(self._waiting) < MAX_WAITING:
                    self.resume_reading()
        except (ConnectionError, TimeoutError):
            self._transport.abort()
        except WaveError as err:
            _log.warning("answer cut off", error=str(err))
            self._transport.abort()
        except asyncio.CancelledError:
            self._transport.abort()
            raise
        except Exception:
            _log.exception("answer failed")
            self._transport.abort()
        finally:
            self.task = None
        self._set_deadline(LINGER_S if self._lingering else self._limits.idle_timeout_s)
        if self._client_done or (self._server.closing and not self._lingering):
            self._transport.close()

    async def _answer(self, request: Request) -> bool:
        """Answer one request; whether the connection can go on with the next."""
        endings = self._ready.endings if self._ready is not None else 0
        if request.malformed:
            status, _, message = request.malformed.partition(" ")
            headers = [("Content-Type", "text/plain"), *self._server.headers]
            reply = Reply(int(status), headers, message.encode() + b"\n", close=True)
        else:
            reply = await self._server.handler(request)
        try:
            goes_on = await self._send(request, reply)
            if self._ready is not None and reply.terms is not None:
                self._ready.keep(request, reply, endings)
            return goes_on
        finally:
            if isinstance(reply.body, FileBody):
                reply.body.source.close()
            elif not isinstance(reply.body, bytes):
                await reply.body.aclose()

    async def _send(self, request: Request, reply: Reply) -> bool:
        if reply.status == 101 and request.rest is not None:
            await self._switch(request.rest, reply)
            return False
        bodiless = reply.status in _BODILESS
        length = None if bodiless else reply.content_length()
        self._endless = endless = length is None and not bodiless
        chunked = endless and not request.http_1_0
        unread = not request.body.complete and not request.malformed
        close = reply.close or not request.keep_alive or unread or self._server.closing or (endless and not chunked)
        head = format_head(reply, length, chunked=chunked, close=close, http_1_0=request.http_1_0)
        if request.method == "HEAD" or bodiless:
            self.write(head)
        else:
            await self._send_body(head, reply.body, chunked)
        self._endless = False
        if close:
            self._end(linger=unread or bool(request.malformed))
        elif self._drained is not None:
            await self._drain()
        return not close

    async def _switch(self, rest: Body, reply: Reply) -> None:
        """Let the client go on with something else: both sides are streams from here on, until one of them ends."""
        if self._head_bytes or self._waiting or self._lingering:
            raise ConnectionAbortedError("the client went on before it was allowed to")
        self._rest, self._endless = rest, True
        head = format_head(reply, None, chunked=False, close=False, http_1_0=False)
        await self._send_body(head, reply.body, chunked=False)
        self._transport.close()

    def _end(self, *, linger: bool) -> None:
        # Closing while the client still sends would make the kernel reset the connection, and the answer with it.
        if linger and not self._secure and not self._client_done and self._transport.can_write_eof():
            self._lingering = True
            self._waiting.clear()
            self.resume_reading()
            self._transport.write_eof()
        else:
            self._transport.close()

    async def _send_body(self, head: bytes, body: bytes | FileBody | Stream, chunked: bool) -> None:
        match body:
            case bytes():
                self.write(head + body)
            case FileBody():
                if self._secure or body.end - body.start <= SMALL_BYTES:
                    await self._send_read(head, body)
                else:
                    await self._send_file(head, body)
            case _:
                self.write(head)
                async for chunk in body:
                    if chunk:
                        self.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
                        await self._drain()
                if chunked:
                    self.write(b"0\r\n\r\n")

    async def _send_read(self, head: bytes, body: FileBody) -> None:
        offset = body.start
        while offset < body.end:
            chunk = b""
            if (ready := min(body.source.readable(), body.end) - offset) > 0:
                chunk = os.pread(body.source.fd, min(ready, READ_BYTES), offset)
                if not chunk:
                    raise ConnectionAbortedError("the blob's file is shorter than its size")
            self.write(head + chunk)
            head = b""
            offset += len(chunk)
            await self._drain()
            if offset < body.end and offset >= body.source.readable():
                await body.source.wait(offset)
        if head:
            self.write(head)

    async def _send_file(self, head: bytes, body: FileBody) -> None:
        await self._flush()
        if self._transport.is_closing():  # its descriptor may be another connection's by now
            raise ConnectionResetError("the client closed the connection")
        peer = self._transport.get_extra_info("socket")
        await send_file(self._loop, peer, head, body, write_timeout_s=self._limits.write_timeout_s)

    async def _flush(self) -> None:
        """Wait until everything that was written has left for the kernel."""
        if self._transport.get_write_buffer_size():
            self._transport.set_write_buffer_limits(high=0)
            while self._transport.get_write_buffer_size():
                await self._drain()
                await asyncio.sleep(0)
            self._transport.set_write_buffer_limits()

    async def _drain(self) -> None:
        if self._transport.is_closing():
            raise ConnectionResetError("the client closed the connection")
        if self._drained is not None:
            async with asyncio.timeout(self._limits.write_timeout_s):
                await asyncio.shield(self._drained)


def _origin_form(target: str) -> str:
    """A target without the scheme and host that clients may put before it. Source: RFC 9112 §3.2.2."""
    found = _ABSOLUTE.match(target)
    if found is None:
        return target
    path = target[found.end() :]
    return path if path.startswith("/") else f"/{path}"
