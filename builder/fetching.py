"""An image out of a registry, as an OCI image layout on disk: of one platform, every byte of it verified."""

import os
from collections.abc import Callable
from pathlib import Path

import orjson

from builder.failures import BuildFailed
from builder.workspace import Workspaces
from wave_proxy.image.oci import (
    LINUX_AMD64,
    OCI_INDEX,
    Descriptor,
    IndexEntry,
    Manifest,
    Platform,
    parse_platform,
    read_manifest,
)
from wave_proxy.image.request import Layer
from wave_proxy.image.size import format_size
from wave_proxy.upstream.registry import FetchedManifest, Registry


class Fetching:
    """Fetches images from ``host``, of at most ``max_bytes``."""

    def __init__(self, registry: Registry, workspaces: Workspaces, host: str, max_bytes: int) -> None:
        self._registry = registry
        self._workspaces = workspaces
        self._host = host
        self._max_bytes = max_bytes

    async def fetch(
        self, repository: str, reference: str, platform: str, layout: Path, say: Callable[[str], None]
    ) -> str:
        """Write the image into a new folder ``layout``; returns its manifest's digest.

        Of an index the image for ``platform``; if that is empty, the one for linux/amd64, else the first one. Raises
        BuildFailed, WaveError.
        """
        fetched, manifest = await self._find_image(repository, reference, platform)
        blobs = {blob.digest: blob for blob in manifest.descriptors()}
        size = sum(blob.size for blob in blobs.values())
        if size > self._max_bytes:
            raise BuildFailed(f"no space: the image has {format_size(size)}, more than [build] disk allows")
        count = len(manifest.layers)
        say(f"image {fetched.digest}, {count} layer{'' if count == 1 else 's'}, {format_size(size)}")
        for blob in blobs.values():
            await self._fetch_blob(repository, blob, layout)
        _write(_path_of(layout, fetched.digest), fetched.content)
        _write(layout / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        entry = {"mediaType": fetched.media_type, "digest": fetched.digest, "size": len(fetched.content)}
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
        _write(layout / "index.json", orjson.dumps(index))
        return fetched.digest

    async def _find_image(self, repository: str, reference: str, platform: str) -> tuple[FetchedManifest, Manifest]:
        fetched = await self._registry.fetch_manifest(self._host, repository, reference)
        manifest = read_manifest(fetched.content, fetched.media_type)
        if manifest.is_index:
            entry = choose(manifest.entries, parse_platform(platform) if platform else None)
            fetched = await self._registry.fetch_manifest(self._host, repository, entry.descriptor.digest)
            manifest = read_manifest(fetched.content, fetched.media_type)
        if not manifest.is_image:
            raise BuildFailed(f"what is to be scanned is not a container image, but {fetched.media_type[:100]}")
        return fetched, manifest

    async def _fetch_blob(self, repository: str, blob: Descriptor, layout: Path) -> None:
        file = _path_of(layout, blob.digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        location = f"docker://{self._host}/v2/{repository}/blobs/{blob.digest}"
        await self._workspaces.fetch(Layer(location, blob.digest, blob.size, ""), file, f"blob {blob.digest}")


def choose(entries: tuple[IndexEntry, ...], wanted: Platform | None) -> IndexEntry:
    """The image of an index for a platform; without one, that for linux/amd64 or the first. Raises BuildFailed."""
    images = [entry for entry in entries if entry.platform is None or entry.platform.os != "unknown"]
    for entry in images:
        found = entry.platform
        if found and (wanted or LINUX_AMD64).matches(found.os, found.architecture, found.variant):
            return entry
    if wanted is not None or not images:
        raise BuildFailed(f"missing platform: the index has no image for {wanted or 'any platform'}")
    return images[0]


def _path_of(layout: Path, digest: str) -> Path:
    return layout.joinpath("blobs", *digest.split(":"))


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
        target.write(content)
