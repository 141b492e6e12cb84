"""For tests of outgoing requests: an egress that must end idle, and a server that answers with given bytes."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.upstream import Upstream
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.egress import Egress, Endpoint, endpoint_for
from wave_proxy.upstream.limits import Limits
from wave_proxy.upstream.registry import Registry

LOGIN = Login("user", "secret")  # what bench.upstream lets in


def opened(*addresses: str, prefix: str = "") -> dict[str, Endpoint]:
    """Endpoints over plain http that may be on this machine."""
    return {a: endpoint_for(a, insecure=True, allow_private=True, prefix=prefix) for a in addresses}


def connections_in_use(egress: Egress) -> int:
    """Connections whose answer is neither read to its end nor closed."""
    connectors = [session.connector for session in egress._sessions.values()]
    return sum(len(connector._acquired) for connector in connectors if connector is not None)


@asynccontextmanager
async def egress_to(*addresses: str, prefix: str = "", **options: Any) -> AsyncIterator[Egress]:
    """An egress with those registries configured; when the test is through, no answer may be open."""
    egress = Egress(opened(*addresses, prefix=prefix), **options)
    try:
        yield egress
        assert connections_in_use(egress) == 0
    finally:
        await egress.close()


@asynccontextmanager
async def registry_at(
    *upstreams: Upstream,
    login: Login | None = None,
    attempts: int = 2,
    limits: Limits | None = None,
    parallel: int = 1,
    prefix: str = "",
    **options: float,
) -> AsyncIterator[Registry]:
    """A client of those upstreams, which it may all log in to; repositories begin with ``prefix`` there."""
    async with egress_to(*(upstream.address for upstream in upstreams), prefix=prefix, **options) as egress:
        logins = {upstream.address: login for upstream in upstreams if login}
        registry = Registry(egress, Credentials(logins), attempts=attempts, limits=limits, parallel=parallel)
        try:
            yield registry
        finally:
            await registry.close()


def answer(status: str = "200 OK", body: bytes = b"", **headers: str) -> bytes:
    """The bytes of an HTTP answer; underscores in header names stand for dashes."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Scripted:
    """A server that is told what to say; ``heads`` are the requests that it got."""

    port: int
    heads: list[str] = field(default_factory=list)


@asynccontextmanager
async def scripted(
    reply: Callable[[str], Awaitable[bytes]] | bytes, context: ssl.SSLContext | None = None, path: str = ""
) -> AsyncIterator[Scripted]:
    """Answer every request with those bytes, or what ``reply`` makes of its head; ``path`` is a Unix socket's."""
    told = Scripted(0)

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                told.heads.append(head)
                writer.write(reply if isinstance(reply, bytes) else await reply(head))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    if path:
        server = await asyncio.start_unix_server(converse, path)
    else:
        server = await asyncio.start_server(converse, "127.0.0.1", 0, ssl=context)
        told.port = server.sockets[0].getsockname()[1]
    async with server:
        yield told
