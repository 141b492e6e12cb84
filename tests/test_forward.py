"""The way to the api: answers that are streamed for as long as they take, and what is left when one side goes away."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.patience import eventually, patience
from tests.test_http import Answer, Place, read_answer, serving
from wave_proxy.errors import UpstreamUnavailable
from wave_proxy.serve.absence import Absence
from wave_proxy.serve.forward import Forwarder
from wave_proxy.serve.messages import Reply, Request
from wave_proxy.serve.ready import ReadyReplies
from wave_proxy.serve.stats import RequestStats
from wave_proxy.serve.tunnel import Tunnels
from wave_proxy.state.quota import Quotas
from wave_proxy.state.redis import connect
from wave_proxy.state.usage import Usage
from wave_proxy.upstream.egress import unix_session

STREAMED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


@dataclass
class Api:
    """The other end of the socket: answers ``/short`` at once; of others it keeps the connection for the test."""

    streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=asyncio.Queue)

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            while await reader.readline() != b"\r\n":
                pass
            if b"/short" not in line:
                writer.write(STREAMED)
                await self.streams.put((reader, writer))
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nshort")
        writer.close()


@asynccontextmanager
async def forwarding(folder: Path) -> AsyncIterator[tuple[Place, Api]]:
    """A port whose every request goes to an api."""
    path, api = f"{folder}/api.sock", Api()
    limits: dict[str, Any] = {"write_timeout_s": 0.05, "idle_timeout_s": 0.05}
    async with (
        serving(lambda request: forwarder.answer(request), **limits) as place,
        await asyncio.start_unix_server(api.converse, path),
    ):
        forwarder = Forwarder(unix_session(path), Tunnels(path, Absence()), Absence())
        try:
            yield place, api
        finally:
            await forwarder.close()


async def follow(place: Place) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for something that is streamed, and read its head."""
    reader, writer = await place.connect()
    writer.write(b"GET /logs?follow=1 HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def test_each_piece_is_there_before_the_next_is_sent_however_long_that_takes(tmp_path: Path) -> None:
    async with patience(), forwarding(tmp_path) as (place, api):
        reader, writer = await follow(place)
        _, sender = await api.streams.get()
        for number in range(3):
            await asyncio.sleep(0.15)  # three times the limits of the port on idle clients and slow ones
            sender.write(chunk(b"line %d\n" % number))
            assert await reader.readexactly(12) == b"7\r\nline %d\n\r\n" % number
        sender.write(b"0\r\n\r\n")
        assert await reader.readexactly(5) == b"0\r\n\r\n"
        sender.close()
        writer.close()


async def test_many_who_follow_keep_nobody_from_a_short_answer(tmp_path: Path) -> None:
    async with patience(), forwarding(tmp_path) as (place, api):
        followers = [await follow(place) for _ in range(400)]
        reader, writer = await place.connect()
        writer.write(b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await read_answer(reader)).body == b"short"
        for _, client in (*followers, (reader, writer)):
            client.close()
        for _ in followers:
            api_reader, sender = await api.streams.get()
            assert await api_reader.read() == b""
            sender.close()


async def test_the_api_hears_that_the_client_is_gone(tmp_path: Path) -> None:
    async with patience(), forwarding(tmp_path) as (place, api):
        _, writer = await follow(place)
        api_reader, sender = await api.streams.get()
        writer.close()
        assert await api_reader.read() == b""
        sender.close()


async def test_an_answer_that_the_api_does_not_end_is_not_ended_for_the_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with patience(), forwarding(tmp_path) as (place, api):
        reader, writer = await follow(place)
        _, sender = await api.streams.get()
        sender.write(chunk(b"line 1\n"))
        await sender.drain()
        sender.close()
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readuntil(b"0\r\n\r\n")
        writer.close()
    logged = capsys.readouterr().out
    assert "answer cut off" in logged
    assert "Traceback" not in logged


# --- answers that may be repeated ------------------------------------------------------------------------------------

TOKEN = "a" * 32
STATUS = f"/v1alpha2/container/{TOKEN}/status"
BODY = b'{"status":"BUILDING"}'


@dataclass
class StatusApi:
    """Answers every request with the same, and counts them; while ``open`` is not set they wait."""

    head: str = f"X-Wave-Repeat: 60.000 {TOKEN}\r\nX-Frame-Options: DENY"
    status: str = "200 OK"
    body: bytes = BODY
    asked: list[str] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            while await reader.readline() not in (b"\r\n", b""):
                pass
            self.asked.append(line.decode().strip())
            await self.open.wait()
            head = f"HTTP/1.1 {self.status}\r\nContent-Length: {len(self.body)}\r\n{self.head}\r\n\r\n"
            writer.write(head.encode() + (b"" if line.startswith(b"HEAD") else self.body))
        writer.close()


@dataclass
class Repeating:
    """A port with ready-made replies before such an api."""

    place: Place
    api: StatusApi
    ready: ReadyReplies

    async def ask(self, method: str = "GET", target: str = STATUS, headers: str = "") -> Answer:
        reader, writer = await self.place.connect()
        writer.write(f"{method} {target} HTTP/1.1\r\nHost: a\r\n{headers}\r\n".encode())
        answer = await read_answer(reader, head_only=method == "HEAD")
        assert "x-wave-repeat" not in answer.headers
        writer.close()
        return answer


@asynccontextmanager
async def repeating(folder: Path, redis_url: str, **changes: Any) -> AsyncIterator[Repeating]:
    path, api = f"{folder}/api.sock", StatusApi(**changes)
    api.open.set()
    async with connect(redis_url) as redis:
        ready = ReadyReplies(Quotas(redis, {}, wait_s=0), Usage(redis), RequestStats())
        async with (
            serving(lambda request: forwarder.answer(request), ready=ready) as place,
            await asyncio.start_unix_server(api.converse, path),
        ):
            forwarder = Forwarder(unix_session(path), Tunnels(path, Absence()), Absence())
            try:
                yield Repeating(place, api, ready)
            finally:
                await forwarder.close()


async def test_an_answer_is_repeated_for_as_long_as_the_api_says(tmp_path: Path, redis_url: str) -> None:
    async with repeating(tmp_path, redis_url) as port:
        answers = [await port.ask() for _ in range(5)]
        # As Java 17 asks: with the length of no body.
        answers.append(await port.ask(headers="Content-Length: 0\r\nContent-Type: application/json\r\n"))
    assert [(answer.status, answer.body) for answer in answers] == [(200, BODY)] * 6
    assert all(answer.headers["x-frame-options"] == "DENY" for answer in answers)
    assert port.api.asked == [f"GET {STATUS} HTTP/1.1"]


@pytest.mark.parametrize("target", ["/a/%2e%2e/b?c=%2F%41", "/a/../b", "/a//b/./c", "/%7Ea/%C3%A9/x%2Fy"])
async def test_a_target_is_handed_on_as_it_is(tmp_path: Path, redis_url: str, target: str) -> None:
    async with repeating(tmp_path, redis_url) as port:
        await port.ask(target=target)
    assert port.api.asked == [f"GET {target} HTTP/1.1"]


async def test_it_is_asked_for_again_after_that(tmp_path: Path, redis_url: str) -> None:
    async with repeating(tmp_path, redis_url, head="X-Wave-Repeat: 0.000") as port:
        for _ in range(3):
            await port.ask()
    assert len(port.api.asked) == 3


@pytest.mark.parametrize(
    ("method", "target", "headers", "changes"),
    [
        pytest.param("HEAD", STATUS, "", {}, id="HEAD"),
        pytest.param("POST", STATUS, "Content-Length: 0\r\n", {}, id="POST"),
        pytest.param("GET", STATUS, "", {"head": "X-Frame-Options: DENY"}, id="the api says nothing"),
        pytest.param("GET", STATUS, "", {"status": "404 Not Found"}, id="not 200"),
        pytest.param("GET", STATUS, "", {"body": b"x" * 20_000}, id="large"),
        pytest.param("GET", "/v1alpha1/builds/x/logs", "", {}, id="another target"),
    ],
)
async def test_what_is_not_repeated(
    tmp_path: Path, redis_url: str, method: str, target: str, headers: str, changes: dict[str, Any]
) -> None:
    async with repeating(tmp_path, redis_url, **changes) as port:
        for _ in range(3):
            answer = await port.ask(method, target, headers)
            assert answer.body == (b"" if method == "HEAD" else port.api.body)
            assert f"{answer.status}" == port.api.status[:3]
    assert len(port.api.asked) >= 3


async def test_a_request_with_a_body_gets_an_answer_of_its_own(tmp_path: Path, redis_url: str) -> None:
    async with repeating(tmp_path, redis_url) as port:
        await port.ask()
        reader, writer = await port.place.connect()
        writer.write(f"GET {STATUS} HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx".encode())
        assert (await read_answer(reader)).body == BODY
        writer.close()
    assert sum(line.startswith("GET ") for line in port.api.asked) == 2


async def test_nothing_is_repeated_of_a_token_that_has_ended(tmp_path: Path, redis_url: str) -> None:
    async with repeating(tmp_path, redis_url) as port:
        await port.ask()
        port.ready.forget(TOKEN)
        await port.ask()
        assert len(port.api.asked) == 2
        port.api.open.clear()
        port.ready.forget(TOKEN)
        asking = asyncio.create_task(port.ask())
        await eventually(lambda: len(port.api.asked) == 3)
        port.ready.forget(TOKEN)  # while the api answers
        port.api.open.set()
        await asking
        await port.ask()
    assert len(port.api.asked) == 4


async def test_those_who_ask_at_the_same_time_are_one_question(tmp_path: Path, redis_url: str) -> None:
    async with repeating(tmp_path, redis_url) as port:
        port.api.open.clear()
        asking = [asyncio.create_task(port.ask()) for _ in range(50)]
        await eventually(lambda: port.api.asked and len(port.place.server.connections) == 50)
        port.api.open.set()
        answers = await asyncio.gather(*asking)
    assert {answer.body for answer in answers} == {BODY}
    assert len(port.api.asked) == 1


async def test_who_leaves_does_not_take_the_answer_along(tmp_path: Path, redis_url: str) -> None:
    async with repeating(tmp_path, redis_url) as port:
        port.api.open.clear()
        _, writer = await port.place.connect()
        writer.write(f"GET {STATUS} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        await eventually(lambda: len(port.api.asked) == 1)
        other = asyncio.create_task(port.ask())
        await eventually(lambda: len(port.place.server.connections) == 2)
        peer = writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()  # with a reset
        await eventually(lambda: len(port.place.server.connections) == 1)
        port.api.open.set()
        assert (await other).body == BODY
    assert len(port.api.asked) == 1


async def test_who_asks_an_api_that_is_not_there_is_told_what_to_start(tmp_path: Path) -> None:
    path, absence = f"{tmp_path}/api.sock", Absence(restart_s=0.2)
    forwarder = Forwarder(unix_session(path), Tunnels(path, absence), absence)

    async def said(place: Place) -> bytes:
        reader, writer = await place.connect()
        writer.write(b"GET /short HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nshort")
        writer.close()

    async def answer(request: Request) -> Reply:
        try:
            return await forwarder.answer(request)
        except UpstreamUnavailable as err:
            return Reply(503, [], str(err).encode())

    async def until_said(place: Place, words: bytes) -> None:
        while words not in await said(place):
            await asyncio.sleep(0.02)

    async with patience(), serving(answer) as place:
        assert b"the API is restarting; try again in a moment" in await said(place)
        await until_said(place, b"`wave-proxy api`")
        async with await asyncio.start_unix_server(converse, path):
            assert b"short" in await said(place)
        Path(path).unlink(missing_ok=True)
        assert b"the API is restarting" in await said(place)
        await until_said(place, b"`wave-proxy api`")
        await forwarder.close()
