"""Images to include: their layers, as layers to append to another image (``wave.md`` §4.8, 6)."""

from api.images.inspection import fetch_image
from wave_proxy.errors import UpstreamError
from wave_proxy.image.oci import LINUX_AMD64, Platform
from wave_proxy.image.reference import Reference
from wave_proxy.image.request import Layer
from wave_proxy.upstream.registry import Registry


async def fetch_layers(
    registry: Registry, place: Reference, *, image: Reference, platform: Platform = LINUX_AMD64
) -> tuple[Layer, ...]:
    """The layers of an image for a platform, lowest first, each with its location, diff_id and media type.

    ``image`` is read at ``place``, which may be another name of it. Raises RequestInvalid when it is no image, or has
    no such platform; ManifestUnknown, Denied, UpstreamError.
    """
    manifest, config = await fetch_image(registry, place, platform)
    match config.get("rootfs"):
        case {"diff_ids": [*diff_ids]} if all(isinstance(diff_id, str) for diff_id in diff_ids):
            pass
        case _:
            raise UpstreamError(f"the config of '{image}' has no rootfs with diff_ids")
    if len(diff_ids) != len(manifest.layers):
        raise UpstreamError(f"the config and the manifest of '{image}' differ in their numbers of layers")
    blobs = f"docker://{image.registry}/v2/{image.repository}/blobs"
    return tuple(
        Layer(f"{blobs}/{layer.digest}", layer.digest, layer.size, diff_id, layer.media_type)
        for layer, diff_id in zip(manifest.layers, diff_ids, strict=True)
    )
