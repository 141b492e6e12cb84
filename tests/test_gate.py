"""The gate: what it lets through, what it refuses and how it says so, and that no connection outlives it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

import builder.gate
from builder.forward import Forward
from builder.gate import Gate, Writable
from builder.places import Place
from tests.patience import eventually, patience
from tests.servers import free_port
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import Egress, Endpoint

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CACHE = Writable("local/cache/layers", Login("build", "k"))
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"


class Server:
    """A server on loopback that answers each request's head with ``answer``, and remembers the heads."""

    def __init__(self, answer: bytes = HELLO) -> None:
        self.answer = answer
        self.heads: list[str] = []
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(self.answer)
            await writer.drain()
            if not self.answer.startswith(b"HTTP"):
                while chunk := await reader.read(1000):
                    writer.write(chunk.upper())
        except (OSError, EOFError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[str]:
    """A server on loopback; gives its ``host:port``."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


class Scene:
    """A gate that answers on loopback, in the place of a box."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.ports = [item.getsockname()[1] for item in sockets]
        self.log = bytearray()

    async def ask(self, request: str, port: int = 0) -> str:
        """The whole answer to one request to the proxy (0), to wave-proxy (1) or to a relay (2…)."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[port])
        try:
            writer.write(request.replace("\n", "\r\n").encode())
            async with patience():
                return (await reader.read()).decode()
        finally:
            writer.close()


@asynccontextmanager
async def gate(
    *allowed: str,
    url: str = "http://127.0.0.1:9",
    writable: Writable | None = None,
    login: Login | None = None,
    proxy: str = "",
) -> AsyncIterator[Scene]:
    egress = Egress({}, connect_timeout_s=5)
    way_out = Gate(egress, url, allowed, login, Forward(egress, proxy) if proxy else None)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in way_out.listen]
    scene = Scene(sockets)
    try:
        async with way_out.serve(sockets, scene.log.extend, writable):
            yield scene
    finally:
        for item in sockets:
            item.close()
        await egress.close()
    assert [task for task in asyncio.all_tasks() if "builder/gate.py" in repr(task)] == []


# --- the proxy ---------------------------------------------------------------------------------------------------


async def test_a_request_to_an_allowed_address_is_passed_on_as_a_servers_own() -> None:
    server = Server()
    async with listening(server.serve) as address, gate(address) as scene:
        head = f"GET http://{address}/a/b?c=d HTTP/1.1\nHost: other\nProxy-Connection: keep-alive\nX-One: 1\n"
        answer = await scene.ask(f"{head}Connection: keep-alive, x\nX-Forwarded-For: 8.8.8.8\n\n")
        assert answer == HELLO.decode()
        lines = server.heads[0].split("\r\n")
        assert lines == ["GET /a/b?c=d HTTP/1.1", f"Host: {address}", "X-One: 1", "Connection: close", "", ""]
    assert scene.log == b""


async def test_what_is_open_to_wave_proxy_itself_is_not_to_builds() -> None:
    """But for the registry of the build's cache; and never wave-proxy by its own address."""
    server = Server()
    async with listening(server.serve) as address, listening(server.serve) as own:
        tables = {host: Endpoint(host, f"http://{host}", allow_private=True) for host in (address, own)}
        way_out = Gate(Egress(tables, connect_timeout_s=5), f"http://{own}")
        for registry, opened in (("", ()), (address, (address,)), (own, ())):
            sockets = [socket.create_server(("127.0.0.1", 0)) for _ in way_out.listen]
            scene = Scene(sockets)
            async with way_out.serve(sockets, scene.log.extend, None, registry):
                for place in (address, own):
                    for asked in (f"GET http://{place}/", f"CONNECT {place}"):
                        answer = await scene.ask(f"{asked} HTTP/1.1\n\n" + "GET / HTTP/1.1\n\n" * ("CONN" in asked))
                        assert ("hello" in answer) == (place in opened), (registry, asked)
                        assert ("403" in answer) == (place not in opened)
            for item in sockets:
                item.close()
        await way_out._egress.close()


async def test_a_tunnel_carries_bytes_both_ways() -> None:
    server = Server(b"go on\n")
    async with listening(server.serve) as address, gate(address) as scene:
        reader, writer = await asyncio.open_connection("127.0.0.1", scene.ports[0])
        writer.write(f"CONNECT {address} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 200 Connection established\r\n\r\n"
        writer.write(b"anything\r\n\r\n")
        assert await reader.readline() == b"go on\n"
        writer.write(b"more")
        writer.write_eof()
        assert await reader.read() == b"MORE"
        writer.close()


async def test_a_body_is_passed_on_whole() -> None:
    received = bytearray()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert "Content-Length: 300000" in head
        received.extend(await reader.readexactly(300_000))
        writer.write(HELLO)
        writer.close()

    async with listening(take) as address, gate(address) as scene:
        answer = await scene.ask(f"POST http://{address}/ HTTP/1.1\nContent-Length: 300000\n\n" + "x" * 300_000)
    assert answer == HELLO.decode()
    assert received == b"x" * 300_000


PRIVATE = [
    "169.254.169.254",
    "169.254.169.254:8080",
    "127.0.0.1:6379",
    "localhost:6379",
    "10.0.0.1",
    "192.168.1.1",
    "172.16.5.5:5000",
    "0.0.0.0:80",
    "[::1]:80",
    "[fd00:ec2::254]:80",
    "[::ffff:169.254.169.254]:80",
    "100.100.100.200",
    "2852039166",
    "0x7f000001",
    "127.1",
]


@pytest.mark.parametrize("place", PRIVATE)
@pytest.mark.parametrize("method", ["GET", "CONNECT"])
async def test_private_addresses_are_refused_with_the_setting_that_would_allow_them(place: str, method: str) -> None:
    async with gate("127.0.0.1:1") as scene:
        target = f"http://{place}/latest" if method == "GET" else (place if ":" in place else f"{place}:443")
        answer = await scene.ask(f"{method} {target} HTTP/1.1\n\n")
    assert answer.startswith("HTTP/1.1 403 Forbidden\r\n")
    assert "refused by wave-proxy: " in answer
    assert "is at a private or loopback address; to let builds reach it, add" in answer
    assert "[build] allow_private" in answer
    log = scene.log.decode()
    assert log.startswith("network: refused by wave-proxy: ")
    assert log.strip().removeprefix("network: ") == answer.split("\r\n\r\n")[1].strip()


async def test_only_the_port_that_is_allowed_is_open() -> None:
    server = Server()
    async with listening(server.serve) as address, gate(f"127.0.0.1:{free_port()}") as scene:
        answer = await scene.ask(f"GET http://{address}/ HTTP/1.1\n\n")
    assert answer.startswith("HTTP/1.1 403 ")
    assert server.heads == []


@pytest.mark.parametrize(
    ("request_head", "status", "text"),
    [
        ("nonsense\n\n", "400", "this is a proxy for HTTP/1.1"),
        ("GET / HTTP/1.1\n\n", "400", "not an address that begins with http://"),
        ("GET https://example.com/ HTTP/1.1\n\n", "400", "not an address that begins with http://"),
        ("GET http:///x HTTP/1.1\n\n", "400", "not an address that begins with http://"),
        ("GET http://user@host/ HTTP/1.1\n\n", "400", "is not host:port"),
        ("GET http://[x/ HTTP/1.1\n\n", "400", "not an address that begins with http://"),
        ("CONNECT example.com:99999 HTTP/1.1\n\n", "400", ""),
        ("CONNECT /x HTTP/1.1\n\n", "400", "is not host:port"),
        ("GET http://nosuch.invalid/ HTTP/1.1\n\n", "502", "can't resolve nosuch.invalid"),
        ("GET http://nosuch.invalid/ HTTP/1.1\n\n", "502", "the operator names it in [build] proxy"),
    ],
)
async def test_what_can_not_be_reached_is_said(request_head: str, status: str, text: str) -> None:
    async with gate() as scene:
        answer = await scene.ask(request_head)
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert text in answer


async def test_a_forward_proxy_is_asked_for_what_is_not_named() -> None:
    """In its own words, with its login, and for a name that this machine can't resolve."""
    server, near = Server(), Server()
    async with (
        listening(server.serve) as proxy,
        listening(near.serve) as allowed,
        gate(allowed, proxy=f"http://me:p%40ss@{proxy}") as scene,
    ):
        head = "GET http://nosuch.invalid/a?b=c HTTP/1.1\nHost: x\nProxy-Authorization: Basic eDp5\nX-One: 1\n\n"
        assert await scene.ask(head) == HELLO.decode()
        assert await scene.ask(f"GET http://{allowed}/ HTTP/1.1\n\n") == HELLO.decode()
    assert server.heads[0].split("\r\n") == [
        "GET http://nosuch.invalid/a?b=c HTTP/1.1",
        "Host: nosuch.invalid",
        "X-One: 1",
        "Proxy-Authorization: Basic bWU6cEBzcw==",
        *("Connection: close", "", ""),
    ]
    assert [head.split("\r\n")[0] for head in near.heads] == ["GET / HTTP/1.1"]


async def test_a_caches_registry_in_our_own_network_is_reached_without_the_forward_proxy() -> None:
    server = Server()
    async with listening(server.serve) as address:
        egress = Egress({address: Endpoint(address, f"http://{address}", allow_private=True)}, connect_timeout_s=5)
        way_out = Gate(egress, "http://127.0.0.1:9", forward=Forward(egress, f"http://127.0.0.1:{free_port()}"))
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in way_out.listen]
        scene = Scene(sockets)
        async with way_out.serve(sockets, scene.log.extend, None, address):
            assert await scene.ask(f"GET http://{address}/v2/ HTTP/1.1\n\n") == HELLO.decode()
        for item in sockets:
            item.close()
        await egress.close()


async def test_a_forward_proxy_is_tunnelled_through() -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 Yes\r\nX: y\r\n\r\n")
        writer.write((await reader.read(100)).upper())
        writer.close()

    async with listening(serve) as proxy, gate(proxy=f"http://{proxy}") as scene:
        reader, writer = await asyncio.open_connection("127.0.0.1", scene.ports[0])
        writer.write(b"CONNECT nosuch.invalid:443 HTTP/1.1\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 200 Connection established\r\n\r\n"
        writer.write(b"hello")
        assert await reader.read() == b"HELLO"
        writer.close()
    assert heads == [b"CONNECT nosuch.invalid:443 HTTP/1.1\r\nHost: nosuch.invalid:443\r\n\r\n"]


@pytest.mark.parametrize("place", [*PRIVATE, "localhost:80"])
async def test_a_forward_proxy_is_not_asked_for_what_is_private(place: str) -> None:
    server = Server()
    async with listening(server.serve) as proxy, gate(proxy=f"http://{proxy}") as scene:
        for head in (
            f"GET http://{place}/ HTTP/1.1\n\n",
            f"CONNECT {place}{'' if ':' in place else ':443'} HTTP/1.1\n\n",
        ):
            assert (await scene.ask(head)).startswith("HTTP/1.1 403 Forbidden\r\n")
    assert server.heads == []


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "answers with 'HTTP/1.1 407 Proxy Auth"),
        (b"HTTP/1.1", "does not answer as one"),
        (b"", "does not answer as one"),
    ],
)
async def test_a_forward_proxy_that_refuses_is_said(answer: bytes, text: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with listening(serve) as proxy, gate(proxy=f"http://{proxy}") as scene:
        said = await scene.ask("CONNECT nosuch.invalid:443 HTTP/1.1\n\n")
    assert said.startswith("HTTP/1.1 502 Bad Gateway\r\n")
    assert f"the proxy on the way to nosuch.invalid {text}" in said
    assert f"network: the proxy on the way to nosuch.invalid {text}" in scene.log.decode()
    assert "[build] proxy" not in said


async def test_a_server_that_is_not_there_is_said() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with gate(address) as scene:
        answer = await scene.ask(f"CONNECT {address} HTTP/1.1\n\n")
    assert answer.startswith("HTTP/1.1 502 Bad Gateway\r\n")
    assert f"network: no connection to {address}" in scene.log.decode()


async def test_an_endless_head_is_cut_off() -> None:
    async with gate() as scene:
        with suppress(ConnectionResetError):  # when it had not read all that was sent
            assert await scene.ask("GET http://x/ HTTP/1.1\n" + "X-Y: z\n" * 20_000) == ""


# --- wave-proxy --------------------------------------------------------------------------------------------------


async def test_the_login_for_a_cache_is_put_in_on_the_way_and_opens_nothing_else() -> None:
    server = Server()
    async with (
        listening(server.serve) as address,
        gate(url=f"http://{address}", writable=CACHE, login=Login("_builder", "x")) as scene,
    ):
        uploads, mine = "/v2/local/cache/layers/blobs/uploads/", "AUTHORIZATION:  Basic YnVpbGQ6aw=="
        for asked, line in (
            (f"POST {uploads}?mount=sha256:00&from=local/private/1/build", f"POST {uploads}"),
            (f"POST {uploads}?m%6funt=sha256:00&%66rom=local/private/1/build", f"POST {uploads}"),
            (f"PUT {uploads}1?digest=sha256:00&mount=1", f"PUT {uploads}1?digest=sha256%3A00"),
        ):
            await scene.ask(f"{asked} HTTP/1.1\n{mine}\nAuthorization: x\n\n", 1)
            first, *lines = server.heads.pop().split("\r\n")
            assert first == f"{line} HTTP/1.1"
            told = [one for one in lines if one.lower().startswith("authorization")]
            assert told == ["Authorization: Basic X2J1aWxkZXI6eA=="]
        for wrong in ("", "Authorization: Basic bWluZQ==\n", "Authorization:\n", "X-A: Basic YnVpbGQ6aw==\n"):
            for asked in (f"POST {uploads}", "GET /v2/local/cache/layers/manifests/1"):
                assert (await scene.ask(f"{asked} HTTP/1.1\n{wrong}\n", 1)).startswith("HTTP/1.1 403 ")
        assert server.heads == []
        assert 'WWW-Authenticate: Basic realm="wave-proxy"' in await scene.ask("GET /v2/ HTTP/1.1\n\n", 1)
        await scene.ask(f"GET /v2/wt/0123456789ab/x/manifests/1 HTTP/1.1\n{mine}\n\n", 1)
        assert "X2J1aWxkZXI6eA==" not in server.heads.pop()


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("GET /v2/", True),
        ("GET /v2/wt/0123456789ab/library/ubuntu/manifests/latest", True),
        ("HEAD /v2/wt/0123456789ab/library/ubuntu/blobs/sha256:00", True),
        ("POST /v2/local/cache/layers/blobs/uploads/", True),
        ("PUT /v2/local/cache/layers/manifests/latest?x=y", True),
        ("POST /v2/local/cache/other/blobs/uploads/", False),
        ("PUT /v2/local/cache/layers2/manifests/latest", False),
        ("GET /v2/local/private/tool/manifests/latest", False),
        ("GET /v2/_catalog", False),
        ("POST /v2/wt/0123456789ab/library/ubuntu/blobs/uploads/", False),
        ("POST /v1alpha2/container", False),
        ("GET /v1alpha1/builds/bd-1/logs", False),
        ("GET /metrics", False),
        ("GET /v2/../v1alpha1/builds", False),
        ("GET /v2/%2e%2e/v1alpha1", False),
        ("DELETE /v2/local/x/manifests/latest", False),
        ("GET http://127.0.0.1/v2/", False),
        ("CONNECT 127.0.0.1:80", False),
    ],
)
async def test_a_build_sees_of_wave_proxy_what_it_pulls(line: str, allowed: bool) -> None:
    server = Server()
    async with (
        listening(server.serve) as address,
        gate(url=f"http://{address}", writable=CACHE if "/cache/" in line else None) as scene,
    ):
        login = "Authorization: Basic YnVpbGQ6aw==\n" if "/cache/" in line else ""
        answer = await scene.ask(
            f"{line} HTTP/1.1\nHost: 127.0.0.1:1\nX-Forwarded-For: 9.9.9.9\n{login}X-Real-IP: 9.9.9.9\n\n", 1
        )
    if allowed:
        assert answer == HELLO.decode()
        assert server.heads == [f"{line} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"]
    else:
        assert answer.startswith("HTTP/1.1 403 Forbidden\r\n")
        assert "refused by wave-proxy: a build may not" in answer
        assert server.heads == []


@pytest.mark.parametrize(
    "head",
    [
        "GET /v2/wt/1/x HTTP/1.1\r\nA: b\n\nPOST /v1alpha2/container HTTP/1.1\nB: c",
        "GET /v2/wt/1/x HTTP/1.1\r\nA: b\nX-Forwarded-For: 9.9.9.9",
        "GET /v2/wt/1/x HTTP/1.1\r\nA: b\rX-Forwarded-For: 9.9.9.9",
        "GET /v2/wt/1/x HTTP/1.1\r\nX-Forwarded-For : 9.9.9.9",
        "GET /v2/wt/1/x HTTP/1.1\r\nA: b\r\n X-Forwarded-For: 9.9.9.9",
        "GET /v2/wt/1/x\tHTTP/1.1\nA:b\n\nPOST\t/v1alpha2/container HTTP/1.1",
    ],
)
async def test_a_head_that_some_servers_read_in_another_way_is_refused(head: str) -> None:
    """Some take a line feed for a line's end, and would find a second request, or a field that is not passed on."""
    server = Server()
    async with listening(server.serve) as address, gate(url=f"http://{address}") as scene:
        reader, writer = await asyncio.open_connection("127.0.0.1", scene.ports[1])
        writer.write(f"{head}\r\n\r\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
    assert server.heads == []


async def test_wave_proxy_that_is_away_is_said() -> None:
    async with gate(url=f"http://127.0.0.1:{free_port()}") as scene:
        answer = await scene.ask("GET /v2/ HTTP/1.1\n\n", 1)
    assert answer.startswith("HTTP/1.1 502 ")
    assert "wave-proxy can't be reached by the builder" in answer


# --- relays and addresses ----------------------------------------------------------------------------------------


async def test_a_relay_leads_to_the_same_address_outside() -> None:
    server = Server(b"raw: ")
    async with listening(server.serve) as address, gate(address) as scene:
        reader, writer = await asyncio.open_connection("127.0.0.1", scene.ports[2])
        writer.write(b"no http at all\r\n\r\nabc")
        writer.write_eof()
        assert await reader.read() == b"raw: ABC"
        writer.close()


def test_each_address_of_a_box_is_listened_on_once() -> None:
    egress = Egress({})
    way_out = Gate(egress, "http://127.0.0.1:8080", ["127.0.0.1:8080", "localhost:3128", "[::1]:7", "mirror.lan:80"])
    assert way_out.listen == [
        ("127.0.0.1", 3129),
        ("127.0.0.1", 8081),
        ("127.0.0.1", 3128),
        ("127.0.0.1", 8080),
        ("::1", 7),
    ]
    assert way_out.registry == "127.0.0.1:8081"
    assert way_out.environment["https_proxy"] == way_out.environment["HTTP_PROXY"] == "http://127.0.0.1:3129"
    assert way_out.environment["no_proxy"] == "localhost,127.0.0.1,::1"


def test_wave_proxy_on_a_name_without_a_port_has_the_schemes() -> None:
    assert Gate(Egress({}), "https://wave.example.com").registry == "127.0.0.1:443"


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:0", "host:70000", ":80", "a:1/b", "u@h:1"])
def test_a_place_without_host_and_port_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Place.parse(text)


# --- its end -----------------------------------------------------------------------------------------------------


async def test_connections_end_with_the_gate() -> None:
    server = Server(b"first")
    async with listening(server.serve) as address:
        async with gate(address) as scene:
            reader, writer = await asyncio.open_connection("127.0.0.1", scene.ports[2])
            writer.write(b"x\r\n\r\n")
            assert await reader.readexactly(5) == b"first"
        assert await reader.read() == b""
        writer.close()
        await eventually(lambda: not server.open)


async def test_more_connections_than_there_is_room_for_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.gate, "_MAX_CONNECTIONS", 2)
    server = Server(b"first")
    async with listening(server.serve) as address, gate(address) as scene:
        held = [await asyncio.open_connection("127.0.0.1", scene.ports[2]) for _ in range(2)]
        for reader, writer in held:
            writer.write(b"x\r\n\r\n")
            assert await reader.readexactly(5) == b"first"
        third = asyncio.create_task(scene.ask("y\n\n", 2))
        await asyncio.sleep(0.05)
        assert len(server.heads) == 2
        for _, writer in held:
            writer.close()
        await eventually(lambda: len(server.heads) == 3)
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)


async def test_a_connection_on_which_nothing_comes_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.gate, "_IDLE_S", 1.0)
    server = Server(b"first")
    async with listening(server.serve) as address, gate(address) as scene:
        assert await scene.ask("x\n\n", 2) == "first"
