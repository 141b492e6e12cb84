"""For tests of the cache: what one worker has of it, over a data folder and real upstream registries."""

import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.upstream import Upstream
from tests.outgoing import registry_at
from wave_proxy.cache.blobs import BlobStore, StoredBlob
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.fill import Fill, FillReader, ReadAlong
from wave_proxy.cache.fills import Fills
from wave_proxy.cache.grants import Grants
from wave_proxy.cache.lead import Opener
from wave_proxy.cache.local import LocalRepositories
from wave_proxy.cache.manifests import ManifestStore
from wave_proxy.cache.permissions import Permissions
from wave_proxy.cache.repositories import OpenBlob, Repositories
from wave_proxy.cache.tags import Tags
from wave_proxy.upstream.registry import Registry
from wave_proxy.upstream.transfer import BlobStream

REPOSITORY = "lib/tool"
AUTHORITY = "localhost:9090"  # of our own images
ORIGIN = "registry"  # of the fills that tests join themselves


@dataclass
class Worker:
    """The cache as one process has it."""

    root: Path
    registry: Registry
    blobs: BlobStore
    evictor: Evictor
    fills: Fills
    tags: Tags
    repositories: Repositories
    local: LocalRepositories

    def opener(self, upstream: Upstream, digest: str, repository: str = REPOSITORY) -> Opener:
        def opener(start: int, size: int | None) -> AbstractAsyncContextManager[BlobStream]:
            return self.registry.open_blob(upstream.address, repository, digest, start=start, size=size)

        return opener

    def is_filling(self, digest: str) -> bool:
        return any(key[1] == digest for key in self.fills._fills)

    def join(self, upstream: Upstream, digest: str, size: int | None = None) -> Fill:
        return self.fills.join(ORIGIN, digest, self.opener(upstream, digest), size)

    async def fetch(self, upstream: Upstream, digest: str) -> bytes:
        """The blob through a fill, from its first byte to its end."""
        return await read_along(await self.join(upstream, digest).open())


@asynccontextmanager
async def worker(
    root: Path,
    *upstreams: Upstream,
    ttl_s: float = 60.0,
    max_bytes: int = 1 << 40,
    response_timeout_s: float = 30.0,
    idle_timeout_s: float = 30.0,
    parallel: int = 1,
    permission_ttl_s: float = 300.0,
) -> AsyncIterator[Worker]:
    """A worker over ``root``; when the test is through with it, no fill and no answer of an upstream may be left."""
    async with registry_at(
        *upstreams, response_timeout_s=response_timeout_s, idle_timeout_s=idle_timeout_s, parallel=parallel
    ) as registry:
        blobs, evictor = BlobStore(root), Evictor(root, max_bytes)
        grants, tags = Grants(root), Tags(root, ttl_s)
        fills = Fills(root, blobs, evictor, grants)
        local = LocalRepositories(root, blobs, AUTHORITY)
        permissions = Permissions(root, permission_ttl_s)
        repositories = Repositories(registry, tags, ManifestStore(root), blobs, fills, grants, permissions, local)
        try:
            yield Worker(root, registry, blobs, evictor, fills, tags, repositories, local)
        finally:
            await repositories.close()
    assert fills._tasks == set()


async def read_along(reader: FillReader) -> bytes:
    """All of a fill; gives it back, however it ends."""
    content = bytearray()
    await read_into(content, reader)
    return bytes(content)


async def read_into(content: bytearray, reader: FillReader) -> None:
    """Add what is read to ``content``, so that it is there also when the fill's error is raised."""
    stream = ReadAlong(reader)
    try:
        async for chunk in stream:
            content += chunk
    finally:
        await stream.aclose()


async def read_blob(blob: OpenBlob) -> bytes:
    """All of an open blob, whatever it comes from; gives it back."""
    if blob.stream is not None:
        try:
            return b"".join([chunk async for chunk in blob.stream])
        finally:
            await blob.stream.aclose()
    if isinstance(blob.source, FillReader):
        return await read_along(blob.source)
    assert isinstance(blob.source, StoredBlob)
    try:
        return os.pread(blob.source.fd, blob.source.size, 0)
    finally:
        blob.source.close()


def files_in(root: Path, *folders: str) -> list[str]:
    """The names of all files in those folders of a data folder."""
    return sorted(path.name for folder in folders for path in (root / folder).rglob("*") if path.is_file())


def open_files(root: Path) -> list[str]:
    """The files of a data folder that this process has open, deleted ones too."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(path for path in found if path.startswith(str(root)))
