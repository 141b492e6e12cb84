"""Content-addressed files: verified before they are visible, readable while they are evicted.

``<root>/blobs/<algorithm>/<first two hex>/<hex>``. A reader holds a shared lock on its file, the evictor needs an
exclusive one, so nothing is freed while it is read, in whichever process. A file's modification time is when it was
last used. Where the file system has extended attributes, one holds the size that was verified: a file that a crash of
the machine has cut short is noticed when it is opened, and dropped.
"""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from time import time

from wave_proxy.errors import StorageFull

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
SIZE_SUFFIX = ".size"  # beside a spool: the blob's size in bytes, or nothing when upstream does not tell
_SIZE_ATTRIBUTE = "user.wave.size"
_TOUCH_AFTER_S = 60.0  # the order of eviction needs no better; spares most reads a write


class StoredBlob:
    """An open blob of the store. Close it once."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    def readable(self) -> int:
        """Bytes that may be read: all."""
        return self.size

    async def wait(self, offset: int) -> None:
        """Never has to wait."""

    def close(self) -> None:
        os.close(self.fd)


class BlobStore:
    """The blobs of one data folder, shared by all processes of the machine."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "blobs"
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where a blob of that (well-formed) digest lies, whether it is there or not."""
        algorithm, _, hex_digits = digest.partition(":")
        return self.folder / algorithm / hex_digits[:2] / hex_digits

    def find(self, digest: str) -> StoredBlob | None:
        """Open a blob for reading; None when it is not there or is being evicted."""
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if _verified_size(fd, status.st_size) != status.st_size:
                self.discard(digest)
                raise _Damaged
            if status.st_mtime < time() - _TOUCH_AFTER_S:
                with suppress(OSError):  # a read-only store still serves
                    os.utime(fd)
        except (BlockingIOError, _Damaged):
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return StoredBlob(fd, status.st_size)

    def link(self, digest: str, file: Path) -> None:
        """Make a verified and synced file visible as that blob under a second name, if there is no other yet.

        Where that can't be, the blob is not in the store; nothing else depends on it.
        """
        path = self.path(digest)
        note_verified_size(file, file.stat().st_size)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, path)

    def put(self, digest: str, content: bytes) -> None:
        """Store content whose digest the caller has verified. Raises StorageFull."""
        write_whole(self.path(digest), content)
        note_verified_size(self.path(digest), len(content))

    def discard(self, digest: str) -> None:
        """Drop a blob that was found damaged; who reads it goes on reading."""
        with suppress(FileNotFoundError):
            self.path(digest).unlink()

    def adopt(self, digest: str, spool: Path) -> None:
        """Make a verified and synced file of the same file system visible as that blob."""
        path = self.path(digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        note_verified_size(spool, spool.stat().st_size)
        os.rename(spool, path)


def open_verified(path: Path) -> StoredBlob | None:
    """Open a file that is a blob; None when it is not there, or no longer as long as it was verified."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    size = os.fstat(fd).st_size
    if _verified_size(fd, size) != size:
        os.close(fd)
        return None
    return StoredBlob(fd, size)


class _Damaged(Exception):
    """A file that is not as long as it was when it was verified."""


def note_verified_size(path: Path, size: int) -> None:
    """Have a file say how large it must be to be whole."""
    with suppress(OSError):  # a file system without such attributes
        os.setxattr(path, _SIZE_ATTRIBUTE, b"%d" % size)


def _verified_size(fd: int, default: int) -> int:
    try:
        return int(os.getxattr(fd, _SIZE_ATTRIBUTE))
    except OSError:
        return default


def write_whole(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file so that it is there whole or not at all. Raises StorageFull.

    Without ``sync`` a power cut may leave it empty: for what is verified when it is read.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
                os.rename(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as err:
        if err.errno in FULL:
            raise StorageFull("the data folder is full: make room there, or lower cache.max_bytes") from err
        raise
