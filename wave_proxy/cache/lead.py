"""The fetch of a blob, in the process that holds its spool's lock: received, absorbed, resumed after a cut, stored."""

import asyncio
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from time import monotonic

import structlog

from wave_proxy.cache.absorb import Absorber
from wave_proxy.cache.blobs import BlobStore
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.fill import Fill
from wave_proxy.cache.grants import Grants
from wave_proxy.cache.spool import Spool, free_bytes
from wave_proxy.errors import (
    ContentMismatch,
    StorageFull,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from wave_proxy.upstream.transfer import BlobStream

_log = structlog.get_logger()

_ATTEMPTS = 5  # without a byte of progress
_BACKOFF_S = 0.2

# An upstream that gives less than this while it is waited for so long is as good as dead. Else whoever has one could
# keep any number of fills open: these outlive the clients that asked for them.
_LEAST_BYTES = 16 << 10
_LEAST_IN_S = 60.0

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
        self._absorber = Absorber(fill, shop.evictor, shop.threads)

    async def run(self, opener: Opener) -> None:
        """Fetch, verify, store. Raises what ended it; nothing that was found wrong stays."""
        try:
            await self._resume()
            await self._fetch(opener)
            await self._absorber.conclude()
            self._fill.finish(self._absorber.size)
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
        finally:
            await self._absorber.stop()

    async def _resume(self) -> None:
        """Take over what a fill that was cut off has left."""
        started, size = self._spool.read_size()
        left = os.fstat(self._fill.fd).st_size
        if not started:
            os.ftruncate(self._fill.fd, 0)
            return
        await self._absorber.take_left(left)
        self._fill.start(size)
        self._fill.advance(left)

    async def _fetch(self, opener: Opener) -> None:
        absorber, failures = self._absorber, 0
        while not absorber.size or absorber.size != self._fill.size:
            before = absorber.size
            try:
                await self._transfer(opener)
                break
            except _Trickle:
                raise
            except (UpstreamUnavailable, UpstreamTimeout) as err:
                failures = 0 if absorber.size > before else failures + 1
                if not absorber.size or failures >= _ATTEMPTS:
                    raise  # before the first byte, the registry client has done the retries
                self._shop.stats.resumed += 1
                _log.info("fill resumes", digest=self._fill.digest, offset=absorber.size, error=str(err))
                await asyncio.sleep(_BACKOFF_S * (failures + 1))

    async def _transfer(self, opener: Opener) -> None:
        absorber = self._absorber
        async with opener(absorber.size, self._fill.size) as stream:
            await self._note_size(stream.size)
            known, pace = absorber.size - stream.start, _Pace()
            try:
                async for chunk in stream.chunks:
                    pace.check(len(chunk), self._fill.digest)
                    self._shop.stats.bytes += len(chunk)
                    if len(chunk) > known:
                        await absorber.take(chunk[known:] if known else chunk)
                    known = max(known - len(chunk), 0)
                    pace.wait()
            finally:
                await absorber.settle()
        if self._fill.size is not None and absorber.size < self._fill.size:
            raise UpstreamUnavailable(f"upstream ended {self._fill.digest} after {absorber.size} bytes")

    async def _note_size(self, size: int | None) -> None:
        if size is not None:
            await self._make_room(size - self._absorber.written)
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


class _Trickle(UpstreamTimeout):
    """Upstream gives next to nothing, but not nothing: to ask it again would bring no more."""


class _Pace:
    """How much comes while it is waited for; what we ourselves take our time for does not count."""

    def __init__(self) -> None:
        self._waited_s = 0.0
        self._bytes = 0
        self._waits_since = monotonic()

    def wait(self) -> None:
        """What is taken next is waited for from now on."""
        self._waits_since = monotonic()

    def check(self, size: int, digest: str) -> None:
        """So many bytes have come. Raises _Trickle when they are too few for the time."""
        self._bytes += size
        self._waited_s += monotonic() - self._waits_since
        if self._waited_s >= _LEAST_IN_S:
            if self._bytes < _LEAST_BYTES:
                raise _Trickle(f"upstream gave {self._bytes} bytes of {digest} in {self._waited_s:.0f} s")
            self._waited_s, self._bytes = 0.0, 0
