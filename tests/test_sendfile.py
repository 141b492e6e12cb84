"""Files into real sockets under uvloop: whole, growing, cut short; and nothing left behind whatever the reader does."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import uvloop

from bench.images import random_blob
from tests.growing import Growing, open_files
from tests.patience import eventually, patience
from wave_proxy.errors import UpstreamUnavailable
from wave_proxy.serve.messages import FileBody
from wave_proxy.serve.sendfile import SHARE_BYTES, send_file

P = ParamSpec("P")

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
MIB = 1 << 20
TIMEOUT_S = 33.0  # told apart from the test's own
SEND_BUFFER = 1 << 16  # small, so that a reader that stops is noticed after few bytes
LARGE = random_blob(20 * MIB + 7, seed=1)


class WatchedLoop(uvloop.Loop):
    """A loop that knows which writers and timers it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.writers: set[Any] = set()
        self.registrations = 0
        self.delays: list[float] = []
        self.timers: list[asyncio.TimerHandle] = []

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]  # looser
        self.registrations += 1
        self.writers.add(fd)
        super().add_writer(fd, callback, *args)

    def remove_writer(self, fd: Any) -> Any:
        self.writers.discard(fd)
        return super().remove_writer(fd)

    def call_later(  # type: ignore[override]  # looser
        self, delay: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = super().call_later(delay, callback, *args, context=context)
        self.delays.append(delay)
        if hasattr(timer, "when"):  # less than half a millisecond is no timer
            self.timers.append(timer)
        return timer

    def pending(self) -> list[asyncio.TimerHandle]:
        """Timers that will still ring."""
        return [timer for timer in self.timers if not timer.cancelled() and timer.when() > self.time()]


def under_watch(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Runs the test on a watched loop; afterwards no writer, timer, task or file may be left, and no error unheard."""

    @wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def watched() -> None:
            loop, heard = the_loop(), list[dict[str, Any]]()
            loop.set_exception_handler(lambda _, context: heard.append(context))
            files = open_files()
            await test(*args, **kwargs)
            assert loop.writers == set()
            assert loop.pending() == []
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert open_files() == files
            assert heard == []

        with asyncio.Runner(loop_factory=WatchedLoop) as runner:
            runner.run(watched())

    return run


def the_loop() -> WatchedLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, WatchedLoop)
    return loop


class Stuck(Growing):
    """A source that says there is more when there is not."""

    async def wait(self, offset: int) -> None:
        """Return, for no reason."""


@asynccontextmanager
async def connected(send_buffer: int = SEND_BUFFER) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """The server's and the client's end of a TCP connection; neither blocks."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SEND_BUFFER)
        client.connect(listener.getsockname())
        client.setblocking(False)
        served, _ = listener.accept()
        with served:
            served.setblocking(False)
            if send_buffer:
                served.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            yield served, client


@asynccontextmanager
async def file_of(path: Path, content: bytes, kind: type[Growing] = Growing) -> AsyncIterator[Growing]:
    source = kind(path / "file", content)
    try:
        yield source
    finally:
        source.close()


def sending(
    peer: socket.socket, source: Growing, start: int, end: int, timeout_s: float = TIMEOUT_S
) -> asyncio.Task[None]:
    body = FileBody(source, start, end)
    return asyncio.create_task(send_file(the_loop(), peer, HEAD, body, write_timeout_s=timeout_s))


async def receive(client: socket.socket, size: int, *, pause_s: float | None = None, at_once: int = MIB) -> bytes:
    """So many bytes, or fewer when the connection ends."""
    content = bytearray()
    async with patience():
        while len(content) < size:
            piece = await the_loop().sock_recv(client, min(size - len(content), at_once))
            if not piece:
                break
            content += piece
            if pause_s is not None:
                await asyncio.sleep(pause_s)
    return bytes(content)


# --- whole answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65536, SHARE_BYTES, SHARE_BYTES + 1, len(LARGE)])
@under_watch
async def test_file_arrives_byte_for_byte(tmp_path: Path, size: int) -> None:
    async with file_of(tmp_path, LARGE[:size]) as source, connected() as (served, client):
        task = sending(served, source, 0, size)
        assert await receive(client, len(HEAD) + size) == HEAD + LARGE[:size]
        await task
        assert source.waits == 0


@pytest.mark.parametrize(("start", "end"), [(0, 1), (5, 5), (MIB - 1, MIB + 1), (7, 3 * MIB), (3 * MIB, len(LARGE))])
@under_watch
async def test_range_arrives_byte_for_byte(tmp_path: Path, start: int, end: int) -> None:
    async with file_of(tmp_path, LARGE) as source, connected() as (served, client):
        task = sending(served, source, start, end)
        assert await receive(client, len(HEAD) + end - start) == HEAD + LARGE[start:end]
        await task
        served.shutdown(socket.SHUT_WR)
        assert await receive(client, 1) == b""


@under_watch
async def test_answer_that_fits_needs_neither_writer_nor_timer(tmp_path: Path) -> None:
    async with file_of(tmp_path, LARGE[:40_000]) as source, connected(send_buffer=0) as (served, client):
        for _ in range(3):
            await send_file(the_loop(), served, HEAD, FileBody(source, 0, 40_000), write_timeout_s=TIMEOUT_S)
            assert the_loop().registrations == 0
            assert TIMEOUT_S not in the_loop().delays
            assert await receive(client, len(HEAD) + 40_000) == HEAD + LARGE[:40_000]


@under_watch
async def test_the_same_connection_takes_answer_after_answer(tmp_path: Path) -> None:
    async with file_of(tmp_path, LARGE) as source, connected() as (served, client):
        for end in (2 * MIB, 1, 3 * MIB):
            task = sending(served, source, 0, end)
            assert await receive(client, len(HEAD) + end) == HEAD + LARGE[:end]
            await task


@under_watch
async def test_slow_reader_costs_one_writer_and_one_timer(tmp_path: Path) -> None:
    async with file_of(tmp_path, LARGE) as source, connected() as (served, client):
        loop, size = the_loop(), 4 * MIB
        task = sending(served, source, 0, size)
        assert await receive(client, len(HEAD) + size, pause_s=0, at_once=10_000) == HEAD + LARGE[:size]
        await task
        assert loop.registrations == 1
        assert loop.delays.count(TIMEOUT_S) == 1


@under_watch
async def test_nobody_is_handed_more_than_a_share_at_a_time(tmp_path: Path) -> None:
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with file_of(tmp_path, LARGE) as source, connected(send_buffer=0) as (served, client):
        client.setblocking(True)
        other = asyncio.create_task(take_turns())
        reader = asyncio.create_task(asyncio.to_thread(client.recv, len(HEAD) + len(LARGE), socket.MSG_WAITALL))
        await send_file(the_loop(), served, HEAD, FileBody(source, 0, len(LARGE)), write_timeout_s=TIMEOUT_S)
        other.cancel()
        assert await reader == HEAD + LARGE
        assert turns >= len(LARGE) // SHARE_BYTES
        await the_loop().shutdown_default_executor()
        await asyncio.wait([other])


# --- files that grow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1000, 300_000, 5 * MIB])
@pytest.mark.parametrize(("start", "end"), [(0, 6 * MIB), (2 * MIB + 5, 2 * MIB + 25), (MIB - 1, 3 * MIB)])
@under_watch
async def test_file_is_sent_while_it_grows(tmp_path: Path, start: int, end: int, step: int) -> None:
    content = LARGE[: 6 * MIB] if step > 1000 else LARGE[: end if end < 3 * MIB else 300_000]
    start, end = min(start, len(content) - 1), min(end, len(content))
    async with file_of(tmp_path, b"") as source, connected() as (served, client):
        task = sending(served, source, start, end)
        assert await receive(client, len(HEAD)) == HEAD  # not held back for bytes that are yet to come
        reading = asyncio.create_task(receive(client, end - start))
        for offset in range(0, len(content), step):
            source.grow(content[offset : offset + step])
            await asyncio.sleep(0)
        assert await reading == content[start:end]
        await task
        assert source.waits > 0


@pytest.mark.parametrize("sent", [0, 1000, 3 * MIB])
@under_watch
async def test_source_that_fails_ends_the_answer(tmp_path: Path, sent: int) -> None:
    async with file_of(tmp_path, LARGE[:sent]) as source, connected() as (served, client):
        task = sending(served, source, 0, len(LARGE))
        assert await receive(client, len(HEAD) + sent) == HEAD + LARGE[:sent]
        source.fail(UpstreamUnavailable("gone"))
        with pytest.raises(UpstreamUnavailable, match="gone"):
            await task


@under_watch
async def test_waiting_for_the_source_is_not_the_clients_time(tmp_path: Path) -> None:
    async with file_of(tmp_path, LARGE[:MIB]) as source, connected() as (served, client):
        task = sending(served, source, 0, 2 * MIB, timeout_s=0.5)
        assert await receive(client, len(HEAD) + MIB) == HEAD + LARGE[:MIB]
        await asyncio.sleep(1.2)
        assert not task.done()
        source.grow(LARGE[MIB : 2 * MIB])
        assert await receive(client, MIB) == LARGE[MIB : 2 * MIB]
        await task


# --- what goes wrong -----------------------------------------------------------------------------------------------


@under_watch
async def test_reader_that_stops_is_cut_off(tmp_path: Path) -> None:
    async with file_of(tmp_path, LARGE) as source, connected() as (served, client):
        task = sending(served, source, 0, len(LARGE), timeout_s=0.5)
        await receive(client, MIB)
        began = the_loop().time()
        with pytest.raises(TimeoutError, match=r"took nothing for 0\.5 s"):
            await task
        assert the_loop().time() - began > 0.05


@under_watch
async def test_reader_that_never_quite_stops_is_not_cut_off(tmp_path: Path) -> None:
    async with file_of(tmp_path, LARGE) as source, connected() as (served, client):
        size, timeout_s = 4 * MIB, 0.6
        began = the_loop().time()
        task = sending(served, source, 0, size, timeout_s)
        assert await receive(client, len(HEAD) + size, pause_s=0.04, at_once=size // 40) == HEAD + LARGE[:size]
        await task
        assert the_loop().time() - began > 2 * timeout_s


@pytest.mark.parametrize("taken", [0, 1, MIB])
@under_watch
async def test_reader_that_hangs_up_ends_the_answer(tmp_path: Path, taken: int) -> None:
    async with file_of(tmp_path, LARGE) as source, connected() as (served, client):
        task = sending(served, source, 0, len(LARGE))
        await receive(client, taken)
        await asyncio.sleep(0)
        client.close()
        with pytest.raises(ConnectionError):
            await task


@pytest.mark.parametrize("waiting_for", ["room", "source", "nothing yet"])
@under_watch
async def test_cancelled_in_midway(tmp_path: Path, waiting_for: str) -> None:
    content = LARGE if waiting_for == "room" else LARGE[:1000]
    async with file_of(tmp_path, content) as source, connected() as (served, client):
        task = sending(served, source, 0, len(LARGE))
        if waiting_for == "room":
            await eventually(lambda: len(the_loop().writers) == 1)  # every buffer is full
        elif waiting_for == "source":
            assert await receive(client, len(HEAD) + 1000) == HEAD + content
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert the_loop().writers == set()
        served.getpeername()  # the server's own socket is none of ours to close


@pytest.mark.parametrize("there", [0, 1000, 3 * MIB])
@pytest.mark.parametrize("kind", [Growing, Stuck], ids=["promised", "not even promised"])
@under_watch
async def test_file_shorter_than_promised(tmp_path: Path, there: int, kind: type[Growing]) -> None:
    async with file_of(tmp_path, LARGE[:there], kind) as source, connected() as (served, client):
        if kind is Growing:
            source.written = 4 * MIB
        task = sending(served, source, 0, 4 * MIB)
        await receive(client, there)
        with pytest.raises(ConnectionAbortedError, match="shorter than its size"):
            await task
