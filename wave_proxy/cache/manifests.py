"""Manifests by digest, byte for byte as they were sent, with their media type; on disk, and the last ones in memory.

``<root>/manifests/<algorithm>/<first two hex>/<hex>`` holds the media type, a line end, and the bytes.
"""

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from wave_proxy.cache.blobs import write_whole
from wave_proxy.errors import StorageFull
from wave_proxy.image.oci import matches

_MEMORY_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class StoredManifest:
    """A manifest or index as upstream sent it, or as we made it."""

    content: bytes
    media_type: str
    digest: str


class ManifestStore:
    """The manifests of one data folder."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "manifests"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._memory: OrderedDict[str, StoredManifest] = OrderedDict()
        self._bytes = 0

    def find(self, digest: str) -> StoredManifest | None:
        """The manifest of that digest; None when it is not there, or its file is no longer what it was."""
        known = self._memory.get(digest)
        if known is not None:
            self._memory.move_to_end(digest)
            return known
        try:
            media_type, _, content = self._path(digest).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if not matches(content, digest) or not media_type.isascii():
            with suppress(FileNotFoundError):
                self._path(digest).unlink()
            return None
        manifest = StoredManifest(content, media_type.decode(), digest)
        self._remember(manifest)
        return manifest

    def put(self, manifest: StoredManifest) -> None:
        """Keep a manifest whose digest the caller has verified; on a full disk, in memory only."""
        self._remember(manifest)
        with suppress(StorageFull):
            write_whole(
                self._path(manifest.digest), manifest.media_type.encode() + b"\n" + manifest.content, sync=False
            )

    def _remember(self, manifest: StoredManifest) -> None:
        if manifest.digest not in self._memory:
            self._memory[manifest.digest] = manifest
            self._bytes += len(manifest.content)
        while self._bytes > _MEMORY_BYTES and len(self._memory) > 1:
            _, oldest = self._memory.popitem(last=False)
            self._bytes -= len(oldest.content)

    def _path(self, digest: str) -> Path:
        algorithm, _, hex_digits = digest.partition(":")
        return self._folder / algorithm / hex_digits[:2] / hex_digits
