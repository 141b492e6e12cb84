"""Starts the stand-in for a Platform, and tells it what to do."""

import sys
from collections.abc import Callable
from subprocess import PIPE, Popen
from types import TracebackType
from typing import Any, Self

from tests.patience import until
from tests.servers import ROOT, WaveProxy, free_port, http_request

TOKEN = "licence-7"


class StandIn:
    """A context manager: the Platform at ``endpoint``, which nothing resolves unless it is its own address."""

    def __init__(self, endpoint: str = "") -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.endpoint = endpoint or f"http://{self.address}/api"
        self._process: Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.platform", "--endpoint", self.endpoint]
        self._process = Popen([*command, "--port", self.address.partition(":")[2]], stdout=PIPE, cwd=ROOT)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    @property
    def config(self) -> str:
        """The table that lets it pair."""
        return f'[platform]\nenabled = true\nendpoints = ["{self.endpoint}"]\npairing_token = "{TOKEN}"\n'

    def tell(self, **switches: Any) -> None:
        """Change what it knows or does: members of ``World``, ``pair``."""
        assert http_request(self.address, "POST", "/control", body=switches).status == 200

    def state(self) -> dict[str, Any]:
        """``seen`` and ``sessions``."""
        document: dict[str, Any] = http_request(self.address, "GET", "/control").json()
        return document

    def seen(self, text: str = "") -> list[str]:
        """The requests so far that have this in them."""
        return [line for line in self.state()["seen"] if text in line]

    def pair(self, proxy: WaveProxy, token: str = TOKEN) -> None:
        """Open a session, and return when it is paired."""
        before = self.state()["sessions"].count("paired")
        self.tell(pair=f"ws://{proxy.address}/pairing/tower/token/{token}")
        self.wait_for(lambda sessions: sessions.count("paired") > before)

    def cut_off(self) -> None:
        """End the session."""
        self.tell(pair="")

    def wait_for(self, condition: Callable[[list[str]], bool]) -> None:
        """Return when the list of what became of sessions fulfils this. Raises AssertionError."""
        until(lambda: condition(self.state()["sessions"]), lambda: str(self.state()))
