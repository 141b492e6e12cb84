"""Composition root of one proxy process, ``python -m wave_proxy.serve``: builds the pull path and serves the port.

The supervisor starts it, with the settings in the environment as every part gets them: ``WAVE_CONFIG_FILE`` names the
TOML file, ``WAVE_API_SOCKET`` the api's Unix socket.
"""

import asyncio
import gc
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from setproctitle import setproctitle

from wave_proxy import logs
from wave_proxy.cache.blobs import BlobStore
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.fills import Fills
from wave_proxy.cache.grants import Grants
from wave_proxy.cache.local import LocalRepositories
from wave_proxy.cache.manifests import ManifestStore
from wave_proxy.cache.permissions import Permissions
from wave_proxy.cache.repositories import Repositories
from wave_proxy.cache.tags import Tags
from wave_proxy.cache.uploads import Uploads
from wave_proxy.config.handed import ConfigInvalid, receive
from wave_proxy.errors import StateUnavailable
from wave_proxy.image.limit import parse_limit
from wave_proxy.readiness import raise_file_limit, say_ready
from wave_proxy.serve.absence import Absence
from wave_proxy.serve.access import Access
from wave_proxy.serve.app import App
from wave_proxy.serve.augment import Augmenter
from wave_proxy.serve.forward import Forwarder
from wave_proxy.serve.hold import Holds
from wave_proxy.serve.http import Limits, Server
from wave_proxy.serve.jobs import follow_jobs
from wave_proxy.serve.layers import Layers
from wave_proxy.serve.lifetimes import Lifetimes
from wave_proxy.serve.login import Logins
from wave_proxy.serve.metrics import Publisher, Sources
from wave_proxy.serve.origin import ClientAddress
from wave_proxy.serve.platform_logins import PlatformLogins
from wave_proxy.serve.pull import Puller
from wave_proxy.serve.push import BodyLimit, Pusher
from wave_proxy.serve.ready import ReadyReplies
from wave_proxy.serve.resolve import Resolver
from wave_proxy.serve.stats import RequestStats
from wave_proxy.serve.surround import Surround
from wave_proxy.serve.tls import server_context
from wave_proxy.serve.tunnel import Tunnels
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.quota import Quotas
from wave_proxy.state.redis import Redis, cancel, check, connect, wait_until_up
from wave_proxy.state.tokens import TokenStore
from wave_proxy.state.usage import Usage
from wave_proxy.upstream.aws import read_ecr
from wave_proxy.upstream.egress import Egress, unix_session
from wave_proxy.upstream.registry import Registry
from wave_proxy.upstream.tables import read_credentials, read_endpoints, read_limits

if TYPE_CHECKING:
    from wave_proxy.config.model import QuotaSettings, Settings


_UNSENT_BYTES = 1 << 18  # of a connection, before it takes no more


def main() -> None:
    """Serve until SIGTERM."""
    try:
        settings = receive()
        logs.configure(settings.log.format, settings.log.level, os.environ.get("WAVE_PART", "proxy"))
        uvloop.run(_run(settings))
    except (ConfigInvalid, StateUnavailable, OSError, ValueError) as err:
        sys.exit(f"wave-proxy: {err}")


async def _run(settings: "Settings") -> None:
    setproctitle(f"wave-proxy: {os.environ.get('WAVE_PART', 'proxy')}")
    raise_file_limit()
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    tls = server_context(settings.tls_cert, settings.tls_key) if settings.tls_cert else None
    places = [(sock, tls) for sock in _listening_sockets(settings.host, settings.port)]
    if own_port := os.environ.get("WAVE_OWN_PORT"):  # for the other parts on this machine
        places += [(sock, None) for sock in _listening_sockets("127.0.0.1", int(own_port))]
    redis = connect(settings.redis_url.get_secret_value())
    await wait_until_up(redis)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as background:
        server = _compose(settings, redis, stack, background)
        listeners = [await loop.create_server(server, sock=sock, ssl=tls, backlog=4096) for sock, tls in places]
        gc.freeze()  # what was built so far lives as long as the process: no collection has to look at it
        say_ready()
        await stop.wait()
        for listener in listeners:
            listener.close()
        await server.shut_down(settings.shutdown_grace)
        await stack.aclose()


def _compose(settings: "Settings", redis: Redis, stack: AsyncExitStack, background: asyncio.TaskGroup) -> Server:
    """Everything that answers a request, from the outside in; ``stack`` closes it, in reverse."""
    stack.push_async_callback(redis.aclose)
    tokens = TokenStore(redis, settings.tokens.retention, settings.tokens.max_lifetime)
    registry = _registry(settings, stack)
    blobs = BlobStore(settings.data)
    evictor = Evictor(settings.data, settings.cache.max_bytes)
    grants = Grants(settings.data)
    fills = Fills(settings.data, blobs, evictor, grants)
    local = LocalRepositories(settings.data, blobs, settings.authority)
    repositories = Repositories(
        registry,
        Tags(settings.data, settings.cache.tag_ttl),
        ManifestStore(settings.data),
        blobs,
        fills,
        grants,
        Permissions(settings.data, settings.cache.permission_ttl),
        local,
    )
    stack.push_async_callback(repositories.close)
    augmenter = Augmenter(repositories, tokens)
    stack.push_async_callback(augmenter.close)
    quotas, usage, stats = _quotas(settings.quota, redis), Usage(redis), RequestStats()
    stack.push_async_callback(usage.close)
    stack.push_async_callback(quotas.close)
    ready = ReadyReplies(quotas, usage, stats, local.changes)
    api = os.environ["WAVE_API_SOCKET"]
    platform_logins = PlatformLogins(unix_session(api))
    stack.push_async_callback(platform_logins.close)
    access = Access(read_credentials(settings.registries), platform_logins, settings.authority)
    resolver = Resolver(tokens, ready, access, settings.authority, anonymous=settings.access.anonymous)
    stack.push_async_callback(resolver.close)
    layers = Layers(repositories, registry, blobs, tokens, access)
    absence = Absence()
    forwarder = Forwarder(unix_session(api), Tunnels(api, absence), absence)
    stack.push_async_callback(forwarder.close)
    builds = BuildStore(redis, BuildLimits(settings.build.max_running))
    followers = (resolver.follow_deletions(), follow_jobs(builds, ready), usage.follow_days())
    for coroutine in (*followers, evictor.run(), quotas.run(), usage.run()):
        stack.push_async_callback(cancel, background.create_task(coroutine))
    holds = Holds(builds, settings.build.pull_wait)
    stack.push_async_callback(holds.close)
    uploads = Uploads(settings.data, local, evictor, settings.local.max_blob_bytes)
    stack.callback(uploads.close)
    pusher = Pusher(local, uploads, _logins(settings))
    lifetimes = Lifetimes(tokens, settings.tokens.lifetime)
    puller = Puller(resolver, repositories, augmenter, layers, tokens, quotas, usage, holds, pusher, lifetimes)
    app = App(puller, forwarder, stats, settings.log.requests)
    limits = _limits(settings)
    headers = settings.security_headers.headers
    server = Server(
        Surround(app, headers, settings.http.deny_paths),
        limits,
        ClientAddress(settings.http.trusted_proxies),
        ready,
        BodyLimit(limits.max_body_bytes),
        headers,
    )
    if folder := os.environ.get("WAVE_METRICS_FOLDER"):
        counted = (stats, fills.stats, registry.stats, evictor.stats, quotas.stats)
        sources = Sources(*counted, lambda: len(server.connections), partial(check, redis))
        _publish(Publisher(Path(folder), os.environ["WAVE_PART"], sources), stack, background)
    return server


def _registry(settings: "Settings", stack: AsyncExitStack) -> Registry:
    egress = Egress(
        read_endpoints(settings.registries),
        connect_timeout_s=settings.upstream.connect_timeout,
        response_timeout_s=settings.upstream.response_timeout,
        idle_timeout_s=settings.upstream.idle_timeout,
        offline=settings.upstream.offline,
    )
    stack.push_async_callback(egress.close)
    registry = Registry(
        egress,
        read_credentials(settings.registries).only(),  # each pull brings the login that applies to it
        attempts=settings.upstream.attempts,
        limits=read_limits(
            settings.registries, settings.upstream.max_connections, settings.workers or os.cpu_count() or 1
        ),
        parallel=settings.upstream.parallel,
        ecr=read_ecr(egress, settings.aws),
    )
    stack.push_async_callback(registry.close)
    return registry


def _publish(publisher: Publisher, stack: AsyncExitStack, background: asyncio.TaskGroup) -> None:
    stack.push_async_callback(publisher.close)
    for coroutine in (publisher.run(), publisher.watch_loop(), publisher.watch_redis()):
        stack.push_async_callback(cancel, background.create_task(coroutine))


def _quotas(settings: "QuotaSettings", redis: Redis) -> Quotas:
    return Quotas(
        redis,
        {
            ("pull", False): parse_limit(settings.pull_anonymous),
            ("pull", True): parse_limit(settings.pull_identified),
        },
        wait_s=settings.wait,
        max_waiting=settings.max_waiting,
        open_when_down=settings.when_redis_is_down == "open",
    )


def _logins(settings: "Settings") -> Logins:
    hashes = {user: text.get_secret_value() for user, text in settings.accounts.items()}
    accounts = Accounts(hashes, builder_secret=settings.build.secret.get_secret_value())
    return Logins(accounts, anonymous=settings.local.anonymous_push)


def _limits(settings: "Settings") -> Limits:
    return Limits(
        header_timeout_s=settings.http.header_timeout,
        idle_timeout_s=settings.http.idle_timeout,
        write_timeout_s=settings.http.write_timeout,
        max_header_bytes=settings.http.max_header_bytes,
        max_body_bytes=settings.http.max_body_bytes,
    )


def _listening_sockets(host: str, port: int) -> list[socket.socket]:
    """One socket an address, each shared with the other workers by the kernel."""
    infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets = []
    for family, kind, protocol, _, address in infos:
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Connections inherit it. Without it the kernel holds megabytes for each slow reader, and a thousand of them
        # leave none for the others.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind(address)
        except OSError:
            sock.close()
            if family == socket.AF_INET6 and not host:
                continue  # a kernel without IPv6
            raise
        sock.setblocking(False)
        sockets.append(sock)
    return sockets


if __name__ == "__main__":
    main()
