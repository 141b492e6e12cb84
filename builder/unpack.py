"""Unpacks a build context: a tar from people whom nobody knows, into a folder that nothing may lead out of."""

import os
import stat
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from gzip import GzipFile
from hashlib import sha256
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, cast

from builder.failures import BuildFailed

MAX_ENTRIES = 100_000
MAX_NAME = 1000
MAX_DEPTH = 100

_STEP = 1 << 18
_MAX_HEADER_BYTES = 1 << 20
_MAX_TIME = 1 << 33


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class ContextInvalid(BuildFailed):
    """A build context that is not what it says, or that holds what a context may not hold."""

    def __init__(self, message: str) -> None:
        super().__init__(f"the build context can't be used: {message}")


def unpack(archive: Path, folder: Path, tar_digest: str, max_bytes: int, stopped: Callable[[], bool]) -> None:
    """Unpack a tar.gz into an empty folder of ours. Long: belongs into a thread, and ends early when ``stopped``.

    Set-user-id bits, owners and extended attributes are not taken over. Raises ContextInvalid for devices, for names
    and links that lead out, for more than MAX_ENTRIES or ``max_bytes``, and for a tar with another digest.
    """
    with open(archive, "rb") as file:
        plain = _Tar(file, max_bytes, stopped)
        try:
            _Unpacker(folder, max_bytes).unpack(plain)
            plain.check(tar_digest)
        except (tarfile.TarError, EOFError, ValueError, zlib.error) as err:
            raise ContextInvalid(f"it is no tar.gz: {err}") from None
        except OSError as err:
            raise _translate(err, folder) from None


def check_tar(archive: Path, tar_digest: str, max_bytes: int, stopped: Callable[[], bool]) -> None:
    """Check that a tar.gz holds the tar with that digest, without unpacking it. Raises ContextInvalid."""
    with open(archive, "rb") as file:
        try:
            _Tar(file, max_bytes, stopped).check(tar_digest)
        except (EOFError, ValueError, OSError, zlib.error) as err:
            raise ContextInvalid(f"a layer is no tar.gz: {err}") from None


def _translate(err: OSError, folder: Path) -> BuildFailed:
    if err.errno is None:  # gzip's own
        return ContextInvalid(f"it is no tar.gz: {err}")
    name = os.path.relpath(err.filename, folder) if err.filename else ""
    return ContextInvalid(f"{err.strerror}{f': {_shown(name)}' if name else ''}")


def _too_large(max_bytes: int) -> ContextInvalid:
    return ContextInvalid(f"it unpacks to more than {max_bytes} bytes")


class _Tar(RawIOBase):
    """The tar in a tar.gz, read once from its beginning to its end; hashed and counted on the way."""

    def __init__(self, file: BinaryIO, max_bytes: int, stopped: Callable[[], bool]) -> None:
        self._plain = GzipFile(fileobj=cast(BinaryIO, _Stoppable(file, stopped)))
        self._hash = sha256()
        self._position = 0
        self._max_bytes = max_bytes

    def read(self, size: int = -1) -> bytes:
        # Names and attributes of any length are read in one piece, into memory.
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ContextInvalid("an entry's name or attributes are too long")
        parts: list[bytes] = []
        while size and (part := self._plain.read(size)):
            parts.append(part)
            size -= len(part)
            self._hash.update(part)
            self._position += len(part)
            if self._position > self._max_bytes:
                raise _too_large(self._max_bytes)
        return b"".join(parts)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Forward only."""
        if whence != os.SEEK_SET or offset < self._position:
            raise ValueError("its entries overlap")
        while self._position < offset and self.read(min(offset - self._position, _STEP)):
            pass
        return self._position

    def check(self, digest: str) -> None:
        """Read what is left, and compare the digest of all. Raises ContextInvalid."""
        while self.read(_STEP):
            pass
        found = f"sha256:{self._hash.hexdigest()}"
        if found != digest:
            raise ContextInvalid(f"tarDigest is {digest} and the unpacked archive's is {found}")


class _Stoppable:
    """A file that ends badly when somebody wants that: an archive may be made to take hours."""

    def __init__(self, file: _Readable, stopped: Callable[[], bool]) -> None:
        self._file = file
        self._stopped = stopped

    def read(self, size: int = -1, /) -> bytes:
        if self._stopped():
            raise ContextInvalid("its unpacking was stopped")
        return self._file.read(size)


class _Unpacker:
    """Makes every folder, file and link itself, and goes through none that is a link."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._written = 0
        self._folders = {PurePosixPath(".")}
        self._files: set[PurePosixPath] = set()
        self._times: list[tuple[Path, float]] = []

    def unpack(self, plain: _Tar) -> None:
        with tarfile.TarFile(fileobj=cast(BinaryIO, plain), mode="r") as tar:
            count = 0
            while (member := tar.next()) is not None:
                count += 1
                if count > MAX_ENTRIES:
                    raise ContextInvalid(f"it has more than {MAX_ENTRIES} entries")
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
                self._add(member, tar)
        for path, when in reversed(self._times):
            os.utime(path, (when, when), follow_symlinks=False)

    def _add(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        name = _inner_path(member.name)
        if member.isdir():
            self._make_folder(name)
            self._finish(name, member, 0o700)
            return
        if name == PurePosixPath("."):
            raise ContextInvalid("an entry that is no folder takes the place of the whole")
        self._make_folder(name.parent)
        self._make_room(name)
        if member.isreg():
            self._write(name, member, tar)
        elif member.issym():
            _check_link(name, member.linkname)
            os.symlink(member.linkname, self._folder / name)
        elif member.islnk():
            source = _inner_path(member.linkname)
            if source not in self._files:
                raise ContextInvalid(f"{_shown(member.name)} is a link to a file that is not in it")
            os.link(self._folder / source, self._folder / name, follow_symlinks=False)
            self._files.add(name)
        else:
            raise ContextInvalid(f"{_shown(member.name)} is a device or pipe; only files, folders and links are taken")

    def _make_folder(self, name: PurePosixPath) -> None:
        if name in self._folders:
            return
        self._make_folder(name.parent)
        try:
            os.mkdir(self._folder / name, 0o755)
        except FileExistsError:
            raise ContextInvalid(f"{_shown(str(name))} is a folder and something else as well") from None
        self._folders.add(name)

    def _make_room(self, name: PurePosixPath) -> None:
        """A later entry takes the place of an earlier one, unless that is a folder."""
        if name in self._folders:
            raise ContextInvalid(f"{_shown(str(name))} is a folder and something else as well")
        with suppress(FileNotFoundError):
            os.unlink(self._folder / name)
        self._files.discard(name)

    def _write(self, name: PurePosixPath, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        content = tar.extractfile(member)
        if content is None:
            raise ContextInvalid(f"{_shown(member.name)} can't be read")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(self._folder / name, flags, 0o600), "wb") as file:
            while chunk := content.read(_STEP):
                self._written += len(chunk)
                if self._written > self._max_bytes:  # its holes are not in the archive
                    raise _too_large(self._max_bytes)
                file.write(chunk)
        self._files.add(name)
        self._finish(name, member, 0o600)

    def _finish(self, name: PurePosixPath, member: tarfile.TarInfo, least: int) -> None:
        path = self._folder / name
        os.chmod(path, (stat.S_IMODE(member.mode) & 0o777) | least)
        self._times.append((path, min(max(float(member.mtime), 0.0), _MAX_TIME)))


def _inner_path(name: str) -> PurePosixPath:
    if len(name) > MAX_NAME or name.count("/") > MAX_DEPTH:
        raise ContextInvalid(f"{_shown(name)} is too long, or too deep")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ContextInvalid(f"{_shown(name)} leads out of it")
    return path


def _check_link(name: PurePosixPath, target: str) -> None:
    """A link may go up as far as the context's root, and from there down: so no chain of links leads out."""
    parts = PurePosixPath(target).parts
    ups = next((position for position, part in enumerate(parts) if part != ".."), len(parts))
    if not parts or target.startswith("/") or ".." in parts[ups:] or ups > len(name.parent.parts):
        raise ContextInvalid(f"the link {_shown(str(name))} leads out of it, to {_shown(target)}")


def _shown(name: str) -> str:
    return ascii(name[:100])
