"""The way to the api: answers that are streamed for as long as they take, and what is left when one side goes away."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.test_http import Place, read_answer, serving
from wave_proxy.serve.forward import Forwarder
from wave_proxy.serve.tunnel import Tunnels
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
        forwarder = Forwarder(unix_session(path), Tunnels(path))
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
    async with asyncio.timeout(10), forwarding(tmp_path) as (place, api):
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
    async with asyncio.timeout(30), forwarding(tmp_path) as (place, api):
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
    async with asyncio.timeout(10), forwarding(tmp_path) as (place, api):
        _, writer = await follow(place)
        api_reader, sender = await api.streams.get()
        writer.close()
        assert await api_reader.read() == b""
        sender.close()


async def test_an_answer_that_the_api_does_not_end_is_not_ended_for_the_client(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with asyncio.timeout(10), forwarding(tmp_path) as (place, api):
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
