"""The layers that a container request brings along: inline, behind a URL, or in another registry."""

import asyncio
import re
from contextlib import AbstractAsyncContextManager

from wave_proxy.cache.blobs import BlobStore
from wave_proxy.cache.repositories import OpenBlob, Repositories
from wave_proxy.errors import BlobUnknown, StorageFull, Unsupported, clip
from wave_proxy.image.request import Layer
from wave_proxy.serve.access import Access
from wave_proxy.serve.resolve import Target
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.registry import Registry
from wave_proxy.upstream.transfer import BlobStream

_OTHER_REGISTRY = re.compile(r"docker://([^/]+)/v2/(.+)/blobs/([^/]+)")


class Layers:
    """Opens requests' layers; each is verified against its digest and size before it is visible."""

    def __init__(
        self, repositories: Repositories, registry: Registry, blobs: BlobStore, tokens: TokenStore, access: Access
    ) -> None:
        self._access = access
        self._repositories = repositories
        self._registry = registry
        self._blobs = blobs
        self._tokens = tokens

    async def open(self, layer: Layer, target: Target) -> OpenBlob | bytes:
        """The gzipped tar of a layer of the target: from the store, else from where the request says it is.

        Bytes are the answer only when an inline layer finds no room on the disk. Another image's layer is read as the
        one may read it who made the request. Raises BlobUnknown, Denied, UpstreamError, Unsupported.
        """
        if layer.is_inline:
            return await self._open_inline(layer)
        if layer.location.startswith(("http://", "https://")):
            return await self._open_linked(layer)
        match = _OTHER_REGISTRY.fullmatch(layer.location)
        if match is None:
            raise Unsupported(
                f"a layer's location must be data:, gzip:, http(s):// or docker://, not {clip(layer.location, 40)}"
            )
        registry, repository = match[1], match[2]
        login = await self._access.find_login(registry, repository, target.identity, target.token)
        return await self._repositories.as_seen_by(registry, login).open_blob(registry, repository, layer.gzip_digest)

    async def _open_inline(self, layer: Layer) -> OpenBlob | bytes:
        stored = self._blobs.find(layer.gzip_digest)
        if stored is None:
            content = await self._tokens.find_layer(layer.gzip_digest)
            if content is None:
                raise BlobUnknown(f"the layer {layer.gzip_digest} has expired with the requests that carried it")
            try:
                await asyncio.to_thread(self._blobs.put, layer.gzip_digest, content)
            except StorageFull:
                return content
            stored = self._blobs.find(layer.gzip_digest)
            if stored is None:  # evicted at once: the cap is smaller than the layer
                return content
        return OpenBlob(stored.size, "HIT", stored)

    async def _open_linked(self, layer: Layer) -> OpenBlob:
        def opener(start: int, size: int | None) -> AbstractAsyncContextManager[BlobStream]:
            return self._registry.open_url(layer.location, start=start, size=size)

        origin = f"{layer.gzip_size} bytes at {layer.location}"
        return await self._repositories.open_content(origin, layer.gzip_digest, opener, layer.gzip_size)
