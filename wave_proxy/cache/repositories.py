"""What repositories hold: upstream's through the cache, fetched once, shown only where it was granted; and our own.

What upstream has shown is noted for the login that it was shown to: see ``as_seen_by``, ``grants`` and ``permissions``.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from copy import copy
from dataclasses import dataclass
from functools import partial
from time import time
from typing import Literal, TypeVar
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
from wave_proxy.cache.permissions import Permissions
from wave_proxy.cache.tags import TagAnswer, Tags
from wave_proxy.errors import BlobUnknown, Denied, RequestInvalid, StorageFull, UpstreamError, clip
from wave_proxy.image.oci import matches, read_manifest
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.registry import ManifestHead, Registry, TagsPage
from wave_proxy.upstream.transfer import BlobStream

T = TypeVar("T")

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
        permissions: Permissions,
        local: LocalRepositories,
    ) -> None:
        """As everybody sees them: ``registry`` has no logins."""
        self._registry = registry
        self._tags = tags
        self._manifests = manifests
        self._blobs = blobs
        self._fills = fills
        self._grants = grants
        self._permissions = permissions
        self._local = local
        self._pages = TagsPages()
        self._fetching: Flights[tuple[str, str], StoredManifest] = Flights()
        self._asking: Flights[tuple[str, str], int | None] = Flights()
        self._key = ""  # of the login

    def as_seen_by(self, registry: str, login: Login | None, advice: str = "") -> "Repositories":
        """The same, for what ``login`` opens in that registry: what was shown to others is not shown to it.

        ``advice`` is for who has none, and is refused.

        Content is shared: of what others have fetched already, upstream is only asked whether this login may have it.
        """
        if login is None and not advice:
            return self
        view = copy(self)
        view._registry = self._registry.acting_with(registry, login, advice)
        view._key = login.key if login else ""
        return view

    def permitted_until(self, registry: str, repository: str) -> float | None:
        """Until when upstream need not be asked whether it lets us in (epoch seconds); None for ever."""
        return self._permissions.until(self._name(registry, repository)) if self._key else None

    # --- tags --------------------------------------------------------------------------------------------------------

    async def find_tag(self, registry: str, repository: str, tag: str) -> TagAnswer:
        """What ``tag`` stands for; its manifest is here then, as far as it is new.

        Raises ManifestUnknown, Denied, UpstreamError, TooManyRequests.
        """
        local = self._local.find_name(registry, repository)
        if local is not None:
            now = time()
            return TagAnswer(self._local.get_tag(local, tag), now, now + _LOCAL_S)
        name = self._name(registry, repository)

        async def ask() -> tuple[str, bool]:
            head = await self._heard(registry, repository, self._registry.head_manifest(registry, repository, tag))
            # A tag moves on only to what is here: a limit may let the HEAD pass, and not the GET.
            if self._is_noted(name, head.digest) or self._adopt(name, registry, head) is not None:
                return head.digest, False
            await self.fetch_manifest(registry, repository, head.digest)
            return head.digest, True

        return await self._tags.find(f"{name}:{tag}", ask)

    async def list_tags(self, registry: str, repository: str, query: str) -> ListedTags:
        """One page of the tags list, or what it was. Raises NameUnknown, Denied, UpstreamError, TooManyRequests."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return ListedTags(_list_local(self._local, local, query), time())

        async def fetch() -> TagsPage:
            return await self._heard(registry, repository, self._registry.fetch_tags(registry, repository, query))

        listed = await self._pages.find((f"{self._key}@{registry}", repository, query), fetch)
        if listed.stale:
            await self._ensure(registry, repository, "tags", fetch)
        return listed

    # --- manifests ---------------------------------------------------------------------------------------------------

    async def fetch_manifest(self, registry: str, repository: str, digest: str) -> StoredManifest:
        """The manifest of that digest in that repository. Raises as ``find_tag``, and ContentMismatch."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return self._local.get_manifest(local, digest)
        name = self._name(registry, repository)

        async def ask() -> ManifestHead:
            return await self._heard(registry, repository, self._registry.head_manifest(registry, repository, digest))

        async def fetch() -> StoredManifest:
            if self._is_delivered(registry, digest):
                known = self._adopt(name, registry, await ask())
                if known is not None:
                    return known
            fetched = await self._heard(
                registry, repository, self._registry.fetch_manifest(registry, repository, digest)
            )
            manifest = StoredManifest(fetched.content, fetched.media_type, fetched.digest)
            self._keep(name, registry, manifest)
            return manifest

        if self._is_noted(name, digest):
            await self._ensure(registry, repository, digest, ask)
            known = self._manifests.find(digest)
            if known is not None:
                return known
        return await self._fetching.run((name, digest), fetch)

    def _is_noted(self, name: str, digest: str) -> bool:
        return self._grants.has(_manifests_of(name), digest) and self._manifests.find(digest) is not None

    def _is_delivered(self, registry: str, digest: str) -> bool:
        return self._grants.has(_manifests_of(registry), digest)

    def _adopt(self, name: str, registry: str, head: ManifestHead) -> StoredManifest | None:
        """A manifest that the registry has delivered once, for a repository of which it has just said to have it."""
        manifest = self._manifests.find(head.digest) if self._is_delivered(registry, head.digest) else None
        if manifest is None or manifest.media_type != head.media_type:
            return None
        self._grants.add(_manifests_of(name), (head.digest,))
        return manifest

    def _keep(self, name: str, registry: str, manifest: StoredManifest) -> None:
        read_manifest(manifest.content, manifest.media_type)  # one that breaks its own rules is not kept
        self._manifests.put(manifest)
        # What it names is not granted with it: anybody can name what he does not have.
        self._grants.add(_manifests_of(name), (manifest.digest,))
        self._grants.add(_manifests_of(registry), (manifest.digest,))

    def changes_of(self, registry: str, repository: str) -> int | None:
        """Of a local repository what ``LocalRepositories.changes`` says; None of others."""
        return None if self._local.find_name(registry, repository) is None else self._local.changes()

    def has_manifest(self, registry: str, repository: str, digest: str) -> bool:
        """Whether that repository has once delivered the manifest of that digest."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return self._local.has_manifest(local, digest)
        return self._grants.has(_manifests_of(self._name(registry, repository)), digest)

    # --- blobs -------------------------------------------------------------------------------------------------------

    def is_granted(self, registry: str, repository: str, digest: str) -> bool:
        """Whether that repository has said that it has a blob of that digest."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return self._local.find_size(local, digest) is not None
        return self._grants.has(self._name(registry, repository), digest)

    async def find_size(self, registry: str, repository: str, digest: str) -> int | None:
        """A blob's size; None when upstream does not tell it. Fetches no more than a head. Raises as ``open_blob``."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            return _local_size(self._local, local, digest)
        name, ask = self._name(registry, repository), partial(self._ask_size, registry, repository, digest)
        if self._grants.has(name, digest):
            await self._ensure(registry, repository, digest, ask)
            stored = self._blobs.find(digest)
            if stored is not None:
                stored.close()
                return stored.size
        return await self._asking.run((name, digest), ask)

    async def _ask_size(self, registry: str, repository: str, digest: str) -> int | None:
        size = await self._heard(registry, repository, self._registry.head_blob(registry, repository, digest))
        self._grants.add(self._name(registry, repository), (digest,))
        return size

    async def open_blob(self, registry: str, repository: str, digest: str) -> OpenBlob:
        """Open a blob of that repository. Raises BlobUnknown, Denied, UpstreamError, TooManyRequests."""
        local = self._local.find_name(registry, repository)
        if local is not None:
            blob = self._local.open_blob(local, digest)
            return OpenBlob(blob.size, "HIT", blob)
        if self._grants.has(self._name(registry, repository), digest):
            await self._ensure(registry, repository, digest, partial(self._ask_size, registry, repository, digest))
        else:
            await self.find_size(registry, repository, digest)

        def opener(start: int, known: int | None) -> AbstractAsyncContextManager[BlobStream]:
            return self._registry.open_blob(registry, repository, digest, start=start, size=known)

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

    # --- permission --------------------------------------------------------------------------------------------------

    def _name(self, registry: str, repository: str) -> str:
        """What the repository is called where it is noted what upstream has shown to this login."""
        return f"{self._key}@{registry}/{repository}"

    async def _heard(self, registry: str, repository: str, answer: Awaitable[T]) -> T:
        """Upstream's answer, which says as well whether the login opens the repository."""
        if not self._key:
            return await answer
        name = self._name(registry, repository)
        self._registry.forget_token(registry, repository, self._permissions.oldest)
        try:
            heard = await answer
        except Denied:
            self._permissions.end(name)
            raise
        self._permissions.confirm(name, self._registry.login_seen(registry, repository))
        return heard

    async def _ensure(self, registry: str, repository: str, what: str, ask: Callable[[], Awaitable[object]]) -> None:
        """Return when the login opens the repository, by what is known or by asking. Raises as ``ask``."""
        if not self._key:
            return

        async def ask_again() -> float:
            await ask()
            return self._registry.login_seen(registry, repository)

        await self._permissions.ensure(self._name(registry, repository), what, ask_again)

    async def close(self) -> None:
        """End what is being fetched."""
        await self._fetching.close()
        await self._asking.close()
        await self._permissions.close()
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
