"""Makes small real images in memory: the same arguments give the same digests."""

import json
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from gzip import compress as gzip_compress
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from platform import machine
from random import Random
from tarfile import DIRTYPE, SYMTYPE, TarFile, TarInfo
from typing import Any, Literal
from zlib import compress as zlib_compress

from wave_proxy.image.oci import (
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)

Family = Literal["oci", "docker"]
Compression = Literal["gzip", "zstd", "none"]

CREATED = "2024-01-01T00:00:00Z"
BUSYBOX = Path("/bin/busybox")

_OCI_TYPES = {"gzip": OCI_LAYER, "zstd": "application/vnd.oci.image.layer.v1.tar+zstd", "none": OCI_LAYER[:-5]}
_DOCKER_TYPES = {OCI_LAYER: DOCKER_LAYER, OCI_LAYER[:-5]: DOCKER_LAYER[:-5]}
_APPLETS = ("ash", "cat", "echo", "env", "false", "id", "ls", "mkdir", "pwd", "sh", "sha256sum", "sleep", "true", "wc")


@dataclass(frozen=True)
class Blob:
    """Bytes with the digest that they have, and what they are."""

    digest: str
    content: bytes = field(repr=False)
    media_type: str

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content)


@dataclass(frozen=True)
class Layer(Blob):
    """A tar, maybe compressed; ``diff_id`` is the digest of the tar itself."""

    diff_id: str

    def inline(self, form: Literal["data", "gzip"] = "data") -> dict[str, Any]:
        """The layer as a member of a request's ``containerConfig.layers``; it must be a gzipped one."""
        packed = self.content if form == "data" else zlib_compress(self.content)
        return {"location": f"{form}:{b64encode(packed).decode()}", **self.described()}

    def described(self) -> dict[str, Any]:
        """``gzipDigest``, ``gzipSize`` and ``tarDigest``: a member of ``layers`` that lacks only its location."""
        return {"gzipDigest": self.digest, "gzipSize": self.size, "tarDigest": self.diff_id}


@dataclass(frozen=True)
class Image:
    """A manifest with its blobs (config first, then layers), or an index with its children."""

    digest: str
    media_type: str
    manifest: bytes = field(repr=False)
    blobs: tuple[Blob, ...] = ()
    children: tuple["Image", ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """The decoded image config. Raises IndexError for an index."""
        document: dict[str, Any] = json.loads(self.blobs[0].content)
        return document

    @property
    def layers(self) -> tuple[Blob, ...]:
        """The layers in the order of the manifest."""
        return self.blobs[1:]


def digest_of(content: bytes) -> str:
    """``sha256:<hex>`` of ``content``."""
    return f"sha256:{sha256(content).hexdigest()}"


def blob(content: bytes, media_type: str = "application/octet-stream") -> Blob:
    """``content`` as a blob."""
    return Blob(digest_of(content), content, media_type)


def random_blob(size: int, seed: int) -> bytes:
    """``size`` incompressible bytes, the same for the same seed; about 0.5 GB a second."""
    source = Random(seed)
    step = 1 << 20
    return b"".join(source.randbytes(min(step, size - start)) for start in range(0, size, step))


def layer(
    files: Mapping[str, bytes | str], *, links: Mapping[str, str] | None = None, compression: Compression = "gzip"
) -> Layer:
    """A layer of executable files; names that end with ``/`` are folders; ``links`` maps names to their targets."""
    tar = _tar(files, links or {})
    match compression:
        case "gzip":
            content = gzip_compress(tar, mtime=0)
        case "zstd":
            import zstandard  # only tests need it, and the demonstration runs without it

            content = zstandard.ZstdCompressor().compress(tar)
        case "none":
            content = tar
    return Layer(digest_of(content), content, _OCI_TYPES[compression], digest_of(tar))


def _tar(files: Mapping[str, bytes | str], links: Mapping[str, str]) -> bytes:
    buffer = BytesIO()
    with TarFile(fileobj=buffer, mode="w") as tar:
        for info, content in _entries(files, links):
            tar.addfile(info, BytesIO(content))
    return buffer.getvalue()


def _entries(files: Mapping[str, bytes | str], links: Mapping[str, str]) -> Iterator[tuple[TarInfo, bytes]]:
    for name, value in files.items():
        content = value.encode() if isinstance(value, str) else value
        info = TarInfo(name.strip("/"))
        info.mode, info.size = 0o755, len(content)
        if name.endswith("/"):
            info.type = DIRTYPE
        yield info, content
    for name, target in links.items():
        info = TarInfo(name.strip("/"))
        info.type, info.linkname = SYMTYPE, target
        yield info, b""


def image(
    layers: Sequence[Layer],
    *,
    family: Family = "oci",
    platform: str = "linux/amd64",
    entrypoint: Sequence[str] | str | None = None,
    cmd: Sequence[str] | None = None,
    env: Sequence[str] = (),
    working_dir: str = "",
    user: str = "",
    history: bool = True,
    media_type_in_body: bool = True,
) -> Image:
    """An image of the given layers. A docker image takes gzip and uncompressed layers only (KeyError otherwise)."""
    if family == "docker":
        layers = [replace(item, media_type=_DOCKER_TYPES[item.media_type]) for item in layers]
    settings: dict[str, Any] = {"Env": list(env)}
    if entrypoint:
        settings["Entrypoint"] = entrypoint if isinstance(entrypoint, str) else list(entrypoint)
    if cmd:
        settings["Cmd"] = list(cmd)
    if working_dir:
        settings["WorkingDir"] = working_dir
    if user:
        settings["User"] = user
    config: dict[str, Any] = {**_platform(platform), "created": CREATED, "config": settings}
    config["rootfs"] = {"type": "layers", "diff_ids": [item.diff_id for item in layers]}
    if history:
        config["history"] = [{"created": CREATED, "created_by": f"layer {n}"} for n, _ in enumerate(layers)]
    config_blob = blob(_json(config), DOCKER_CONFIG if family == "docker" else OCI_CONFIG)
    media_type = DOCKER_MANIFEST if family == "docker" else OCI_MANIFEST
    manifest: dict[str, Any] = {"schemaVersion": 2}
    if media_type_in_body:
        manifest["mediaType"] = media_type
    manifest |= {"config": descriptor(config_blob), "layers": [descriptor(item) for item in layers]}
    content = _json(manifest)
    return Image(digest_of(content), media_type, content, (config_blob, *layers))


def _platform(text: str) -> dict[str, str]:
    return dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False))


def _json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def descriptor(item: Blob) -> dict[str, Any]:
    """What a manifest says of a blob."""
    return {"mediaType": item.media_type, "digest": item.digest, "size": item.size}


def index(images: Sequence[Image], *, family: Family = "oci") -> Image:
    """An index of images; each entry carries the platform that the image's config names."""
    media_type = DOCKER_INDEX if family == "docker" else OCI_INDEX
    entries = [
        {
            "mediaType": child.media_type,
            "digest": child.digest,
            "size": len(child.manifest),
            "platform": {
                name: child.config[name] for name in ("architecture", "os", "variant") if name in child.config
            },
        }
        for child in images
    ]
    content = _json({"schemaVersion": 2, "mediaType": media_type, "manifests": entries})
    return Image(digest_of(content), media_type, content, (), tuple(images))


def has_busybox() -> bool:
    """Whether this machine has the static busybox that busybox_image() packs."""
    return BUSYBOX.is_file()


def busybox_image(
    *,
    family: Family = "oci",
    entrypoint: Sequence[str] | None = None,
    cmd: Sequence[str] = ("sh",),
    env: Sequence[str] = (),
) -> Image:
    """An image that runs on this machine: a shell and a few commands. Needs has_busybox()."""
    base = layer(
        {
            "bin/": "",
            "bin/busybox": BUSYBOX.read_bytes(),
            "etc/": "",
            "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
            "etc/group": "root:x:0:\n",
            "root/": "",
            "tmp/": "",
        },
        links={f"bin/{name}": "busybox" for name in _APPLETS},
    )
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine(), machine())
    return image(
        [base],
        family=family,
        platform=f"linux/{architecture}",
        entrypoint=entrypoint,
        cmd=cmd,
        env=("PATH=/bin", *env),
    )
