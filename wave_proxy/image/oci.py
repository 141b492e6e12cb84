"""The vocabulary of images: digests, descriptors, platforms, media types, and how manifests are read."""

import re
from dataclasses import dataclass
from hashlib import new as new_hash
from typing import Any

import orjson

from wave_proxy.errors import DigestInvalid, RequestInvalid, UpstreamError, clip

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA1_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

INDEX_TYPES = frozenset({DOCKER_INDEX, OCI_INDEX})
MANIFEST_TYPES = frozenset({DOCKER_MANIFEST, OCI_MANIFEST})
CONFIG_TYPES = frozenset({DOCKER_CONFIG, OCI_CONFIG})

# What we ask upstream for: everything that we know, then whatever there is.
ACCEPT_MANIFESTS = ", ".join(
    (OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST, DOCKER_SCHEMA1_SIGNED, DOCKER_SCHEMA1, "*/*;q=0.1")
)

# The distribution spec lets a registry refuse manifests over 4 MiB; every client tried stops there as well.
MAX_MANIFEST_BYTES = 4 << 20

# No registry has blobs of a pebibyte; what is said to be larger would not fit into the numbers of other programs.
MAX_BLOB_BYTES = 1 << 50

_HEX_LENGTH = {"sha256": 64, "sha512": 128}
_DIGEST = re.compile(r"(sha256|sha512):([0-9a-f]+)")
_NAME = r"[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,126}"
_MEDIA_TYPE = re.compile(f"{_NAME}/{_NAME}")


def parse_digest(text: str) -> str:
    """Return ``text`` when it is ``sha256:<64 hex>`` or ``sha512:<128 hex>`` in lower case.

    Raises DigestInvalid otherwise. Source: image-spec descriptor.md, "Digests".
    """
    match = _DIGEST.fullmatch(text)
    if match is None or len(match[2]) != _HEX_LENGTH[match[1]]:
        raise DigestInvalid(f"{clip(text)} is not a digest: expected sha256:<64 lower-case hex digits>")
    return text


def digest_of(content: bytes, algorithm: str = "sha256") -> str:
    """The digest of ``content``."""
    return f"{algorithm}:{new_hash(algorithm, content, usedforsecurity=True).hexdigest()}"


def matches(content: bytes, digest: str) -> bool:
    """Whether ``content`` has that (well-formed) digest."""
    return digest_of(content, digest.partition(":")[0]) == digest


def is_media_type(text: str) -> bool:
    """Whether ``text`` is ``type/subtype``, both of them names as RFC 6838 §4.2 has them, without parameters."""
    return _MEDIA_TYPE.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a manifest says of a blob: media type, digest of the bytes as sent, size in bytes."""

    media_type: str
    digest: str
    size: int


# --- platforms ---------------------------------------------------------------------------------------------------

# Those that we know, by all the names that they go by. Source: ``wave.md`` §4.5a.
ARCHITECTURES = {
    "amd64": "amd64",
    "x86_64": "amd64",
    "x86-64": "amd64",
    "arm64": "arm64",
    "aarch64": "arm64",
    "arm": "arm",
}


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system, architecture and variant; ``str`` is the wire form, such as ``linux/arm/v7``."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def matches(self, os: str, architecture: str, variant: str) -> bool:
        """Whether an index entry with these values serves this platform (``wave.md`` §3.8)."""
        if os != self.os or ARCHITECTURES.get(architecture, architecture) != self.architecture:
            return False
        if self.architecture == "arm64" and not self.variant:
            return variant in ("", "8", "v8")
        return variant == self.variant


LINUX_AMD64 = Platform("linux", "amd64")


def parse_platform(text: str) -> Platform:
    """Parse ``arch``, ``os/arch`` or ``os/arch/variant``.

    Raises RequestInvalid. Source: ``wave.md`` §4.5a and its vectors V7.
    """
    parts = text.strip().split("/")
    if parts == [""]:
        raise RequestInvalid("Missing container platform attribute")
    if len(parts) > 3 or not all(parts):
        raise RequestInvalid(f"Invalid container platform: {text[:100]} -- offending value: {text[:100]}")
    os, arch = (parts[0], parts[1]) if len(parts) > 1 else ("linux", parts[0])
    architecture = ARCHITECTURES.get(arch)
    if architecture is None:
        raise RequestInvalid(f"Unsupported container platform: {arch[:100]}")
    variant = parts[2] if len(parts) == 3 else ""
    if variant.isdigit():
        variant = f"v{variant}"
    if architecture == "arm64" and variant == "v8":
        variant = ""
    if architecture == "arm" and not variant:
        variant = "v7"
    return Platform(os, architecture, variant)


def parse_platforms(text: str) -> tuple[Platform, ...]:
    """Parse a comma-separated list of platforms. Raises RequestInvalid."""
    return tuple(parse_platform(part) for part in text.split(","))


# --- manifests ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One manifest that an index names, with the platform it says it is for (None when it says nothing)."""

    descriptor: Descriptor
    platform: Platform | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What we need to know of a manifest or index; the bytes themselves stay as they came.

    ``config`` is None for an index and for types that we don't know, which pass through unread.
    """

    media_type: str
    config: Descriptor | None
    layers: tuple[Descriptor, ...]
    entries: tuple[IndexEntry, ...]

    @property
    def is_index(self) -> bool:
        """Whether it names other manifests rather than layers."""
        return self.media_type in INDEX_TYPES

    @property
    def is_image(self) -> bool:
        """Whether it is a manifest whose config is that of a container image, so that it can be rewritten."""
        return self.media_type in MANIFEST_TYPES and self.config is not None and self.config.media_type in CONFIG_TYPES

    def descriptors(self) -> tuple[Descriptor, ...]:
        """Everything that the document names: what a client may ask for after reading it."""
        named = (self.config,) if self.config else ()
        return named + self.layers + tuple(entry.descriptor for entry in self.entries)


def read_json_object(content: bytes, what: str) -> dict[str, Any]:
    """Decode a JSON object that came from upstream. Raises UpstreamError that names ``what``."""
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as err:
        raise UpstreamError(f"{what} is not JSON: {err}") from None
    if not isinstance(document, dict):
        raise UpstreamError(f"{what} is not a JSON object")
    return document


def read_manifest(content: bytes, media_type: str) -> Manifest:
    """Read a manifest or index of a media type that we know; others give a Manifest that names nothing.

    Raises UpstreamError when a known type lacks what its specification requires, or is two things at once.
    Source: image-spec manifest.md and image-index.md; distribution GHSA-qq97-vm5h-rrhg for the confusion check.
    """
    if media_type not in MANIFEST_TYPES and media_type not in INDEX_TYPES:
        return Manifest(media_type, None, (), ())
    document = read_json_object(content, "manifest")
    if "manifests" in document and ("layers" in document or "config" in document):
        raise UpstreamError("manifest names both layers and manifests")
    own_type = document.get("mediaType")
    if own_type is not None and own_type != media_type:
        raise UpstreamError(f"manifest says it is {clip(own_type)} and was sent as {clip(media_type)}")
    if media_type in INDEX_TYPES:
        return Manifest(media_type, None, (), tuple(_read_entry(e) for e in _array(document, "manifests")))
    layers = tuple(read_descriptor(layer, "layer") for layer in _array(document, "layers"))
    return Manifest(media_type, read_descriptor(document.get("config"), "config"), layers, ())


def _array(document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise UpstreamError(f"manifest's {key} is not an array")
    return value


def read_descriptor(value: Any, what: str) -> Descriptor:
    """A descriptor out of a manifest. Raises UpstreamError that names ``what`` it is of the manifest."""
    match value:
        case {"digest": str(digest), "size": int(size), **rest} if 0 <= size <= MAX_BLOB_BYTES:
            try:
                parse_digest(digest)
            except DigestInvalid as err:
                raise UpstreamError(f"manifest's {what}: {err}") from None
            media_type = rest.get("mediaType")
            return Descriptor(media_type if isinstance(media_type, str) else "", digest, size)
    raise UpstreamError(f"manifest's {what} is no descriptor: {clip(value)}")


def _read_entry(value: Any) -> IndexEntry:
    descriptor = read_descriptor(value, "entry")
    match value.get("platform"):
        case {"os": str(os), "architecture": str(architecture), **rest}:
            variant = rest.get("variant")
            return IndexEntry(descriptor, Platform(os, architecture, variant if isinstance(variant, str) else ""))
    return IndexEntry(descriptor, None)


def sniff_media_type(content: bytes) -> str:
    """The media type of a manifest that came without a usable Content-Type, from what it contains.

    Falls back to ``application/octet-stream``. OCI documents may leave ``mediaType`` out (image-spec manifest.md).
    """
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        return "application/octet-stream"
    match document:
        case {"mediaType": str(media_type)} if is_media_type(media_type):
            return media_type
        case {"manifests": list()}:
            return OCI_INDEX
        case {"config": dict(), "layers": list()}:
            return OCI_MANIFEST
        case {"schemaVersion": 1, "signatures": list()}:
            return DOCKER_SCHEMA1_SIGNED
        case {"schemaVersion": 1}:
            return DOCKER_SCHEMA1
    return "application/octet-stream"
