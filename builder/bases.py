"""What the base images of a build are, as wave-proxy gives them."""

import asyncio
from dataclasses import dataclass

from builder.failures import NOT_BUILT, BuildFailed
from wave_proxy.errors import ContentMismatch, UpstreamError, WaveError
from wave_proxy.image.oci import MAX_MANIFEST_BYTES, Descriptor, Platform, matches, read_json_object, read_manifest
from wave_proxy.image.reference import Reference
from wave_proxy.upstream.registry import FetchedManifest, ManifestHead, Registry

_LOOK_S = 10.0


@dataclass(frozen=True, slots=True)
class Base:
    """A base image as it is now; with a ``problem`` nothing else is known of it."""

    path: str
    image: Reference
    found: FetchedManifest | ManifestHead | None = None
    problem: str = ""

    @property
    def digest(self) -> str:
        """``@digest``, empty when that is not known or in the name."""
        return f"@{self.found.digest}" if self.found and not self.image.is_digest else ""


class Bases:
    """Looks at base images through wave-proxy, ``authority``."""

    def __init__(self, registry: Registry, authority: str) -> None:
        self._registry = registry
        self._authority = authority

    async def look(self, path: str, image: Reference) -> Base:
        """What ``image`` is, whose repository is ``path`` at wave-proxy. What can't be read, the engine will name."""
        try:
            async with asyncio.timeout(_LOOK_S):
                place = (self._authority, path, image.reference)
                if path == image.repository:  # by its own token, to get the manifest would count as a pull
                    return Base(path, image, await self._registry.head_manifest(*place))
                return Base(path, image, await self._registry.fetch_manifest(*place))
        except TimeoutError:
            return Base(path, image, problem=f"nothing came within {_LOOK_S:g} s")
        except WaveError as err:
            name = f"{image.registry}/{image.repository}"
            return Base(path, image, problem=str(err).replace(f"{self._authority}/{path}", name))

    async def check(self, base: Base, wanted: Platform) -> None:
        """Check that an image which is no index is for that platform, for the tools only warn. Raises BuildFailed."""
        try:
            async with asyncio.timeout(_LOOK_S):
                found = await self._find_platform(base)
        except (WaveError, TimeoutError):
            return  # the engine will say what is wrong
        if found and not wanted.matches(found.os, found.architecture, found.variant or wanted.variant):
            raise BuildFailed(
                "missing platform: a base image does not exist for the platform that was asked for "
                f"({base.image} is for {found}, and not for {wanted}); choose another containerPlatform or base image",
                NOT_BUILT,
            )

    async def _find_platform(self, base: Base) -> Platform | None:
        """What the config of a single image says; None for an index, and where it says nothing."""
        if not isinstance(base.found, FetchedManifest):
            return None
        manifest = read_manifest(base.found.content, base.found.media_type)
        if manifest.config is None or not manifest.is_image:
            return None
        config = read_json_object(await self._read(base.path, manifest.config), f"the config of {base.image}")
        names = (config.get("os"), config.get("architecture"), config.get("variant"))
        found = Platform(*(str(name or "") for name in names))
        return found if found.os and found.architecture else None

    async def _read(self, path: str, blob: Descriptor) -> bytes:
        if blob.size > MAX_MANIFEST_BYTES:
            raise UpstreamError(f"a config of {blob.size} bytes")
        content = bytearray()
        async with self._registry.open_blob(self._authority, path, blob.digest, size=blob.size) as stream:
            async for chunk in stream.chunks:
                content += chunk
                if len(content) > blob.size:
                    break
        if not matches(bytes(content), blob.digest):
            raise ContentMismatch(blob.digest)
        return bytes(content)
