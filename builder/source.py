"""An image as a job reads it: through wave-proxy, which checks every blob, keeps it, and fetches it once."""

from collections.abc import AsyncGenerator, Callable

from wave_proxy.errors import SizeMismatch, UpstreamError, WaveError
from wave_proxy.image.mirror import Parts, read_parts
from wave_proxy.image.oci import Descriptor
from wave_proxy.image.reference import Reference
from wave_proxy.upstream.layout import Content
from wave_proxy.upstream.patience import patiently
from wave_proxy.upstream.registry import FetchedManifest, Registry

_MAX_DEPTH = 4  # of indexes in indexes
_MAX_MANIFESTS = 1000
_MAX_BYTES = 64 << 20  # of manifests, which are in memory


class Source:
    """The image at ``place``, a name that wave-proxy gave for it; ``say`` is told what takes longer.

    ``failures`` are what the last attempts to read blobs have raised, by digest: a push raises them too. ``skipped``
    are the layers that nobody copies.
    """

    def __init__(self, registry: Registry, place: Reference, say: Callable[[str], None]) -> None:
        self._registry = registry
        self._place = place
        self._say = say
        self._manifests = 0
        self._bytes = 0
        self.skipped: dict[str, Descriptor] = {}
        self.failures: dict[str, WaveError] = {}

    async def read(self) -> Content:
        """The manifest, or index with all that it names, each as it came.

        Raises ManifestUnknown, Denied, TooManyRequests, UpstreamError.
        """
        return await self._read(self._place.reference, _MAX_DEPTH)

    async def _read(self, reference: str, depth: int) -> Content:
        fetched = await patiently(f"manifest {reference}", lambda: self._fetch(reference), self._say)
        parts = self._parts_of(fetched, depth)
        children = [await self._read(entry.digest, depth - 1) for entry in parts.manifests]
        return Content(fetched.content, fetched.media_type, fetched.digest, parts.blobs, tuple(children))

    async def _fetch(self, reference: str) -> FetchedManifest:
        place = self._place
        return await self._registry.fetch_manifest(place.registry, place.repository, reference)

    def _parts_of(self, fetched: FetchedManifest, depth: int) -> Parts:
        self._manifests += 1
        self._bytes += len(fetched.content)
        if self._manifests > _MAX_MANIFESTS or self._bytes > _MAX_BYTES:
            raise UpstreamError(f"the image has more than {_MAX_MANIFESTS} manifests, or {_MAX_BYTES >> 20} MB of them")
        parts = read_parts(fetched.content, fetched.media_type)
        if parts.manifests and not depth:
            raise UpstreamError(f"the image is an index of indexes, more than {_MAX_DEPTH} deep")
        self.skipped |= {blob.digest: blob for blob in parts.elsewhere}
        return parts

    async def open(self, blob: Descriptor, start: int) -> AsyncGenerator[bytes]:
        """A blob's bytes from ``start`` on, never more than it has. Raises what the registry's client raises."""
        place = self._place
        try:
            async with self._registry.open_blob(
                place.registry, place.repository, blob.digest, start=start, size=blob.size
            ) as stream:
                at = stream.start
                async for chunk in stream.chunks:
                    at += len(chunk)
                    if at > blob.size:
                        raise SizeMismatch(f"{blob.digest} has more than the {blob.size} bytes that are announced")
                    if at > start:
                        yield chunk[start - at :] if at - len(chunk) < start else chunk
            self.failures.pop(blob.digest, None)
        except WaveError as err:
            self.failures[blob.digest] = err
            raise
