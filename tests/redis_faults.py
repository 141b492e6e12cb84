"""A Redis that dies and comes back, and a connection to one that loses answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryDirectory

from hiredis import ProtocolError, Reader

from tests.servers import redis_program
from wave_proxy.state.redis import connect, wait_until_up


class DurableRedis:
    """A Redis that keeps what it knows when it is stopped."""

    def __init__(self, folder: Path) -> None:
        self.url = f"unix://{folder}/redis.sock"
        options = ["--port", "0", "--unixsocket", f"{folder}/redis.sock", "--dir", str(folder), "--save", ""]
        self._command = [str(redis_program()), *options, "--appendonly", "yes", "--appendfsync", "always"]
        self._process: Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it, with what it knew."""
        self._process = Popen(self._command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
        async with connect(self.url) as redis:
            await wait_until_up(redis)

    def stop(self) -> None:
        """Kill it, if it runs: at once, as its clients go on meanwhile."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@asynccontextmanager
async def durable_redis() -> AsyncIterator[DurableRedis]:
    """One that runs, and is stopped at the end."""
    with TemporaryDirectory(prefix="redis-") as folder:
        redis = DurableRedis(Path(folder))
        await redis.start()
        try:
            yield redis
        finally:
            redis.stop()


class Lossy:
    """A Unix socket in front of Redis that loses every other answer of the script, after Redis has done the work."""

    def __init__(self, url: str, folder: str) -> None:
        self._target = url.removeprefix("unix://")
        self._path = f"{folder}/lossy.sock"
        self.url = f"unix://{self._path}"
        self.lost = 0
        self._scripts: list[bytes] = []

    async def serve(self) -> asyncio.Server:
        """Listen at ``url``."""
        return await asyncio.start_unix_server(self._relay, self._path)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        redis_reader, redis_writer = await asyncio.open_unix_connection(self._target)
        try:
            while request := await _read_messages(reader):
                redis_writer.write(request)
                answer = await _read_messages(redis_reader, _count(request))
                if b"EVALSHA" in request and not answer.startswith(b"-NOSCRIPT"):
                    self._scripts.append(request)
                    if len(self._scripts) % 2:
                        self.lost += 1
                        break
                writer.write(answer)
        finally:
            for end in (writer, redis_writer):
                end.close()

    async def repeat(self) -> None:
        """Send every call of the script once more, as a connection would that was held up."""
        reader, writer = await asyncio.open_unix_connection(self._target)
        for request in self._scripts:
            writer.write(request)
            assert (await _read_messages(reader)).startswith((b"*", b":"))
        writer.close()
        await writer.wait_closed()


async def _read_messages(reader: asyncio.StreamReader, wanted: int = 1) -> bytes:
    """The next messages, at least so many and whole ones; empty at the end. Redis writes a long answer in parts."""
    content = b""
    while chunk := await reader.read(65536):
        content += chunk
        if _count(content) >= wanted:
            break
    return content


def _count(content: bytes) -> int:
    """How many messages these are; 0 when the last of them is not whole."""
    parser = Reader()
    parser.feed(content + b"+end\r\n")
    found = []
    with suppress(ProtocolError):
        while (message := parser.gets()) is not False:
            found.append(message)
    return len(found) - 1 if found and found[-1] == b"end" else 0
