"""Listening on loopback for as long as it is wanted, and no connection longer than that."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from socket import socket
from weakref import WeakSet

from aiohttp import web

_TURNS = 5  # of the event loop, until what is accepted is a connection

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def listening(handle: Handler, listener: socket) -> AsyncIterator[None]:
    """Answer what comes to a bound socket. At the end answers that a client has not read yet are cut short."""
    transports: WeakSet[asyncio.Transport] = WeakSet()

    async def noted(request: web.BaseRequest) -> web.StreamResponse:
        if request.transport is not None:
            transports.add(request.transport)
        return await handle(request)

    runner = web.ServerRunner(web.Server(noted, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield
    finally:
        # The event loop loses a connection that it has accepted, but made no transport for, when its server is closed.
        asyncio.get_running_loop().remove_reader(listener.fileno())
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        await runner.cleanup()
        for transport in transports:
            transport.abort()  # one that is only closed stays open for as long as its client does not read
        await asyncio.sleep(0)
