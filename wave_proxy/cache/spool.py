"""The files of a fill: the spool with the bytes so far, whose lock says who leads, and beside it the size.

A spool that has no whole size note beside it is empty to everybody.
"""

import fcntl
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from wave_proxy.cache.blobs import FULL, SIZE_SUFFIX
from wave_proxy.errors import StorageFull


@dataclass(frozen=True, slots=True)
class Spool:
    """Where the files of a fill are."""

    path: Path

    @property
    def _note(self) -> Path:
        return self.path.with_name(self.path.name + SIZE_SUFFIX)

    def open(self) -> int:
        """A descriptor of the file, which is made if need be. Raises StorageFull."""
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as err:
            raise no_room(err) from err

    def read_size(self) -> tuple[bool, int | None]:
        """Whether the fill's leader has begun to get an answer, and the size that it told."""
        try:
            text = self._note.read_text()
        except FileNotFoundError:
            return False, None
        if not text.endswith("\n"):
            return False, None  # being written
        return True, None if text == "-\n" else int(text)

    def note_size(self, size: int | None) -> None:
        """Tell it to other processes, unless that was done. Raises StorageFull."""
        if not self._note.exists():
            try:
                self._note.write_text("-\n" if size is None else f"{size}\n")
            except OSError as err:
                raise no_room(err) from err

    def forget_size(self) -> None:
        """Drop the note: what is in the spool has become a blob."""
        self._note.unlink(missing_ok=True)

    def drop(self) -> None:
        """Drop both; who has the spool open can go on reading."""
        self.path.unlink(missing_ok=True)
        self.forget_size()


def spool_name(origin: str, digest: str) -> str:
    """The file name of a fill's spool."""
    return f"{digest.replace(':', '-')}.{sha256(origin.encode()).hexdigest()[:8]}"


def no_room(err: OSError) -> StorageFull:
    """What a failed write means for who reads along."""
    if err.errno in FULL:
        return StorageFull("the data folder is full: make room there, or lower cache.max_bytes")
    return StorageFull(f"can't write to the data folder: {err.strerror}")


def free_bytes(folder: Path) -> int:
    """Room on that file system."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def lock(fd: int) -> bool:
    """Take the lock that leaders hold; False when another has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_same_file(fd: int, path: Path) -> bool:
    """Whether the descriptor's file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
