"""The api as a process of its own: its socket, its settings, its end."""

import os
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from socket import AF_UNIX, socket
from subprocess import PIPE, Popen

import pytest

from tests.patience import PATIENCE_S, until
from tests.servers import ROOT, Response


class UnixConnection(HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the path."""
        self.sock = socket(AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(str(self._path))


@contextmanager
def started(path: Path, env: Mapping[str, str]) -> Iterator["Popen[str]"]:
    """``python -m api`` with nothing of this process's own WAVE_* environment; killed at the end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WAVE_")}
    command = [sys.executable, "-m", "api", "--socket", str(path)]
    with Popen(command, env={**clean, **env}, cwd=ROOT, stderr=PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def get(path: Path, target: str) -> Response:
    connection = UnixConnection(path)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        return Response(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


def first_answer(process: "Popen[str]", path: Path, target: str) -> Response:
    def answer() -> Response | None:
        try:
            return get(path, target)
        except (FileNotFoundError, ConnectionRefusedError):
            assert process.poll() is None, process.stderr and process.stderr.read()
            return None

    return until(answer, "the api does not answer")


def test_it_serves_a_private_socket_and_ends_cleanly(tmp_path: Path, redis_url: str) -> None:
    path, config = tmp_path / "api.sock", tmp_path / "wave.toml"
    path.touch()  # what a killed predecessor left
    config.write_text('[registries."127.0.0.1:5055"]\ninsecure = true\nusername = "u"\npassword = "p"\n')
    with started(path, {"WAVE_REDIS_URL": redis_url, "WAVE_CONFIG_FILE": str(config)}) as process:
        # The file is there before anything listens on it; connections are refused until then.
        answer = first_answer(process, path, "/health")
        assert (answer.status, answer.json()) == (200, {"status": "UP"})
        assert answer.headers["Server"] is None
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("env", "words"),
    [
        pytest.param({}, "redis_url", id="no Redis"),
        pytest.param({"WAVE_REDIS_URL": "http://x"}, "WAVE_REDIS_URL", id="not a Redis URL"),
        pytest.param({"WAVE_CONFIG_FILE": "/nowhere/wave.toml"}, "/nowhere/wave.toml", id="no such file"),
        pytest.param({"WAVE_PORT": "x"}, "WAVE_PORT", id="bad key"),
        pytest.param(
            {"WAVE_REDIS_URL": "unix:///x", "WAVE_ACCOUNTS": '{"admin": "plain-secret"}'},
            "accounts.admin: expected what",
            id="account without a hash",
        ),
    ],
)
def test_it_says_in_one_line_why_it_does_not_start(tmp_path: Path, env: Mapping[str, str], words: str) -> None:
    with started(tmp_path / "api.sock", env) as process:
        assert process.wait(PATIENCE_S) == 1
        assert process.stderr is not None
        said = process.stderr.read()
    assert said.startswith("wave-proxy api: ")
    assert words in said
    assert said.count("\n") == 1
    assert "secret" not in said
