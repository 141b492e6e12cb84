"""Finds the container clients that are installed, and runs them."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import pathsep
from pathlib import Path
from shutil import which
from subprocess import DEVNULL, STDOUT, CompletedProcess, Popen, TimeoutExpired, run
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import pytest

from tests.clients.scene import shell_layer
from tests.patience import PATIENCE_S


def find(name: str) -> str:
    """The path of a program: on the PATH, beside Python, or where Debian puts daemons. Empty when it is not there."""
    folders = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), "/usr/sbin", "/sbin"]
    return which(name, path=pathsep.join(folders)) or ""


def needs(name: str, origin: str) -> pytest.MarkDecorator:
    """Skips where a program is missing; ``origin`` says where it comes from."""
    return pytest.mark.skipif(not find(name), reason=f"{name} is not installed ({origin})")


class Client:
    """A program with the arguments that it always gets. It sees no registry settings and no login of the user."""

    def __init__(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.name = name
        self._arguments = arguments
        self._env = env or {}

    def attempt(self, *arguments: str | Path) -> "CompletedProcess[str]":
        """Run it to its end, whatever that is. Raises TimeoutExpired when it hangs."""
        with TemporaryDirectory(prefix="home-") as home:
            logins = Path(home) / "auth.json"
            logins.write_text("{}")
            own = {"HOME": home, "XDG_CONFIG_HOME": home, "DOCKER_CONFIG": home, "REGISTRY_AUTH_FILE": str(logins)}
            return run(
                [find(self.name), *self._arguments, *arguments],
                stdin=DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                env={**os.environ, **own, **self._env},
                check=False,
            )

    def __call__(self, *arguments: str | Path) -> str:
        """What it prints. Raises AssertionError with its standard error when it fails."""
        finished = self.attempt(*arguments)
        command = " ".join(map(str, (self.name, *arguments)))
        assert finished.returncode == 0, f"{command}: {finished.returncode}\n{finished.stderr}"
        return finished.stdout


def skip_unless_it_runs(client: Client, run_command: Sequence[str], folder: Path) -> None:
    """Skip the test where docker or podman can't run even an image that no registry had a part in."""
    shell = shell_layer()
    if shell is None:
        pytest.skip("there is no /bin/busybox to put into an image (Debian package busybox-static)")
    (folder / "files.tar").write_bytes(shell.content)
    client("import", folder / "files.tar", "localhost/probe")
    finished = client.attempt(*run_command, "localhost/probe", "/bin/true")
    if finished.returncode != 0:
        pytest.skip(f"{client.name} can't run containers on this machine: {finished.stderr.strip()[-300:]}")


# --- daemons ---------------------------------------------------------------------------------------------------------


def reason_to_skip_daemon(name: str, client: str, origin: str) -> str:
    """Why a daemon and its client can't be tested here; empty when they can. ``origin`` says where they come from."""
    missing = [program for program in (client, name) if not find(program)]
    if missing:
        return f"{' and '.join(missing)} not installed ({origin})"
    return "" if os.geteuid() == 0 else f"only root can start {name}"


@contextmanager
def docker_daemon() -> Iterator[Client]:
    """Start a dockerd that shares nothing with another one; gives docker. Skips the test when it does not start."""
    with _daemon_folder() as folder:
        config, socket = folder / "daemon.json", f"unix://{folder}/docker.sock"
        config.write_text("{}")  # not the machine's
        options = {
            "config-file": config,
            "data-root": folder / "data",
            "exec-root": folder / "exec",
            "pidfile": folder / "pid",
            "host": socket,
            "storage-driver": "vfs",
            "bridge": "none",
            "iptables": "false",
            "ip6tables": "false",
        }
        docker = Client("docker", env={"DOCKER_HOST": socket})
        command = ["dockerd", *(f"--{name}={value}" for name, value in options.items())]
        with _daemon(command, docker, folder / "log", folder / "exec" / "containerd" / "containerd.pid"):
            yield docker


@contextmanager
def containerd_daemon() -> Iterator[tuple[Client, Path]]:
    """Start a containerd; gives ctr and the folder whose ``blobs`` it keeps. Skips the test when it does not start."""
    with _daemon_folder() as folder:
        socket = folder / "containerd.sock"
        settings: dict[str, Any] = {"version": 2, "root": f"{folder}/root", "state": f"{folder}/state"}
        settings["disabled_plugins"] = ["io.containerd.grpc.v1.cri"]  # it looks at the machine's network
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        lines += ["[grpc]", f'address = "{socket}"', "[ttrpc]", f'address = "{socket}.ttrpc"']
        (folder / "config.toml").write_text("\n".join(lines))
        ctr = Client("ctr", "--address", str(socket))
        with _daemon(["containerd", "--config", f"{folder}/config.toml"], ctr, folder / "log"):
            yield ctr, folder / "root" / "io.containerd.content.v1.content"


@contextmanager
def _daemon_folder() -> Iterator[Path]:
    # A socket's path may have 107 bytes; folders of tests are longer than that.
    with TemporaryDirectory(prefix="daemon-") as name:
        yield Path(name)


@contextmanager
def _daemon(command: list[str], client: Client, log: Path, child: Path | None = None) -> Iterator[None]:
    """Run a daemon until the block ends; ``child`` is where it writes the id of a process of its own."""
    with log.open("wb") as sink:
        process = Popen([find(command[0]), *command[1:]], stdin=DEVNULL, stdout=sink, stderr=STDOUT)
    try:
        _wait_for(client, process, log)
        yield
    finally:
        _stop(process, child)


def _wait_for(client: Client, process: "Popen[bytes]", log: Path) -> None:
    deadline = monotonic() + PATIENCE_S
    while client.attempt("version").returncode != 0:
        if process.poll() is not None or monotonic() > deadline:
            tail = log.read_text(errors="replace").strip()[-300:]
            pytest.skip(f"the daemon of {client.name} does not start on this machine: {tail}")
        sleep(0.05)


def _stop(process: "Popen[bytes]", child: Path | None) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE_S)
    except TimeoutExpired:
        # A daemon that is killed has no time to end its child.
        for pid in (process.pid, *([int(child.read_text())] if child and child.exists() else ())):
            os.kill(pid, signal.SIGKILL)
        process.wait()
