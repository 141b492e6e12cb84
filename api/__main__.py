"""Composition root of the REST API: ``python -m api --socket PATH``, with the settings from the environment.

``WAVE_CONFIG_FILE`` names the TOML file, if there is one. The proxy in front is the only client of the socket.
"""

import argparse
import os
import signal
import sys
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import NoReturn
from urllib.parse import urlsplit

import uvicorn
import uvloop
from starlette.applications import Starlette

from api.accounts import Accounts
from api.app import create_app
from api.containers import Containers
from api.locations import OpenHosts, address_of
from wave_proxy.config import ConfigInvalid, Settings, receive
from wave_proxy.errors import StateUnavailable
from wave_proxy.logs import configure
from wave_proxy.readiness import say_ready
from wave_proxy.state.redis import check, connect, wait_until_up
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.egress import Egress, Endpoint
from wave_proxy.upstream.registry import Registry
from wave_proxy.upstream.tables import read_credentials, read_endpoints

# Connections from the proxy are reused; it should be the one to close them.
_KEEP_ALIVE_S = 300


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m api", description="The REST API, behind the proxy's port.")
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to listen on")
    path: Path = parser.parse_args().socket
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        settings = receive()
        configure(settings.log.format, settings.log.level, "api")
        uvloop.run(_serve(settings, path))
    except (ConfigInvalid, StateUnavailable, OSError, ValueError) as err:
        sys.exit(f"wave-proxy api: {err}")


def _end(_number: int, _frame: object) -> NoReturn:
    # Also called, again, by uvicorn once it has shut down in order.
    raise SystemExit(0)


async def _serve(settings: Settings, path: Path) -> None:
    async with AsyncExitStack() as stack:
        config = uvicorn.Config(
            await _compose(settings, stack),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(int(settings.shutdown_grace), 1),
        )
        listener = stack.enter_context(_listen(path))
        say_ready()  # the socket takes connections from here on
        await uvicorn.Server(config).serve([listener])


async def _compose(settings: Settings, stack: AsyncExitStack) -> Starlette:
    if not settings.redis_url.get_secret_value():
        raise ConfigInvalid("redis_url: the api needs a Redis to talk to; `wave-proxy serve` brings its own")
    accounts = Accounts({user: text.get_secret_value() for user, text in settings.accounts.items()})
    redis = connect(settings.redis_url.get_secret_value())
    stack.push_async_callback(redis.aclose)
    await wait_until_up(redis)
    endpoints = read_endpoints(settings.registries)
    egress = Egress(
        endpoints,
        connect_timeout_s=settings.upstream.connect_timeout,
        response_timeout_s=settings.upstream.response_timeout,
        idle_timeout_s=settings.upstream.idle_timeout,
        offline=settings.upstream.offline,
    )
    stack.push_async_callback(egress.close)
    registry = Registry(egress, read_credentials(settings.registries), attempts=settings.upstream.attempts)
    stack.push_async_callback(registry.close)
    containers = Containers(
        TokenStore(redis, settings.tokens.retention),
        registry,
        accounts,
        _open_hosts(endpoints),
        authority=urlsplit(settings.public_url).netloc,
        lifetime_s=settings.tokens.lifetime,
        max_body_bytes=settings.http.max_body_bytes,
    )
    return create_app(containers, partial(check, redis))


def _open_hosts(endpoints: dict[str, Endpoint]) -> OpenHosts:
    open_ones = [endpoint for endpoint in endpoints.values() if endpoint.allow_private or endpoint.proxy]
    return OpenHosts(frozenset(endpoints), frozenset(address_of(endpoint.url) for endpoint in open_ones))


def _listen(path: Path) -> socket:
    """A socket that this user alone can connect to: whoever does can say which client it speaks for."""
    path.unlink(missing_ok=True)
    listener = socket(AF_UNIX, SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(1024)
    finally:
        os.umask(umask)
    return listener


if __name__ == "__main__":
    main()
