"""What an upstream image says of itself: its manifest and config for one platform."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wave_proxy.errors import (
    BlobUnknown,
    Denied,
    HostUnknown,
    ManifestUnknown,
    NameUnknown,
    Offline,
    RequestInvalid,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from wave_proxy.image.oci import (
    MAX_MANIFEST_BYTES,
    Descriptor,
    Manifest,
    Platform,
    matches,
    read_json_object,
    read_manifest,
)
from wave_proxy.image.reference import Reference
from wave_proxy.upstream.registry import Registry


@contextmanager
def explained(image: Reference) -> Iterator[None]:
    """What goes wrong with an upstream image, in the words and statuses of a container request's answer."""
    unknown = f"Container image '{image}' does not exist or access is not authorized"
    try:
        yield
    except (Denied, HostUnknown) as err:
        raise RequestInvalid(f"{unknown} - Cause: {err}") from None
    except (ManifestUnknown, NameUnknown, BlobUnknown):
        raise RequestInvalid(unknown) from None
    except Offline as err:
        raise UpstreamUnavailable(f"Registry '{image.registry}' is not available: {err}", None) from err
    except (UpstreamUnavailable, UpstreamTimeout) as err:
        raise UpstreamUnavailable(f"Registry '{image.registry}' is not available, try again later: {err}") from err


async def fetch_image(registry: Registry, reference: Reference, platform: Platform) -> tuple[Manifest, dict[str, Any]]:
    """The manifest of an image for a platform, and its config as it stands.

    Raises RequestInvalid when the reference is no image, or has no such platform; ManifestUnknown, Denied,
    UpstreamError.
    """
    manifest = await _fetch_manifest(registry, reference, platform)
    if manifest.config is None or not manifest.is_image:
        raise RequestInvalid(f"'{reference}' is {manifest.media_type}, which is no container image")
    return manifest, await fetch_config(registry, reference, manifest.config)


async def fetch_entrypoint(registry: Registry, reference: Reference, platform: Platform) -> tuple[str, ...]:
    """The entrypoint of an image; empty when it has none. Raises as ``fetch_image``."""
    _, config = await fetch_image(registry, reference, platform)
    match config.get("config"):
        case {"Entrypoint": [*words]} if all(isinstance(word, str) for word in words):
            return tuple(words)
        case {"Entrypoint": str(word)} if word:
            return (word,)
    return ()


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


async def fetch_config(registry: Registry, reference: Reference, config: Descriptor) -> dict[str, Any]:
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
    return read_json_object(bytes(content), f"the config of '{reference}'")
