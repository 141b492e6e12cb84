"""One upstream fetch a blob and machine, and everybody who wants the blob reads along.

A fill belongs to the worker, not to the request that began it: no client's speed or death slows or stops it. Its bytes
go to ``<root>/spool/<digest>`` while a running digest checks them; readers follow the growing file. The last chunk is
written only after digest and size were found right, so that no reader ever has a whole blob that was not verified; then
the file is synced and renamed into the store.

Whichever process holds the exclusive lock on the spool leads; the others follow the file's size. When a leader dies,
the kernel gives its lock back and a follower goes on from the bytes that are there. Followers poll: every few
milliseconds for a fill, not for each client.
"""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from hashlib import sha256
from pathlib import Path

import structlog

from wave_proxy._fast.digest import Verifier
from wave_proxy.cache.blobs import FULL, SIZE_SUFFIX, BlobStore
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.grants import Grants
from wave_proxy.errors import (
    ContentMismatch,
    SizeMismatch,
    StorageFull,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
)
from wave_proxy.upstream.registry import BlobStream

_log = structlog.get_logger()

_POLL_S = 0.004
_READ_BYTES = 1 << 20
_ATTEMPTS = 5  # without a byte of progress
_BACKOFF_S = 0.2

Opener = Callable[[int, int | None], AbstractAsyncContextManager[BlobStream]]
"""Opens the blob upstream from a byte offset on; the second argument is its size once that is known."""


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

    # What follows is for Fills alone.

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


def spool_name(origin: str, digest: str) -> str:
    """The file name of a fill's spool."""
    return f"{digest.replace(':', '-')}.{sha256(origin.encode()).hexdigest()[:8]}"


class Fills:
    """The fills of one worker."""

    def __init__(self, root: Path, store: BlobStore, evictor: Evictor, grants: Grants) -> None:
        self._folder = root / "spool"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._store = store
        self._evictor = evictor
        self._grants = grants
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
        return fill

    def is_under_way(self, origin: str, digest: str) -> bool:
        """Whether ``join`` would find one."""
        return (origin, digest) in self._fills

    async def close(self) -> None:
        """End all fills; what they have so far stays in the spool for the next one."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, fill: Fill, opener: Opener) -> None:
        try:
            while not fill.finished:
                await self._lead_or_follow(fill, opener)
            self._evictor.nudge()
        except WaveError as err:
            _log.warning("fill failed", digest=fill.digest, error=str(err))
            fill.fail(err)
        except asyncio.CancelledError:
            fill.fail(UpstreamUnavailable("the proxy is shutting down"))
            raise
        except Exception:
            _log.exception("fill failed", digest=fill.digest)
            fill.fail(UpstreamError(f"could not fetch {fill.digest}: the server's log says more"))
        finally:
            del self._fills[fill.origin, fill.digest]
            fill.end()

    async def _lead_or_follow(self, fill: Fill, opener: Opener) -> None:
        if self._take_stored(fill):
            return
        spool = self._folder / spool_name(fill.origin, fill.digest)
        fill.attach(_open_spool(spool))
        if not _lock(fill.fd):
            await self._follow(fill, spool)
        elif not _is_same_file(fill.fd, spool):
            return  # it was stored or dropped in between: look again
        elif os.fstat(fill.fd).st_size == 0 and self._take_stored(fill):
            spool.unlink(missing_ok=True)  # stored since the first look, so that this one is new
        else:
            await _Lead(fill, spool, self._store, self._evictor, self._grants).run(opener)

    def _take_stored(self, fill: Fill) -> bool:
        """Whether another process has finished it; what came from elsewhere does not count."""
        stored = self._store.find(fill.digest) if self._grants.has(fill.origin, fill.digest) else None
        if stored is None:
            return False
        fill.attach(stored.fd)
        fill.finish(stored.size)
        return True

    async def _follow(self, fill: Fill, spool: Path) -> None:
        """Read along with another process; returns when it is done or gone, for the caller to look again."""
        size_file = spool.with_name(spool.name + SIZE_SUFFIX)
        while True:
            stored = _is_same_file(fill.fd, self._store.path(fill.digest))
            gone = not stored and _lock(fill.fd)
            started, size = _read_size(size_file)
            readable = os.fstat(fill.fd).st_size
            if started:
                fill.start(size)
                fill.advance(readable)
            if stored or (started and readable == fill.size and not gone):
                return fill.finish(readable)
            if gone:
                fcntl.flock(fill.fd, fcntl.LOCK_UN)
                if _is_same_file(fill.fd, spool):
                    return None
                if not _is_same_file(fill.fd, self._store.path(fill.digest)):
                    if not fill.readable():
                        return None
                    raise ContentMismatch(f"another process failed to fetch {fill.digest}; the next pull starts afresh")
            await asyncio.sleep(_POLL_S)


class _Lead:
    """The fetch itself, in the process that holds the spool's lock."""

    def __init__(self, fill: Fill, spool: Path, store: BlobStore, evictor: Evictor, grants: Grants) -> None:
        self._fill = fill
        self._grants = grants
        self._spool = spool
        self._size_file = spool.with_name(spool.name + SIZE_SUFFIX)
        self._store = store
        self._evictor = evictor
        self._verifier = Verifier(fill.digest, -1 if fill.size is None else fill.size)
        self._held = b""
        self._written = 0

    async def run(self, opener: Opener) -> None:
        """Fetch, verify, store. Raises what ended it; nothing that was found wrong stays."""
        try:
            await self._resume()
            await self._fetch(opener)
            self._verifier.finish()
            await self._write(self._held)
            self._fill.finish(self._verifier.size)
            await asyncio.to_thread(os.fsync, self._fill.fd)
            # Readers' duplicates share it and keep the evictor away; and once it is visible, nobody may be refused.
            fcntl.flock(self._fill.fd, fcntl.LOCK_SH)
            self._grants.add(self._fill.origin, (self._fill.digest,))  # who finds it stored finds this as well
            self._store.adopt(self._fill.digest, self._spool)
            self._size_file.unlink(missing_ok=True)
        except (UpstreamUnavailable, UpstreamTimeout):
            raise  # what is there can be gone on with
        except (UpstreamError, StorageFull):
            self._spool.unlink(missing_ok=True)
            self._size_file.unlink(missing_ok=True)
            raise

    async def _resume(self) -> None:
        """Take over what a fill that was cut off has left."""
        started, size = _read_size(self._size_file)
        left = os.fstat(self._fill.fd).st_size
        if not started:
            os.ftruncate(self._fill.fd, 0)
            return
        for offset in range(0, left, _READ_BYTES):
            self._verifier.update(await asyncio.to_thread(os.pread, self._fill.fd, _READ_BYTES, offset))
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
                _log.info("fill resumes", digest=self._fill.digest, offset=self._verifier.size, error=str(err))
                await asyncio.sleep(_BACKOFF_S * (failures + 1))

    async def _transfer(self, opener: Opener) -> None:
        async with opener(self._verifier.size, self._fill.size) as stream:
            await self._note_size(stream.size)
            known = self._verifier.size - stream.start
            async for chunk in stream.chunks:
                fresh = chunk[known:] if known else chunk
                known = max(known - len(chunk), 0)
                if fresh:
                    self._verifier.update(fresh)
                    await self._write(self._held)
                    self._held = fresh
        if self._fill.size is not None and self._verifier.size < self._fill.size:
            raise UpstreamUnavailable(f"upstream ended {self._fill.digest} after {self._verifier.size} bytes")

    async def _note_size(self, size: int | None) -> None:
        if size is not None:
            await self._make_room(size - self._written)
        self._fill.start(size)
        if not self._size_file.exists():
            try:
                self._size_file.write_text("-\n" if self._fill.size is None else f"{self._fill.size}\n")
            except OSError as err:
                raise _no_room(err) from err

    async def _make_room(self, wanted: int) -> None:
        """Before the first byte is promised to anybody: a full disk is then no cut, but a pull past the store."""
        if wanted > self._evictor.max_bytes:
            raise StorageFull(f"{self._fill.digest} is said to have {wanted} bytes, more than cache.max_bytes")
        if _free_bytes(self._spool.parent) < wanted:
            await asyncio.to_thread(self._evictor.evict, wanted)
            if (free := _free_bytes(self._spool.parent)) < wanted:
                raise StorageFull(f"the data folder has {free} bytes left and {self._fill.digest} needs {wanted}")

    async def _write(self, chunk: bytes) -> None:
        if self._written + len(chunk) > self._evictor.max_bytes:
            raise StorageFull(f"{self._fill.digest} does not end within cache.max_bytes")
        rest, error = self._append(memoryview(chunk))
        if error is not None:
            await asyncio.to_thread(self._evictor.evict, 64 * len(chunk))
            rest, error = self._append(rest)
        self._fill.advance(self._written)
        if error is not None:
            raise _no_room(error) from error

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


def _open_spool(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as err:
        raise _no_room(err) from err


def _no_room(err: OSError) -> StorageFull:
    if err.errno in FULL:
        return StorageFull("the data folder is full: make room there, or lower cache.max_bytes")
    return StorageFull(f"can't write to the data folder: {err.strerror}")


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _read_size(path: Path) -> tuple[bool, int | None]:
    """Whether the fill's leader has begun to get an answer, and the size that it told."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return False, None
    if not text.endswith("\n"):
        return False, None  # being written
    return True, None if text == "-\n" else int(text)
