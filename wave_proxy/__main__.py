"""Command line and composition root: reads the settings, builds everything, hands it down."""

import asyncio
import gc
import os
import resource
import signal
import socket
import ssl
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wave_proxy import __version__, logs
from wave_proxy.config import ConfigInvalid, Settings, load, to_toml
from wave_proxy.errors import StateUnavailable
from wave_proxy.supervisor import (
    Part,
    StartFailed,
    Supervisor,
    claim_folder,
    claim_port,
    fail,
    redis_command,
    runtime_folder,
    say_ready,
)

cli = typer.Typer(
    name="wave-proxy",
    help="Container registry proxy and on-demand image builder for compute clusters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="WAVE_CONFIG_FILE", help="Settings in a TOML file.", metavar="FILE"),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on.  [default: all]", show_default=False)]
Port = Annotated[
    int | None, typer.Option(help="Port to listen on; 0 picks a free one.  [default: 9090]", show_default=False)
]
Data = Annotated[
    Path | None, typer.Option(help="Data folder.  [default: ./wave-data]", show_default=False, metavar="DIR")
]
Workers = Annotated[int | None, typer.Option(help="Proxy processes.  [default: one per core]", show_default=False)]
RedisUrl = Annotated[
    str | None,
    typer.Option("--redis", help="Redis to use.  [default: an embedded one]", show_default=False, metavar="URL"),
]
TlsCert = Annotated[Path | None, typer.Option(help="Certificate chain (PEM): speak TLS.", metavar="FILE")]
TlsKey = Annotated[Path | None, typer.Option(help="Private key (PEM) of the certificate.", metavar="FILE")]

_STAGES = {"proxy": 0, "api": 1, "builder": 1, "redis": 2}


@cli.command()
def serve(
    config: ConfigFile = None,
    host: Host = None,
    port: Port = None,
    data: Data = None,
    workers: Workers = None,
    redis: RedisUrl = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Run everything on this machine: proxy, API, builder, and a Redis unless one is given."""
    overrides = _overrides(
        host=host, port=port, data=data, workers=workers, redis_url=redis, tls_cert=tls_cert, tls_key=tls_key
    )
    raise typer.Exit(_supervise(config, overrides, ("proxy", "api", "builder")))


@cli.command()
def proxy(
    config: ConfigFile = None,
    host: Host = None,
    port: Port = None,
    data: Data = None,
    workers: Workers = None,
    redis: RedisUrl = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Run the proxy alone, next to an api with the same data folder or behind a load balancer. Needs a Redis."""
    overrides = _overrides(
        host=host, port=port, data=data, workers=workers, redis_url=redis, tls_cert=tls_cert, tls_key=tls_key
    )
    raise typer.Exit(_supervise(config, overrides, ("proxy",)))


@cli.command()
def api(
    config: ConfigFile = None, data: Data = None, redis: RedisUrl = None, host: Host = None, port: Port = None
) -> None:
    """Run the API alone: on the data folder's Unix socket, and with --port also there. Needs a Redis."""
    arguments = [] if port is None else ["--host", host or "0.0.0.0", "--port", str(port)]
    _become("api", config, _overrides(data=data, redis_url=redis), arguments)


@cli.command()
def builder(config: ConfigFile = None, data: Data = None, redis: RedisUrl = None) -> None:
    """Run the builder alone. Needs a Redis."""
    _become("builder", config, _overrides(data=data, redis_url=redis), [])


@cli.command("config")
def show_config(config: ConfigFile = None) -> None:
    """Check the configuration and print what is in effect, with secrets hidden."""
    print(to_toml(_load(config, {})), end="")


@cli.command()
def version() -> None:
    """Print the version."""
    print(f"wave-proxy {__version__}")


@cli.command(hidden=True)
def worker(config: ConfigFile = None) -> None:
    """One proxy process; the supervisor starts it."""
    import uvloop

    settings = _load(config, {})
    logs.configure(settings.log.format, settings.log.level, os.environ.get("WAVE_PART", "proxy"))
    try:
        uvloop.run(_run_worker(settings))
    except (StateUnavailable, OSError) as err:
        raise typer.Exit(fail(str(err))) from None


def main() -> None:
    """Entry point of ``wave-proxy`` and of ``python -m wave_proxy``."""
    cli()


# --- settings ------------------------------------------------------------------------------------------------------


def _overrides(**given: Any) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _load(config: Path | None, overrides: dict[str, Any]) -> Settings:
    try:
        return load(config, overrides)
    except ConfigInvalid as err:
        fail(str(err))
        raise typer.Exit(2) from None


def _environment(config: Path | None, overrides: dict[str, Any]) -> dict[str, str]:
    """What makes a child process load the same settings."""
    environment = {**os.environ, **{f"WAVE_{key.upper()}": str(value) for key, value in overrides.items()}}
    if config is not None:
        environment["WAVE_CONFIG_FILE"] = str(config.resolve())
    return environment


def _become(module: str, config: Path | None, overrides: dict[str, Any], arguments: list[str]) -> None:
    settings = _load(config, overrides)
    if not settings.redis_url.get_secret_value():
        raise typer.Exit(fail(f"the {module} alone needs a Redis: give its address with --redis URL or WAVE_REDIS_URL"))
    if module == "api":
        arguments = ["--socket", str(runtime_folder(settings.data) / "api.sock"), *arguments]
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], _environment(config, overrides))  # noqa: S606


# --- the supervisor's side -----------------------------------------------------------------------------------------


def _supervise(config: Path | None, overrides: dict[str, Any], parts: tuple[str, ...]) -> int:
    settings = _load(config, overrides)
    logs.configure(settings.log.format, settings.log.level, "supervisor")
    try:
        lock = claim_folder(settings.data) if "api" in parts else None
        if settings.tls_cert:
            _tls_context(settings)
        if url := settings.redis_url.get_secret_value():
            asyncio.run(_check_redis(url))
        overrides["port"] = claim_port(settings.host, settings.port)
        settings = _load(config, overrides)
        chosen = _parts(settings, config, overrides, parts)
    except (StartFailed, StateUnavailable) as err:
        return fail(str(err))
    try:
        return Supervisor(chosen, lambda: _announce(settings), settings.shutdown_grace).run()
    finally:
        if lock is not None:
            lock.close()


async def _check_redis(url: str) -> None:
    from wave_proxy.state.redis import connect, wait_until_up

    redis = connect(url)
    try:
        await wait_until_up(redis)
    finally:
        await redis.aclose()


def _announce(settings: Settings) -> None:
    print(f"ready {settings.public_url}", file=sys.stderr, flush=True)


def _parts(settings: Settings, config: Path | None, overrides: dict[str, Any], names: tuple[str, ...]) -> list[Part]:
    sockets = runtime_folder(settings.data)
    parts: list[Part] = []
    if not settings.redis_url.get_secret_value():
        if "api" not in names:
            raise StartFailed("the proxy alone needs a Redis: give its address with --redis URL or WAVE_REDIS_URL")
        redis_socket = sockets / "redis.sock"
        command = redis_command(settings.data, redis_socket)
        parts.append(Part("redis", command, _STAGES["redis"], dict(os.environ), says_ready=False))
        overrides["redis_url"] = f"unix://{redis_socket}"
    environment = _environment(config, overrides)
    environment["WAVE_API_SOCKET"] = str(sockets / "api.sock")
    python = [sys.executable, "-m"]
    commands = {
        "proxy": [*python, "wave_proxy", "worker"],
        "api": [*python, "api", "--socket", str(sockets / "api.sock")],
        "builder": [*python, "builder"],
    }
    for name in names:
        for number in range(settings.workers or os.cpu_count() or 1) if name == "proxy" else (0,):
            label = f"proxy-{number}" if name == "proxy" else name
            parts.append(Part(label, commands[name], _STAGES[name], environment, urgent=name != "builder"))
    return parts


def _tls_context(settings: Settings) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert or "", settings.tls_key)
    except OSError as err:
        raise StartFailed(f"tls_cert {settings.tls_cert} with tls_key {settings.tls_key}: {err}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context


# --- one worker ----------------------------------------------------------------------------------------------------


async def _run_worker(settings: Settings) -> None:
    from setproctitle import setproctitle

    from wave_proxy.cache.blobs import BlobStore
    from wave_proxy.cache.evict import Evictor
    from wave_proxy.cache.fill import Fills
    from wave_proxy.cache.grants import Grants
    from wave_proxy.cache.manifests import ManifestStore
    from wave_proxy.cache.repositories import Repositories
    from wave_proxy.cache.tags import Tags
    from wave_proxy.serve.app import App
    from wave_proxy.serve.augment import Augmenter
    from wave_proxy.serve.forward import Forwarder
    from wave_proxy.serve.http import Limits, Server
    from wave_proxy.serve.layers import Layers
    from wave_proxy.serve.pull import Puller
    from wave_proxy.serve.resolve import Resolver
    from wave_proxy.state.redis import connect, wait_until_up
    from wave_proxy.state.tokens import TokenStore
    from wave_proxy.upstream.egress import Egress, unix_session
    from wave_proxy.upstream.registry import Registry
    from wave_proxy.upstream.tables import read_credentials, read_endpoints

    setproctitle(f"wave-proxy: {os.environ.get('WAVE_PART', 'proxy')}")
    _raise_file_limit()
    redis = connect(settings.redis_url.get_secret_value())
    await wait_until_up(redis)
    tokens = TokenStore(redis, settings.tokens.retention)
    egress = Egress(
        read_endpoints(settings.registries),
        connect_timeout_s=settings.upstream.connect_timeout,
        response_timeout_s=settings.upstream.response_timeout,
        idle_timeout_s=settings.upstream.idle_timeout,
    )
    registry = Registry(egress, read_credentials(settings.registries), attempts=settings.upstream.attempts)
    blobs = BlobStore(settings.data)
    evictor = Evictor(settings.data, settings.cache.max_bytes)
    repositories = Repositories(
        registry,
        Tags(settings.data, settings.cache.tag_ttl),
        ManifestStore(settings.data),
        blobs,
        Fills(settings.data, blobs, evictor),
        Grants(settings.data),
    )
    resolver = Resolver(tokens)
    augmenter = Augmenter(repositories, tokens)
    puller = Puller(resolver, repositories, augmenter, Layers(repositories, registry, blobs, tokens), registry, tokens)
    forwarder = Forwarder(unix_session(os.environ["WAVE_API_SOCKET"], limit=256))
    server = Server(
        App(puller, forwarder, settings.log.requests),
        Limits(
            header_timeout_s=settings.http.header_timeout,
            idle_timeout_s=settings.http.idle_timeout,
            write_timeout_s=settings.http.write_timeout,
            max_header_bytes=settings.http.max_header_bytes,
            max_body_bytes=settings.http.max_body_bytes,
        ),
    )
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    tls = _tls_context(settings) if settings.tls_cert else None
    listeners = [
        await loop.create_server(server, sock=sock, ssl=tls, backlog=4096)
        for sock in _listening_sockets(settings.host, settings.port)
    ]
    async with asyncio.TaskGroup() as background:
        tasks = [background.create_task(resolver.follow_deletions()), background.create_task(evictor.run())]
        gc.freeze()
        say_ready()
        await stop.wait()
        for listener in listeners:
            listener.close()
        await server.shut_down(settings.shutdown_grace)
        for task in tasks:
            task.cancel()
    await augmenter.close()
    await repositories.close()
    await forwarder.close()
    await registry.close()
    await egress.close()
    await redis.aclose()


def _listening_sockets(host: str, port: int) -> list[socket.socket]:
    """One socket an address, each shared with the other workers by the kernel."""
    infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets = []
    for family, kind, protocol, _, address in infos:
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()
