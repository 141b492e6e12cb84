"""What a build is: everything that decides its result, and what is recorded of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from re import compile as compile_pattern
from typing import Any, Literal

from wave_proxy.image.request import Identity, Layer

_BUILD_ID = compile_pattern(r"((?:bd|mr|sc)-[0-9a-f]{16})_([0-9]{1,9})")

Compressor = Literal["", "gzip", "estargz", "zstd"]
Format = Literal["docker", "sif"]
Kind = Literal["build", "mirror", "scan"]
Phase = Literal["queued", "running", "done"]

_NOBODY = Identity()

PREFIXES: Mapping[Kind, str] = {"build": "bd", "mirror": "mr", "scan": "sc"}
"""What the ids of jobs begin with."""

LOCK_START = ">> CONDA_LOCK_START"
LOCK_END = "<< CONDA_LOCK_END"


@dataclass(frozen=True, slots=True)
class Compression:
    """How the layers of a built image are compressed; an empty mode is the engine's default, gzip."""

    mode: Compressor = ""
    level: int | None = None
    force: bool | None = None


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What to do: an image to build and where it goes, or one to mirror or to scan. Equal specs give equal results.

    ``container_id`` is the hash of what decides the result; ``target_image`` the normalised reference that is pushed
    (``host/repository:tag``, no ``oras://``). ``container_file`` and ``conda_file`` are the effective texts. The build
    context is unpacked from the tar.gz ``context``; ``layers`` are those that the container file adds as
    ``layer-<hex of gzip_digest>.tar.gz``. ``platform`` is one platform, or several with commas: then
    the image is an index of one image each. ``cache_repository`` has no tag. ``epoch`` is
    the time that files and image get (epoch seconds), 0 for 1970.

    A mirror copies ``source_image``, as it was with the digest ``source_digest``, to ``target_image``. A scan looks at
    ``source_image``, which names the image by digest where that was known, and is the ``target_image`` by the name that
    was asked for; ``made_by`` is the id of the build or mirror that makes the image, and the platform may be empty:
    linux/amd64 then, or what there is. ``logins`` are those of the one who asked, as (registry, user, password): they
    go before the configured ones. It is ``private`` when not everybody may read what it is about: then nobody can work
    out its ``container_id``.
    """

    container_id: str
    target_image: str
    container_file: str
    conda_file: str = ""
    context: Layer | None = None
    layers: tuple[Layer, ...] = ()
    platform: str = "linux/amd64"
    format: Format = "docker"
    build_repository: str = ""
    cache_repository: str = ""
    compression: Compression = Compression()
    template: str = ""
    freeze: bool = False
    epoch: int = 0
    timeout_s: float = 900.0
    identity: Identity = _NOBODY
    ip_address: str = field(default="", repr=False)
    kind: Kind = "build"
    source_image: str = ""
    source_digest: str = ""
    made_by: str = ""
    logins: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)
    private: bool = False

    @property
    def platforms(self) -> tuple[str, ...]:
        """Each platform by itself."""
        return tuple(self.platform.split(","))

    @property
    def carried(self) -> tuple[Layer, ...]:
        """What a request may bring along: the layers, and the context behind them."""
        return (*self.layers, *((self.context,) if self.context else ()))

    @property
    def series(self) -> str:
        """What the ids of all jobs of the same result begin with: ``bd-``, ``mr-`` or ``sc-``, and the container id."""
        return f"{PREFIXES[self.kind]}-{self.container_id}"

    @property
    def slot(self) -> str:
        """What at most one job at a time is about: the image that a build or a mirror makes, or the one to scan."""
        match self.kind:
            case "build":
                return self.target_image
            case "mirror":
                return f"mirror {self.target_image}"
            case "scan":
                return f"{self.series} {self.platform}"

    @property
    def image(self) -> str:
        """The name that clients are told: that of a Singularity image begins with ``oras://``."""
        return f"oras://{self.target_image}" if self.format == "sif" else self.target_image

    @property
    def owner(self) -> str:
        """Whose turn it is when builds wait: the user's e-mail address, or the address that the request came from."""
        return self.identity.email.lower() or self.ip_address or "-"


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """A build as it stands. Times are epoch seconds, 0 for what has not happened.

    ``exit_status`` is None until it is done; 0 is success, and ``digest`` is then that of the pushed manifest.
    ``reason`` says in one line why it failed. ``attempt`` counts the builders that have had it.
    """

    build_id: str
    spec: BuildSpec
    phase: Phase
    created: float
    started: float = 0.0
    finished: float = 0.0
    exit_status: int | None = None
    digest: str = ""
    reason: str = ""
    attempt: int = 0

    @property
    def succeeded(self) -> bool | None:
        """None until it is done."""
        return None if self.phase != "done" else self.exit_status == 0

    @property
    def duration_s(self) -> float | None:
        """From the request to the end; None until it is done."""
        return None if self.phase != "done" else max(self.finished - self.created, 0.0)


def split_build_id(text: str) -> tuple[str, int] | None:
    """The series (``bd-<16 hex>``) and the number of a whole id (``bd-<16 hex>_<n>``); None for any other text.

    Ids of mirrors begin with ``mr-``, those of scans with ``sc-``.
    """
    match = _BUILD_ID.fullmatch(text)
    return (match[1], int(match[2])) if match else None


def spec_to_json(spec: BuildSpec) -> dict[str, Any]:
    """The form in which a spec is kept: plain JSON values."""
    document = {name: getattr(spec, name) for name in BuildSpec.__slots__}
    document["context"] = _layer_to_json(spec.context) if spec.context else None
    document["layers"] = [_layer_to_json(layer) for layer in spec.layers]
    document["compression"] = [getattr(spec.compression, name) for name in Compression.__slots__]
    document["identity"] = {name: getattr(spec.identity, name) for name in Identity.__slots__}
    return document


def spec_from_json(document: Mapping[str, Any]) -> BuildSpec:
    """Inverse of spec_to_json. Unknown members are ignored, so that older builders read newer records."""
    members = {name: document[name] for name in BuildSpec.__slots__ if name in document}
    members["context"] = Layer(*members["context"]) if members.get("context") else None
    members["layers"] = tuple(Layer(*layer) for layer in members.get("layers", ()))
    members["compression"] = Compression(*members.get("compression", ()))
    identity = members.get("identity", {})
    members["identity"] = Identity(**{name: identity[name] for name in Identity.__slots__ if name in identity})
    members["logins"] = tuple((host, user, password) for host, user, password in members.get("logins", ()))
    return BuildSpec(**members)


def _layer_to_json(layer: Layer) -> list[Any]:
    return [getattr(layer, name) for name in Layer.__slots__]
