"""The guard, redirects, TLS, proxies and timeouts of outgoing requests."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from bench.images import Blob, blob, random_blob
from bench.upstream import Faults, Upstream
from tests.outgoing import answer, connections_in_use, egress_to, opened, scripted
from wave_proxy.errors import (
    AddressRefused,
    Denied,
    HostUnknown,
    Offline,
    TooManyRequests,
    UpstreamError,
    UpstreamFailing,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from wave_proxy.upstream.egress import (
    Egress,
    _resolve,
    endpoint_for,
    is_public,
    parse_url,
    retry_after_s,
    unix_session,
)

CONTENT = blob(random_blob(300_000, seed=1))

Start = Callable[..., Upstream]


def path_of(item: Blob) -> str:
    return f"/v2/lib/tool/blobs/{item.digest}"


def serving(upstream: Start, **faults: Any) -> Upstream:
    server = upstream(faults=Faults(**faults))
    server.add_blob("lib/tool", CONTENT)
    return server


# --- addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::6810:84e5", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("192.0.0.192", False),
        ("168.63.129.16", False),
        ("64:ff9b::a83f:8110", False),
        ("168.63.129.17", True),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::808:808", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("registry", "options", "url", "allow_private"),
    [
        ("docker.io", {}, "https://registry-1.docker.io", False),
        ("quay.io", {}, "https://quay.io", False),
        ("localhost", {}, "http://localhost", False),
        ("localhost:5000", {}, "http://localhost:5000", False),
        ("127.0.0.1:5055", {}, "http://127.0.0.1:5055", False),
        ("[::1]:5000", {}, "http://[::1]:5000", False),
        ("127.0.0.1:5055", {"url": "https://127.0.0.1:5055"}, "https://127.0.0.1:5055", True),
        ("registry.lan:5000", {"insecure": True}, "http://registry.lan:5000", False),
        ("docker.io", {"url": "http://mirror.lan/"}, "http://mirror.lan", False),
        ("foo.com", {"url": "http://foo.com/v2/"}, "http://foo.com", False),
        ("docker.io", {"url": "http://10.0.0.7:5000"}, "http://10.0.0.7:5000", True),
        ("docker.io", {"url": "http://[fd00::7]:5000"}, "http://[fd00::7]:5000", True),
        ("docker.io", {"url": "http://localhost:5000"}, "http://localhost:5000", True),
        ("docker.io", {"url": "http://localhost:5000", "allow_private": False}, "http://localhost:5000", False),
    ],
)
def test_endpoint_of_a_registry(registry: str, options: dict[str, Any], url: str, allow_private: bool) -> None:
    endpoint = endpoint_for(registry, **options)
    assert (endpoint.registry, endpoint.url, endpoint.allow_private) == (registry, url, allow_private)


@pytest.mark.parametrize("url", ["ftp://mirror", "https://user:pass@mirror", "https://", "https://mirror:99999"])
def test_endpoint_that_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"endpoint of registry 'quay.io'.*expected http\(s\)://host"):
        endpoint_for("quay.io", url=url)


@pytest.mark.parametrize(
    "text",
    [
        "file:///etc/passwd",
        "/v2/",
        "http://",
        "http://u:p@h/",
        "http://u@h/",
        "http://a\\b/",
        "http://h%00/",
        "http://[::1/",
        "http://[]@",
    ],
)
def test_urls_refused(text: str) -> None:
    with pytest.raises(UpstreamError, match="not an http"):
        parse_url(text)


def test_signed_urls_stay_as_they_are() -> None:
    text = "https://cdn.example/a%2Fb/%7Euser?X-Sig=a%2Bb%2F%3D&q=%20"
    assert str(parse_url(text)) == text
    assert str(parse_url("../c%2Fd?s=%7E", parse_url(text))) == "https://cdn.example/c%2Fd?s=%7E"


async def test_private_addresses_are_refused_unless_configured(upstream: Start) -> None:
    server = serving(upstream)
    port = server.address.partition(":")[2]
    async with egress_to() as egress:
        # A name that resolves to loopback, and literals.
        for host in ("localhost", "127.0.0.1", "127.0.0.2", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"):
            with pytest.raises(AddressRefused, match=r"allow_private = true in \[registries"):
                await egress.request("GET", f"http://{host}:{port}/v2/")
        for host in ("2130706433", "127.1", "0x7f.0.0.1"):
            with pytest.raises((HostUnknown, AddressRefused)):
                await egress.request("GET", f"http://{host}:{port}/v2/")
    assert server.log == []


@pytest.mark.parametrize("host", ["256.1.1.1", "1.2.3.4.5", "2130706433"])
async def test_what_only_looks_like_an_address(host: str) -> None:
    async with egress_to() as egress:
        with pytest.raises(HostUnknown, match=f"^{host} is no host that can be connected to: "):
            await egress.request("GET", f"https://{host}/v2/")


async def test_a_pooled_connection_does_not_pass_the_guard(upstream: Start) -> None:
    server = serving(upstream)
    endpoint = opened(server.address)[server.address]
    async with egress_to() as egress:
        (await egress.request("GET", f"{server.url}/v2/", endpoint=endpoint)).release()
        with pytest.raises(AddressRefused):
            await egress.request("GET", f"{server.url}/v2/")
    assert len(server.log) == 1


# --- redirects ---------------------------------------------------------------------------------------------------


async def test_request_does_not_follow(upstream: Start) -> None:
    server = serving(upstream, redirect_blobs_to="http://127.0.0.1:1")
    async with egress_to(server.address) as egress:
        response = await egress.request("GET", server.url + path_of(CONTENT))
        response.release()
        assert response.status == 307


async def test_redirect_to_another_host_loses_the_authorization(upstream: Start) -> None:
    target = serving(upstream)
    server = serving(upstream, redirect_blobs_to=target.url)
    async with egress_to(server.address, target.address) as egress:
        response = await egress.follow(
            "GET", server.url + path_of(CONTENT), headers={"Authorization": "Basic c2VjcmV0"}
        )
        assert await egress.read(response, 1 << 20, "it") == CONTENT.content
    assert server.log[0].headers["Authorization"] == "Basic c2VjcmV0"
    assert "Authorization" not in target.log[0].headers
    assert target.log[0].headers["Accept-Encoding"] == "identity"
    assert target.log[0].headers["User-Agent"].startswith("wave-proxy/")


async def test_redirect_on_the_same_host_keeps_it() -> None:
    async def reply(head: str) -> bytes:
        return answer("302 Found", Location="/b") if head.startswith("GET /a ") else answer()

    async with scripted(reply) as server, egress_to(f"127.0.0.1:{server.port}") as egress:
        url = f"http://127.0.0.1:{server.port}/a"
        (await egress.follow("GET", url, headers={"Authorization": "Basic c2VjcmV0"})).release()
    assert ["Basic c2VjcmV0" in head for head in server.heads] == [True, True]


async def test_redirect_away_and_back_does_not_bring_it_back(upstream: Start) -> None:
    home = ""

    async def reply(head: str) -> bytes:
        if head.startswith("GET /a "):
            return answer("307 Temporary Redirect", Location=f"{away}/{home}/c")
        return answer()

    async def bounce(head: str) -> bytes:
        return answer("307 Temporary Redirect", Location=head.split()[1].removeprefix("/"))

    async with scripted(reply) as server, scripted(bounce) as other:
        home, away = f"http://127.0.0.1:{server.port}", f"http://127.0.0.1:{other.port}"
        async with egress_to(f"127.0.0.1:{server.port}", f"127.0.0.1:{other.port}") as egress:
            (await egress.follow("GET", f"{home}/a", headers={"Authorization": "x"})).release()
    assert ["Authorization" in head for head in server.heads] == [True, False]


async def test_redirect_to_a_private_host_is_refused(upstream: Start) -> None:
    target = serving(upstream)
    server = serving(upstream, redirect_blobs_to=target.url)
    async with egress_to(server.address) as egress:
        with pytest.raises(AddressRefused, match=target.address):
            await egress.follow("GET", server.url + path_of(CONTENT))
    assert target.log == []


async def test_redirect_loop(upstream: Start) -> None:
    server = serving(upstream)
    server.faults.redirect_blobs_to = server.url
    async with egress_to(server.address) as egress:
        with pytest.raises(UpstreamError, match="in a loop"):
            await egress.follow("GET", server.url + path_of(CONTENT))
    assert len(server.log) == 1


@pytest.mark.parametrize(
    ("location", "message", "requests"),
    [
        ("{path}x", "more than 5 times", 6),
        ("", "to nowhere", 1),
        ("ftp://127.0.0.1/", "not an http", 1),
        ("http://user:pass@127.0.0.1/", "not an http", 1),
    ],
)
async def test_redirects_that_lead_nowhere(location: str, message: str, requests: int) -> None:
    async def reply(head: str) -> bytes:
        # Part of the body stays out: the connection is useless and has to be closed.
        return answer("301 Moved", Location=location.format(path=head.split()[1])).replace(b"Length: 0", b"Length: 9")

    async with scripted(reply) as server, egress_to(f"127.0.0.1:{server.port}") as egress:
        with pytest.raises(UpstreamError, match=message):
            await egress.follow("GET", f"http://127.0.0.1:{server.port}/a")
    assert len(server.heads) == requests


# --- TLS and proxies ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a self-signed certificate for 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=upstream", "-days", "2", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "keyUsage=critical,digitalSignature,keyCertSign"),
            *("-keyout", folder / "key.pem", "-out", folder / "cert.pem"),
        ],
        check=True,
        capture_output=True,
    )
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return both


def tls_server(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


async def test_own_certificate_authority(certificate: Path) -> None:
    async with scripted(answer(body=b"hello"), tls_server(certificate)) as server:
        address = f"127.0.0.1:{server.port}"
        endpoint = endpoint_for(address, url=f"https://{address}", ca_file=str(certificate))
        egress = Egress({address: endpoint})
        try:
            response = await egress.request("GET", f"https://{address}/")
            assert await egress.read(response, 100, "it") == b"hello"
            assert connections_in_use(egress) == 0
        finally:
            await egress.close()


async def test_unknown_certificate_authority(certificate: Path) -> None:
    async with scripted(answer(), tls_server(certificate)) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to() as egress:
            endpoint = endpoint_for(address, url=f"https://{address}")
            with pytest.raises(UpstreamUnavailable, match=r"(?i)no TLS connection.*certificate.*ca_file"):
                await egress.request("GET", f"https://{address}/", endpoint=endpoint)
    assert server.heads == []


def test_certificate_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ssl.SSLError):
        Egress({"quay.io": endpoint_for("quay.io", ca_file=str(tmp_path / "ca.pem"))})
    with pytest.raises(FileNotFoundError):
        Egress({"quay.io": endpoint_for("quay.io", ca_file=str(tmp_path / "missing.pem"))})


async def test_https_goes_down_to_http_only_where_that_is_configured(certificate: Path, upstream: Start) -> None:
    target = serving(upstream)
    redirect = answer("302 Found", Location=target.url + path_of(CONTENT))
    async with scripted(redirect, tls_server(certificate)) as server:
        address = f"127.0.0.1:{server.port}"
        secure = endpoint_for(address, url=f"https://{address}", ca_file=str(certificate))
        async with egress_to() as egress:
            with pytest.raises(UpstreamError, match="redirects from https to http"):
                await egress.follow("GET", f"https://{address}/", endpoint=secure)
        assert target.log == []
        async with egress_to(target.address) as egress:
            response = await egress.follow("GET", f"https://{address}/", endpoint=secure)
            assert await egress.read(response, 1 << 20, "it") == CONTENT.content


async def test_forward_proxy(upstream: Start) -> None:
    async with scripted(answer(body=b"by proxy")) as proxy:
        # Only the proxy resolves the name, and its own address is not guarded.
        endpoint = endpoint_for("registry.test", insecure=True, proxy=f"http://127.0.0.1:{proxy.port}")
        egress = Egress({"registry.test": endpoint})
        try:
            response = await egress.request("GET", "http://registry.test/v2/")
            assert await egress.read(response, 100, "it") == b"by proxy"
        finally:
            await egress.close()
    assert proxy.heads[0].startswith("GET http://registry.test/v2/ HTTP/1.1\r\n")


# --- failures ----------------------------------------------------------------------------------------------------


async def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with egress_to(address) as egress:
            with pytest.raises(UpstreamUnavailable, match=f"no answer from {address}"):
                await egress.request("GET", f"http://{address}/v2/")


async def test_connection_closed_without_an_answer() -> None:
    async def hang_up(_: str) -> bytes:
        raise ConnectionError

    async with scripted(hang_up) as server, egress_to(f"127.0.0.1:{server.port}") as egress:
        with pytest.raises(UpstreamUnavailable):
            await egress.request("GET", f"http://127.0.0.1:{server.port}/")


async def test_answer_that_is_not_http() -> None:
    async with scripted(b"SSH-2.0-OpenSSH_9.2\r\n\r\n") as server, egress_to(f"127.0.0.1:{server.port}") as egress:
        with pytest.raises(UpstreamError, match="not HTTP"):
            await egress.request("GET", f"http://127.0.0.1:{server.port}/")


async def test_no_head_in_time(upstream: Start) -> None:
    server = serving(upstream, stall_at=-1)
    async with egress_to(server.address, response_timeout_s=0.1) as egress:
        with pytest.raises(UpstreamTimeout, match=r"within 0\.1 s"):
            await egress.request("GET", server.url + path_of(CONTENT))


async def test_head_that_comes_byte_by_byte() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with egress_to(address, connect_timeout_s=0.1, response_timeout_s=0.1) as egress:
            with pytest.raises(UpstreamTimeout):
                await egress.request("GET", f"http://{address}/")


async def test_what_reading_the_body_raises_is_what_the_request_raises() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"begun"
        raise Denied("the source has changed its mind")

    ended = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        ended.set()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with egress_to(address) as egress:
            with pytest.raises(Denied, match="changed its mind"):
                await egress.follow("PUT", f"http://{address}/", headers={"Content-Length": "9"}, body=body)
        await ended.wait()


async def test_body_that_stalls(upstream: Start) -> None:
    server = serving(upstream, stall_at=1000)
    async with egress_to(server.address, idle_timeout_s=0.1) as egress:
        response = await egress.request("GET", server.url + path_of(CONTENT))
        with pytest.raises(UpstreamTimeout, match=r"nothing for 0\.1 s"):
            await egress.read(response, 1 << 20, "it")


async def test_slow_reader_is_no_stalled_upstream(upstream: Start) -> None:
    server = upstream()
    big = blob(random_blob(16 << 20, seed=2))
    server.add_blob("lib/tool", big)
    async with egress_to(server.address, idle_timeout_s=1.0) as egress:
        response = await egress.request("GET", server.url + path_of(big))
        await asyncio.sleep(2.0)
        assert await egress.read(response, 16 << 20, "it") == big.content


@pytest.mark.parametrize("no_content_length", [False, True])
async def test_body_that_breaks_off(upstream: Start, no_content_length: bool) -> None:
    server = serving(upstream, truncate_at=1000, no_content_length=no_content_length)
    async with egress_to(server.address) as egress:
        response = await egress.request("GET", server.url + path_of(CONTENT))
        with pytest.raises(UpstreamUnavailable, match="breaks off"):
            await egress.read(response, 1 << 20, "it")


async def test_body_over_the_limit(upstream: Start) -> None:
    server = serving(upstream)
    async with egress_to(server.address) as egress:
        response = await egress.request("GET", server.url + path_of(CONTENT))
        with pytest.raises(UpstreamError, match="more than the 299999 bytes"):
            await egress.read(response, 299_999, "it")


async def test_cancelled_while_waiting(upstream: Start) -> None:
    server = serving(upstream, stall_at=-1)
    async with egress_to(server.address) as egress:
        waiting = asyncio.create_task(egress.request("GET", server.url + path_of(CONTENT)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_bodies_are_not_decoded() -> None:
    packed = answer(body=b"\x1f\x8bpacked", Content_Encoding="gzip")
    async with scripted(packed) as server, egress_to(f"127.0.0.1:{server.port}") as egress:
        response = await egress.request("GET", f"http://127.0.0.1:{server.port}/")
        assert await egress.read(response, 100, "it") == b"\x1f\x8bpacked"


NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3", 3),
        (" 3 ", 3),
        ("0", 1),
        ("-5", 1),
        ("36000", 60),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10),
        ("Tue, 14 Nov 2023 23:13:30 GMT", 60),
        ("Tue, 14 Nov 2023 22:00:00 -0000", 1),
        ("", None),
        ("soon", None),
        ("9" * 400, None),
        ("1.5", None),
    ],
)
def test_retry_after(value: str, expected: int | None) -> None:
    assert retry_after_s(value, NOW) == expected


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (
            "429 Too Many",
            b'{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}',
            TooManyRequests,
            "slow down",
        ),
        ("503 Busy", b"<html>", UpstreamFailing, "HTTP 503"),
        ("418 Teapot", b'{"errors":[{"code":"TEAPOT"}]}', UpstreamError, "TEAPOT"),
        ("400 Bad", b'{"details":"no scope"}', UpstreamError, "no scope"),
    ],
)
async def test_failures(status: str, body: bytes, kind: type[Exception], message: str) -> None:
    reply = answer(status, body, Retry_After="7")
    async with scripted(reply) as server, egress_to(f"127.0.0.1:{server.port}") as egress:
        error = await egress.failure(await egress.request("GET", f"http://127.0.0.1:{server.port}/"), "it")
    assert type(error) is kind
    assert message in str(error)
    if isinstance(error, TooManyRequests):
        assert error.retry_after_s == 7


# --- the way to our own api --------------------------------------------------------------------------------------


async def test_unix_session_passes_bytes_and_headers_through(tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    packed = answer(body=b"\x1f\x8bpacked", Content_Encoding="gzip")
    async with scripted(packed, path=path) as server, unix_session(path) as session:
        async with session.get("http://api/status", headers={"X-Mine": "1"}) as response:
            assert await response.read() == b"\x1f\x8bpacked"
        assert session.timeout.total is None
    assert server.heads == ["GET /status HTTP/1.1\r\nHost: api\r\nX-Mine: 1\r\n\r\n"]


# --- bare connections --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "::1", "10.0.0.1", "2130706433", "0"])
async def test_a_bare_connection_goes_to_public_addresses_only(host: str) -> None:
    egress = Egress({})
    with pytest.raises(AddressRefused, match="is at a private or loopback address"):
        await egress.connect(host, 80)


@pytest.mark.parametrize("configured", [True, False])
async def test_a_bare_connection_is_made_where_that_is_allowed(upstream: Start, configured: bool) -> None:
    server = serving(upstream)
    egress = Egress(opened(server.address) if configured else {})
    host, _, port = server.address.partition(":")
    reader, writer = await egress.connect(host, int(port), allow_private=not configured)
    writer.write(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 OK\r\n")
    writer.close()
    await writer.wait_closed()


async def test_a_strict_connection_goes_to_no_address_of_this_machine(
    upstream: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many machines have a public address, behind whose firewall they are themselves."""
    monkeypatch.setattr("wave_proxy.upstream.egress.is_public", lambda _address: True)
    server = serving(upstream)
    host, _, port = server.address.partition(":")
    egress = Egress({})
    with pytest.raises(AddressRefused):
        await egress.connect(host, int(port), strict=True)
    for permitted in ({"strict": False}, {"strict": True, "allow_private": True}):
        _, writer = await egress.connect(host, int(port), **permitted)
        writer.close()
        await writer.wait_closed()
    assert await _resolve("1.2.3.4", 80, private=False, strict=True) == ["1.2.3.4"]


async def test_a_bare_connection_that_fails_says_why() -> None:
    egress = Egress({})
    with pytest.raises(HostUnknown, match=r"can't resolve nosuch\.invalid"):
        await egress.connect("nosuch.invalid", 80)
    with pytest.raises(UpstreamUnavailable, match=r"no connection to 127\.0\.0\.1:1: "):
        await egress.connect("127.0.0.1", 1, allow_private=True)
    with pytest.raises(UpstreamUnavailable):
        await egress.connect("a" * 300, 80)
    with pytest.raises(Offline):
        await Egress({}, offline=True).connect("127.0.0.1", 1, allow_private=True)
