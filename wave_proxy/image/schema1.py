"""Schema-1 manifests, which carry the image's config in their history: read, never written.

Source: distribution's ``spec/manifest-v2-1``, the page that was dropped from it with version 3.
"""

from base64 import urlsafe_b64decode
from typing import Any

from wave_proxy.errors import UpstreamError
from wave_proxy.image.oci import DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED, digest_of, read_json_object

SCHEMA1_TYPES = frozenset({DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED})


def config_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The image's config: that of its newest layer, which the history has first. Raises UpstreamError without one."""
    match manifest.get("history"):
        case [{"v1Compatibility": str(text)}, *_]:
            return read_json_object(text.encode(errors="replace"), "the newest entry of the manifest's history")
    raise UpstreamError("the schema-1 manifest has no history, and so no config")


def layers_of(manifest: dict[str, Any]) -> list[str]:
    """Digests of the layers, lowest first; the manifest has them the other way round. Raises UpstreamError."""
    match manifest.get("fsLayers"):
        case [*entries] if all(isinstance(entry, dict) and isinstance(entry.get("blobSum"), str) for entry in entries):
            return [entry["blobSum"] for entry in reversed(entries)]
    raise UpstreamError("the schema-1 manifest has no fsLayers with a blobSum each")


def unsigned_digest(content: bytes) -> str:
    """The digest that registries know a manifest by: of its content without the signatures that were put into it.

    That of ``content`` itself where no signature says how to take them out.
    """
    match read_json_object(content, "manifest").get("signatures"):
        case [{"protected": str(protected)}, *_]:
            found = _payload(content, protected)
            return digest_of(content if found is None else found)
    return digest_of(content)


def _payload(content: bytes, protected: str) -> bytes | None:
    """What was signed: ``formatLength`` bytes of the manifest, and ``formatTail`` instead of the signatures."""
    try:
        header = read_json_object(_decode(protected), "signature")
        length, tail = header.get("formatLength"), header.get("formatTail")
        if not isinstance(length, int) or not isinstance(tail, str) or not 0 <= length <= len(content):
            return None
        return content[:length] + _decode(tail)
    except (ValueError, UpstreamError):
        return None


def _decode(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
