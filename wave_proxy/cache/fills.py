"""One upstream fetch a blob and machine, and everybody who wants the blob reads along.

A fill's bytes go to ``<root>/spool/<digest>`` while a running digest checks them; whole and right, the file is synced
and renamed into the store. Whichever process holds the exclusive lock on the spool leads; the others follow the file's
size. When a leader dies, the kernel gives its lock back and a follower goes on from the bytes that are there. Followers
poll: every few milliseconds for a fill, not for each client.
"""

import asyncio
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from wave_proxy.cache.blobs import BlobStore
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.fill import Fill
from wave_proxy.cache.grants import Grants
from wave_proxy.cache.lead import FillStats, Lead, Opener, Workshop
from wave_proxy.cache.spool import Spool, is_same_file, lock, spool_name
from wave_proxy.errors import ContentMismatch, UpstreamError, UpstreamUnavailable, WaveError

_log = structlog.get_logger()

_POLL_S = 0.004
_THREADS = 4  # that hash and write; a machine has a worker for each core already


class Fills:
    """The fills of one worker."""

    def __init__(self, root: Path, store: BlobStore, evictor: Evictor, grants: Grants) -> None:
        self.stats = FillStats()
        self._folder = root / "spool"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._store = store
        self._evictor = evictor
        self._grants = grants
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fill")
        self._shop = Workshop(store, evictor, grants, self._threads, self.stats)
        self._fills: dict[tuple[str, str], Fill] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def join(self, origin: str, digest: str, opener: Opener, size: int | None = None) -> Fill:
        """The fill of that blob from that origin: the one under way, else a new one.

        Origins don't share a fill: one that is slow, or that lies, holds up nobody who asked another. ``size`` is for
        an origin whose name includes it; of a shared one, upstream alone says how large its blobs are.
        """
        fill = self._fills.get((origin, digest))
        if fill is None:
            fill = self._fills[origin, digest] = Fill(origin, digest)
            fill.size = size
            task = asyncio.get_running_loop().create_task(self._run(fill, opener))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self.stats.followers += 1
        return fill

    def is_under_way(self, origin: str, digest: str) -> bool:
        """Whether ``join`` would find one."""
        return (origin, digest) in self._fills

    async def close(self) -> None:
        """End all fills; what they have so far stays in the spool for the next one."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for fill in self._fills.values():  # those whose task was ended before its first step
            fill.fail(UpstreamUnavailable("the proxy is shutting down"))
            fill.end()
        self._threads.shutdown()

    async def _run(self, fill: Fill, opener: Opener) -> None:
        try:
            while not fill.finished:
                await self._lead_or_follow(fill, opener)
            self._evictor.nudge()
        except WaveError as err:
            self.stats.failed += 1
            _log.warning("fill failed", digest=fill.digest, error=str(err))
            fill.fail(err)
        except asyncio.CancelledError:
            fill.fail(UpstreamUnavailable("the proxy is shutting down"))
            raise
        except Exception:
            self.stats.failed += 1
            _log.exception("fill failed", digest=fill.digest)
            fill.fail(UpstreamError(f"could not fetch {fill.digest}: the server's log says more"))
        finally:
            del self._fills[fill.origin, fill.digest]
            fill.end()

    async def _lead_or_follow(self, fill: Fill, opener: Opener) -> None:
        if self._take_stored(fill):
            return
        spool = Spool(self._folder / spool_name(fill.origin, fill.digest))
        fill.attach(spool.open())
        if not lock(fill.fd):
            await self._follow(fill, spool)
        elif not is_same_file(fill.fd, spool.path):
            return  # it was stored or dropped in between: look again
        elif os.fstat(fill.fd).st_size == 0 and self._take_stored(fill):
            spool.path.unlink(missing_ok=True)  # stored since the first look, so that this one is new
        else:
            self.stats.begun += 1
            await Lead(fill, spool, self._shop).run(opener)

    def _take_stored(self, fill: Fill) -> bool:
        """Whether another process has finished it; what came from elsewhere does not count."""
        stored = self._store.find(fill.digest) if self._grants.has(fill.origin, fill.digest) else None
        if stored is None:
            return False
        fill.attach(stored.fd)
        fill.finish(stored.size)
        return True

    async def _follow(self, fill: Fill, spool: Spool) -> None:
        """Read along with another process; returns when it is done or gone, for the caller to look again."""
        while True:
            stored = is_same_file(fill.fd, self._store.path(fill.digest))
            gone = not stored and lock(fill.fd)
            started, size = spool.read_size()
            readable = os.fstat(fill.fd).st_size
            if started:
                fill.start(size)
                fill.advance(readable)
            if stored or (started and readable == fill.size and not gone):
                return fill.finish(readable)
            if gone:
                fcntl.flock(fill.fd, fcntl.LOCK_UN)
                if is_same_file(fill.fd, spool.path):
                    return None
                if not is_same_file(fill.fd, self._store.path(fill.digest)):
                    if not fill.readable():
                        return None
                    raise ContentMismatch(f"another process failed to fetch {fill.digest}; the next pull starts afresh")
            await asyncio.sleep(_POLL_S)
