"""Images to include: their layers, as layers to append to another image (``wave.md`` §4.8, 6)."""

from wave_proxy.errors import RequestInvalid, UpstreamError
from wave_proxy.image.oci import (
    LINUX_AMD64,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    Platform,
    matches,
    read_json_object,
    read_manifest,
)
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.image.request import Layer
from wave_proxy.upstream.registry import Registry


async def fetch_layers(registry: Registry, name: str, platform: Platform = LINUX_AMD64) -> tuple[Layer, ...]:
    """The layers of an image for a platform, lowest first, each with its location, diff_id and media type.

    Raises RequestInvalid when the image is none, or has no such platform; ManifestUnknown, Denied, UpstreamError.
    """
    reference = parse_reference(name)
    manifest = await _fetch_manifest(registry, reference, platform)
    if manifest.config is None or not manifest.is_image:
        raise RequestInvalid(f"'{reference}' is {manifest.media_type}, which is no container image")
    diff_ids = await _fetch_diff_ids(registry, reference, manifest.config)
    if len(diff_ids) != len(manifest.layers):
        raise UpstreamError(f"the config and the manifest of '{reference}' differ in their numbers of layers")
    place = f"docker://{reference.registry}/v2/{reference.repository}/blobs"
    return tuple(
        Layer(f"{place}/{layer.digest}", layer.digest, layer.size, diff_id, layer.media_type)
        for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
    )


async def _fetch_manifest(registry: Registry, reference: Reference, platform: Platform) -> Manifest:
    fetched = await registry.fetch_manifest(reference.registry, reference.repository, reference.reference)
    manifest = read_manifest(fetched.content, fetched.media_type)
    if not manifest.is_index:
        return manifest
    for entry in manifest.entries:
        there = entry.platform
        if there is not None and platform.matches(there.os, there.architecture, there.variant):
            digest = entry.descriptor.digest
            fetched = await registry.fetch_manifest(reference.registry, reference.repository, digest)
            return read_manifest(fetched.content, fetched.media_type)
    raise RequestInvalid(f"'{reference}' has no image for {platform}")


async def _fetch_diff_ids(registry: Registry, reference: Reference, config: Descriptor) -> list[str]:
    if config.size > MAX_MANIFEST_BYTES:
        raise UpstreamError(f"the config of '{reference}' has {config.size} bytes, more than {MAX_MANIFEST_BYTES}")
    content = bytearray()
    async with registry.open_blob(reference.registry, reference.repository, config.digest, size=config.size) as blob:
        async for chunk in blob.chunks:
            content += chunk
            if len(content) > config.size:
                break
    if not matches(bytes(content), config.digest):
        raise UpstreamError(f"the config of '{reference}' does not have the digest {config.digest}")
    match read_json_object(bytes(content), f"the config of '{reference}'").get("rootfs"):
        case {"diff_ids": [*diff_ids]} if all(isinstance(diff_id, str) for diff_id in diff_ids):
            return diff_ids
    raise UpstreamError(f"the config of '{reference}' has no rootfs with diff_ids")
