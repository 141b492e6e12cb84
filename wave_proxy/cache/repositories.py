"""What repositories hold: upstream's through the cache, fetched once, shown only where it was granted; and our own."""

import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from time import time
from typing import Literal
from urllib.parse import parse_qsl, urlencode

import orjson

from wave_proxy._fast.digest import Verifier
from wave_proxy.cache.blobs import BlobStore, StoredBlob
from wave_proxy.cache.fill import FillReader, ReadAlong
from wave_proxy.cache.fills import Fills
from wave_proxy.cache.flight import Flights
from wave_proxy.cache.grants import Grants
from wave_proxy.cache.lead import Opener
from wave_proxy.cache.local import LOCAL, LocalRepositories
from wave_proxy.cache.manifests import ManifestStore, StoredManifest
from wave_proxy.cache.pages import ListedTags, TagsPages
from wave_proxy.cache.tags import TagAnswer, Tags
from wave_proxy.errors import BlobUnknown, RequestInvalid, StorageFull, UpstreamError, clip
from wave_proxy.image.oci import matches, read_manifest
from wave_proxy.upstream.registry import Registry, TagsPage
from wave_proxy.upstream.transfer import BlobStream

CacheState = Literal["HIT", "MISS", "FILL", "STALE"]

_LOCAL_S = 60.0  # as long as nothing is deleted or moved in local repositories
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class OpenBlob:
    """A blob that can be read: a file, whole or growing, or (when the disk is full) upstream's own stream.

    ``size`` is None when upstream does not tell it. Exactly one of ``source`` and ``stream`` is there; a source must be
    closed, a stream must be read or closed.
    """

    size: int | None
    state: CacheState
    source: StoredBlob | FillReader | None = None
    stream: "PassThrough | None" = None


class Repositories:
    """Upstream's repositories as this machine knows them, and the local ones."""

    def __init__(
        self,
        registry: Registry,
        tags: Tags,
        manifests: ManifestStore,
        blobs: BlobStore,
        fills: Fills,
        grants: Grants,
        local: LocalRepositories,
    ) -> None:
        self.registry = registry
        self._tags = tags
        self._manifests = manifests
        self._blobs = blobs
        self._fills = fills
        self._grants = grants
        self._local = local
        self._pages = TagsPages()
        self._fetching: Flights[tuple[str, str], StoredManifest] = Flights()
        self._asking: Flights[tuple[str, str], int | None] = Flights()

    async def find_tag(self, registry: str, repository: str, tag: str) -> TagAnswer:
        """What ``tag`` stands for; its manifest is here then, as far as it is new.

        Raises ManifestUnknown, Denied, UpstreamError, TooManyRequests.
        """
        local = self._local.find_name(registry, repository)
        if local is not None:
            now = time()
            return TagAnswer(self._local.get_tag(local, tag), now, now + _LOCAL_S)

        async def ask() -> tuple[str, bool]:
            head = await self.registry.head_manifest(registry, repository, tag)
            # A tag moves on only to what is here: a limit may let the HEAD pass, and not the GET.
            is_new = self._find_manifest(registry, repository, head.digest) is None
            if is_new:
                await self.fetch_manifest(registry, repository, head.digest)
            return head.digest, is_new

        return await self._tags.find(f"{registry}/{repository}:{tag}", ask)

    async def list_tags(self, registry: str, repository: str, query: str) -> ListedTags:
        """One page of the tags list, or what it was. Raises NameUnknown, Denied, UpstreamError, TooManyRequests."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return ListedTags(_list_local(self._local, local, query), time())
        key = registry, repository, query
        return await self._pages.find(key, lambda: self.registry.fetch_tags(*key))

    async def fetch_manifest(self, registry: str, repository: str, digest: str) -> StoredManifest:
        """The manifest of that digest in that repository. Raises as ``find_tag``, and ContentMismatch."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return self._local.get_manifest(local, digest)
        name = f"{registry}/{repository}"
        known = self._find_manifest(registry, repository, digest)
        if known is not None:
            return known

        async def fetch() -> StoredManifest:
            fetched = await self.registry.fetch_manifest(registry, repository, digest)
            manifest = StoredManifest(fetched.content, fetched.media_type, fetched.digest)
            self._keep(name, manifest)
            return manifest

        return await self._fetching.run((name, digest), fetch)

    def changes_of(self, registry: str, repository: str) -> int | None:
        """Of a local repository what ``LocalRepositories.changes`` says; None of others."""
        return None if self._local.find_name(registry, repository) is None else self._local.changes()

    def _find_manifest(self, registry: str, repository: str, digest: str) -> StoredManifest | None:
        return self._manifests.find(digest) if self.has_manifest(registry, repository, digest) else None

    def _keep(self, name: str, manifest: StoredManifest) -> None:
        read_manifest(manifest.content, manifest.media_type)  # one that breaks its own rules is not kept
        self._manifests.put(manifest)
        # What it names is not granted with it: anybody can name what he does not have.
        self._grants.add(_manifests_of(name), (manifest.digest,))

    def has_manifest(self, registry: str, repository: str, digest: str) -> bool:
        """Whether that repository has once delivered the manifest of that digest."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return self._local.has_manifest(local, digest)
        return self._grants.has(_manifests_of(f"{registry}/{repository}"), digest)

    def is_granted(self, registry: str, repository: str, digest: str) -> bool:
        """Whether that repository has said that it has a blob of that digest."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return self._local.find_size(local, digest) is not None
        return self._grants.has(f"{registry}/{repository}", digest)

    async def find_size(self, registry: str, repository: str, digest: str) -> int | None:
        """A blob's size; None when upstream does not tell it. Fetches no more than a head. Raises as ``open_blob``."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return _local_size(self._local, local, digest)
        if self.is_granted(registry, repository, digest):
            stored = self._blobs.find(digest)
            if stored is not None:
                stored.close()
                return stored.size
        name = f"{registry}/{repository}"

        async def ask() -> int | None:
            size = await self.registry.head_blob(registry, repository, digest)
            self._grants.add(name, (digest,))
            return size

        return await self._asking.run((name, digest), ask)

    async def open_blob(self, registry: str, repository: str, digest: str) -> OpenBlob:
        """Open a blob of that repository. Raises BlobUnknown, Denied, UpstreamError, TooManyRequests."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            blob = self._local.open_blob(local, digest)
            return OpenBlob(blob.size, "HIT", blob)
        if not self.is_granted(registry, repository, digest):
            await self.find_size(registry, repository, digest)

        def opener(start: int, known: int | None) -> AbstractAsyncContextManager[BlobStream]:
            return self.registry.open_blob(registry, repository, digest, start=start, size=known)

        return await self.open_content(registry, digest, opener)

    async def open_content(self, origin: str, digest: str, opener: Opener, size: int | None = None) -> OpenBlob:
        """Open what ``origin`` has under that digest: from the store if it once delivered it, else by ``opener``.

        ``origin`` is a registry, for whose repository the caller has checked the permission, or what else stands for
        the place and the size of the content.
        """
        stored = self._blobs.find(digest) if self._grants.has(origin, digest) else None
        if stored is not None:
            return OpenBlob(stored.size, "HIT", stored)
        under_way = self._fills.is_under_way(origin, digest)
        fill = self._fills.join(origin, digest, opener, size)
        try:
            reader = await fill.open()
        except StorageFull:
            through = PassThrough(digest, opener(0, size))
            return OpenBlob(await through.open(), "MISS", stream=through)
        return OpenBlob(fill.size, "FILL" if under_way else "MISS", reader)

    async def read_config(self, registry: str, repository: str, digest: str, size: int) -> bytes:
        """The whole content of an image's config. Raises as ``open_blob``; UpstreamError when it is too large."""
        if size > MAX_CONFIG_BYTES:
            raise UpstreamError(f"the image's config {digest} is said to have {size} bytes; at most {MAX_CONFIG_BYTES}")
        content = await _read_all(await self.open_blob(registry, repository, digest), MAX_CONFIG_BYTES)
        if not matches(content, digest):
            self._blobs.discard(digest)
            raise UpstreamError(f"the stored config {digest} was damaged and has been dropped; pull again")
        return content

    async def close(self) -> None:
        """End what is being fetched."""
        await self._fetching.close()
        await self._asking.close()
        await self._tags.close()
        await self._pages.close()
        await self._fills.close()


def _local_size(local: LocalRepositories, name: str, digest: str) -> int:
    size = local.find_size(name, digest)
    if size is None:
        raise BlobUnknown(f"{LOCAL}/{name} has no blob {digest}")
    return size


def _list_local(local: LocalRepositories, name: str, query: str) -> TagsPage:
    asked = dict(parse_qsl(query, keep_blank_values=True))
    count = asked.get("n")
    if count is not None and not (count.isascii() and count.isdigit() and len(count) < 10):
        raise RequestInvalid(f"n={clip(count)}: expected how many tags to list")
    page = local.list_tags(name, None if count is None else int(count), asked.get("last", ""))
    content = orjson.dumps({"name": f"{LOCAL}/{name}", "tags": page.entries})
    link = f"</v2/?{urlencode({'n': count, 'last': page.last})}>" if page.last else ""
    return TagsPage(content, link)


def _manifests_of(name: str) -> str:
    # Apart from its blobs: to say that one has a blob, a HEAD is enough.
    return f"manifests of {name}"


async def _read_all(blob: OpenBlob, limit: int) -> bytes:
    """All of a blob; gives it back. Raises UpstreamError when it has more than ``limit`` bytes."""
    if isinstance(blob.source, StoredBlob):
        try:
            content = os.pread(blob.source.fd, min(blob.source.size, limit + 1), 0)
        finally:
            blob.source.close()
    else:
        stream = ReadAlong(blob.source) if blob.source is not None else blob.stream
        assert stream is not None  # noqa: S101
        content = b""
        try:
            async for chunk in stream:
                content += chunk
                if len(content) > limit:
                    break
        finally:
            await stream.aclose()
    if len(content) > limit:
        raise UpstreamError(f"the image's config has more than {limit} bytes")
    return content


class PassThrough:
    """Upstream's stream for one client, for when the disk is full: verified, with the last chunk held back."""

    def __init__(self, digest: str, transfer: AbstractAsyncContextManager[BlobStream]) -> None:
        self._digest = digest
        self._transfer = transfer
        self._stream: BlobStream | None = None

    async def open(self) -> int | None:
        """Begin; returns the size that upstream tells. Raises what the transfer raises."""
        self._stream = await self._transfer.__aenter__()
        return self._stream.size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert self._stream is not None  # noqa: S101
        verifier = Verifier(self._digest, -1 if self._stream.size is None else self._stream.size)
        held = b""
        async for chunk in self._stream.chunks:
            verifier.update(chunk)
            if held:
                yield held
            held = chunk
        verifier.finish()
        yield held

    async def aclose(self) -> None:
        """End the transfer, wherever it is."""
        if self._stream is not None:
            self._stream = None
            await self._transfer.__aexit__(None, None, None)
