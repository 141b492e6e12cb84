"""What goes into a build: whether who asks may read it, and whether others may see what comes out."""

import asyncio
from collections.abc import Iterable
from re import compile as compile_pattern
from time import time

from api.images.inspection import explained
from api.registries import Registries
from wave_proxy.errors import BlobUnknown, Denied, ManifestUnknown, NameUnknown, RequestInvalid
from wave_proxy.image.build import BuildSpec
from wave_proxy.image.containerfile import base_images
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.image.request import ContainerRequest, Identity, Layer
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.registry import Registry

_LAYER = compile_pattern(r"docker://([^/]+)/v2/(.+)/blobs/([^/]+)")
_BY_TOKEN = compile_pattern(r"wt/([0-9a-f]{32})/.+")
_DEPTH = 5  # of images that are named by a token of another such image


class Ingredients:
    """Looks at base images, added layers and contexts; ``authority`` is what the names of our own images begin with."""

    def __init__(self, registries: Registries, tokens: TokenStore, authority: str) -> None:
        self._registries = registries
        self._tokens = tokens
        self._authority = authority

    async def are_private(self, spec: BuildSpec) -> bool:
        """Whether something goes into an image that not everybody may read; who asks may read all of it.

        Raises RequestInvalid for what he may not read, UpstreamUnavailable, PlatformError.
        """
        images = await asyncio.to_thread(_bases_of, spec) | _sources_of(spec.carried)
        found = [await self._is_private(spec.identity, image) for image in images]
        return any(found)

    async def _is_private(self, identity: Identity, image: Reference, depth: int = _DEPTH) -> bool:
        by_token = _BY_TOKEN.fullmatch(image.repository) if image.registry == self._authority else None
        if by_token is not None:
            record = await self._tokens.find_record(by_token[1])
            if record is None or not record.is_valid(time()) or not depth:
                return False  # then the build finds nothing there
            return await self._is_private_by_token(identity, image, record.request, depth)
        with explained(image):
            if not await self._registries.is_guarded(identity, image):
                return False
            await _ask(await self._registries.open(identity, image), image)
            return not await self._is_everybodys(image)

    async def _is_private_by_token(
        self, identity: Identity, image: Reference, request: ContainerRequest, depth: int
    ) -> bool:
        """The same for an image that a token names, whose user's permission it is read with."""
        sources = {parse_reference(request.image), *_sources_of(request.config.layers)}
        found = [await self._is_private(request.identity, source, depth - 1) for source in sources]
        if any(found) and request.identity.key != identity.key:
            raise RequestInvalid(f"Container image '{image}' does not exist or access is not authorized")
        return any(found)

    async def _is_everybodys(self, image: Reference) -> bool:
        try:
            await _ask(await self._registries.open(Identity(), image), image)
        except (Denied, ManifestUnknown, NameUnknown, BlobUnknown):
            return False
        return True


def _bases_of(spec: BuildSpec) -> set[Reference]:
    try:
        return {image for platform in spec.platforms for image in base_images(spec.container_file, platform)}
    except RequestInvalid:
        return set()  # the builder says what is wrong with it


def _sources_of(layers: Iterable[Layer]) -> set[Reference]:
    matches = [_LAYER.fullmatch(layer.location) for layer in layers if not layer.is_inline]
    return {Reference(match[1], match[2], match[3], "blob") for match in matches if match}


async def _ask(registry: Registry, image: Reference) -> None:
    if image.scheme == "blob":
        await registry.head_blob(image.registry, image.repository, image.reference)
    else:
        await registry.head_manifest(image.registry, image.repository, image.reference, at_once=True)
