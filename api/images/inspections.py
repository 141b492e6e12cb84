"""Inspection: what an image is, as its registry has it (``wave.md`` §9)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from yarl import URL

from api.body import read_object
from api.endpoints import ASKING_UPSTREAM, Answer, Parameter, endpoint, routes_of
from api.identities import Identities, claims_of
from api.images.image_answers import (
    described_config,
    described_image,
    described_index,
    described_manifest,
    described_schema1,
)
from api.images.inspection import explained, fetch_config
from api.images.own_images import OwnImages
from api.images.reading import ImageReader
from api.registries import Registries
from api.replies import json_reply
from api.schema import Claiming, Text, parse_body
from api.shapes import Inspected
from wave_proxy.errors import PairingMissing, RequestInvalid, clip
from wave_proxy.image.oci import CONFIG_TYPES, Manifest, Platform, parse_platforms, read_json_object, read_manifest
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.image.request import Identity
from wave_proxy.image.schema1 import SCHEMA1_TYPES, config_of, unsigned_digest
from wave_proxy.upstream.egress import Endpoint, authority_of, endpoint_for
from wave_proxy.upstream.registry import FetchedManifest, Registry

_SHOWN_INDEX_CHARS = 2000


class InspectSpec(Claiming):
    """What to inspect."""

    container_image: Text = None
    """The image, such as `docker.io/library/ubuntu:24.04`."""


class Inspections:
    """The endpoint of inspection. Nothing of it counts as a pull.

    ``endpoints`` are those of configured registries, ``public_url`` our own address, scheme included.
    """

    def __init__(
        self,
        registries: Registries,
        identities: Identities,
        own_images: OwnImages,
        images: ImageReader,
        endpoints: Mapping[str, Endpoint],
        *,
        public_url: str,
        max_body_bytes: int,
    ) -> None:
        self._registries = registries
        self._identities = identities
        self._own_images = own_images
        self._images = images
        self._endpoints = endpoints
        self._public_url = public_url
        self._max_body_bytes = max_body_bytes
        self.routes = routes_of(self)

    @endpoint(
        "POST",
        "/v1alpha1/inspect",
        "Images",
        {200: Answer("The image or the index.", Inspected), **ASKING_UPSTREAM},
        parameters=(Parameter("platform", "Of an index: the image for this platform, such as `linux/arm64`."),),
        body=InspectSpec,
        example={"containerImage": "docker.io/library/busybox:latest"},
        login="token",
    )
    async def inspect(self, request: Request) -> Response:
        """What an image is, as its registry has it.

        This is no pull, and has no limit. Without `platform` an index is answered as such.
        """
        document = await read_object(request, self._max_body_bytes)
        platform = request.query_params.get("platform", "")
        return json_reply(await self.look(document, platform, request.headers.get("authorization", "")))

    async def look(self, document: dict[str, Any], platform: str, authorization: str = "") -> dict[str, Any]:
        """The answer to a request with that body, platform and Authorization header.

        Raises RequestInvalid, and what identities and registries raise.
        """
        asked = parse_body(InspectSpec, document)
        if asked.container_image is None:
            raise RequestInvalid("Missing 'containerImage' attribute")
        wanted = _platform(platform)
        identity = await self._identify(asked, authorization)
        image = parse_reference(asked.container_image)
        shown = host_name(image.registry, self._endpoints, self._public_url)
        found = await self._read(identity, image, wanted)
        return found.described(image, shown)

    async def _read(self, identity: Identity, image: Reference, platform: Platform | None) -> "_Found":
        async def ask(registry: Registry, place: Reference) -> _Found:
            if place != image:  # it may be an image that is still being built
                await registry.head_manifest(place.registry, place.repository, place.reference, at_once=True)
            return await _fetch(registry, place, platform)

        async with self._own_images.open(image, identity) as place:
            if place == image:
                return await self._images.read(identity, image, ask)
            with explained(image):
                return await ask(await self._registries.open(identity, image), place)

    async def _identify(self, asked: InspectSpec, authorization: str) -> Identity:
        try:
            return await self._identities.identify(claims_of(asked), authorization)
        except PairingMissing as err:  # in the words of ``wave.md`` §9.1
            raise RequestInvalid(
                f"Tower instance '{err.endpoint[:200]}' has not enabled to connect Wave service '{self._public_url}'"
            ) from None


def host_name(registry: str, endpoints: Mapping[str, Endpoint], own: str) -> str:
    """A registry's own address, scheme included, whatever mirror or way we reach it by; ``own`` is ours."""
    if registry == authority_of(URL(own)):
        return own
    endpoint = endpoints.get(registry)
    is_its_own = endpoint is not None and authority_of(URL(endpoint.url)) == registry
    return endpoint.url if endpoint is not None and is_its_own else endpoint_for(registry).url


def _platform(text: str) -> Platform | None:
    if not text:
        return None
    platforms = parse_platforms(text)
    if len(platforms) > 1:
        raise RequestInvalid(f"Container multi-platform architecture not allowed - offending value: {clip(text)}")
    return platforms[0]


@dataclass(frozen=True, slots=True)
class _Found:
    """An index, or a manifest with its config in the form of answers."""

    fetched: FetchedManifest
    is_index: bool
    config: dict[str, Any]

    def described(self, image: Reference, shown: str) -> dict[str, Any]:
        """The answer; ``shown`` is the registry's address in it."""
        content, media_type, digest = self.fetched.content, self.fetched.media_type, self.fetched.digest
        document = read_json_object(content, "manifest")
        if self.is_index:
            return {"index": described_index(document, media_type, digest)}
        if media_type in SCHEMA1_TYPES:
            manifest, digest = described_schema1(document, media_type), unsigned_digest(content)
        else:
            manifest = described_manifest(document, media_type)
        return {"container": described_image(image, shown, digest, manifest, self.config)}


async def _fetch(registry: Registry, place: Reference, platform: Platform | None) -> _Found:
    """What is there under that name; of an index, the image for the platform. Raises RequestInvalid, UpstreamError."""
    fetched = await registry.fetch_manifest(place.registry, place.repository, place.reference)
    read = read_manifest(fetched.content, fetched.media_type)
    if read.is_index and platform is not None:
        digest = _choose(read, platform, fetched.content)
        fetched = await registry.fetch_manifest(place.registry, place.repository, digest)
        read = read_manifest(fetched.content, fetched.media_type)
    if read.is_index:
        return _Found(fetched, True, {})
    return _Found(fetched, False, await _fetch_config(registry, place, fetched, read))


async def _fetch_config(
    registry: Registry, place: Reference, fetched: FetchedManifest, read: Manifest
) -> dict[str, Any]:
    """A manifest's config; empty for an artifact's, which may be anything."""
    if fetched.media_type in SCHEMA1_TYPES:
        return described_config(config_of(read_json_object(fetched.content, "manifest")))
    if read.config is None:
        raise RequestInvalid(f"'{place}' is {read.media_type}, which is no container image")
    if read.config.media_type not in CONFIG_TYPES:
        return {}
    return described_config(await fetch_config(registry, place, read.config))


def _choose(index: Manifest, platform: Platform, content: bytes) -> str:
    for entry in index.entries:
        there = entry.platform
        if there is not None and platform.matches(there.os, there.architecture, there.variant):
            return entry.descriptor.digest
    shown = content.decode(errors="replace")
    if len(shown) > _SHOWN_INDEX_CHARS:
        shown = f"{shown[:_SHOWN_INDEX_CHARS]}…"
    raise RequestInvalid(f"Cannot find platform '{platform}' in the manifest: {shown}")
