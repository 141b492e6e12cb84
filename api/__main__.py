"""Composition root of the REST API: ``python -m api --socket PATH``, with the settings from the environment.

``WAVE_CONFIG_FILE`` names the TOML file, if there is one. The proxy in front is the only client of the socket.
"""

import argparse
import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket
from time import time
from typing import NoReturn

import uvicorn
import uvloop
from starlette.applications import Starlette

from api.app import Endpoints, create_app
from api.building.planning import BuildDefaults, Planner
from api.containers import Containers
from api.credentials import CredentialChecks
from api.identities import Identities
from api.images.inspections import Inspections
from api.images.own_images import OwnImages
from api.images.reading import ImageReader
from api.jobs.builds import Builds
from api.jobs.job_logs import JobLogs
from api.jobs.mirrors import Mirrors
from api.jobs.scans import Scans
from api.locations import OpenHosts, address_of
from api.metrics import UsageMetrics
from api.mirroring import Mirroring, MirrorPlaces
from api.orders import Orders
from api.pages.site import Site
from api.platform.logins import InternalLogins
from api.platform.pairing import PairingEndpoint, PairingRules
from api.platform.platforms import Platforms
from api.platform.refreshing import Refreshing
from api.platform.remembered import Remembered
from api.platform.runs import RunLimits, Runs
from api.registries import Registries
from api.scan_orders import ScanOrders
from api.sizes import Sizes
from wave_proxy.config.handed import ConfigInvalid, receive
from wave_proxy.config.model import BuildSettings, PlatformSettings, ScanSettings, Settings
from wave_proxy.errors import StateUnavailable
from wave_proxy.image.limit import parse_limit
from wave_proxy.logs import configure
from wave_proxy.readiness import raise_file_limit, say_ready
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.answers import Answers
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.channel import Channel
from wave_proxy.state.identities import AccessTokens
from wave_proxy.state.jwts import TokenPairs
from wave_proxy.state.pairing import Pairings
from wave_proxy.state.quota import Quotas
from wave_proxy.state.redis import Redis, cancel, check, connect, wait_until_up
from wave_proxy.state.runs import RunTokens
from wave_proxy.state.scans import ScanReports
from wave_proxy.state.secret import obtain_secret
from wave_proxy.state.tokens import TokenStore
from wave_proxy.state.usage import Usage
from wave_proxy.upstream.aws import read_ecr
from wave_proxy.upstream.credentials import Credentials
from wave_proxy.upstream.direct import DirectTransport
from wave_proxy.upstream.egress import Egress, Endpoint
from wave_proxy.upstream.logins import LoginChecks
from wave_proxy.upstream.platform import PlatformClient
from wave_proxy.upstream.registry import Registry
from wave_proxy.upstream.tables import own_login, read_credentials, read_endpoints, with_own

# Connections from the proxy are reused; it should be the one to close them.
_KEEP_ALIVE_S = 300
_MAX_MESSAGE_BYTES = 4 << 20  # of a Platform


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
        raise_file_limit()
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
            ws="websockets-sansio",
            ws_max_size=_MAX_MESSAGE_BYTES,
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
    credentials = read_credentials(settings.registries, own_login(settings.authority, settings.build.secret))
    egress = _egress(settings, endpoints, stack)
    channel, local = Channel(redis, call_s=settings.platform.timeout), f"{settings.authority}/local"
    platforms = _platforms(settings, redis, egress, channel, stack)
    registries = Registries(_registry(settings, egress, stack), credentials, local, platforms)
    identities = Identities(AccessTokens(redis), platforms, anonymous=settings.access.anonymous)
    tokens = TokenStore(redis, settings.tokens.retention, settings.tokens.max_lifetime)
    sizes = Sizes(anonymous=settings.tokens.bytes_anonymous, identified=settings.tokens.bytes_identified)
    builds, usage = _builds(settings.build, redis), _usage(redis, stack)
    reports = ScanReports(redis, settings.build.log_retention)
    secret = await obtain_secret(redis)
    scans = _scans(settings.scan, builds, reports, usage, secret)
    own_images = OwnImages(tokens, settings.authority)
    images = ImageReader(registries, own_images)
    planner = Planner(registries, images, tokens, _defaults(settings), secret)
    containers = Containers(
        tokens,
        registries,
        images,
        identities,
        accounts,
        _open_hosts(endpoints),
        _orders(settings, redis, planner, builds, usage, sizes, stack),
        scans,
        _mirroring(settings, registries, builds, usage, secret),
        sizes,
        public_url=settings.public_url,
        lifetime_s=settings.tokens.lifetime,
        max_body_bytes=settings.http.max_body_bytes,
        runs=_runs(settings.platform, redis, tokens, platforms, stack),
    )
    logs = JobLogs(builds)
    stack.push_async_callback(logs.close)
    inspections = Inspections(
        registries,
        identities,
        own_images,
        images,
        endpoints,
        public_url=settings.public_url,
        max_body_bytes=settings.http.max_body_bytes,
    )
    logins = LoginChecks(egress, endpoints, read_ecr(egress, settings.aws, as_itself=False))
    checks = CredentialChecks(logins, max_body_bytes=settings.http.max_body_bytes)
    paired: list[Endpoints] = [_pairing(settings.platform, redis, channel)]
    if platforms is not None:
        paired.append(InternalLogins(tokens, platforms))
    scan_endpoints, metrics = Scans(builds, reports, enabled=scans.enabled), UsageMetrics(usage, accounts)
    jobs = (Builds(builds, accounts, scans, logs), Mirrors(builds, accounts, scans, logs))
    groups: tuple[Endpoints, ...] = (*jobs, scan_endpoints, inspections, checks, metrics, *paired)
    site = Site(tokens, builds, reports, scans, containers, inspections, settings.authority)
    pages = (site,) if settings.pages.enabled else ()
    urls = (settings.public_url, settings.pages.landing_url)
    return create_app(containers, (*groups, *pages), partial(check, redis), *urls)


def _egress(settings: Settings, endpoints: dict[str, Endpoint], stack: AsyncExitStack) -> Egress:
    egress = Egress(
        with_own(endpoints, settings.authority, settings.own_url),
        connect_timeout_s=settings.upstream.connect_timeout,
        response_timeout_s=settings.upstream.response_timeout,
        idle_timeout_s=settings.upstream.idle_timeout,
        offline=settings.upstream.offline,
    )
    stack.push_async_callback(egress.close)
    return egress


def _registry(settings: Settings, egress: Egress, stack: AsyncExitStack) -> Registry:
    ecr = read_ecr(egress, settings.aws)
    registry = Registry(egress, Credentials({}), attempts=settings.upstream.attempts, ecr=ecr)
    stack.push_async_callback(registry.close)
    return registry


def _builds(settings: BuildSettings, redis: Redis) -> BuildStore:
    return BuildStore(
        redis,
        BuildLimits(settings.max_running, settings.max_running_per_user),
        retention_s=settings.log_retention,
        failure_memory_s=settings.failure_memory,
    )


def _scans(settings: ScanSettings, builds: BuildStore, reports: ScanReports, usage: Usage, secret: bytes) -> ScanOrders:
    return ScanOrders(
        builds,
        reports,
        usage,
        enabled=bool(settings.program),
        timeout_s=settings.timeout,
        memory_s=settings.repeat_after,
        secret=secret,
    )


def _defaults(settings: Settings) -> BuildDefaults:
    build = settings.build
    return BuildDefaults(
        repository=build.repository or f"{settings.authority}/local/build",
        local=f"{settings.authority}/local",
        cache_repository=build.cache_repository,
        conda_template=build.conda_template,
        compression=build.compression,
        timeout_s=build.timeout,
        kept_s=build.log_retention,
    )


def _usage(redis: Redis, stack: AsyncExitStack) -> Usage:
    usage = Usage(redis)
    stack.push_async_callback(usage.close)
    for coroutine in (usage.run(), usage.follow_days()):
        stack.push_async_callback(cancel, asyncio.create_task(coroutine))
    return usage


def _mirroring(
    settings: Settings, registries: Registries, builds: BuildStore, usage: Usage, secret: bytes
) -> Mirroring:
    defaults = _defaults(settings)
    places = MirrorPlaces(settings.authority, (defaults.repository, defaults.cache_repository))
    mirror = settings.mirror
    return Mirroring(builds, registries, usage, places, timeout_s=mirror.timeout, enabled=mirror.enabled, secret=secret)


def _orders(
    settings: Settings,
    redis: Redis,
    planner: Planner,
    builds: BuildStore,
    usage: Usage,
    sizes: Sizes,
    stack: AsyncExitStack,
) -> Orders:
    quotas = Quotas(
        redis,
        {
            ("build", False): parse_limit(settings.quota.build_anonymous),
            ("build", True): parse_limit(settings.quota.build_identified),
        },
        wait_s=settings.quota.wait,
        max_waiting=settings.quota.max_waiting,
        open_when_down=settings.quota.when_redis_is_down == "open",
    )
    stack.push_async_callback(quotas.close)
    stack.push_async_callback(cancel, asyncio.create_task(quotas.run()))
    return Orders(builds, planner, quotas, usage, sizes, enabled=settings.build.engine != "none")


def _platforms(
    settings: Settings, redis: Redis, egress: Egress, channel: Channel, stack: AsyncExitStack
) -> Platforms | None:
    platform, build = settings.platform, settings.build
    if not platform.enabled:
        return None
    stack.push_async_callback(cancel, asyncio.create_task(channel.run()))
    direct = DirectTransport(egress, allow_private=platform.allow_private, timeout_s=platform.timeout)
    transport = direct if platform.direct else channel
    pairs = TokenPairs(redis)
    client = PlatformClient(transport, pairs, platform.endpoints)
    stack.push_async_callback(cancel, asyncio.create_task(Refreshing(pairs, client).run()))
    remembered = Remembered(Answers(redis, settings.tokens.max_lifetime), platform.patience)
    stack.push_async_callback(remembered.close)
    return Platforms(
        platform.endpoints,
        Pairings(redis),
        client,
        pairs,
        remembered,
        read_ecr(egress, settings.aws),
        own=[place for place in (settings.authority, build.repository, build.cache_repository) if place],
    )


def _runs(
    settings: PlatformSettings, redis: Redis, tokens: TokenStore, platforms: Platforms | None, stack: AsyncExitStack
) -> Runs | None:
    if platforms is None:
        return None
    limits = RunLimits(settings.run_lifetime, settings.run_max_lifetime, settings.run_check)
    runs = Runs(RunTokens(redis), tokens, platforms, limits, time)
    stack.push_async_callback(cancel, asyncio.create_task(runs.run()))
    return runs


def _pairing(settings: PlatformSettings, redis: Redis, channel: Channel) -> PairingEndpoint:
    rules = PairingRules(settings.endpoints, settings.pairing_token.get_secret_value(), enabled=settings.enabled)
    return PairingEndpoint(rules, Pairings(redis), channel)


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
