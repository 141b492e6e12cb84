"""A Redis that can hang, die and come back with what it knew."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import cast

from redis import Redis
from redis.exceptions import RedisError

from tests.servers import redis_program

START_LIMIT_S = 120.0  # on a machine that is slow and busy too


class RedisServer:
    """On a Unix socket, every write in its append-only file."""

    def __init__(self, folder: Path) -> None:
        self.url = f"unix://{folder}/redis.sock"
        options = {"port": "0", "unixsocket": f"{folder}/redis.sock", "dir": str(folder), "save": ""}
        options |= {"appendonly": "yes", "appendfsync": "everysec"}  # as the embedded one
        self._command = [str(redis_program()), *(word for key, text in options.items() for word in (f"--{key}", text))]
        self._process: Popen[bytes] | None = None

    def start(self) -> None:
        """Start it with what it knew, and wait until it answers. Raises AssertionError when it does not."""
        self._process = Popen(self._command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        deadline = monotonic() + START_LIMIT_S
        while not self._answers():
            assert self._process.poll() is None, f"{self._command[0]} ended with {self._process.returncode}"
            assert monotonic() < deadline, f"{self._command[0]} does not answer"
            sleep(0.01)

    def _answers(self) -> bool:
        with Redis.from_url(self.url) as client:
            try:
                return bool(client.ping())
            except RedisError:  # not there yet, or still reading its file
                return False

    def hang(self) -> None:
        """From now on it takes requests and does not answer."""
        assert self._process is not None, "not started"
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def client(self) -> Iterator["Redis"]:
        """A connection to it."""
        with Redis.from_url(self.url) as client:
            yield client

    def used_memory(self) -> int:
        """Bytes that its data takes, as it says itself."""
        with self.client() as client:
            return int(client.info("memory")["used_memory"])

    def permits_in_use(self) -> int:
        """How many permits the quotas of all subjects have out or used, within their periods."""
        with self.client() as client:
            keys = cast(list[bytes], client.keys("wave:quota:*:counts"))
            return sum(int(cast(bytes | None, client.hget(key, "total")) or 0) for key in keys)


@contextmanager
def redis_that_may_die() -> Iterator[RedisServer]:
    """One that runs, and is ended with the block; nothing of it is left."""
    # A socket's path may have 107 bytes; folders of tests are longer than that.
    with TemporaryDirectory(prefix="redis-") as folder:
        server = RedisServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()
