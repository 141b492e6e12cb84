"""OCI image layouts on disk: what they hold, read with care, since who made them may have put anything there."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from errno import EINVAL
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import orjson

from wave_proxy.errors import ContentMismatch, UpstreamError
from wave_proxy.image.oci import (
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    Descriptor,
    Platform,
    digest_of,
    matches,
    parse_digest,
    read_json_object,
    read_manifest,
    sniff_media_type,
)

_STEP = 1 << 18
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_DEPTH = 2  # an index of images


@dataclass(frozen=True, slots=True)
class Content:
    """A manifest, or an index with its ``children``; ``blobs`` are what the manifest itself names, each once."""

    manifest: bytes
    media_type: str
    digest: str
    blobs: tuple[Descriptor, ...]
    children: tuple["Content", ...] = ()


def read_layout(layout: Path) -> Content:
    """What an OCI image layout holds: its one image or index; of several images, one for each platform, their index.

    Reads the disk. Raises ContentMismatch, UpstreamError. Source: image-spec image-layout.md.
    """
    try:
        index = read_json_object(_read_small(layout, "index.json"), "index.json")
    except OSError as err:
        raise UpstreamError(f"{layout.name} is not an OCI image layout: {err.strerror}") from None
    match index.get("manifests"):
        case [{"digest": str(digest), **rest}]:
            return _read_content(layout, digest, rest.get("mediaType"), _MAX_DEPTH)
        case [*entries] if entries and all(isinstance(entry, dict) and "digest" in entry for entry in entries):
            images = [_read_content(layout, str(entry["digest"]), entry.get("mediaType"), 0) for entry in entries]
            platforms = [platform_of(layout, image) for image in images]
            if len(set(platforms)) == len(images):
                return _index_of(tuple(zip(images, platforms, strict=True)))
    raise UpstreamError(f"{layout.name} does not hold exactly one image, or one for each platform")


def platform_of(layout: Path, image: Content) -> Platform:
    """What an image's config says that it is for. Raises ContentMismatch, UpstreamError; also for what is no image."""
    manifest = read_manifest(image.manifest, image.media_type)
    if manifest.config is None:
        raise UpstreamError(f"{image.digest} is an index, and one image is expected")
    config = read_json_object(read_blob(layout, manifest.config.digest), "the image's config")
    return Platform(*(str(config.get(name) or "") for name in ("os", "architecture", "variant")))


def _index_of(images: Sequence[tuple[Content, Platform]]) -> Content:
    """The OCI index of images, in this order. Source: ``wave.md`` V49."""
    entries = [
        {
            "mediaType": image.media_type,
            "digest": image.digest,
            "size": len(image.manifest),
            "platform": {name: value for name in Platform.__slots__ if (value := getattr(platform, name))},
        }
        for image, platform in images
    ]
    index = orjson.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    return Content(index, OCI_INDEX, digest_of(index), (), tuple(image for image, _ in images))


def _read_content(layout: Path, digest: str, media_type: Any, depth: int) -> Content:
    manifest = read_blob(layout, digest)
    if not isinstance(media_type, str):
        media_type = sniff_media_type(manifest)
    read = read_manifest(manifest, media_type)
    if read.entries and not depth:
        raise UpstreamError("an index names indexes that name indexes")
    blobs = {blob.digest: blob for blob in (*((read.config,) if read.config else ()), *read.layers)}
    for blob in blobs.values():
        _check_size(layout, blob)
    children = (
        _read_content(layout, entry.descriptor.digest, entry.descriptor.media_type or None, depth - 1)
        for entry in read.entries
    )
    return Content(manifest, media_type, digest, tuple(blobs.values()), tuple(children))


def read_blob(layout: Path, digest: str) -> bytes:
    """A manifest or config out of a layout, checked against its digest. Raises ContentMismatch."""
    try:
        content = _read_small(layout, *_blob_path(digest))
    except OSError as err:
        raise ContentMismatch(f"{digest} can't be read: {err.strerror}") from None
    if not matches(content, digest):
        raise ContentMismatch(f"what is called {digest} is another one, or larger than {MAX_MANIFEST_BYTES} bytes")
    return content


def _read_small(layout: Path, *path: str) -> bytes:
    with _open(layout, *path) as file:
        return file.read(MAX_MANIFEST_BYTES + 1)[:MAX_MANIFEST_BYTES]


def _open(layout: Path, *path: str) -> BinaryIO:
    """Who made the layout may have put anything into it: links, also for folders, or a pipe that nobody writes to."""
    folders, name = path[:-1], path[-1]
    opened = os.open(layout, _FOLDER)
    try:
        for folder in folders:
            inner = os.open(folder, _FOLDER, dir_fd=opened)
            os.close(opened)
            opened = inner
        file = open(os.open(name, _FILE, dir_fd=opened), "rb")  # noqa: SIM115 - the caller's
    finally:
        os.close(opened)
    if not S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(EINVAL, "not a regular file")
    return file


def _blob_path(digest: str) -> tuple[str, str, str]:
    algorithm, _, name = parse_digest(digest).partition(":")
    return "blobs", algorithm, name


def _check_size(layout: Path, blob: Descriptor) -> None:
    try:
        with _open(layout, *_blob_path(blob.digest)) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as err:
        raise ContentMismatch(f"blob {blob.digest} can't be read: {err.strerror}") from None
    if size != blob.size:
        raise ContentMismatch(f"blob {blob.digest} has {size} bytes, and the manifest says {blob.size}")


async def read_blob_file(layout: Path, digest: str, start: int) -> AsyncIterator[bytes]:
    """A blob's bytes from ``start`` on. Raises OSError."""
    with _open(layout, *_blob_path(digest)) as file:
        file.seek(start)
        while chunk := await asyncio.to_thread(file.read, _STEP):
            yield chunk
