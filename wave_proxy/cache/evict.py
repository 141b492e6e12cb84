"""The byte cap of the data folder: the blobs that were not used for longest go first.

Any process may evict, one at a time: a lock file decides. What is being read is locked by its reader and stays; the
spool counts into the cap, and spools that no process fills any more are taken over by the next fill or go after an
hour. What local repositories have as well is a file of two names: it stays, and does not count. Their uploads that
nobody goes on with go after a day.
"""

import asyncio
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from time import monotonic, time

import structlog

from wave_proxy.cache.blobs import SIZE_SUFFIX
from wave_proxy.cache.local import LOCAL, UPLOADS

_log = structlog.get_logger()

_LOW_WATER = 0.95  # evict down to this share of the cap, so that not every new blob starts a walk
_STALE_SPOOL_S = 3600.0
_STALE_UPLOAD_S = 86400.0
_INTERVAL_S = 30.0
_OLD_NOTE_S = 30 * 86400.0
_NOTES_INTERVAL_S = 6 * 3600.0  # there may be a million of them


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    size: int
    used: float
    names: int


@dataclass(slots=True)
class EvictStats:
    """What was evicted here, and the size of all that is kept (blobs, manifests, spools) when this process last looked.

    ``measured_at`` is that instant on the monotonic clock; 0 before the first look.
    """

    evicted_bytes: int = 0
    evicted_files: int = 0
    store_bytes: int = 0
    measured_at: float = 0.0


class Evictor:
    """Keeps ``<root>/blobs``, ``<root>/manifests`` and ``<root>/spool`` together within ``max_bytes``."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self.max_bytes = max_bytes
        self._nudged = asyncio.Event()
        self._next_notes = 0.0
        self.stats = EvictStats()

    def nudge(self) -> None:
        """Look at the sizes soon: a blob was added."""
        self._nudged.set()

    async def run(self) -> None:
        """Evict after each nudge, and every now and then, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_INTERVAL_S):
                    await self._nudged.wait()
            except TimeoutError:
                pass
            self._nudged.clear()
            try:
                await asyncio.to_thread(self.evict)
            except OSError as err:
                _log.error("can't look after the size of the data folder", error=str(err))

    def evict(self, wanted: int = 0) -> int:
        """Get under the cap, and free at least ``wanted`` bytes if it is given; returns what was freed. Blocking."""
        with open(self._root / "evict.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0  # another process is at it
            self._drop_stale_spools()
            self._drop_stale_uploads()
            self._drop_old_notes()
            blobs = (file for file in _files(self._root / "blobs") if file.names == 1)
            stored = [*blobs, *_files(self._root / "manifests")]
            files = sorted(stored, key=lambda file: file.used)
            total = sum(file.size for file in files) + sum(file.size for file in _files(self._root / "spool"))
            over_cap = total + wanted - self.max_bytes
            excess = over_cap + int(self.max_bytes * (1 - _LOW_WATER)) if over_cap > 0 else 0
            if wanted:  # the disk itself is full: the cap is no measure then
                excess = max(excess, wanted)
            freed = self._free(files, excess) if excess else 0
            self.stats.store_bytes, self.stats.measured_at = total - freed, monotonic()
        if not excess:
            return 0
        _log.info("evicted", bytes=freed, total=total - freed, cap=self.max_bytes)
        return freed

    def _free(self, files: list[_File], excess: int) -> int:
        freed = 0
        for file in files:
            if freed >= excess:
                break
            if _unlink_unread(file.path, only_name=True):
                freed += file.size
                self.stats.evicted_files += 1
        self.stats.evicted_bytes += freed
        return freed

    def _drop_old_notes(self) -> None:
        """Grants and tags that nobody has renewed for a month: upstream can be asked again."""
        if monotonic() < self._next_notes:
            return
        self._next_notes = monotonic() + _NOTES_INTERVAL_S
        for file in (*_files(self._root / "grants"), *_files(self._root / "tags")):
            if file.used < time() - _OLD_NOTE_S:
                _unlink_unread(file.path)

    def _drop_stale_uploads(self) -> None:
        for file in _files(self._root / LOCAL / UPLOADS):
            if file.used < time() - _STALE_UPLOAD_S:
                _unlink_unread(file.path)

    def _drop_stale_spools(self) -> None:
        for file in _files(self._root / "spool"):
            spool = file.path.removesuffix(SIZE_SUFFIX)
            stale = file.used < time() - _STALE_SPOOL_S
            if stale and (file.path == spool or not os.path.exists(spool)):
                _unlink_unread(file.path)


def _files(folder: Path) -> Iterator[_File]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                continue
            if S_ISREG(status.st_mode):
                yield _File(path, status.st_size, status.st_mtime, status.st_nlink)


def _unlink_unread(path: str, *, only_name: bool = False) -> bool:
    """Remove a file that no process has locked, with ``only_name`` if it has no other; whether it was removed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if only_name and os.fstat(fd).st_nlink != 1:
            return False
        os.unlink(path)
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(fd)
    return True
