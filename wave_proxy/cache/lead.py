"""The fetch of a blob, in the process that holds its spool's lock: received, checked, written and told of as it comes.

The event loop receives and serves; a thread hashes and writes, one piece after the other. While it is busy, what
arrives gathers into the next piece, so pieces grow as upstream gets faster, up to the buffer of the connection.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import TypeVar

import structlog

from wave_proxy._fast.digest import Verifier
from wave_proxy.cache.blobs import BlobStore
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.fill import Fill
from wave_proxy.cache.grants import Grants
from wave_proxy.cache.spool import Spool, free_bytes, no_room
from wave_proxy.errors import (
    ContentMismatch,
    SizeMismatch,
    StorageFull,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from wave_proxy.upstream.transfer import BlobStream

_log = structlog.get_logger()

_READ_BYTES = 1 << 20
_ATTEMPTS = 5  # without a byte of progress
_BACKOFF_S = 0.2

T = TypeVar("T")

Opener = Callable[[int, int | None], AbstractAsyncContextManager[BlobStream]]
"""Opens the blob upstream from a byte offset on; the second argument is its size once that is known."""


@dataclass(slots=True)
class FillStats:
    """What the fills of a worker have come to, since its start.

    ``begun`` counts blobs that this process began to fetch, ``followers`` requests that read along with a fill that was
    under way, ``bytes`` what was taken from upstream, ``resumed`` transfers that went on after a cut, ``failed`` fills
    that ended with an error, ``mismatched`` those of them whose content was not what it should be.
    """

    begun: int = 0
    followers: int = 0
    bytes: int = 0
    resumed: int = 0
    failed: int = 0
    mismatched: int = 0


@dataclass(frozen=True, slots=True)
class Workshop:
    """What the leaders of a worker share."""

    store: BlobStore
    evictor: Evictor
    grants: Grants
    threads: Executor
    stats: FillStats


class Lead:
    """One fill, led."""

    def __init__(self, fill: Fill, spool: Spool, shop: Workshop) -> None:
        self._fill = fill
        self._spool = spool
        self._shop = shop
        self._verifier = Verifier(fill.digest, -1 if fill.size is None else fill.size)
        self._held = b""  # of a blob of unknown size, the last piece so far
        self._written = 0

    async def run(self, opener: Opener) -> None:
        """Fetch, verify, store. Raises what ended it; nothing that was found wrong stays."""
        try:
            await self._resume()
            await self._fetch(opener)
            await self._in_thread(self._conclude)
            self._fill.finish(self._verifier.size)
            await asyncio.to_thread(os.fsync, self._fill.fd)
            # Readers' duplicates share it and keep the evictor away; and once it is visible, nobody may be refused.
            fcntl.flock(self._fill.fd, fcntl.LOCK_SH)
            self._shop.grants.add(self._fill.origin, (self._fill.digest,))  # who finds it stored finds this as well
            self._shop.store.adopt(self._fill.digest, self._spool.path)
            self._spool.forget_size()
        except (UpstreamUnavailable, UpstreamTimeout):
            raise  # what is there can be gone on with
        except (UpstreamError, StorageFull) as err:
            self._shop.stats.mismatched += isinstance(err, ContentMismatch)
            self._spool.drop()
            raise

    async def _resume(self) -> None:
        """Take over what a fill that was cut off has left."""
        started, size = self._spool.read_size()
        left = os.fstat(self._fill.fd).st_size
        if not started:
            os.ftruncate(self._fill.fd, 0)
            return
        for offset in range(0, left, _READ_BYTES):
            await self._in_thread(self._read_left, offset)
        self._written = left
        self._fill.start(size)
        self._fill.advance(left)

    async def _fetch(self, opener: Opener) -> None:
        failures = 0
        while not self._verifier.size or self._verifier.size != self._fill.size:
            before = self._verifier.size
            try:
                await self._transfer(opener)
                break
            except (UpstreamUnavailable, UpstreamTimeout) as err:
                failures = 0 if self._verifier.size > before else failures + 1
                if not self._verifier.size or failures >= _ATTEMPTS:
                    raise  # before the first byte, the registry client has done the retries
                self._shop.stats.resumed += 1
                _log.info("fill resumes", digest=self._fill.digest, offset=self._verifier.size, error=str(err))
                await asyncio.sleep(_BACKOFF_S * (failures + 1))

    async def _transfer(self, opener: Opener) -> None:
        async with opener(self._verifier.size, self._fill.size) as stream:
            await self._note_size(stream.size)
            known = self._verifier.size - stream.start
            async for chunk in stream.chunks:
                self._shop.stats.bytes += len(chunk)
                fresh = chunk[known:] if known else chunk
                known = max(known - len(chunk), 0)
                if fresh:
                    await self._take(fresh)
        if self._fill.size is not None and self._verifier.size < self._fill.size:
            raise UpstreamUnavailable(f"upstream ended {self._fill.digest} after {self._verifier.size} bytes")

    async def _take(self, piece: bytes) -> None:
        try:
            await self._in_thread(self._absorb, piece)
        finally:
            self._fill.advance(self._written)

    async def _note_size(self, size: int | None) -> None:
        if size is not None:
            await self._make_room(size - self._written)
        self._fill.start(size)
        self._spool.note_size(self._fill.size)

    async def _make_room(self, wanted: int) -> None:
        """Before the first byte is promised to anybody: a full disk is then no cut, but a pull past the store."""
        folder, evictor = self._spool.path.parent, self._shop.evictor
        if wanted > evictor.max_bytes:
            raise StorageFull(f"{self._fill.digest} is said to have {wanted} bytes, more than cache.max_bytes")
        if free_bytes(folder) < wanted:
            await asyncio.to_thread(evictor.evict, wanted)
            if (free := free_bytes(folder)) < wanted:
                raise StorageFull(f"the data folder has {free} bytes left and {self._fill.digest} needs {wanted}")

    async def _in_thread(self, job: Callable[..., T], *arguments: object) -> T:
        """The job's result. It is over when this ends, cancelled or not: the file is not closed under its hands."""
        future = asyncio.get_running_loop().run_in_executor(self._shop.threads, job, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            raise

    # --- in the thread, one at a time ----------------------------------------------------------------------------

    def _read_left(self, offset: int) -> None:
        self._verifier.update(os.pread(self._fill.fd, _READ_BYTES, offset))

    def _absorb(self, piece: bytes) -> None:
        """Hash and write; the piece that ends the blob is written only when all of it is right."""
        self._verifier.update(piece)
        self._write(self._held)  # also when the size has become known meanwhile
        self._held = b""
        size = self._fill.size
        if size is None:
            self._held = piece
            return
        if self._verifier.size > size:
            raise SizeMismatch(f"more than the {size} bytes announced for {self._fill.digest}")
        if self._verifier.size == size:
            self._verifier.finish()
        self._write(piece)

    def _conclude(self) -> None:
        self._verifier.finish()
        self._write(self._held)

    def _write(self, piece: bytes) -> None:
        if self._written + len(piece) > self._shop.evictor.max_bytes:
            raise StorageFull(f"{self._fill.digest} does not end within cache.max_bytes")
        rest, error = self._append(memoryview(piece))
        if error is not None:
            self._shop.evictor.evict(64 * len(piece))
            rest, error = self._append(rest)
        if error is not None:
            raise no_room(error) from error

    def _append(self, rest: memoryview) -> tuple[memoryview, OSError | None]:
        """Write what can be written; returns what could not, and why."""
        try:
            while rest:
                written = os.pwrite(self._fill.fd, rest, self._written)
                self._written += written
                rest = rest[written:]
        except OSError as err:
            return rest, err
        return rest, None
