"""The HTTP server on real sockets under uvloop: what clients may send, how slowly they may read, and what is left."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import uvloop

from bench.images import random_blob
from tests.growing import Growing, open_files
from tests.patience import eventually, patience
from wave_proxy.errors import UpstreamUnavailable, WaveError
from wave_proxy.serve import http
from wave_proxy.serve.http import Handler, Limits, Server
from wave_proxy.serve.messages import FileBody, Reply, Request
from wave_proxy.serve.ready import ReadyReplies

P = ParamSpec("P")

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
MIB = 1 << 20


# --- the stage ---------------------------------------------------------------------------------------------------


def under_uvloop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Runs the test there; an error that only the loop hears of fails it."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def watched() -> None:
            heard: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
            await test(*args, **kwargs)
            assert heard == []

        uvloop.run(watched())

    return run


@dataclass
class Place:
    """A server, and a client's way to it."""

    server: Server
    port: int
    trust: ssl.SSLContext | None = None

    async def connect(self, limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.trust, limit=limit)

    async def exchange(self, *parts: bytes) -> bytes:
        """All that comes back for these bytes until the server closes."""
        reader, writer = await self.connect()
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            async with patience():
                return await reader.read()
        finally:
            writer.close()

    async def is_empty(self) -> None:
        """Return when the server has no connection any more."""
        await eventually(lambda: not self.server.connections)


@asynccontextmanager
async def serving(
    handler: Handler,
    *,
    tls: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    send_buffer: int = 0,
    ready: ReadyReplies | None = None,
    **limits: Any,
) -> AsyncIterator[Place]:
    """A server on loopback; when the test is through, no task, connection or file may be left."""
    loop, files = asyncio.get_running_loop(), open_files()
    server = Server(handler, Limits(**limits), ready=ready)
    sock = socket.create_server(("127.0.0.1", 0))
    if send_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # connections inherit it
    listener = await loop.create_server(server, sock=sock, ssl=tls[0] if tls else None)
    place = Place(server, sock.getsockname()[1], tls[1] if tls else None)
    try:
        yield place
    finally:
        listener.close()
        await server.shut_down(grace_s=0)
        await listener.wait_closed()
    await place.is_empty()
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()} and open_files() <= files)


@dataclass
class Answer:
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes


async def read_answer(reader: asyncio.StreamReader, *, head_only: bool = False) -> Answer:
    """The next answer on a connection. Raises IncompleteReadError when it ends early."""
    async with patience():
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        body = b""
        if not head_only:
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await reader.readline(), 16):
                    body += (await reader.readexactly(size + 2))[:-2]
                assert await reader.readexactly(2) == b"\r\n"
            else:
                body = await reader.readexactly(int(headers["content-length"]))
        return Answer(int(lines[0].split()[1]), headers, body)


async def hello(request: Request) -> Reply:
    return Reply(200, [("X-Target", request.target)], f"{request.method} {request.target}".encode())


async def echo(request: Request) -> Reply:
    """What the request's body was, and its trailers if they got through; the error's status when it was none."""
    try:
        body = b"".join([chunk async for chunk in request.body.chunks()])
    except WaveError as err:
        return Reply(err.status, [], str(err).encode())
    return Reply(200, [("X-Names", ",".join(sorted(key.decode() for key, _ in request.headers)))], body)


def replying(reply: Callable[[], Reply]) -> Handler:
    async def handle(_: Request) -> Reply:
        return reply()

    return handle


@dataclass
class Pieces:
    """A stream that counts what was taken of it."""

    pieces: list[bytes]
    error: Exception | None = None
    taken: int = 0
    closed: int = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            self.taken += 1
            yield piece
        if self.error:
            raise self.error

    async def aclose(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of a server and of clients that trust it."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


# --- one connection, many requests -------------------------------------------------------------------------------


@under_uvloop
async def test_connection_is_kept() -> None:
    async with serving(hello) as place:
        reader, writer = await place.connect()
        for target in ("/a", "/b"):
            writer.write(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            answer = await read_answer(reader)
            assert (answer.status, answer.body) == (200, f"GET {target}".encode())
            assert "connection" not in answer.headers
        assert len(place.server.connections) == 1
        writer.close()


@pytest.mark.parametrize(
    ("request_line", "connection", "kept"),
    [
        ("GET / HTTP/1.1", "close", False),
        ("GET / HTTP/1.1", "keep-alive, close", False),
        ("GET / HTTP/1.0", "", False),
        ("GET / HTTP/1.0", "keep-alive", True),
    ],
)
@under_uvloop
async def test_connection_ends_as_asked(request_line: str, connection: str, kept: bool) -> None:
    async with serving(hello) as place:
        reader, writer = await place.connect()
        writer.write(f"{request_line}\r\nHost: a\r\nConnection: {connection}\r\n\r\n".encode() + GET)
        first = await read_answer(reader)
        assert first.headers["connection"] == ("keep-alive" if kept else "close")
        if kept:
            assert (await read_answer(reader)).status == 200
        else:
            assert await reader.read() == b""
        writer.close()


@under_uvloop
async def test_pipelined_requests_are_answered_in_order() -> None:
    count = 4 * http.MAX_WAITING

    async def slow_at_first(request: Request) -> Reply:
        if request.target == "/0":
            await asyncio.sleep(0.02)
        return await hello(request)

    async with serving(slow_at_first) as place:
        reader, writer = await place.connect()
        for number in range(count):
            writer.write(f"GET /{number} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            await writer.drain()
        answers = [(await read_answer(reader)).headers["x-target"] for _ in range(count)]
        writer.close()
    assert answers == [f"/{number}" for number in range(count)]


@pytest.mark.parametrize("extra", ["", "Connection: upgrade\r\nUpgrade: a\r\n"], ids=["plain", "upgrade"])
@under_uvloop
async def test_requests_that_came_at_once_do_not_all_wait_parsed(extra: str) -> None:
    go_on, count = asyncio.Event(), 5000

    async def held(request: Request) -> Reply:
        await go_on.wait()
        return await hello(request)

    async with serving(held) as place:
        reader, writer = await place.connect()
        writer.write(b"".join(f"GET /{number} HTTP/1.1\r\n{extra}\r\n".encode() for number in range(count)))
        await eventually(lambda: place.server.connections and next(iter(place.server.connections))._unparsed)
        assert len(next(iter(place.server.connections))._waiting) < 1000
        go_on.set()
        answers = [(await read_answer(reader)).headers["x-target"] for _ in range(count)]
        writer.close()
    assert answers == [f"/{number}" for number in range(count)]


@under_uvloop
async def test_pipelined_bodies_stay_apart() -> None:
    large = random_blob(MIB, seed=1)
    announced = POST + b"Content-Length: %d\r\n\r\n" % len(large) + large
    chunked = CHUNKED + b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    async with serving(echo) as place:
        reader, writer = await place.connect()
        writer.write(announced + chunked + announced + LAST)
        bodies = [(await read_answer(reader)).body for _ in range(4)]
        writer.close()
    assert bodies == [large, b"hello world", large, b""]


@under_uvloop
async def test_head_has_the_length_and_no_body() -> None:
    async with serving(hello) as place:
        reader, writer = await place.connect()
        writer.write(b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n" + LAST)
        head = await read_answer(reader, head_only=True)
        assert head.headers["content-length"] == str(len("HEAD /x"))
        assert (await read_answer(reader)).body == b"GET /last"
        writer.close()


@pytest.mark.parametrize("status", [204, 304])
@under_uvloop
async def test_bodiless_statuses_announce_no_body(status: int) -> None:
    async with serving(replying(lambda: Reply(status, [], Pieces([])))) as place:
        reader, writer = await place.connect()
        writer.write(GET + GET)
        for _ in range(2):
            head = await read_answer(reader, head_only=True)
            assert head.status == status
            assert not head.headers.keys() & {"content-length", "transfer-encoding", "connection"}
        writer.close()


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
)
@under_uvloop
async def test_upgrade_is_ignored_and_the_body_is_not(framing: bytes) -> None:
    upgrade = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n" + framing
    async with serving(echo) as place:
        for parts in ([upgrade + LAST], [upgrade[:-2], upgrade[-2:] + LAST]):
            answer = await place.exchange(*parts)
            assert answer.count(b"HTTP/1.1 200 OK") == 2
            assert b"\r\n\r\nabcHTTP/1.1" in answer


@under_uvloop
async def test_upgrade_without_a_body_is_ignored() -> None:
    websocket = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with serving(hello) as place:
        answer = await place.exchange(websocket + LAST)
    assert answer.index(b"GET /ws") < answer.index(b"GET /last")


@under_uvloop
async def test_client_that_is_done_sending_is_answered() -> None:
    async with serving(hello) as place:
        reader, writer = await place.connect()
        writer.write(GET + GET)
        writer.write_eof()
        assert (await reader.read()).count(b"HTTP/1.1 200 OK") == 2
        writer.close()
        await place.is_empty()


# --- bodies of answers -------------------------------------------------------------------------------------------


@under_uvloop
async def test_streams_of_unknown_length_are_chunked() -> None:
    streams: list[Pieces] = []

    async def handle(_: Request) -> Reply:
        streams.append(Pieces([b"one", b"", b"two" * 50_000]))
        return Reply(200, [], streams[-1])

    async with serving(handle) as place:
        reader, writer = await place.connect()
        writer.write(GET + GET)
        for _ in range(2):
            answer = await read_answer(reader)
            assert answer.body == b"one" + b"two" * 50_000
            assert "content-length" not in answer.headers
        old = await place.exchange(b"GET / HTTP/1.0\r\n\r\n")
        assert b"chunked" not in old
        assert old.endswith(b"\r\n\r\none" + b"two" * 50_000)
        writer.close()
    assert [stream.closed for stream in streams] == [1, 1, 1]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("size", [0, 1, http.SMALL_BYTES, http.SMALL_BYTES + 1, 5 * MIB + 7])
@under_uvloop
async def test_files_arrive_byte_for_byte(
    tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext], size: int, secure: bool
) -> None:
    content = random_blob(size, seed=2)
    source: list[Growing] = []

    async def handle(_: Request) -> Reply:
        source.append(Growing(tmp_path / f"{len(source)}", content))
        return Reply(200, [], FileBody(source[-1], 0, size))

    async with serving(handle, tls=tls if secure else None) as place:
        reader, writer = await place.connect()
        writer.write(GET + GET)
        for _ in range(2):
            assert (await read_answer(reader)).body == content
        writer.close()
    assert [one.closed for one in source] == [1, 1]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize(("start", "end"), [(0, 3 * MIB), (MIB + 5, MIB + 25), (MIB - 1, 3 * MIB)])
@under_uvloop
async def test_files_are_sent_while_they_grow(
    tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext], start: int, end: int, secure: bool
) -> None:
    content = random_blob(3 * MIB, seed=3)
    source = Growing(tmp_path / "growing")
    async with serving(
        replying(lambda: Reply(200, [], FileBody(source, start, end))), tls=tls if secure else None
    ) as place:
        reader, writer = await place.connect()
        writer.write(GET)
        for offset in range(0, len(content), 300_000):
            await asyncio.sleep(0.001)
            source.grow(content[offset : offset + 300_000])
        assert (await read_answer(reader)).body == content[start:end]
        writer.close()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("sent", [0, 1000, 2 * MIB])
@under_uvloop
async def test_file_that_fails_midway_is_cut(
    tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext], sent: int, secure: bool
) -> None:
    source = Growing(tmp_path / "part", random_blob(sent, seed=4))
    async with serving(
        replying(lambda: Reply(200, [], FileBody(source, 0, 3 * MIB))), tls=tls if secure else None
    ) as place:
        reader, writer = await place.connect()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(sent)
        source.fail(UpstreamUnavailable("gone"))
        assert await read_to_end(reader) == b""
        writer.close()
    assert source.closed == 1


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """What still comes, however the connection ends."""
    content = b""
    try:
        async with patience():
            while piece := await reader.read(MIB):
                content += piece
    except ConnectionError:
        pass
    return content


@under_uvloop
async def test_file_that_shrank_is_cut(tmp_path: Path) -> None:
    for size in (1000, 3 * MIB):
        source = Growing(tmp_path / f"{size}", bytes(size // 2))
        source.written = size
        async with serving(replying(lambda s=source, n=size: Reply(200, [], FileBody(s, 0, n)))) as place:  # type: ignore[misc]
            reader, writer = await place.connect()
            writer.write(GET)
            assert len((await read_to_end(reader)).partition(b"\r\n\r\n")[2]) < size
            writer.close()


@pytest.mark.parametrize("error", [UpstreamUnavailable("gone"), ValueError("our bug")], ids=["upstream", "bug"])
@under_uvloop
async def test_stream_that_fails_midway_is_cut(error: Exception) -> None:
    stream = Pieces([b"one", b"two"], error)
    async with serving(replying(lambda: Reply(200, [], stream))) as place:
        reader, writer = await place.connect()
        writer.write(GET)
        content = await read_to_end(reader)
        writer.close()
    assert not content.endswith(b"0\r\n\r\n")
    assert stream.closed == 1


@pytest.mark.parametrize("value", ["a\r\nX-Injected: b", "a\nb", "a\rb"])
@under_uvloop
async def test_header_that_ends_its_line_is_never_sent(value: str) -> None:
    async with serving(replying(lambda: Reply(200, [("X-Name", value)], b"x"))) as place:
        reader, writer = await place.connect()
        writer.write(GET)
        assert await read_to_end(reader) == b""
        writer.close()


# --- what comes in -----------------------------------------------------------------------------------------------


@under_uvloop
async def test_expect_continue() -> None:
    async with serving(echo) as place:
        reader, writer = await place.connect()
        writer.write(POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello" + LAST)
        assert (await read_answer(reader)).body == b"hello"
        assert (await read_answer(reader)).status == 200
        writer.close()


@under_uvloop
async def test_expect_continue_is_not_answered_by_who_does_not_read() -> None:
    async with serving(hello) as place:
        answer = await place.exchange(POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"Connection: close" in answer


@under_uvloop
async def test_expect_continue_of_too_much_is_refused_at_once() -> None:
    async with serving(echo, max_body_bytes=4) as place:
        answer = await place.exchange(POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("pieces", [1, 100], ids=["at once", "in pieces"])
@under_uvloop
async def test_large_head_is_refused(pieces: int) -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-Filler: %b\r\n" % (b"y" * 100) * 200
    step = len(head) // pieces + 1
    async with serving(hello, max_header_bytes=8192) as place:
        answer = await place.exchange(*(head[at : at + step] for at in range(0, len(head), step)))
    assert answer.startswith(b"HTTP/1.1 431")
    assert b"over 8192 bytes" in answer


@under_uvloop
async def test_head_of_a_megabyte_and_ten_thousand_headers_are_refused() -> None:
    async with serving(hello) as place:
        for filler in (b"X: %b\r\n" % bytes(b"y" * MIB), b"".join(b"X-%d: y\r\n" % n for n in range(10_000))):
            answer = await place.exchange(b"GET / HTTP/1.1\r\nHost: a\r\n" + filler + b"\r\n")
            assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
            assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("framing", ["announced", "chunked"])
@under_uvloop
async def test_client_with_too_large_a_body_can_read_why(framing: str) -> None:
    body = bytes(8 * MIB)
    async with serving(echo, max_body_bytes=100_000) as place:
        if framing == "announced":
            answer = await place.exchange(POST + b"Content-Length: %d\r\n\r\n" % len(body), body)
        else:
            answer = await place.exchange(CHUNKED, b"%x\r\n" % len(body), body, b"\r\n0\r\n\r\n")
        await place.is_empty()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"over the limit of 100000 bytes" in answer
    assert b"Connection: close" in answer


@under_uvloop
async def test_body_at_the_limit_is_taken() -> None:
    async with serving(echo, max_body_bytes=5) as place:
        answer = await place.exchange(POST + b"Content-Length: 5\r\n\r\nhello" + LAST)
    assert answer.count(b"HTTP/1.1 200 OK") == 2


@under_uvloop
async def test_body_that_nobody_reads_is_not_taken_for_a_request() -> None:
    body = b"GET /inner HTTP/1.1\r\nHost: a\r\n\r\n" * 20_000
    async with serving(hello) as place:
        answer = await place.exchange(POST + b"Content-Length: %d\r\n\r\n" % len(body), body)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"/inner" not in answer


@under_uvloop
async def test_body_is_not_read_ahead_of_the_handler() -> None:
    requests: list[Request] = []
    go_on = asyncio.Event()

    async def patient(request: Request) -> Reply:
        requests.append(request)
        await go_on.wait()
        return await echo(request)

    body = random_blob(8 * MIB, seed=5)
    async with serving(patient) as place:
        reader, writer = await place.connect()
        writer.write(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        held = await settled(lambda: requests[0].body.received if requests else -1)
        assert 0 <= held < MIB
        go_on.set()
        assert (await read_answer(reader)).body == body
        writer.close()


async def settled(value: Callable[[], int]) -> int:
    """The value once it has stopped changing for some rounds."""
    last, same = value(), 0
    while same < 20 or last < 0:
        await asyncio.sleep(0.005)
        last, same = value(), same + 1 if value() == last else 0
    return last


@under_uvloop
async def test_request_that_ends_early_wakes_its_handler() -> None:
    ended: list[type[BaseException]] = []

    async def handle(request: Request) -> Reply:
        try:
            return await echo(request)
        except BaseException as err:
            ended.append(type(err))
            raise

    async with serving(handle, idle_timeout_s=3600) as place:
        reader, writer = await place.connect()
        writer.write(POST + b"Content-Length: 5\r\n\r\nhe")
        writer.write_eof()
        assert await read_to_end(reader) == b""
        writer.close()
    assert ended == [ConnectionResetError]


SMUGGLED = b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
MALFORMED = {
    "CL+TE": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
    "TE+CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + SMUGGLED,
    "two CL": POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n" + SMUGGLED,
    "two equal CL": POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\n" + SMUGGLED,
    "list CL": POST + b"Content-Length: 4, 4\r\n\r\n" + SMUGGLED,
    "signed CL": POST + b"Content-Length: +4\r\n\r\n" + SMUGGLED,
    "negative CL": POST + b"Content-Length: -4\r\n\r\n" + SMUGGLED,
    "huge CL": POST + b"Content-Length: 99999999999999999999\r\n\r\n" + SMUGGLED,
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + SMUGGLED,
    "chunked, identity": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + SMUGGLED,
    "TE twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + SMUGGLED,
    "TE after vertical tab": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n" + SMUGGLED,
    "space before colon": POST + b"Transfer-Encoding : chunked\r\n\r\n" + SMUGGLED,
    "LF in chunk extension": CHUNKED + b"1;a\nb\r\nx\r\n" + SMUGGLED,
    "CR in chunk extension": CHUNKED + b"1;a\rb\r\nx\r\n" + SMUGGLED,
    "LF after chunk size": CHUNKED + b"1\nx\r\n" + SMUGGLED,
    "0x chunk size": CHUNKED + b"0x1\r\nx\r\n" + SMUGGLED,
    "huge chunk size": CHUNKED + b"fffffffffffffffff\r\nx\r\n" + SMUGGLED,
    "chunk longer than said": CHUNKED + b"1\r\nxx\r\n" + SMUGGLED,
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare LF in a header": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "bare CR in a header": b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
    "space before the first header": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "header without colon": b"GET / HTTP/1.1\r\nHost\r\n\r\n",
    "header without name": b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n",
    "NUL in the target": b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "overlong UTF-8 in the target": b"GET /\xc0\xae HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "lower-case method": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "unknown version": b"GET / HTTP/3.7\r\nHost: a\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "garbage": b"\x00\x01garbage",
    "TLS ClientHello": bytes.fromhex("16030100c8010000c40303") + bytes(200),
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED.keys())
@under_uvloop
async def test_malformed_requests_end_the_connection(request_bytes: bytes) -> None:
    # The limits are long: whatever is malformed is said to be so at once.
    async with serving(echo, header_timeout_s=3600, idle_timeout_s=3600) as place:
        answer = await place.exchange(request_bytes)
        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"Connection: close" in answer
        await place.is_empty()


@under_uvloop
async def test_malformed_chunk_wakes_the_handler_that_reads() -> None:
    async with serving(echo, idle_timeout_s=3600) as place:
        reader, writer = await place.connect()
        writer.write(CHUNKED + b"5\r\nhello\r\n")
        await asyncio.sleep(0.01)
        writer.write(b"nonsense\r\n" + GET)
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1 ") == 1


@under_uvloop
async def test_garbage_behind_a_request_does_not_harm_its_answer(tmp_path: Path) -> None:
    source = Growing(tmp_path / "growing")
    async with serving(
        replying(lambda: Reply(200, [], FileBody(source, 0, 10))), header_timeout_s=0.5, idle_timeout_s=0.5
    ) as place:
        reader, writer = await place.connect()
        writer.write(GET + b"\x00garbage")
        await asyncio.sleep(1.2)  # longer than every limit
        source.grow(b"0123456789")
        assert (await read_answer(reader)).body == b"0123456789"
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()


@under_uvloop
async def test_trailers_are_no_headers() -> None:
    async with serving(echo) as place:
        reader, writer = await place.connect()
        writer.write(CHUNKED + b"1\r\nx\r\n0\r\nAuthorization: Basic eDp5\r\n\r\n")
        answer = await read_answer(reader)
        writer.close()
    assert (answer.body, answer.headers["x-names"]) == (b"x", "host,transfer-encoding")


# --- time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@under_uvloop
async def test_head_must_arrive_in_time(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "LINGER_S", 0.05)
    async with serving(hello, tls=tls if secure else None, header_timeout_s=0.1) as place:
        reader, writer = await place.connect()
        dripping = asyncio.create_task(drip(writer, b"GET / HTTP/1.1\r\nX: " + b"y" * 1000))
        assert (await read_to_end(reader)).startswith(b"HTTP/1.1 408")
        await place.is_empty()  # though this client neither stops nor closes
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
        writer.close()


async def drip(writer: asyncio.StreamWriter, content: bytes) -> None:
    for byte in content:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.01)


@under_uvloop
async def test_silent_connections_are_closed() -> None:
    async with serving(hello, header_timeout_s=0.5, idle_timeout_s=0.1) as place:
        reader, writer = await place.connect()
        assert await reader.read() == b""
        writer.close()
        reader, writer = await place.connect()
        writer.write(GET)
        assert (await read_answer(reader)).status == 200
        assert await reader.read() == b""
        writer.close()


@under_uvloop
async def test_slow_handler_is_not_an_idle_connection() -> None:
    async def slow(request: Request) -> Reply:
        await asyncio.sleep(0.8)
        return await hello(request)

    async with serving(slow, header_timeout_s=0.3, idle_timeout_s=0.3) as place:
        reader, writer = await place.connect()
        writer.write(GET)
        assert (await read_answer(reader)).status == 200
        writer.close()


@under_uvloop
async def test_body_that_stalls_ends_the_request() -> None:
    async with serving(echo, idle_timeout_s=0.05) as place:
        reader, writer = await place.connect()
        writer.write(POST + b"Content-Length: 5\r\n\r\nhe")
        assert await read_to_end(reader) == b""
        writer.close()


def reluctant() -> tuple[socket.socket, Callable[[int], Awaitable[None]]]:
    """A client's socket with a small buffer, and how to connect it and ask."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)

    async def ask(port: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, GET)

    return sock, ask


@under_uvloop
async def test_slow_reader_holds_back_the_stream() -> None:
    piece = random_blob(1 << 16, seed=6)
    stream = Pieces([piece] * 200)
    async with serving(replying(lambda: Reply(200, [], stream)), send_buffer=1 << 16) as place:
        sock, ask = reluctant()
        with sock:
            await ask(place.port)
            assert await settled(lambda: stream.taken or -1) < 20
            received = bytearray()
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received += await asyncio.get_running_loop().sock_recv(sock, MIB)
            assert stream.taken == 200
        await place.is_empty()
    assert received.count(piece) == 200


@pytest.mark.parametrize("kind", ["bytes", "bytes and close", "stream", "small file", "file"])
@under_uvloop
async def test_client_that_takes_nothing_is_cut_off(tmp_path: Path, kind: str) -> None:
    large = bytes(4 * MIB)
    source = Growing(tmp_path / "file", large)
    replies = {
        "bytes": lambda: Reply(200, [], large),
        "bytes and close": lambda: Reply(200, [], large, close=True),
        "stream": lambda: Reply(200, [], Pieces([large] * 3)),
        "small file": lambda: Reply(200, [], FileBody(source, 0, http.SMALL_BYTES)),
        "file": lambda: Reply(200, [], FileBody(source, 0, len(large))),
    }
    async with serving(
        replying(replies[kind]), send_buffer=4096, write_timeout_s=0.05, idle_timeout_s=0.05, header_timeout_s=0.5
    ) as place:
        sock, ask = reluctant()
        with sock:
            await ask(place.port)
            await place.is_empty()
    if "file" in kind:
        assert source.closed == 1
    else:
        source.close()


# --- clients that go, servers that end ----------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("kind", ["stream", "file", "growing file", "waiting handler"])
@under_uvloop
async def test_client_that_goes_leaves_nothing(
    tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext], kind: str, secure: bool
) -> None:
    sources: list[Growing | Pieces] = []

    async def handle(_: Request) -> Reply:
        if kind == "waiting handler":
            await asyncio.Event().wait()
        if kind == "stream":
            stream = Pieces([bytes(MIB)] * 100)
            sources.append(stream)
            return Reply(200, [], stream)
        source = Growing(tmp_path / "file", bytes(20 * MIB))
        sources.append(source)
        return Reply(200, [], FileBody(source, 0, (20 if kind == "file" else 21) * MIB))

    async with serving(handle, tls=tls if secure else None) as place:
        reader, writer = await place.connect()
        writer.write(GET)
        if kind == "waiting handler":
            await eventually(lambda: any(connection.task for connection in place.server.connections))
        else:
            await reader.readexactly(21 * MIB // 2 if kind != "growing file" else 20 * MIB)
        writer.transport.abort()
        if kind in ("growing file", "waiting handler") and not secure:
            # A closed connection looks like one whose client is done sending; it shows when something is sent.
            place.server.connections.copy().pop().abort()
        await place.is_empty()
    assert [source.closed for source in sources] == ([] if kind == "waiting handler" else [1])


@under_uvloop
async def test_shutdown_lets_answers_end() -> None:
    go_on = asyncio.Event()

    class Waiting(Pieces):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"one"
            await go_on.wait()
            yield b"two"

    async def handle(request: Request) -> Reply:
        return await hello(request) if request.target == "/last" else Reply(200, [], Waiting([]))

    async with serving(handle) as place:
        idle, idle_writer = await place.connect()
        idle_writer.write(b"GET /last HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await read_answer(idle)).status == 200
        busy, busy_writer = await place.connect()
        busy_writer.write(GET)
        await busy.readuntil(b"one\r\n")
        ending = asyncio.create_task(place.server.shut_down(grace_s=3600))
        assert await idle.read() == b""
        go_on.set()
        assert await busy.read() == b"3\r\ntwo\r\n0\r\n\r\n"
        async with patience():
            await ending
        idle_writer.close()
        busy_writer.close()


@under_uvloop
async def test_shutdown_cuts_what_outlasts_the_grace() -> None:
    cancelled = asyncio.Event()

    async def handle(_: Request) -> Reply:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    async with serving(handle) as place:
        reader, writer = await place.connect()
        writer.write(GET)
        await eventually(lambda: any(connection.task for connection in place.server.connections))
        await place.server.shut_down(grace_s=0.01)
        assert cancelled.is_set()
        assert await read_to_end(reader) == b""
        writer.close()
