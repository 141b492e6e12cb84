"""What a fill receives, hashed, checked and written in a thread, while the event loop receives and serves.

The thread takes all that has come since it last looked, so its steps grow as upstream gets faster. Those who read along
are told of progress in steps as well: for each chunk, fifty waiting clients would cost more than the chunk does.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

from wave_proxy._fast.digest import Verifier
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.fill import Fill
from wave_proxy.cache.spool import no_room
from wave_proxy.errors import SizeMismatch, StorageFull

_AHEAD_BYTES = 4 << 20  # of what was taken and is not written yet
_BATCH_BYTES = 512 << 10  # hashed, and written while it is still in the processor's cache
_MAX_VECTOR = 1000  # pieces that one call can write
_READ_BYTES = 1 << 20
_TELL_S = 0.005


class Absorber:
    """A blob's bytes, in order. The batch that ends the blob is written only when all of it was found right."""

    def __init__(self, fill: Fill, evictor: Evictor, threads: Executor) -> None:
        self._fill = fill
        self._evictor = evictor
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._verifier = Verifier(fill.digest, -1 if fill.size is None else fill.size)
        self._chunks: deque[bytes] = deque()
        self._held: list[bytes] = []  # of a blob of unknown size, the last batch so far
        self._taken = 0
        self._absorbed = 0
        self.written = 0
        self._job: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._moved = asyncio.Event()
        self._tell_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def size(self) -> int:
        """Bytes that were hashed. Steady once it was settled."""
        return self._verifier.size

    async def take_left(self, size: int) -> None:
        """Take over the file's first ``size`` bytes, which an earlier fill has written."""
        self._begin(lambda: self._read_left(size))
        await self.settle()
        self.written = size

    async def take(self, chunk: bytes) -> None:
        """The next bytes; returns when there is room for more. Raises what was wrong with these or those before."""
        self._chunks.append(chunk)
        self._taken += len(chunk)
        if self._job is None:
            self._begin(self._absorb_all)
        while self._taken - self._absorbed > _AHEAD_BYTES and self._error is None:
            await self._wait()
        self._raise()

    async def settle(self) -> None:
        """Return when all that was taken is hashed and written. Raises what was wrong with it."""
        while self._job is not None:
            await self._wait()
        self._raise()

    async def conclude(self) -> None:
        """There is no more: the blob is right, and all of it written. Raises DigestMismatch, SizeMismatch."""
        self._begin(self._end)
        await self.settle()

    async def stop(self) -> None:
        """Let go of what waits. The thread is out of the file then, cancelled or not."""
        self._chunks.clear()
        while self._job is not None:
            with suppress(asyncio.CancelledError):
                await asyncio.wait([self._job])

    def _begin(self, job: Callable[[], None]) -> None:
        self._job = self._loop.run_in_executor(self._threads, job)
        self._job.add_done_callback(self._ended)

    def _ended(self, job: "asyncio.Future[None]") -> None:
        self._job = None
        if job.cancelled() or job.exception() is not None:
            self._error = asyncio.CancelledError() if job.cancelled() else job.exception()
            self._chunks.clear()
        if self._chunks:  # they came while the job was ending
            self._begin(self._absorb_all)
        self._moved.set()
        self._tell()

    async def _wait(self) -> None:
        self._moved.clear()
        await self._moved.wait()

    def _step(self) -> None:
        self._moved.set()
        if self._timer is None:
            now = self._loop.time()
            if now >= self._tell_at:
                self._tell_at = now + _TELL_S
                self._tell()
            else:
                self._timer = self._loop.call_at(self._tell_at, self._tell)

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fill.advance(self.written)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # --- in the thread, one job at a time ------------------------------------------------------------------------

    def _read_left(self, size: int) -> None:
        for offset in range(0, size, _READ_BYTES):
            self._verifier.update(os.pread(self._fill.fd, min(_READ_BYTES, size - offset), offset))

    def _absorb_all(self) -> None:
        while batch := self._next_batch():
            self._absorb(batch)
            self._absorbed += sum(map(len, batch))
            self._loop.call_soon_threadsafe(self._step)

    def _next_batch(self) -> list[bytes]:
        batch: list[bytes] = []
        size = 0
        with suppress(IndexError):  # there is no more, or it was let go of
            while size < _BATCH_BYTES and len(batch) < _MAX_VECTOR:
                batch.append(self._chunks.popleft())
                size += len(batch[-1])
        return batch

    def _absorb(self, batch: list[bytes]) -> None:
        for chunk in batch:
            self._verifier.update(chunk)
        self._write(self._held)  # also when the size has become known meanwhile
        self._held = []
        size = self._fill.size
        if size is None:
            self._held = batch
            return
        if self._verifier.size > size:
            raise SizeMismatch(f"more than the {size} bytes announced for {self._fill.digest}")
        if self._verifier.size == size:
            self._verifier.finish()
        self._write(batch)

    def _end(self) -> None:
        self._verifier.finish()
        self._write(self._held)

    def _write(self, batch: list[bytes]) -> None:
        size = sum(map(len, batch))
        end = self.written + size
        if end > self._evictor.max_bytes:
            raise StorageFull(f"{self._fill.digest} does not end within cache.max_bytes")
        error = self._append(batch, end)
        if error is not None:
            self._evictor.evict(64 * size)
            error = self._append(batch, end)
        if error is not None:
            raise no_room(error) from error

    def _append(self, batch: list[bytes], end: int) -> OSError | None:
        """Write what is missing of a batch that is to end at ``end``; returns why not all could be written."""
        try:
            while (missing := end - self.written) > 0:
                done = sum(map(len, batch)) - missing
                rest = [memoryview(b"".join(batch))[done:]] if done else batch
                self.written += os.pwritev(self._fill.fd, rest, self.written)
        except OSError as err:
            return err
        return None
