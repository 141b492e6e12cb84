"""Finds the container clients that are installed, and runs them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import pathsep
from pathlib import Path
from shutil import which
from subprocess import DEVNULL, STDOUT, CompletedProcess, Popen, TimeoutExpired, run
from tempfile import TemporaryDirectory
from time import monotonic, sleep

import pytest

TIMEOUT_S = 120.0  # a client that takes longer hangs
DAEMON_TIMEOUT_S = 30.0


def find(name: str) -> str:
    """The path of a program: on the PATH, beside Python, or where Debian puts daemons. Empty when it is not there."""
    folders = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent), "/usr/sbin", "/sbin"]
    return which(name, path=pathsep.join(folders)) or ""


def needs(name: str, package: str) -> pytest.MarkDecorator:
    """Skips where a program is missing; ``package`` says where it comes from."""
    return pytest.mark.skipif(not find(name), reason=f"{name} is not installed ({package})")


def attempt(*command: str | Path, env: dict[str, str] | None = None) -> "CompletedProcess[str]":
    """Run a program to its end, whatever that is; registry settings of the user are not seen by it."""
    with TemporaryDirectory(prefix="home-") as home:
        (Path(home) / "auth.json").write_text("{}")  # podman wants it to be there
        own = {"HOME": home, "DOCKER_CONFIG": home, "REGISTRY_AUTH_FILE": f"{home}/auth.json", "XDG_CONFIG_HOME": home}
        return run(
            [find(str(command[0])), *command[1:]],
            stdin=DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env={**os.environ, **own, **(env or {})},
            check=False,
        )


def output(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """What a program prints. Raises AssertionError with its standard error when it fails."""
    finished = attempt(*command, env=env)
    assert finished.returncode == 0, f"{' '.join(map(str, command))}: {finished.returncode}\n{finished.stderr}"
    return finished.stdout


# --- Docker ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Docker:
    """The docker command with a daemon of its own."""

    socket: Path

    def attempt(self, *arguments: str) -> "CompletedProcess[str]":
        """Run a command to its end, whatever that is."""
        return attempt("docker", *arguments, env={"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_CLI_HINTS": "false"})

    def __call__(self, *arguments: str) -> str:
        """What a command prints. Raises AssertionError when it fails."""
        finished = self.attempt(*arguments)
        assert finished.returncode == 0, f"docker {' '.join(arguments)}: {finished.returncode}\n{finished.stderr}"
        return finished.stdout


def reason_to_skip_docker() -> str:
    """Why docker can't be tested here; empty when it can."""
    missing = [name for name in ("docker", "dockerd") if not find(name)]
    if missing:
        return f"{' and '.join(missing)} not installed (Debian packages docker.io, and docker-cli where it exists)"
    return "" if os.geteuid() == 0 else "only root can start dockerd"


@contextmanager
def docker_daemon() -> Iterator[Docker]:
    """Start a dockerd that shares nothing with another one. Skips the test when it does not start on this machine."""
    # A socket's path may have 107 bytes; folders of tests are longer than that.
    with TemporaryDirectory(prefix="dockerd-") as name:
        folder = Path(name)
        docker, log = Docker(folder / "docker.sock"), folder / "log"
        with log.open("wb") as sink:
            process = Popen(_daemon_command(folder), stdin=DEVNULL, stdout=sink, stderr=STDOUT, start_new_session=True)
        try:
            _wait_for(docker, process, log)
            yield docker
        finally:
            _stop(process, folder / "exec" / "containerd" / "containerd.pid")


def _daemon_command(folder: Path) -> list[str]:
    config = folder / "daemon.json"
    config.write_text("{}")  # not the machine's
    options = {
        "config-file": config,
        "data-root": folder / "data",
        "exec-root": folder / "exec",
        "pidfile": folder / "pid",
        "host": f"unix://{folder}/docker.sock",
        "storage-driver": "vfs",
        "bridge": "none",
        "iptables": "false",
        "ip6tables": "false",
    }
    return [find("dockerd"), *(f"--{name}={value}" for name, value in options.items())]


def _wait_for(docker: Docker, process: "Popen[bytes]", log: Path) -> None:
    deadline = monotonic() + DAEMON_TIMEOUT_S
    while docker.attempt("version").returncode != 0:
        if process.poll() is not None or monotonic() > deadline:
            pytest.skip(f"dockerd does not start on this machine: {log.read_text(errors='replace').strip()[-300:]}")
        sleep(0.05)


def _stop(process: "Popen[bytes]", containerd: Path) -> None:
    """End the daemon, and its containerd, which only a daemon that had time for it stops."""
    process.terminate()
    try:
        process.wait(DAEMON_TIMEOUT_S)
    except TimeoutExpired:
        pids = [process.pid, *([int(containerd.read_text())] if containerd.exists() else ())]
        for pid in pids:
            os.kill(pid, 9)
        process.wait()
