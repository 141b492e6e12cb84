"""Uploads: blobs on their way into local repositories, a file each, with which any worker process can go on.

``<root>/local/_uploads/<id>-<hash of the repository's name>`` holds the bytes so far, and its length is how many. Who
adds to it holds its lock. A running hash stays with the worker that had the upload last; another one reads the file
again from where its own hash stands. A blob becomes visible under its digest when all of it was found right and synced;
its file has then no name any more under which it could be added to.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import new as new_hash
from hashlib import sha256
from pathlib import Path
from re import compile as compile_pattern
from secrets import token_hex
from typing import TYPE_CHECKING

from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.local import LOCAL, UPLOADS, LocalRepositories
from wave_proxy.cache.spool import is_same_file, lock, no_room
from wave_proxy.errors import (
    BodyTooLarge,
    DigestInvalid,
    Overloaded,
    StorageFull,
    UploadInvalid,
    UploadOutOfOrder,
    UploadUnknown,
)

if TYPE_CHECKING:
    from hashlib import _Hash

_THREADS = 4  # that write and hash
_BATCH_BYTES = 512 << 10  # at once; while they are written, as many are received
_READ_BYTES = 1 << 20
_HASHES = 10_000
_LOCK_S = 5.0  # a client that comes back after a cut may be faster than the news of the cut
_LOCK_POLL_S = 0.02
_ID = compile_pattern("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a blob as it arrives: ``start`` and ``size`` are what the client says of it, None when it does not."""

    chunks: AsyncIterator[bytes]
    start: int | None = None
    size: int | None = None


@dataclass(slots=True)
class _Running:
    """The hash of a file's first ``size`` bytes."""

    hash: "_Hash"
    size: int = 0


class Uploads:
    """The uploads of one worker, and those that others had before."""

    def __init__(self, root: Path, local: LocalRepositories, evictor: Evictor, max_bytes: int | None) -> None:
        """``max_bytes`` limits one blob."""
        self._folder = root / LOCAL / UPLOADS
        self._local = local
        self._evictor = evictor
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="upload")
        self._hashes: OrderedDict[tuple[Path, str], _Running] = OrderedDict()

    def close(self) -> None:
        """End the threads, which have nothing to do any more."""
        self._threads.shutdown()

    def begin(self, name: str) -> str:
        """Begin an upload to that repository; returns its id. Raises StorageFull."""
        upload_id = token_hex(16)
        try:
            os.close(os.open(self._path(name, upload_id), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        except OSError as err:
            raise no_room(err) from err
        return upload_id

    def received(self, name: str, upload_id: str) -> int:
        """How many bytes are there. Raises UploadUnknown."""
        try:
            return self._path(name, upload_id).stat().st_size
        except FileNotFoundError:
            raise _unknown(name, upload_id) from None

    async def cancel(self, name: str, upload_id: str) -> None:
        """Drop an upload. Raises UploadUnknown, Overloaded."""
        async with self._open(name, upload_id) as upload:
            upload.drop()

    async def append(self, name: str, upload_id: str, part: Part) -> int:
        """Add a part; returns how many bytes are there. What arrived before an error stays, for the client to go on.

        Raises UploadUnknown, UploadOutOfOrder, UploadInvalid, BodyTooLarge, StorageFull, Overloaded, and what reading
        the part raises.
        """
        async with self._open(name, upload_id) as upload:
            await upload.receive(part)
            return upload.size

    async def finish(self, name: str, upload_id: str, part: Part, digest: str) -> None:
        """Add the last part, and take the whole as the blob ``digest``, or drop it: raises DigestInvalid then.

        Raises as ``append``.
        """
        async with self._open(name, upload_id) as upload:
            await upload.receive(part)
            await upload.finish(digest)
        self._evictor.nudge()

    async def add_whole(self, name: str, part: Part, digest: str) -> None:
        """Take a blob in one piece. Raises as ``finish``, and leaves nothing then."""
        upload_id = self.begin(name)
        try:
            await self.finish(name, upload_id, part, digest)
        except BaseException:
            self._path(name, upload_id).unlink(missing_ok=True)
            raise

    def _path(self, name: str, upload_id: str) -> Path:
        if not _ID.fullmatch(upload_id):
            raise _unknown(name, upload_id)
        return self._folder / f"{upload_id}-{sha256(name.encode()).hexdigest()[:8]}"

    @asynccontextmanager
    async def _open(self, name: str, upload_id: str) -> "AsyncIterator[_Upload]":
        path = self._path(name, upload_id)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise _unknown(name, upload_id) from None
        try:
            await _wait_for_lock(fd)
            if not is_same_file(fd, path):
                raise _unknown(name, upload_id)  # it was finished meanwhile
            yield _Upload(self, name, path, fd)
        finally:
            os.close(fd)

    # For the upload that is open.

    def running(self, path: Path, algorithm: str) -> _Running:
        key = path, algorithm
        running = self._hashes.get(key)
        if running is None:
            running = self._hashes[key] = _Running(new_hash(algorithm))
        self._hashes.move_to_end(key)
        if len(self._hashes) > _HASHES:
            self._hashes.popitem(last=False)
        return running

    def forget(self, path: Path) -> None:
        for algorithm in ("sha256", "sha512"):
            self._hashes.pop((path, algorithm), None)

    def start(self, job: Callable[[], None]) -> "asyncio.Future[None]":
        return asyncio.get_running_loop().run_in_executor(self._threads, job)

    def check_size(self, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise BodyTooLarge(f"the blob is over the limit of {self._max_bytes} bytes (local.max_blob_bytes)")

    def make_room(self, wanted: int) -> None:
        self._evictor.evict(wanted)

    def add_blob(self, name: str, digest: str, file: Path) -> None:
        self._local.add_blob(name, digest, file)


class _Upload:
    """An upload whose file is open and locked."""

    def __init__(self, uploads: Uploads, name: str, path: Path, fd: int) -> None:
        self._uploads = uploads
        self._name = name
        self._path = path
        self._fd = fd
        self._running = uploads.running(path, "sha256")
        self.size = os.fstat(fd).st_size

    async def receive(self, part: Part) -> None:
        start = self.size
        if part.start is not None and part.start != start:
            raise UploadOutOfOrder(f"the part begins at byte {part.start}, and {start} bytes are there", start)
        if part.size is not None:
            self._uploads.check_size(start + part.size)
        await self._write_all(part.chunks)
        if part.size is not None and part.size != self.size - start:
            told, self.size = self.size - start, start
            self._uploads.forget(self._path)
            os.ftruncate(self._fd, start)
            raise UploadInvalid(f"Content-Range says {part.size} bytes, and {told} were sent")

    async def _write_all(self, chunks: AsyncIterator[bytes]) -> None:
        batch, waiting = list[bytes](), 0
        job: asyncio.Future[None] | None = None
        try:
            async for chunk in chunks:
                batch.append(chunk)
                waiting += len(chunk)
                if waiting >= _BATCH_BYTES:
                    if job is not None:
                        await asyncio.shield(job)
                    job = self._start_writing(batch, waiting)
                    batch, waiting = [], 0
            if job is not None:
                await asyncio.shield(job)
            if batch:
                job = self._start_writing(batch, waiting)
                await asyncio.shield(job)
        finally:
            if job is not None:
                await _outlast(job)

    def _start_writing(self, batch: list[bytes], size: int) -> "asyncio.Future[None]":
        self._uploads.check_size(self.size + size)
        return self._uploads.start(lambda: self._write(b"".join(batch)))

    async def finish(self, digest: str) -> None:
        algorithm = digest.partition(":")[0]
        if algorithm != self._running.hash.name:
            self._running = self._uploads.running(self._path, algorithm)
        job = self._uploads.start(lambda: self._take(digest))
        try:
            await asyncio.shield(job)
        finally:
            await _outlast(job)

    def drop(self) -> None:
        self._uploads.forget(self._path)
        self._path.unlink(missing_ok=True)

    # --- in a thread, one job at a time ----------------------------------------------------------------------------

    def _write(self, content: bytes) -> None:
        running, start = self._running, self.size
        error = self._append(content, start)
        if error is not None:
            self._uploads.make_room(64 * len(content))
            error = self._append(content, start)
        if error is not None:
            raise no_room(error) from error
        if running.size == start:
            running.hash.update(content)
            running.size = self.size

    def _append(self, content: bytes, start: int) -> OSError | None:
        """Write what is missing of ``content``, which belongs at ``start``; returns why not all could be written."""
        try:
            while left := start + len(content) - self.size:
                self.size += os.pwrite(self._fd, memoryview(content)[len(content) - left :], self.size)
        except OSError as err:
            return err
        return None

    def _take(self, digest: str) -> None:
        running = self._running
        while running.size < self.size:
            content = os.pread(self._fd, min(_READ_BYTES, self.size - running.size), running.size)
            if not content:
                raise UploadInvalid("the upload's file has become shorter: upload it again")
            running.hash.update(content)
            running.size += len(content)
        found = f"{running.hash.name}:{running.hash.hexdigest()}"
        if found != digest:
            self.drop()
            raise DigestInvalid(f"what was uploaded has the digest {found}, and not {digest}: upload it again")
        os.fsync(self._fd)
        # A name that no upload has: from here on nobody can add to the file, also when this process dies.
        nameless = self._path.with_name(f".new-{self._path.name}")
        os.rename(self._path, nameless)
        try:
            self._uploads.add_blob(self._name, digest, nameless)
        except StorageFull:
            if nameless.stat().st_nlink == 1:
                os.rename(nameless, self._path)
            raise
        self._uploads.forget(self._path)
        nameless.unlink()


async def _wait_for_lock(fd: int) -> None:
    ends = asyncio.get_running_loop().time() + _LOCK_S
    while not lock(fd):
        if asyncio.get_running_loop().time() > ends:
            raise Overloaded("another request is adding to this upload; try again when it has ended")
        await asyncio.sleep(_LOCK_POLL_S)


async def _outlast(job: "asyncio.Future[None]") -> None:
    """Return when a thread has let go of the file, cancelled or not. Its error goes to who waits for it besides."""
    while not job.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([job])
    job.exception()


def _unknown(name: str, upload_id: str) -> UploadUnknown:
    return UploadUnknown(f"there is no upload {upload_id[:32]!r} to {LOCAL}/{name}: begin a new one")
