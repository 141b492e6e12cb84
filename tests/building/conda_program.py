#!/usr/bin/python3
"""Stands in for micromamba and pixi in the images of tests: their usual command lines over rattler's real solver.

As there, channel names are looked up under ``$CONDA_CHANNEL_ALIAS``. It runs in images that have rattler and PyYAML.
"""

import asyncio
import json
import os
import re
import shutil
import sys
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import yaml
from rattler import (
    Channel,
    ChannelConfig,
    Gateway,
    LockFile,
    LockPlatform,
    MatchSpec,
    PrefixRecord,
    RepoDataRecord,
    Subdir,
    VirtualPackage,
    VirtualPackageOverrides,
    install,
    solve,
)
from rattler.exceptions import GatewayError, SolverError
from rattler.match_spec import MatchSpec as Spec
from rattler.shell import ActivationVariables, Shell, activate

ALIAS = os.environ.get("CONDA_CHANNEL_ALIAS", "https://conda.anaconda.org")
CACHE = Path(os.environ.get("CONDA_TOOLS_CACHE") or Path(os.environ.get("HOME", "/tmp")) / ".cache" / "conda-tools")
DEFAULT_CHANNEL = "conda-forge"
ENTRY = re.compile(r"(?:(?P<channel>.+)::)?(?P<name>[A-Za-z0-9_.-]+)\s*(?P<version>.*)", re.DOTALL)


class Failure(Exception):
    """What went wrong, in the words of the program that it stands in for."""


def channel_of(name: str) -> Channel:
    """A channel by its URL, or by its name under the alias."""
    return Channel(name, ChannelConfig(channel_alias=ALIAS))


def spec_of(text: str) -> MatchSpec:
    """``channel::name=version`` and the other forms; the channel's name under our alias."""
    channel, separator, rest = text.rpartition("::")
    return MatchSpec(f"{channel_of(channel).base_url}::{rest}" if separator else text, strict=False)


async def bring(prefix: Path, specs: Sequence[MatchSpec], channels: Iterable[str]) -> list[RepoDataRecord]:
    """Solve for ``specs`` and what was asked for before, and make the prefix be that; returns all of its records."""
    installed = [PrefixRecord.from_path(path) for path in sorted(prefix.glob("conda-meta/*.json"))]
    requested = prefix / "conda-meta" / "requested.txt"
    before = [spec_of(text) for text in requested.read_text().splitlines()] if requested.exists() else []
    urls = [channel_of(name).base_url for name in channels]
    urls += [spec.channel.base_url for spec in specs if spec.channel is not None]
    urls += [record.channel for record in installed if record.channel]
    sources = [Channel(url) for url in dict.fromkeys(url if url.endswith("/") else f"{url}/" for url in urls)]
    wanted = [*specs, *(spec for spec in before if str(spec) not in map(str, specs))]
    records: list[RepoDataRecord] = await solve(
        sources=sources,
        specs=wanted,
        gateway=Gateway(cache_dir=CACHE / "repodata"),
        locked_packages=installed,
        virtual_packages=VirtualPackage.detect(VirtualPackageOverrides.from_env()),
    )
    await install(
        records,
        prefix,
        cache_dir=CACHE / "pkgs",
        installed_packages=installed,
        execute_link_scripts=True,
        show_progress=False,
    )
    requested.parent.mkdir(parents=True, exist_ok=True)
    requested.write_text("".join(f"{spec}\n" for spec in wanted))
    return records


# --- micromamba ------------------------------------------------------------------------------------------------------


def micromamba(arguments: Sequence[str]) -> None:
    """Run one command line of micromamba."""
    parser = ArgumentParser("micromamba")
    parser.add_argument("--version", action="version", version="2.0.5")
    commands = parser.add_subparsers(required=True)
    for name in ("install", "create"):
        command = _command(commands, name, _install)
        command.add_argument("-f", "--file", action="append", default=[])
        command.add_argument("-c", "--channel", action="append", default=[])
        command.add_argument("--override-channels", action="store_true")
        command.add_argument("specs", nargs="*")
    command = _command(commands, "env", _export)
    command.add_argument("action", choices=["export"])
    command.add_argument("--explicit", action="store_true", required=True)
    command = _command(commands, "clean", _clean)
    command.add_argument("-a", "--all", action="store_true", required=True)
    _command(commands, "run", _run).add_argument("command", nargs="+")
    parsed = parser.parse_args(arguments)
    try:
        parsed.function(parsed)
    except SolverError as error:
        raise Failure(f"error    libmamba Could not solve for environment specs\n{error}") from error
    except GatewayError as error:
        raise Failure(f"critical libmamba {error}") from error


def _command(commands: Any, name: str, function: Callable[[Namespace], None]) -> ArgumentParser:
    command: ArgumentParser = commands.add_parser(name)
    command.set_defaults(function=function)
    command.add_argument("-y", "--yes", action="store_true")
    command.add_argument("-n", "--name", default="base")
    command.add_argument("-p", "--prefix", default="")
    return command


def _prefix(parsed: Namespace) -> Path:
    root = Path(os.environ.get("MAMBA_ROOT_PREFIX", "/opt/conda"))
    return Path(parsed.prefix) if parsed.prefix else root if parsed.name == "base" else root / "envs" / parsed.name


def _install(parsed: Namespace) -> None:
    specs, channels = [spec_of(text) for text in parsed.specs], list(parsed.channel)
    for file in parsed.file:
        found, named = _read(file)
        specs, channels = [*specs, *found], [*channels, *named]
    if not specs:
        raise Failure("critical libmamba Nothing to install: neither specs nor a file that has some")
    records = asyncio.run(bring(_prefix(parsed), specs, channels or [DEFAULT_CHANNEL]))
    for record in sorted(records, key=lambda record: record.name.normalized):
        print(f"  + {record.name.normalized} {record.version} {record.url}")
    print("Transaction finished")


def _read(file: str) -> tuple[list[MatchSpec], list[str]]:
    """The specs and channels of an environment file, or of a lock file (a path or a URL) with the packages' URLs."""
    if file.startswith(("http://", "https://")):
        with urlopen(file, timeout=120) as answer:
            text = answer.read().decode()
    else:
        text = Path(file).read_text()
    if "@EXPLICIT" in text:
        lines = (line.strip().partition("#")[0] for line in text.splitlines())
        return [Spec.from_url(line) for line in lines if "://" in line], []
    document = yaml.safe_load(text)
    entries = document.get("dependencies") or []
    if not all(isinstance(entry, str) for entry in entries):
        raise Failure("critical libmamba pip packages are more than this stand-in for micromamba can install")
    return [spec_of(entry) for entry in entries], document.get("channels") or []


def _export(parsed: Namespace) -> None:
    print(f"# This file may be used to create an environment.\n# platform: {Subdir.current()}\n@EXPLICIT")
    for path in sorted(_prefix(parsed).glob("conda-meta/*.json")):
        record = json.loads(path.read_text())
        print(f"{record['url']}#{record['md5']}" if "md5" in record else record["url"])


def _clean(parsed: Namespace) -> None:
    shutil.rmtree(CACHE, ignore_errors=True)
    print("Cleaning the caches")


def _run(parsed: Namespace) -> None:
    os.environ["PATH"] = f"{_prefix(parsed)}/bin:{os.environ['PATH']}"
    os.execvp(parsed.command[0], parsed.command)


# --- pixi ------------------------------------------------------------------------------------------------------------


def pixi(arguments: Sequence[str]) -> None:
    """Run one command line of pixi in the project of the working folder."""
    parser = ArgumentParser("pixi")
    parser.add_argument("--version", action="version", version="pixi 0.59.0")
    commands = parser.add_subparsers(required=True)
    init = commands.add_parser("init")
    init.add_argument("-i", "--import", dest="file", default="")
    init.add_argument("path", nargs="?", default=".")
    init.set_defaults(function=_pixi_init)
    add = commands.add_parser("add")
    add.add_argument("specs", nargs="+")
    add.set_defaults(function=_pixi_add)
    commands.add_parser("install").set_defaults(function=_pixi_install)
    hook = commands.add_parser("shell-hook")
    hook.add_argument("-s", "--shell", choices=["bash"], default="bash")
    hook.add_argument("-e", "--environment", choices=["default"], default="default")
    hook.set_defaults(function=_pixi_shell_hook)
    parsed = parser.parse_args(arguments)
    try:
        parsed.function(parsed)
    except SolverError as error:
        problem = f"failed to solve requirements of environment 'default' for platform '{Subdir.current()}'"
        raise Failure(f"Error:   × {problem}\n  ├─▶   × failed to solve the environment\n  ╰─▶ {error}") from error
    except GatewayError as error:
        raise Failure(f"Error:   × {error}") from error


def _pixi_init(parsed: Namespace) -> None:
    folder = Path(parsed.path)
    if (folder / "pixi.toml").exists():
        raise Failure("Error:   × pixi.toml already exists")
    document = yaml.safe_load((folder / parsed.file).read_text()) if parsed.file else {}
    entries = document.get("dependencies") or []
    if not all(isinstance(entry, str) for entry in entries):
        raise Failure("Error:   × pip packages are more than this stand-in for pixi can install")
    _write_project(folder, document.get("channels") or [DEFAULT_CHANNEL], dict(map(_dependency, entries)))
    print(f"✔ Created {folder.resolve() / 'pixi.toml'}", file=sys.stderr)


def _pixi_add(parsed: Namespace) -> None:
    channels, dependencies = _read_project()
    _write_project(Path(), channels, {**dependencies, **dict(map(_dependency, parsed.specs))})
    _pixi_install(parsed)
    for spec in parsed.specs:
        print(f"✔ Added {spec}", file=sys.stderr)


def _pixi_install(parsed: Namespace) -> None:
    channels, dependencies = _read_project()
    specs = [
        spec_of(f"{value['channel']}::{name} {value['version']}" if isinstance(value, dict) else f"{name} {value}")
        for name, value in dependencies.items()
    ]
    records = asyncio.run(bring(_environment(), specs, channels))
    platform = LockPlatform(str(Subdir.current()))
    lock = LockFile([platform])
    lock.set_channels("default", [channel_of(name).to_lock_channel() for name in channels])
    for record in records:
        lock.add_conda_package("default", platform, record)
    lock.to_path(Path("pixi.lock"))


def _pixi_shell_hook(parsed: Namespace) -> None:
    _pixi_install(parsed)
    print(f'export PIXI_PROJECT_ROOT="{Path.cwd()}"')
    print(activate(_environment(), ActivationVariables(None, os.environ["PATH"].split(":")), Shell.bash).script)


def _environment() -> Path:
    return Path.cwd() / ".pixi" / "envs" / "default"


def _dependency(text: str) -> tuple[str, Any]:
    """An entry as pixi.toml has it: a version, or a table with the channel too."""
    found = ENTRY.fullmatch(text.strip())
    if found is None:
        raise Failure(f"Error:   × invalid match spec {text!r}")
    version = str(spec_of(text).version or "*")
    return found["name"], {"version": version, "channel": found["channel"]} if found["channel"] else version


def _read_project() -> tuple[list[str], dict[str, Any]]:
    try:
        document = tomllib.loads(Path("pixi.toml").read_text())
    except FileNotFoundError as error:
        raise Failure(f"Error:   × could not find pixi.toml in {Path.cwd()}") from error
    return document["workspace"]["channels"], document["dependencies"]


def _write_project(folder: Path, channels: list[str], dependencies: dict[str, Any]) -> None:
    # A JSON text is a TOML basic string.
    lines = ["[workspace]", f"channels = {json.dumps(channels)}", f"platforms = {json.dumps([str(Subdir.current())])}"]
    lines += ["[dependencies]", *(f"{json.dumps(name)} = {_toml(value)}" for name, value in dependencies.items())]
    (folder / "pixi.toml").write_text("\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    return "{ " + ", ".join(f"{name} = {json.dumps(text)}" for name, text in value.items()) + " }"


if __name__ == "__main__":
    status = 0
    try:
        {"micromamba": micromamba, "pixi": pixi}[Path(sys.argv[0]).name](sys.argv[1:])
    except Failure as failure:
        print(failure, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # rattler's threads sometimes crash an interpreter that ends in good order
