"""Command line and composition root: reads the settings, builds everything, hands it down."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from secrets import token_hex
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import SecretStr

from wave_proxy import __version__, logs
from wave_proxy.config.handed import ConfigInvalid, hand_down
from wave_proxy.config.loading import load
from wave_proxy.config.model import Settings
from wave_proxy.errors import RequestInvalid, StateUnavailable
from wave_proxy.serve.tls import TlsInvalid, server_context
from wave_proxy.state.accounts import Accounts, hash_password
from wave_proxy.supervisor import (
    Part,
    StartFailed,
    Supervisor,
    claim_folder,
    claim_port,
    fail,
    make_private,
    redis_command,
    runtime_folder,
)

if TYPE_CHECKING:
    from wave_proxy.state.identities import AccessTokens

_log = logs.get_logger()

cli = typer.Typer(
    name="wave-proxy",
    help="Container registry proxy and on-demand image builder for compute clusters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # it would take the name of a table, [accounts], for markup
    pretty_exceptions_enable=False,
)
token = typer.Typer(
    help="Issue, list and revoke access tokens of users, while the service runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
cli.add_typer(token, name="token")
account = typer.Typer(help="Accounts for administration.", no_args_is_help=True, rich_markup_mode=None)
cli.add_typer(account, name="account")

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="WAVE_CONFIG_FILE", help="Settings in a TOML file.", metavar="FILE"),
]
Host = Annotated[str | None, typer.Option(help="Address to listen on. (default: all)", show_default=False)]
Port = Annotated[
    int | None, typer.Option(help="Port to listen on; 0 picks a free one. (default: 9090)", show_default=False)
]
Data = Annotated[
    Path | None, typer.Option(help="Data folder. (default: ./wave-data)", show_default=False, metavar="DIR")
]
Workers = Annotated[int | None, typer.Option(help="Proxy processes. (default: one per core)", show_default=False)]
MetricsPort = Annotated[
    int | None,
    typer.Option(help="Port for Prometheus (/metrics); 0 picks a free one. (default: none)", show_default=False),
]
_redis_option = partial(typer.Option, "--redis", show_default=False, metavar="URL")
RedisUrl = Annotated[str | None, _redis_option(help="Redis to use. (default: an embedded one)")]
SharedRedisUrl = Annotated[str | None, _redis_option(help="Redis to use. (required, here or as redis_url)")]
RunningRedisUrl = Annotated[str | None, _redis_option(help="Redis to use. (default: that of the service in --data)")]
TlsCert = Annotated[Path | None, typer.Option(help="Certificate chain (PEM): speak TLS.", metavar="FILE")]
TlsKey = Annotated[Path | None, typer.Option(help="Private key (PEM) of the certificate.", metavar="FILE")]

_NEEDS_REDIS = "the {} alone needs a Redis: give its address with --redis URL or WAVE_REDIS_URL"
# Builders pull and push through the proxy, so they end first; the proxy hands requests on to the api.
_STAGES = {"builder": 0, "proxy": 1, "api": 2, "metrics": 2, "redis": 3}


def _print_version(wanted: bool = True) -> None:
    if wanted:
        print(f"wave-proxy {__version__}")
        raise typer.Exit


@cli.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options that stand before a command; what they do, their callbacks have done."""


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
    metrics_port: MetricsPort = None,
) -> None:
    """Run everything on this machine: proxy, API, builder, and a Redis unless one is given."""
    overrides = _overrides(
        host=host,
        port=port,
        data=data,
        workers=workers,
        redis_url=redis,
        tls_cert=tls_cert,
        tls_key=tls_key,
        metrics_port=metrics_port,
    )
    raise typer.Exit(_supervise(config, overrides, ("proxy", "api", "builder")))


@cli.command()
def proxy(
    config: ConfigFile = None,
    host: Host = None,
    port: Port = None,
    data: Data = None,
    workers: Workers = None,
    redis: SharedRedisUrl = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    metrics_port: MetricsPort = None,
) -> None:
    """Run the proxy alone, next to an api with the same data folder or behind a load balancer. Needs a Redis."""
    overrides = _overrides(
        host=host,
        port=port,
        data=data,
        workers=workers,
        redis_url=redis,
        tls_cert=tls_cert,
        tls_key=tls_key,
        metrics_port=metrics_port,
    )
    raise typer.Exit(_supervise(config, overrides, ("proxy",)))


@cli.command()
def api(config: ConfigFile = None, data: Data = None, redis: SharedRedisUrl = None) -> None:
    """Run the API alone, for a proxy with the same data folder. Needs a Redis."""
    _become("api", config, _overrides(data=data, redis_url=redis))


@cli.command()
def builder(config: ConfigFile = None, data: Data = None, redis: SharedRedisUrl = None) -> None:
    """Run the builder alone. Needs a Redis."""
    _become("builder", config, _overrides(data=data, redis_url=redis))


@cli.command("config")
def show_config(config: ConfigFile = None) -> None:
    """Check the configuration and print what is in effect, with secrets hidden."""
    from wave_proxy.config.mistakes import unknown_variables
    from wave_proxy.config.writing import to_toml

    settings = _load(config, {})
    if settings.tls_cert:
        try:
            server_context(settings.tls_cert, settings.tls_key)
        except TlsInvalid as err:
            fail(str(err))
            raise typer.Exit(2) from None
    if unknown := unknown_variables(os.environ):
        fail("; ".join(unknown))
        raise typer.Exit(2)
    print(to_toml(settings), end="")


@cli.command()
def version() -> None:
    """Print the version."""
    _print_version()


@token.command("create")
def create_token(
    user: Annotated[str, typer.Option(help="The user's e-mail address.", metavar="MAIL")],
    expires: Annotated[
        str, typer.Option(help="12h, 30d, 8w, a date such as 2026-12-31 (until its end, UTC), or never.")
    ] = "365d",
    note: Annotated[str, typer.Option(help="What it is for, to tell it from others.", metavar="TEXT")] = "",
    config: ConfigFile = None,
    data: Data = None,
    redis: RunningRedisUrl = None,
) -> None:
    """Issue an access token and print it, this once. Others of the user stay as they are."""

    async def issue(tokens: "AccessTokens") -> None:
        text, issued = await tokens.create(user, expires=ends, note=note)
        print(text)
        until = f"until {admin.show_time(ends)} UTC" if ends else "until it is revoked"
        print(f"Access token {issued.id} of {issued.email}, valid {until}. It is not shown again.", file=sys.stderr)

    from wave_proxy import admin

    try:
        ends = admin.parse_expiry(expires, datetime.now(UTC))
    except RequestInvalid as err:
        raise typer.Exit(fail(str(err))) from None
    _with_tokens(config, data, redis, issue)


@token.command("list")
def list_tokens(
    user: Annotated[str, typer.Option(help="Only this user's.", metavar="MAIL", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    config: ConfigFile = None,
    data: Data = None,
    redis: RunningRedisUrl = None,
) -> None:
    """List access tokens, those that ended in the last 90 days too; times are UTC."""

    async def show(tokens: "AccessTokens") -> None:
        asked, now = user.strip().lower(), datetime.now(UTC).timestamp()
        found = [item for item in await tokens.read_all() if asked in ("", item.email)]
        if as_json:
            print(json.dumps([admin.token_json(item, now) for item in found], indent=2))
        elif found:
            print(admin.token_table(found, now))
        else:
            print("No access tokens. `wave-proxy token create --user MAIL` issues one.", file=sys.stderr)

    from wave_proxy import admin

    _with_tokens(config, data, redis, show)


@token.command("revoke")
def revoke_token(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of tokens.", metavar="[ID]...")] = None,
    user: Annotated[str, typer.Option(help="All of this user's.", metavar="MAIL", show_default=False)] = "",
    config: ConfigFile = None,
    data: Data = None,
    redis: RunningRedisUrl = None,
) -> None:
    """End access tokens, for every request from now on. Containers that were requested with them stay."""

    async def revoke(tokens: "AccessTokens") -> None:
        chosen = await admin.choose(tokens, ids or [], user)
        await tokens.revoke(chosen)
        for item in chosen:
            print(
                f"Access token {item.id} of {admin.plain(item.email)} is {'already ' if item.revoked else ''}revoked."
            )

    from wave_proxy import admin

    if bool(ids) == bool(user):
        raise typer.Exit(fail("name tokens by their ids, or a user with --user MAIL"))
    _with_tokens(config, data, redis, revoke)


@account.command("hash")
def hash_account() -> None:
    """Print a password's hash for [accounts]. The password is asked for, or read from a pipe."""
    if sys.stdin.isatty():
        password = str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise typer.Exit(fail("the password is empty"))
    print(hash_password(password))


def main() -> None:
    """Entry point of ``wave-proxy`` and of ``python -m wave_proxy``."""
    cli()


# --- settings ------------------------------------------------------------------------------------------------------


def _overrides(**given: Any) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def _load(config: Path | None, overrides: dict[str, Any]) -> Settings:
    try:
        settings = load(config, overrides)
        Accounts({user: text.get_secret_value() for user, text in settings.accounts.items()})
        return settings
    except (ConfigInvalid, ValueError) as err:
        fail(str(err))
        raise typer.Exit(2) from None


def _warn(settings: Settings, part: str) -> None:
    """Begin the log, with what is probably a mistake."""
    from wave_proxy.config.mistakes import unknown_variables

    logs.configure(settings.log.format, settings.log.level, part)
    for what in unknown_variables(os.environ):
        _log.warning(f"environment: {what}")


def _environment(config: Path | None, overrides: dict[str, Any]) -> dict[str, str]:
    """What makes a child process load the same settings."""
    environment = {**os.environ, **{f"WAVE_{key.upper()}": str(value) for key, value in overrides.items()}}
    if config is not None:
        environment["WAVE_CONFIG_FILE"] = str(config.resolve())
    return environment


def _become(module: str, config: Path | None, overrides: dict[str, Any]) -> None:
    """Go on as another program, in this process."""
    settings = _load(config, overrides)
    _warn(settings, module)
    if not settings.redis_url.get_secret_value():
        raise typer.Exit(fail(_NEEDS_REDIS.format(module)))
    try:
        make_private(settings.data)
        arguments = ["--socket", str(runtime_folder(settings.data) / "api.sock")] if module == "api" else []
    except (StartFailed, OSError) as err:
        raise typer.Exit(fail(str(err))) from None
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], _environment(config, overrides))  # noqa: S606


def _with_tokens(
    config: Path | None, data: Path | None, redis: str | None, work: "Callable[[AccessTokens], Awaitable[None]]"
) -> None:
    """Do ``work`` on the access tokens of the running service; ends with one line when it can't be done."""
    from wave_proxy.admin import CommandFailed, access_tokens

    settings = _load(config, _overrides(data=data, redis_url=redis))
    logs.configure(settings.log.format, settings.log.level, "admin")  # standard output is for what was asked

    async def run() -> None:
        async with access_tokens(settings.redis_url.get_secret_value(), settings.data) as tokens:
            await work(tokens)

    try:
        asyncio.run(run())
    except (CommandFailed, RequestInvalid, StateUnavailable) as err:
        raise typer.Exit(fail(str(err))) from None


# --- the supervisor's side -----------------------------------------------------------------------------------------


def _supervise(config: Path | None, overrides: dict[str, Any], parts: tuple[str, ...]) -> int:
    settings = _load(config, overrides)
    _warn(settings, "supervisor")
    try:
        if "api" not in parts and not settings.redis_url.get_secret_value():
            raise StartFailed(_NEEDS_REDIS.format("proxy"))
        make_private(settings.data)
        lock = claim_folder(settings.data) if "api" in parts else None
        if settings.tls_cert:
            server_context(settings.tls_cert, settings.tls_key)
        if url := settings.redis_url.get_secret_value():
            asyncio.run(_check_redis(url))
        ports = _claim_ports(settings)
        settings = settings.model_copy(update=ports)
        chosen = _parts(settings, parts)
    except (StartFailed, StateUnavailable, TlsInvalid) as err:
        return fail(str(err))
    try:
        return Supervisor(chosen, lambda: _announce(settings), settings.shutdown_grace).run()
    finally:
        rmtree(_metrics_folder(settings), ignore_errors=True)
        if lock is not None:
            rmtree(runtime_folder(settings.data), ignore_errors=True)
            lock.close()


def _claim_ports(settings: Settings) -> dict[str, int]:
    """The numbers of the ports that are wanted, in place of 0 free ones. Raises StartFailed."""
    ports = {"port": claim_port(settings.host, settings.port)}
    if settings.metrics_port is not None:
        if settings.metrics_port == ports["port"]:
            raise StartFailed(f"metrics need a port of their own, and {ports['port']} is taken: give --metrics-port")
        host = settings.metrics_host or settings.host
        ports["metrics_port"] = claim_port(host, settings.metrics_port, "--metrics-port")
    return ports


async def _check_redis(url: str) -> None:
    from wave_proxy.state.redis import connect, wait_until_up

    redis = connect(url)
    try:
        await wait_until_up(redis)
    finally:
        await redis.aclose()


def _announce(settings: Settings) -> None:
    print(f"ready {settings.public_url}", file=sys.stderr, flush=True)
    if not settings.server_url and settings.host in ("", "0.0.0.0", "::"):
        _log.warning("server_url is not set: image names begin with localhost, and only this machine can pull them")
    if settings.metrics_port is not None:
        host = settings.metrics_host or settings.host or "localhost"
        shown = f"[{host}]" if ":" in host else host
        _log.info("metrics for Prometheus", url=f"http://{shown}:{settings.metrics_port}/metrics")


def _parts(settings: Settings, names: tuple[str, ...]) -> list[Part]:
    sockets = runtime_folder(settings.data)
    parts: list[Part] = []
    if not settings.redis_url.get_secret_value():
        redis_socket = sockets / "redis.sock"
        command = redis_command(settings.data, redis_socket)
        parts.append(Part("redis", command, _STAGES["redis"], dict(os.environ), says_ready=False))
        settings = settings.model_copy(update={"redis_url": SecretStr(f"unix://{redis_socket}")})
    if "builder" in names and not settings.build.secret.get_secret_value():
        build = settings.build.model_copy(update={"secret": SecretStr(token_hex(32))})
        settings = settings.model_copy(update={"build": build})
    handed_down = hand_down(settings)
    environment = {
        **os.environ,
        "WAVE_API_SOCKET": str(sockets / "api.sock"),
        "WAVE_SETTINGS_FD": str(handed_down),
        **_own_address(settings),
    }
    if settings.metrics_port is not None:
        environment["WAVE_METRICS_FOLDER"] = str(_metrics_folder(settings))
        parts.append(_metrics_part(settings))
    # Else glibc gives the memory of each large chunk back to the kernel at once, and gets it again page by page: of a
    # cold blob that is a third of the event loop's time.
    lavish = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(32 << 20), **environment}
    python = [sys.executable, "-m"]
    commands = {
        "proxy": [*python, "wave_proxy.serve"],
        "api": [*python, "api", "--socket", str(sockets / "api.sock")],
        "builder": [*python, "builder"],
    }
    for name in names:
        for number in range(settings.workers or os.cpu_count() or 1) if name == "proxy" else (0,):
            label = f"proxy-{number}" if name == "proxy" else name
            urgent = name != "builder"
            variables = lavish if name == "proxy" else environment
            parts.append(Part(label, commands[name], _STAGES[name], variables, urgent=urgent, keeps=handed_down))
    return parts


def _own_address(settings: Settings) -> dict[str, str]:
    """How the parts reach the port: by loopback and without TLS, on another port where the public one is not so."""
    if settings.tls_cert or settings.host not in ("", "0.0.0.0", "127.0.0.1"):
        port = claim_port("127.0.0.1", 0)
        return {"WAVE_OWN_PORT": str(port), "WAVE_OWN_URL": f"http://127.0.0.1:{port}"}
    return {"WAVE_OWN_URL": f"http://127.0.0.1:{settings.port}"}


def _metrics_folder(settings: Settings) -> Path:
    # Several programs may run over one data folder, and their parts have the same names.
    return runtime_folder(settings.data) / f"metrics-{os.getpid()}"


def _metrics_part(settings: Settings) -> Part:
    folder = _metrics_folder(settings)
    rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    command = [sys.executable, "-m", "wave_proxy.exporter", "--host", settings.metrics_host or settings.host]
    command += ["--port", str(settings.metrics_port), "--folder", str(folder)]
    return Part("metrics", command, _STAGES["metrics"], dict(os.environ), says_ready=False, urgent=False)


if __name__ == "__main__":
    main()
