"""Images to include: their layers, as layers to append to another image (``wave.md`` §4.8, 6)."""

from api.images.inspection import fetch_image
from wave_proxy.errors import UpstreamError
from wave_proxy.image.oci import LINUX_AMD64, Platform
from wave_proxy.image.reference import Reference
from wave_proxy.image.request import Layer
from wave_proxy.upstream.registry import Registry


async def fetch_layers(registry: Registry, reference: Reference, platform: Platform = LINUX_AMD64) -> tuple[Layer, ...]:
    """The layers of an image for a platform, lowest first, each with its location, diff_id and media type.

    Raises RequestInvalid when the image is none, or has no such platform; ManifestUnknown, Denied, UpstreamError.
    """
    manifest, config = await fetch_image(registry, reference, platform)
    match config.get("rootfs"):
        case {"diff_ids": [*diff_ids]} if all(isinstance(diff_id, str) for diff_id in diff_ids):
            pass
        case _:
            raise UpstreamError(f"the config of '{reference}' has no rootfs with diff_ids")
    if len(diff_ids) != len(manifest.layers):
        raise UpstreamError(f"the config and the manifest of '{reference}' differ in their numbers of layers")
    place = f"docker://{reference.registry}/v2/{reference.repository}/blobs"
    return tuple(
        Layer(f"{place}/{layer.digest}", layer.digest, layer.size, diff_id, layer.media_type)
        for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
    )
