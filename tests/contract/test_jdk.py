"""The transport of both clients itself: ``java.net.http`` of the JDK that is installed, against the whole program."""

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from subprocess import PIPE, Popen
from typing import Any

import pytest

from tests.contract import nextflow
from tests.contract.conftest import Service
from tests.contract.wave_cli import configured, submission

pytestmark = pytest.mark.skipif(
    which("javac") is None, reason="no JDK is installed (Debian package openjdk-17-jdk-headless)"
)

PROGRAM = Path(__file__).with_name("Exchange.java")
V2 = "/v1alpha2/container"


class Jdk:
    """The program that sends requests, which runs for as long as the tests."""

    def __init__(self, process: "Popen[str]", url: str) -> None:
        self._process = process
        self._url = url

    def _say(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of an answer."""
        line = f"{method} {self._url}{path}" + (f" {b64encode(body).decode()}" if body else "")
        status, _, content = self._say(line).partition(" ")
        return int(status), b64decode(content)

    def submit(self, body: bytes) -> dict[str, Any]:
        """The answer to a container request."""
        status, content = self.ask("POST", V2, body)
        assert status == 200, content
        document: dict[str, Any] = json.loads(content)
        return document

    def read_instant(self, text: str) -> str:
        """The instant, if it is one."""
        return self._say(f"instant {text}")


@pytest.fixture(scope="module")
def jdk(service: Service) -> Iterator[Jdk]:
    """The JDK's client, whose source is compiled as it starts."""
    with Popen(["java", "-Xshare:auto", str(PROGRAM)], stdin=PIPE, stdout=PIPE, text=True) as process:
        try:
            started = Jdk(process, f"http://{service.address}")
            assert started.read_instant("2026-01-01T00:00:00Z") == "2026-01-01T00:00:00Z", "no JDK that compiles"
            yield started
        finally:
            assert process.stdin is not None
            process.stdin.close()


@pytest.mark.parametrize("client", ["wave", "nextflow"])
def test_an_image(service: Service, jdk: Jdk, client: str) -> None:
    body = submission(containerImage="ubuntu") if client == "wave" else nextflow.submission(containerImage="ubuntu")
    answer = jdk.submit(body)
    assert jdk.read_instant(answer["expiration"]) == answer["expiration"]
    status, content = jdk.ask("GET", f"{V2}/{answer['requestId']}/status")
    assert (status, json.loads(content)["status"]) == (200, "DONE")
    created = json.loads(content)["creationTime"]
    assert jdk.read_instant(created) == created
    service.wave.pull(answer["targetImage"])


def test_ten_mebibytes(jdk: Jdk) -> None:
    layers = [{"large": bytes([number]) * (8 << 20)} for number in range(2)]
    body = submission(configured(layers=layers), containerImage="ubuntu", ignored="x" * (10 << 20))
    assert jdk.submit(body)["succeeded"] is True


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/service-info", 200),
        ("GET", f"{V2}/{'0' * 32}/status", 404),
        ("GET", "/v2/", 200),
        ("GET", V2, 405),
        ("POST", "/v1alpha1/inspect", 400),
        ("POST", V2, 400),
    ],
)
def test_answers_of_each_kind(jdk: Jdk, method: str, path: str, status: int) -> None:
    assert jdk.ask(method, path, b"{}" if method == "POST" else b"")[0] == status
    assert jdk.ask("GET", "/service-info")[0] == 200, "the connection is not good any more"
