"""``python -m builder``: one builder process, configured as the proxy is (WAVE_CONFIG_FILE and environment)."""

import asyncio
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog

from builder.advisories import Advisories
from builder.child import Allowance
from builder.engines import Engine, EngineMissing
from builder.engines.buildah import Buildah
from builder.engines.buildkit import BuildKit
from builder.engines.missing import MissingEngine
from builder.fetching import Fetching
from builder.forward import Forward, variables
from builder.gate import Gate
from builder.lending import Lending
from builder.limits import Limits
from builder.mirror import Mirrors
from builder.pipeline import Pipeline
from builder.places import Place
from builder.scanner import Scanner
from builder.trivy import ScannerMissing, Trivy
from builder.work import Work, Works
from builder.worker import Worker
from builder.workspace import Workspaces
from wave_proxy.config.handed import ConfigInvalid, receive
from wave_proxy.errors import StateUnavailable
from wave_proxy.image.build import Kind
from wave_proxy.logs import configure
from wave_proxy.state.blob_places import BlobPlaces
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import Redis, connect, wait_until_up
from wave_proxy.state.scans import ScanReports
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.aws import read_ecr
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.egress import Egress
from wave_proxy.upstream.registry import Registry
from wave_proxy.upstream.tables import own_login, read_credentials, read_endpoints, with_own

if TYPE_CHECKING:
    from wave_proxy.config.model import BuildSettings, Settings


log = structlog.get_logger()


async def run(settings: "Settings") -> None:
    """Work until SIGTERM or SIGINT. Raises StateUnavailable when Redis does not answer."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        redis = connect(settings.redis_url.get_secret_value())
        stack.push_async_callback(redis.aclose)
        await wait_until_up(redis)
        log.debug("builder is running", engine=settings.build.engine)
        if not settings.build.secret.get_secret_value():
            log.warning(
                "[build] secret is empty: images can't be pushed to wave-proxy's local repositories; set it to the "
                "same text for the proxy and for the builder"
            )
        worker = await _compose(settings, redis, stack)
        await worker.run(stop, settings.shutdown_grace)
    log.info("builder stopped")


async def _compose(settings: "Settings", redis: Redis, stack: AsyncExitStack) -> Worker:
    egress = Egress(
        with_own(read_endpoints(settings.registries), settings.authority, settings.own_url),
        connect_timeout_s=settings.upstream.connect_timeout,
        response_timeout_s=settings.upstream.response_timeout,
        idle_timeout_s=settings.upstream.idle_timeout,
        offline=settings.upstream.offline,
    )
    stack.push_async_callback(egress.close)
    credentials = read_credentials(settings.registries, own_login(settings.authority, settings.build.secret))
    ecr = read_ecr(egress, settings.aws)
    registry = Registry(egress, credentials, attempts=settings.upstream.attempts, ecr=ecr)
    stack.push_async_callback(registry.close)
    tokens = TokenStore(redis, settings.tokens.retention)
    # What a build adds is read without the builder's own login, which opens every local repository.
    reader = registry.acting_as(read_credentials(settings.registries))
    workspaces = Workspaces(settings.data / "builds", reader, tokens, settings.build.disk)
    store = _store(settings.build, redis)
    for build_id, attempt in await workspaces.remove_leftovers():
        await store.abandon(build_id, attempt)
    lending = Lending(tokens, settings.authority)
    works: dict[Kind, Work] = {}
    if settings.build.engine != "none":
        engine = await _engine(settings, egress, credentials.find(settings.authority))
        works["build"] = Pipeline(engine, workspaces, registry, lending, credentials)
    works["mirror"] = Mirrors(
        workspaces, registry, lending, BlobPlaces(redis), partial(Registry, egress, Credentials({}))
    )
    works["scan"] = await _scanner(settings, registry, workspaces, lending, redis)
    name = f"{socket.gethostname()}-{os.getpid()}-{token_hex(4)}"
    return Worker(store, Works(works), name, slots=settings.build.slots or settings.build.max_running)


async def _scanner(
    settings: "Settings", registry: Registry, workspaces: Workspaces, lending: Lending, redis: Redis
) -> Scanner:
    """What scans; a scan fails with the reason when this machine can't run the program."""
    scan, build = settings.scan, settings.build
    trivy = Trivy(
        scan.program,
        Advisories((scan.cache or settings.data / "scan-cache").absolute(), offline=scan.offline),
        Allowance(build.memory, build.disk, build.log_bytes),
        severities=scan.severities,
        arguments=scan.arguments,
    )
    if scan.program:
        try:
            await trivy.check()
        except ScannerMissing as err:
            log.error("scans can't be run here, and fail until that is mended", reason=str(err))
    fetching = Fetching(registry, workspaces, settings.authority, build.disk)
    reports = ScanReports(redis, build.log_retention)
    return Scanner(trivy, fetching, workspaces, lending, reports, most=scan.max_vulnerabilities)


def _store(settings: "BuildSettings", redis: Redis) -> BuildStore:
    return BuildStore(
        redis,
        BuildLimits(settings.max_running, settings.max_running_per_user),
        retention_s=settings.log_retention,
        failure_memory_s=settings.failure_memory,
    )


async def _engine(settings: "Settings", egress: Egress, own: Login | None) -> Engine:
    """The configured engine; one that fails every build with the reason when this machine can't run it.

    ``own`` is the login of our own registry.
    """
    build = settings.build
    limits = Limits(build.memory, build.processes, build.disk, build.log_bytes)
    is_isolated = build.network == "isolated"
    forward = Forward(egress, build.proxy) if build.proxy else None
    gate = Gate(egress, settings.own_url, build.allow_private, own, forward) if is_isolated else None
    engine: Engine
    if build.engine == "buildkit":
        engine = BuildKit(build.buildkit_address, settings.authority, build.log_bytes)
    else:
        near = (urlsplit(settings.own_url).netloc, *build.allow_private)
        told = variables(build.proxy, (Place.parse(text, 443).host for text in near)) if build.proxy else None
        engine = Buildah(limits, gate, settings.own_url, settings.authority, told)
    try:
        await engine.check()
    except EngineMissing as err:
        log.error("builds can't be run here, and fail until that is mended", reason=str(err))
        return MissingEngine(str(err))
    return engine


def main() -> int:
    """The exit code: 0 after a signal, 2 for settings that can't be used, 1 without Redis."""
    try:
        settings = receive()
    except ConfigInvalid as err:
        print(f"error: {err}", file=sys.stderr)  # noqa: T201
        return 2
    configure(settings.log.format, settings.log.level, "builder")
    os.umask(0o022)  # files of builds have it from here; their folders are for this user alone
    if not settings.redis_url.get_secret_value():
        log.error("redis_url is empty: a builder on its own needs the Redis that the proxy uses; set WAVE_REDIS_URL")
        return 2
    try:
        asyncio.run(run(settings))
    except (StateUnavailable, OSError) as err:
        log.error(str(err))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
