"""For tests of what sends files: a source that grows while it is sent, and what the process has open."""

import asyncio
import os
from contextlib import suppress
from pathlib import Path


class Growing:
    """A file that may be written while it is sent; counts how often it was waited for, and closed."""

    def __init__(self, path: Path, content: bytes = b"") -> None:
        path.touch()
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.written = 0
        self.error: Exception | None = None
        self.waits = 0
        self.closed = 0
        self._grown = asyncio.Event()
        self.grow(content)

    def grow(self, content: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(content)
        self.written += len(content)
        self._grown.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._grown.set()

    def readable(self) -> int:
        return self.written

    async def wait(self, offset: int) -> None:
        self.waits += 1
        while self.written <= offset:
            if self.error:
                raise self.error
            self._grown.clear()
            await self._grown.wait()

    def close(self) -> None:
        self.closed += 1
        os.close(self.fd)


def open_files() -> int:
    """How many files and sockets this process has open; the loop keeps a spare one at hand, which is /dev/null."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{name}") != os.devnull
    return found
