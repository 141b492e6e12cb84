"""Mirrors: what the copy of an image in another registry is called, and what has to be copied with a manifest."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from wave_proxy.errors import UpstreamError
from wave_proxy.image.oci import (
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    Descriptor,
    read_descriptor,
    read_json_object,
    read_manifest,
)
from wave_proxy.image.reference import Reference, is_registry, parse_reference

_FOREIGN = (".foreign.", ".nondistributable.")  # in the media types of layers that are not to be distributed


def is_registry_alone(place: str) -> bool:
    """Whether a mirror's target is a registry, such as ``quay.io`` or ``localhost:5000``, rather than a repository."""
    return "/" not in place and ("." in place or ":" in place) and is_registry(place)


def mirror_target(source: Reference, place: str) -> Reference:
    """The name of the copy of ``source`` in a registry, or below a repository.

    Raises RequestInvalid when that is no name. Source: ``wave.md`` §4.13, vectors V22.
    """
    return parse_reference(f"{place.rstrip('/')}/{source.name_and_reference}")


def target_registry(place: str) -> str:
    """The registry of a mirror's target. Raises RequestInvalid."""
    return mirror_target(Reference("", "image", "latest"), place).registry


def mirror_hash(source: Reference, target: Reference) -> str:
    """What the ids of all mirrors of ``source`` to ``target`` have in common: 16 hex digits."""
    return sha256(f"mirror\0{source}\0{target}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a copy of a manifest needs: ``blobs`` and other ``manifests``, each once, by digest.

    ``elsewhere`` are layers that come from an address of their own, or must not be distributed: nobody copies them.
    """

    blobs: tuple[Descriptor, ...]
    manifests: tuple[Descriptor, ...]
    elsewhere: tuple[Descriptor, ...] = ()


def read_parts(content: bytes, media_type: str) -> Parts:
    """What a manifest or index of any media type names. Raises UpstreamError, also for what can't be copied whole.

    Source: image-spec manifest.md and image-index.md; distribution's schema 2, "urls".
    """
    if media_type in (DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED):
        raise UpstreamError("the image has a manifest of schema 1, which registries do not take any more")
    read_manifest(content, media_type)  # of the types that we know: every rule
    document = read_json_object(content, "manifest")
    config = document.get("config")
    named = [*([config] if isinstance(config, dict) else []), *_list(document, "layers"), *_list(document, "blobs")]
    blobs: dict[str, Descriptor] = {}
    elsewhere: dict[str, Descriptor] = {}
    for value in named:
        blob = read_descriptor(value, "blob")
        (elsewhere if _is_elsewhere(value, blob) else blobs)[blob.digest] = blob
    manifests = {(one := read_descriptor(value, "entry")).digest: one for value in _list(document, "manifests")}
    return Parts(tuple(blobs.values()), tuple(manifests.values()), tuple(elsewhere.values()))


def _list(document: dict[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    return value if isinstance(value, list) else []


def _is_elsewhere(value: dict[str, Any], blob: Descriptor) -> bool:
    return bool(value.get("urls")) or any(mark in blob.media_type for mark in _FOREIGN)
