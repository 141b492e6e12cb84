"""A blob on its way into the store, as its readers see it: they all read the same growing file.

A fill belongs to the worker, not to the request that began it: no client's speed or death slows or stops it. The
last bytes can be read only after digest and size were found right: nobody ever has a whole blob that was not verified.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator

from wave_proxy.errors import SizeMismatch, WaveError

_READ_BYTES = 1 << 20


class Fill:
    """A blob on its way into the store, as the readers in this worker see it."""

    def __init__(self, origin: str, digest: str) -> None:
        self.origin = origin
        self.digest = digest
        self.size: int | None = None
        self.finished = False
        self._readable = 0
        self.fd = -1
        self._started = False
        self._opening = 0
        self._ended = False
        self._error: WaveError | None = None
        self._waiters: set[asyncio.Future[None]] = set()

    async def open(self) -> "FillReader":
        """A source that reads along, once upstream has begun to answer.

        ``size`` is then known, unless upstream does not tell it. Raises the error that ended the fill.
        """
        self._opening += 1
        try:
            while not self._started:
                await self._changed()
            if self._error is not None and not self._readable:
                raise self._error  # better than an answer that is cut off before its first byte
            return FillReader(self, os.dup(self.fd))
        finally:
            self._opening -= 1
            self._detach_if_unused()

    def readable(self) -> int:
        """Bytes from the start that may be sent."""
        return self._readable

    async def wait(self, offset: int) -> None:
        """Return when there are more than ``offset`` readable bytes, or all there will be. Raises the fill's error."""
        while self._readable <= offset and not self.finished:
            await self._changed()

    async def wait_for_end(self) -> None:
        """Return when the blob is whole and right. Raises the fill's error."""
        while not self.finished:
            await self._changed()

    async def _changed(self) -> None:
        if self._error is not None:
            raise self._error
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    # What follows is for who fills it.

    def attach(self, fd: int) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = fd

    def end(self) -> None:
        self._ended = True
        self._detach_if_unused()

    def _detach_if_unused(self) -> None:
        if self._ended and not self._opening and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def start(self, size: int | None) -> None:
        if size is not None and self.size is not None and size != self.size:
            raise SizeMismatch(f"upstream first said that {self.digest} has {self.size} bytes, and now {size}")
        self.size = self.size if size is None else size
        self._started = True
        self._wake()

    def advance(self, readable: int) -> None:
        if readable > self._readable:
            self._readable = readable
            self._wake()

    def finish(self, size: int) -> None:
        self.start(size)
        self._readable = size
        self.finished = True
        self._wake()

    def fail(self, error: WaveError) -> None:
        self._error = error
        if self.fd >= 0:
            fcntl.flock(self.fd, fcntl.LOCK_UN)  # readers' duplicates would keep it for as long as they are slow
        self._wake()


class FillReader:
    """One client's view of a fill. Close it once."""

    def __init__(self, fill: Fill, fd: int) -> None:
        self._fill = fill
        self._withheld: int | None = None
        self.fd = fd

    def withhold(self, end: int) -> None:
        """For an answer that ends at ``end``: keep its last byte until the whole blob was found right."""
        self._withheld = end - 1

    def readable(self) -> int:
        """Bytes from the start that may be sent."""
        readable = self._fill.readable()
        return readable if self._withheld is None or self._fill.finished else min(readable, self._withheld)

    async def wait(self, offset: int) -> None:
        """Return when there are more than ``offset``. Raises the fill's error."""
        if offset == self._withheld:
            await self._fill.wait_for_end()
        else:
            await self._fill.wait(offset)

    def close(self) -> None:
        os.close(self.fd)


class ReadAlong:
    """A fill from its first byte to its end, as a stream: for a blob whose size upstream does not tell."""

    def __init__(self, reader: FillReader) -> None:
        self._reader = reader

    async def __aiter__(self) -> AsyncIterator[bytes]:
        offset = 0
        while True:
            await self._reader.wait(offset)
            chunk = os.pread(self._reader.fd, min(_READ_BYTES, self._reader.readable() - offset), offset)
            if not chunk:
                return
            offset += len(chunk)
            yield chunk

    async def aclose(self) -> None:
        """Give the fill's file back. Call it once."""
        self._reader.close()
