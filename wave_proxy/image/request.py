"""What a token stands for: the container request, its settings and its layers."""

import zlib
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from re import compile as compile_pattern
from typing import Any

from wave_proxy.errors import DigestMismatch, RequestInvalid, SizeMismatch, clip
from wave_proxy.image.oci import digest_of, matches

_FUSION_HOST = "https://fusionfs.seqera.io/"
_FUSION_FILE = compile_pattern(r"v([^/]+)-\w+\.json|fusion-\w+\.tar\.gz")
_FUSION_LAYER = compile_pattern(r".*/fusion-(\w+)\.tar\.gz")

MAX_TAR_BYTES = 256 << 20  # what an inline layer may unpack to
MAX_TARS_BYTES = 512 << 20  # and all those of one request together
# A location has at most 14,000,000 characters, and no honest gzip becomes much shorter when it is deflated once more.
_MAX_GZIP_BYTES = 16 << 20
_STEP = 1 << 15
_MIN_COST = 1 << 10  # a gzip member of nothing has 20 bytes, and takes as long as this many bytes


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer to append: where its gzipped tar is, and what it must be.

    ``location`` starts with ``data:`` (base64 of the gzipped tar), ``gzip:`` (base64 of that, deflated once more),
    ``http(s)://``, or ``docker://registry/v2/repository/blobs/digest``. ``gzip_size`` is bytes; ``tar_digest`` is the
    diff_id. ``media_type`` is set for layers that come out of another image, empty otherwise.
    """

    location: str = field(repr=False)
    gzip_digest: str
    gzip_size: int
    tar_digest: str
    media_type: str = ""

    @property
    def is_inline(self) -> bool:
        """Whether the request itself carries the bytes."""
        return self.location.startswith(("data:", "gzip:"))

    def fits(self, architecture: str) -> bool:
        """Whether the layer belongs into an image of that architecture: Fusion's layers are one per architecture."""
        match = _FUSION_LAYER.fullmatch(self.location)
        return match is None or match[1] == architecture


@dataclass(frozen=True, slots=True)
class ContainerConfig:
    """What to change in an image. Empty members change nothing."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    working_dir: str = ""
    layers: tuple[Layer, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.entrypoint or self.cmd or self.env or self.working_dir or self.layers)

    @property
    def has_fusion(self) -> bool:
        """Whether Fusion is one of the layers: a pull of it counts apart as well."""
        return bool(self.fusion_version)

    @property
    def fusion_version(self) -> str:
        """The version of the first Fusion layer, empty when there is none. Source: ``wave.md`` §8.4, vectors V29."""
        for layer in self.layers:
            if not layer.location.startswith(_FUSION_HOST):
                continue
            folder, _, file = layer.location.rpartition("/")
            _, package, version = folder.rpartition("/pkg/")
            match = _FUSION_FILE.fullmatch(file)
            if match and (match[1] or (package and version)):
                return match[1] or version.replace("/", ".")
        return ""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks. Anonymous when there is no user; tokens never show in ``repr``.

    A user of the Platform has an ``access_token``; one whom this server itself knows has an ``email`` only.
    """

    user_id: int | None = None
    email: str = ""
    workspace_id: int | None = None
    access_token: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    endpoint: str = ""
    workflow_id: str = ""

    @property
    def is_platform(self) -> bool:
        """Whether it is a Platform that says who this is."""
        return bool(self.access_token)

    @property
    def local_email(self) -> str:
        """The address of a user whom this server itself knows; empty for others.

        Anybody may run a Platform, and there be whoever he likes.
        """
        return "" if self.is_platform else self.email

    @property
    def key(self) -> str:
        """Stands for the user: 16 hex digits, the same for all requests of one; empty for nobody."""
        if self.is_platform:
            user = f"{self.endpoint}\0{self.user_id or self.email or self.access_token}"
        elif self.email:
            user = self.email.lower()
        else:
            return ""
        return sha256(user.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ContainerRequest:
    """A container that was asked for. Immutable: a token means the same thing for as long as it lives.

    ``image`` is the normalised reference that is pulled upstream; ``platforms`` is empty when none was asked for, and
    then all platforms of an index are served. ``timestamp`` is the client's, ISO-8601 with offset, or empty. Times are
    epoch seconds.

    An image that is built has a ``build_id``; ``build_new`` says that the build was begun for this request. With
    ``freeze`` clients pull the image by its own name, not by the token, as they do one that is copied (``mirror``).
    Pulls of our own builder are ``uncounted``.

    An image that is scanned has ``scan_ids``: one, or one for each of its platforms. With the ``scan_mode`` "required"
    it is ready no sooner than these have found nothing but severities of ``scan_levels``.
    """

    image: str
    config: ContainerConfig = ContainerConfig()
    platforms: tuple[str, ...] = ()
    identity: Identity = Identity()
    fingerprint: str = ""
    timestamp: str = ""
    ip_address: str = ""
    includes: tuple[str, ...] = ()
    dry_run: bool = False
    build_id: str = ""
    build_new: bool = False
    freeze: bool = False
    mirror: bool = False
    uncounted: bool = False
    scan_ids: tuple[str, ...] = ()
    scan_mode: str = ""
    scan_levels: tuple[str, ...] = ()
    created: float = 0.0
    expires: float = 0.0

    @property
    def is_durable(self) -> bool:
        """Whether clients pull the image by its own name, and the token is for its status only."""
        return self.freeze or self.mirror


def request_to_json(request: ContainerRequest) -> dict[str, Any]:
    """The form in which a request is kept: plain JSON values, without empty members, as there may be millions."""
    config = _set_members(request.config)
    if request.config.layers:
        config["layers"] = [[getattr(layer, name) for name in Layer.__slots__] for layer in request.config.layers]
    members = _set_members(request) | {"config": config, "identity": _set_members(request.identity)}
    return {"image": request.image} | {name: value for name, value in members.items() if value}


def request_from_json(document: Mapping[str, Any]) -> ContainerRequest:
    """Inverse of request_to_json. Unknown members are ignored, so that older workers read newer records."""
    members = _known_members(ContainerRequest, document)
    if "config" in members:
        config = _known_members(ContainerConfig, members["config"])
        config["layers"] = tuple(Layer(*layer) for layer in config.get("layers", ()))
        members["config"] = ContainerConfig(**config)
    if "identity" in members:
        members["identity"] = Identity(**_known_members(Identity, members["identity"]))
    return ContainerRequest(**members)


def _set_members(value: ContainerRequest | ContainerConfig | Identity) -> dict[str, Any]:
    return {name: member for name in value.__slots__ if (member := getattr(value, name))}


def _known_members(
    kind: type[ContainerRequest | ContainerConfig | Identity], document: Mapping[str, Any]
) -> dict[str, Any]:
    """The members that ``kind`` has; JSON's arrays become tuples."""
    known = {name: document[name] for name in kind.__slots__ if name in document}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}


def unpack_inline_layer(layer: Layer, limit: int = MAX_TAR_BYTES) -> tuple[bytes, int]:
    """The gzipped tar that an inline layer carries, checked against its digests and size; and what unpacking it cost.

    The cost, at most ``limit``, is the tar's size in bytes; more where the gzip has very many members.
    Raises RequestInvalid when it is no base64 or gzip, or unpacks to more than ``limit``; DigestMismatch or
    SizeMismatch when it is not what it says.
    Costs one hash of the gzip and one pass of inflate with a hash; memory is bounded by 64 KiB beyond the layer itself.
    """
    kind, _, text = layer.location.partition(":")
    try:
        content = b64decode(text, validate=True)
        if kind == "gzip":
            content = _inflate(content)
    except (ValueError, zlib.error) as err:
        raise RequestInvalid(f"location is not valid after '{kind}:' ({err}): {clip(text, 40)}") from None
    if len(content) != layer.gzip_size:
        raise SizeMismatch(f"gzipSize is {layer.gzip_size} and the layer has {len(content)} bytes")
    if not matches(content, layer.gzip_digest):
        raise DigestMismatch(f"gzipDigest is {layer.gzip_digest} and the layer's is {digest_of(content)}")
    tar_digest, cost = _tar_digest(content, limit)
    if tar_digest != layer.tar_digest:
        raise DigestMismatch(f"tarDigest is {layer.tar_digest} and the unpacked layer's is {tar_digest}")
    return content, cost


def _inflate(content: bytes) -> bytes:
    inflater = zlib.decompressobj()
    plain = inflater.decompress(content, _MAX_GZIP_BYTES)
    if not inflater.eof:
        raise zlib.error(f"incomplete, or over {_MAX_GZIP_BYTES >> 20} MiB")
    return plain


def _tar_digest(content: bytes, limit: int) -> tuple[str, int]:
    """Digest of the tar inside a gzip of one or more members, and its cost. Raises RequestInvalid."""
    running, cost = sha256(), 0
    try:
        for piece in _tar_pieces(content):
            running.update(piece)
            cost += max(len(piece), _MIN_COST)
            if cost > limit:
                raise RequestInvalid(
                    f"the layer unpacks to more than {limit} bytes: one inline layer may have {MAX_TAR_BYTES}, "
                    f"and all of a request together {MAX_TARS_BYTES}"
                )
    except zlib.error as err:
        raise RequestInvalid(f"the layer is not gzip data: {err}") from None
    return f"sha256:{running.hexdigest()}", cost


def _tar_pieces(content: bytes) -> Iterator[bytes]:
    # Zlib copies what it leaves of its input on every call, so it is fed little at a time: with all of it at once, a
    # layer of ten megabytes could keep a process busy for hours.
    inflater = zlib.decompressobj(wbits=31)
    for start in range(0, len(content), _STEP):
        rest = content[start : start + _STEP]
        while rest:
            if inflater.eof:
                inflater = zlib.decompressobj(wbits=31)
            yield inflater.decompress(rest, _STEP)
            rest = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    while not inflater.eof:
        piece = inflater.decompress(b"", _STEP)
        if not piece:
            raise zlib.error("it ends early")
        yield piece
