"""Local repositories: what was pushed to us, on disk, shared by all worker processes.

``<root>/local/<name>/`` has ``_blobs/<digest>`` (hard links to the store's files, which the evictor leaves alone
therefore), ``_manifests/<digest>`` (the media type, a line end, and the bytes), ``_tags/<tag>`` (a digest), and
``_referrers/<digest of the subject>/<digest>`` (the descriptor of a manifest that names that subject). Digests stand
there with a dash for the colon. No component of a repository's name begins with an underscore.

A byte more in ``<root>/local/_changes`` says that something has changed or gone: see ``changes``.

Everything appears whole and synced, by a rename or a link, and in an order in which nothing names what is not there.
``_lock`` is held while manifests, tags and what they name change: no manifest loses a blob while it is put.
"""

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import orjson

from wave_proxy.cache.blobs import FULL, BlobStore, StoredBlob, open_verified
from wave_proxy.cache.manifests import StoredManifest
from wave_proxy.cache.spool import no_room
from wave_proxy.errors import (
    BlobUnknown,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    UpstreamError,
    clip,
)
from wave_proxy.image.oci import (
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_INDEX,
    Descriptor,
    Manifest,
    matches,
    parse_digest,
    read_json_object,
    read_manifest,
)
from wave_proxy.image.private import owner_of

LOCAL = "local"
"""The first component of the repositories' names, as clients spell them."""

UPLOADS = "_uploads"
"""The folder of what is not finished."""

_MAX_REFERRERS_BYTES = 4 << 20  # of one page, as of every manifest
_LOCAL_ATTRIBUTE = "user.wave.local"  # of a blob's file: it was in a repository here that is nobody's own
_NO_LINK = frozenset({errno.ENOENT, errno.EXDEV, errno.EMLINK, errno.EPERM})
_ELSEWHERE = ("nondistributable", "rootfs.foreign")  # layers that only their URLs have


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, and the last of its entries when more follow."""

    entries: list[str]
    last: str = ""


class LocalRepositories:
    """The local repositories of one data folder. All of it blocks; writing, also for what the disk takes to sync."""

    def __init__(self, root: Path, blobs: BlobStore, authority: str) -> None:
        """``authority`` is the host and port under which others know this server."""
        self._folder = root / LOCAL
        self._unfinished = self._folder / UPLOADS
        self._unfinished.mkdir(parents=True, exist_ok=True)
        self._changes = self._folder / "_changes"
        self._blobs = blobs
        self._authority = authority

    def find_name(self, registry: str, repository: str) -> str | None:
        """The name here of such a repository; None when it is not one of ours."""
        if registry != self._authority or not repository.startswith(f"{LOCAL}/"):
            return None
        return repository.removeprefix(f"{LOCAL}/")

    def changes(self) -> int:
        """A number that is another one after whatever was there has changed or gone, in any repository and process.

        An answer holds as long as the number is what it was before the answer was looked up. What is new counts not.
        """
        try:
            return self._changes.stat().st_size
        except FileNotFoundError:
            return 0

    def _note_change(self) -> None:
        with suppress(OSError):  # on a full disk; answers are given again for a minute at most
            fd = os.open(self._changes, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.write(fd, b".")
            finally:
                os.close(fd)

    # --- reading ---------------------------------------------------------------------------------------------------

    def get_tag(self, name: str, tag: str) -> str:
        """The digest that a tag stands for. Raises ManifestUnknown."""
        try:
            return self._tag(name, tag).read_text()
        except FileNotFoundError:
            raise ManifestUnknown(f"{LOCAL}/{name} has no tag {clip(tag)}") from None

    def list_tags(self, name: str, count: int | None, last: str) -> Page:
        """The tags behind ``last``, in the order of their bytes, at most ``count``. Raises NameUnknown."""
        folder = self._folder / name
        tags = sorted(tag for tag in _names(folder / "_tags") if tag > last)
        if not tags and not (folder / "_blobs").is_dir() and not (folder / "_manifests").is_dir():
            raise NameUnknown(f"there is no repository {LOCAL}/{name}")
        if count is None or len(tags) <= count:
            return Page(tags)
        return Page(tags[:count], tags[count - 1] if count else "")

    def has_manifest(self, name: str, digest: str) -> bool:
        """Whether the repository has that manifest."""
        return self._manifest(name, digest).exists()

    def get_manifest(self, name: str, digest: str) -> StoredManifest:
        """A manifest as it was pushed. Raises ManifestUnknown."""
        try:
            media_type, _, content = self._manifest(name, digest).read_bytes().partition(b"\n")
        except FileNotFoundError:
            content = b""
        if not content or not matches(content, digest):
            raise ManifestUnknown(f"{LOCAL}/{name} has no manifest {digest}")
        return StoredManifest(content, media_type.decode(), digest)

    def find_size(self, name: str, digest: str) -> int | None:
        """The size of a blob; None when the repository does not have it."""
        try:
            return self._blob(name, digest).stat().st_size
        except FileNotFoundError:
            return None

    def open_blob(self, name: str, digest: str) -> StoredBlob:
        """Open a blob for reading; who has it open reads it to its end. Raises BlobUnknown."""
        blob = open_verified(self._blob(name, digest))
        if blob is None:
            raise BlobUnknown(f"{LOCAL}/{name} has no blob {digest}")
        return blob

    def list_referrers(self, name: str, subject: str, artifact_type: str | None, last: str) -> tuple[bytes, str]:
        """An index of the manifests that name ``subject`` and come behind the digest ``last``.

        With it, the digest of its last manifest when more follow, else nothing.
        """
        folder, found, size = self._referrers(name, subject), list[bytes](), 0
        page_ends = ""
        for digest in sorted(entry.replace("-", ":", 1) for entry in _names(folder)):
            if digest <= last or not self.has_manifest(name, digest):
                continue
            try:
                descriptor = (folder / _file_name(digest)).read_bytes()
            except FileNotFoundError:
                continue  # it was just deleted
            if artifact_type is not None and orjson.loads(descriptor).get("artifactType") != artifact_type:
                continue
            size += len(descriptor) + 1
            if size > _MAX_REFERRERS_BYTES and found:
                return _referrers_index(found), page_ends
            found.append(descriptor)
            page_ends = digest
        return _referrers_index(found), ""

    # --- manifests and tags ----------------------------------------------------------------------------------------

    def put_manifest(self, name: str, manifest: StoredManifest, tag: str) -> str:
        """Take a manifest whose digest was verified, and let ``tag`` stand for it, unless that is empty.

        Returns the digest of the subject that it names, empty if it names none. Raises ManifestInvalid,
        ManifestBlobUnknown, StorageFull.
        """
        document, parsed = _read(manifest)
        subject = _subject_of(document)
        with self._locked(name):
            self._check_contents(name, parsed, document)
            if subject:
                note = self._referrers(name, subject) / _file_name(manifest.digest)
                self._write(note, orjson.dumps(_referrer(document, manifest)))
            content = manifest.media_type.encode() + b"\n" + manifest.content
            self._write(self._manifest(name, manifest.digest), content)
            if tag:
                is_new = not self._tag(name, tag).exists()
                self._write(self._tag(name, tag), manifest.digest.encode())
                if not is_new:
                    self._note_change()
        return subject

    def _check_contents(self, name: str, manifest: Manifest, document: Mapping[str, Any]) -> None:
        for entry in manifest.entries:
            self._check_manifest(name, entry.descriptor)
        if manifest.config is not None:
            self._check_blob(name, manifest.config)
        for layer, source in zip(manifest.layers, document["layers"] if manifest.layers else (), strict=True):
            if not source.get("urls") and not any(word in layer.media_type for word in _ELSEWHERE):
                self._check_blob(name, layer)

    def _check_manifest(self, name: str, descriptor: Descriptor) -> None:
        try:
            size = len(self.get_manifest(name, descriptor.digest).content)
        except ManifestUnknown:
            raise ManifestBlobUnknown(
                f"the index names the manifest {descriptor.digest}, which {LOCAL}/{name} does not have: push it first"
            ) from None
        _check_size(descriptor, size)

    def _check_blob(self, name: str, descriptor: Descriptor) -> None:
        size = self.find_size(name, descriptor.digest)
        if size is None:
            raise ManifestBlobUnknown(
                f"the manifest names the blob {descriptor.digest}, which {LOCAL}/{name} does not have: push it first"
            )
        _check_size(descriptor, size)

    def delete_tag(self, name: str, tag: str) -> None:
        """Raises ManifestUnknown when there is no such tag."""
        with self._locked(name, ManifestUnknown(f"{LOCAL}/{name} has no tag {clip(tag)}")) as missing:
            _remove(self._tag(name, tag), missing)
            self._note_change()

    def delete_manifest(self, name: str, digest: str) -> None:
        """Delete a manifest with the tags that stand for it. Raises ManifestUnknown when there is none."""
        with self._locked(name, ManifestUnknown(f"{LOCAL}/{name} has no manifest {digest}")) as missing:
            try:
                document = orjson.loads(self.get_manifest(name, digest).content)
            except ManifestUnknown:
                document = {}
            for tag in _names(self._folder / name / "_tags"):
                if self._tag(name, tag).read_text() == digest:
                    _remove(self._tag(name, tag), missing)
            _remove(self._manifest(name, digest), missing)
            if subject := _subject_of(document):
                with suppress(FileNotFoundError):
                    (self._referrers(name, subject) / _file_name(digest)).unlink()
            self._note_change()

    # --- blobs -----------------------------------------------------------------------------------------------------

    def add_blob(self, name: str, digest: str, file: Path) -> None:
        """Take a verified and synced file as that blob; the file itself stays. Raises StorageFull."""
        path = self._blob(name, digest)
        with _storing():
            _make_folder(path.parent)
            stored = self._blobs.find(digest)  # held, so that the evictor does not take it meanwhile
            try:
                if stored is None:
                    self._blobs.link(digest, file)
                if stored is None or not _link(self._blobs.path(digest), path):
                    with suppress(FileExistsError):
                        os.link(file, path)
                    _sync_folder(path.parent)
                if not owner_of(name):
                    _note_public(path)
            finally:
                if stored is not None:
                    stored.close()

    def mount(self, name: str, digest: str, source: str) -> bool:
        """Take a blob from another repository, from any when ``source`` is empty; whether that was possible."""
        origin = self._blob(source, digest) if source else self._blobs.path(digest)
        # Who may push may read what is nobody's own; that a repository has it shows in the file, if it can at all.
        if not origin.exists() or not (source or _is_in_repository(origin)):
            return False
        path = self._blob(name, digest)
        with _storing():
            _make_folder(path.parent)
            if not _link(origin, path):
                return False
        if not owner_of(name):
            _note_public(path)
        return True

    def delete_blob(self, name: str, digest: str) -> None:
        """Raises BlobUnknown when there is no such blob."""
        with self._locked(name, BlobUnknown(f"{LOCAL}/{name} has no blob {digest}")) as missing:
            _remove(self._blob(name, digest), missing)
            self._note_change()

    # --- files -----------------------------------------------------------------------------------------------------

    def _blob(self, name: str, digest: str) -> Path:
        return self._folder / name / "_blobs" / _file_name(digest)

    def _manifest(self, name: str, digest: str) -> Path:
        return self._folder / name / "_manifests" / _file_name(digest)

    def _tag(self, name: str, tag: str) -> Path:
        return self._folder / name / "_tags" / tag

    def _referrers(self, name: str, subject: str) -> Path:
        return self._folder / name / "_referrers" / _file_name(subject)

    @contextmanager
    def _locked(self, name: str, missing: Exception | None = None) -> Iterator[Exception]:
        """Hold the repository's lock. Where there is no repository, raise ``missing``, or make it if that is None."""
        folder = self._folder / name
        with _storing():
            if missing is None:
                _make_folder(folder)
            try:
                fd = os.open(folder / "_lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                raise missing or NameUnknown(f"there is no repository {LOCAL}/{name}") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield missing or NameUnknown(name)
            finally:
                os.close(fd)

    def _write(self, path: Path, content: bytes) -> None:
        _make_folder(path.parent)
        with NamedTemporaryFile(dir=self._unfinished, prefix=".new-", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.rename(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        _sync_folder(path.parent)


# --- what a manifest says --------------------------------------------------------------------------------------------


def _read(manifest: StoredManifest) -> tuple[dict[str, Any], Manifest]:
    if manifest.media_type not in MANIFEST_TYPES and manifest.media_type not in INDEX_TYPES:
        known = ", ".join(sorted(MANIFEST_TYPES | INDEX_TYPES))
        raise ManifestInvalid(f"Content-Type {clip(manifest.media_type)} is none of {known}")
    try:
        document = read_json_object(manifest.content, "manifest")
        parsed = read_manifest(manifest.content, manifest.media_type)
    except UpstreamError as err:
        raise ManifestInvalid(str(err)) from None
    if parsed.is_index and not isinstance(document.get("manifests"), list):
        raise ManifestInvalid("an index names manifests, and this one does not")
    return document, parsed


def _subject_of(document: Mapping[str, Any]) -> str:
    match document.get("subject"):
        case None:
            return ""
        case {"digest": str(digest)}:
            try:
                return parse_digest(digest)
            except DigestInvalid as err:
                raise ManifestInvalid(f"manifest's subject: {err}") from None
        case other:
            raise ManifestInvalid(f"manifest's subject is no descriptor: {clip(other)}")


def _referrer(document: Mapping[str, Any], manifest: StoredManifest) -> dict[str, Any]:
    """The descriptor of a manifest in the list of what refers to its subject (distribution-spec, end-12a)."""
    descriptor = {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.content)}
    artifact_type = document.get("artifactType")
    if not artifact_type and isinstance(config := document.get("config"), dict):
        artifact_type = config.get("mediaType")
    if isinstance(artifact_type, str) and artifact_type:
        descriptor["artifactType"] = artifact_type
    if isinstance(annotations := document.get("annotations"), dict):
        descriptor["annotations"] = annotations
    return descriptor


def _referrers_index(descriptors: list[bytes]) -> bytes:
    return b'{"schemaVersion":2,"mediaType":"%b","manifests":[%b]}' % (OCI_INDEX.encode(), b",".join(descriptors))


def _check_size(descriptor: Descriptor, size: int) -> None:
    if descriptor.size != size:
        raise ManifestInvalid(f"{descriptor.digest} has {size} bytes, and the manifest says {descriptor.size}")


# --- files -----------------------------------------------------------------------------------------------------------


def _file_name(digest: str) -> str:
    return digest.replace(":", "-")


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _remove(path: Path, missing: Exception) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        raise missing from None
    _sync_folder(path.parent)


def _link(source: Path, path: Path) -> bool:
    """Give a file a second name; False when that can't be."""
    try:
        os.link(source, path)
    except FileExistsError:
        return True
    except OSError as err:
        if err.errno in _NO_LINK:
            return False
        raise
    _sync_folder(path.parent)
    return True


def _note_public(path: Path) -> None:
    with suppress(OSError):  # a file system without such attributes
        os.setxattr(path, _LOCAL_ATTRIBUTE, b"")


def _is_in_repository(path: Path) -> bool:
    """Whether a file of the store has a second name, and was given it here."""
    try:
        os.getxattr(path, _LOCAL_ATTRIBUTE)
        return path.stat().st_nlink > 1
    except OSError:
        return False


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if err.errno in FULL:
            raise no_room(err) from err
        raise
