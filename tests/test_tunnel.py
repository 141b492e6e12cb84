"""WebSockets through the port: both directions, backpressure, how many, and what is left when one side ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.patience import eventually, patience
from tests.test_http import Place, read_answer, serving
from wave_proxy.errors import WaveError
from wave_proxy.serve import http, tunnel
from wave_proxy.serve.absence import Absence
from wave_proxy.serve.forward import Forwarder
from wave_proxy.serve.messages import Reply, Request
from wave_proxy.serve.origin import ClientAddress
from wave_proxy.serve.tunnel import Tunnels
from wave_proxy.upstream.egress import unix_session

ASK = (
    b"GET /pairing/tower/token/x?endpoint=y HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\n"
    b"Upgrade: WebSocket\r\nSec-WebSocket-Key: k\r\nX-Wave-Client: 9.9.9.9\r\n\r\n"
)
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
REFUSED = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Api:
    """The other end: gives each request ``answer``, and leaves its connection to the test."""

    answer: bytes
    heads: list[bytes] = field(default_factory=list)
    accepted: asyncio.Queue[Ends] = field(default_factory=asyncio.Queue)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer)
        await self.accepted.put((reader, writer))


@asynccontextmanager
async def tunnelling(folder: Path, answer: bytes = SWITCHED) -> AsyncIterator[tuple[Place, Api]]:
    path, api = f"{folder}/api.sock", Api(answer)
    forwarder = Forwarder(unix_session(path), Tunnels(path, Absence()), Absence())

    async def handle(request: Request) -> Reply:
        try:
            return await forwarder.answer(request)
        except WaveError as err:
            return Reply(err.status, [], str(err).encode())

    async with patience(), serving(handle) as place, await asyncio.start_unix_server(api.accept, path):
        try:
            yield place, api
        finally:
            await forwarder.close()


async def opened(place: Place, api: Api) -> tuple[Ends, Ends]:
    """A WebSocket: the client's end and the api's."""
    reader, writer = await place.connect()
    writer.write(ASK)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n")
    assert b"close" not in head
    return (reader, writer), await api.accepted.get()


@pytest.mark.parametrize("ending", ["client", "api"])
async def test_a_websocket_goes_through_both_ways_and_so_does_its_end(ending: str, tmp_path: Path) -> None:
    async with tunnelling(tmp_path) as (place, api):
        client, there = await opened(place, api)
        assert b"\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" in api.heads[0]
        assert b"x-wave-client: 127.0.0.1\r\n" in api.heads[0]
        assert b"9.9.9.9" not in api.heads[0]
        for (_, writer), (reader, _) in ((client, there), (there, client)):
            for frame in (b"\x81\x00", b"GET / HTTP/1.1\r\n\r\n", bytes(300_000)):
                writer.write(frame)
                assert await reader.readexactly(len(frame)) == frame
        first, last = (client, there) if ending == "client" else (there, client)
        first[1].close()
        assert await last[0].read() == b""
        last[1].close()
        await place.is_empty()


@pytest.mark.parametrize("sender", ["client", "api"])
async def test_what_one_side_does_not_take_the_other_can_not_send(sender: str, tmp_path: Path) -> None:
    async with tunnelling(tmp_path) as (place, api):
        client, there = await opened(place, api)
        (_, writer), (reader, other) = (client, there) if sender == "client" else (there, client)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 100 << 20:
                writer.write(bytes(1 << 18))
                sent += 1 << 18
                async with asyncio.timeout(0.5):
                    await writer.drain()
        assert sent < 40 << 20
        assert await reader.readexactly(sent) == bytes(sent)
        writer.close()
        other.close()


async def test_a_client_with_a_whole_network_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "MAX_OF_CLIENT", 2)
    async with tunnelling(tmp_path) as (place, api):
        place.server.addresses = ClientAddress(("127.0.0.1",))

        async def ask(address: str) -> int:
            reader, writer = await place.connect()
            writer.write(ASK.replace(b"Host: a", b"Host: a\r\nX-Forwarded-For: " + address.encode()))
            try:
                return int((await reader.readline()).split()[1])
            finally:
                held.append(writer)

        held: list[asyncio.StreamWriter] = []
        tried = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"]
        assert [await ask(address) for address in tried] == [101, 101, 503, 101]
        for writer in held:
            writer.close()
        while not api.accepted.empty():
            (await api.accepted.get())[1].close()


@pytest.mark.parametrize("limit", ["MAX_TUNNELS", "MAX_OF_CLIENT"])
async def test_only_so_many_are_open_at_once(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, limit, 2)
    async with tunnelling(tmp_path) as (place, api):
        ends = [await opened(place, api) for _ in range(2)]
        reader, writer = await place.connect()
        writer.write(ASK)
        refused = await read_answer(reader)
        assert (refused.status, refused.body[:2]) == (503, b"to")
        (_, first), (there, back) = ends[0]
        first.close()
        assert await there.read() == b""
        back.close()
        await eventually(lambda: len(place.server.connections) <= 2)
        ends.append(await opened(place, api))
        for client, other in ends[1:]:
            client[1].close()
            other[1].close()
        writer.close()


async def test_who_sends_nothing_for_long_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TUNNEL_IDLE_S", 0.05)
    async with tunnelling(tmp_path) as (place, api):
        (reader, writer), (there, back) = await opened(place, api)
        assert await reader.read() == b""
        assert await there.read() == b""
        writer.close()
        back.close()


async def test_a_shutdown_does_not_wait_for_a_websocket(tmp_path: Path) -> None:
    async with tunnelling(tmp_path) as (place, api):
        (reader, writer), (there, back) = await opened(place, api)
        async with patience():
            await place.server.shut_down(grace_s=3600)
        assert await reader.read() == b""
        assert await there.read() == b""
        writer.close()
        back.close()


async def test_who_goes_on_before_the_answer_is_cut_off(tmp_path: Path) -> None:
    async with tunnelling(tmp_path) as (place, api):
        assert await place.exchange(ASK + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") == b""
        (await api.accepted.get())[1].close()


async def test_a_refusal_of_the_api_is_an_answer(tmp_path: Path) -> None:
    async with tunnelling(tmp_path, REFUSED) as (place, api):
        assert (await place.exchange(ASK)).startswith(b"HTTP/1.1 403 Forbidden\r\n")
        (await api.accepted.get())[1].close()


@pytest.mark.parametrize(
    "ask",
    [
        ASK.replace(b"/pairing/", b"/v1alpha2/"),
        ASK.replace(b"/pairing/", b"/x/../pairing/"),
        ASK.replace(b"Upgrade: WebSocket", b"Upgrade: h2c"),
        ASK.replace(b"keep-alive, Upgrade", b"keep-alive"),
        ASK.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["another-path", "a-path-that-leads-there", "another-protocol", "no-connection-upgrade", "http-1.0"],
)
async def test_elsewhere_an_upgrade_is_not_handed_on(ask: bytes, tmp_path: Path) -> None:
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nplain"
    async with tunnelling(tmp_path, plain) as (place, api):
        reader, writer = await place.connect()
        writer.write(ask)
        assert (await read_answer(reader)).body == b"plain"
        assert b"upgrade" not in api.heads[0].lower()
        (await api.accepted.get())[1].close()
        writer.close()
