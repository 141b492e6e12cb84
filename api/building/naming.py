"""Names of what is built: the id, which is a hash of all that decides the result, and the image's name."""

import sys
from collections.abc import Iterable, Sequence
from hmac import digest
from operator import mul
from re import compile as compile_pattern
from typing import Literal

from siphash24 import siphash24

from api.building.conda import Package, read_packages
from api.schema import ConfigSpec
from wave_proxy.image.reference import MAX_NAME_LENGTH, is_repository, parse_reference
from wave_proxy.image.request import Layer

NameStrategy = Literal["none", "tagPrefix", "imageSuffix"]

MAX_TAG_CHARS = 80
MAX_PACKAGES = 5

_KEY = bytes(range(16))
_NOT_IN_TAG = compile_pattern(r"[^a-zA-Z0-9_.-]")
_NOT_IN_NAME = compile_pattern(r"[^a-zA-Z0-9_./-]")
_EDGES = compile_pattern(r"\A[\W_]+|[\W_]+\Z")
_SEPARATORS = compile_pattern(r"[._-]+")
_BLOCK = 4096


# --- ids -------------------------------------------------------------------------------------------------------------


def container_id(
    *,
    container_file: str,
    conda_file: str | None = None,
    platform: str,
    repository: str,
    context: Layer | None = None,
    config: ConfigSpec | None = None,
    included: Sequence[Layer] = (),
    cache: str = "",
) -> str:
    """The id of what a build makes: 16 hex digits.

    ``repository`` is the one that is pushed to, as asked for; ``context`` is the build context. ``config`` and the
    layers ``included`` from other images belong in it when the build bakes them in (freeze). ``cache`` is a place of
    the requester's own that layers are taken from: what he has put there, others must not get for their requests.
    Source: ``wave.md`` §4.9a, vectors V2.
    """
    attributes = {
        "containerFile": container_file,
        "condaFile": conda_file or "",
        "platform": platform,
        "repository": repository,
    }
    if context:
        attributes["buildContext"] = context.tar_digest
    if included or (config and config.to_config()):
        attributes["containerConfig"] = str(hash_config(config or ConfigSpec(), included))
    if cache:
        attributes["cacheRepository"] = cache
    return hash_attributes(attributes.items())


def hash_attributes(attributes: Iterable[tuple[str, str]]) -> str:
    """SipHash-2-4 of names with values, in their order: 16 hex digits. Source: ``wave.md`` §4.9a, vectors V1."""
    text = "".join(f"{name}\x1c{value}\x1e" for name, value in attributes)
    return str(siphash24(text.encode("utf-16-le"), key=_KEY).hexdigest())


def hidden_id(known_id: str, secret: bytes) -> str:
    """An id in the place of one that whoever knows the names of images can work out: 16 hex digits as well.

    Ids open what is told of jobs, so those about private images must be known to nobody but who was told them.
    """
    return digest(secret, known_id.encode(), "sha256").hex()[:16]


def hash_config(config: ConfigSpec, included: Sequence[Layer] = ()) -> int:
    """The 32-bit hash of a config as the service computes it: a missing ``layers`` is an empty list, null is not.

    Source: ``wave.md`` §4.9a, vectors V3.
    """
    layers = [layer.to_layer() for layer in config.layers or ()] + list(included)
    no_layers = config.layers is None and "layers" in config.model_fields_set and not included
    members = (
        _hash_texts(config.entrypoint),
        _hash_texts(config.cmd),
        _hash_texts(config.env),
        _hash_text(config.working_dir or ""),
        0 if no_layers else _fold(_hash_layer(layer) for layer in layers),
    )
    return _fold(members)


def _hash_layer(layer: Layer) -> int:
    blob = (_hash_text(layer.location), _hash_text(layer.gzip_digest), layer.gzip_size)
    return _fold((*blob, _hash_text(layer.tar_digest)))


def _hash_texts(texts: Sequence[str] | None) -> int:
    return 0 if texts is None else _fold(_hash_text(text) for text in texts)


def _fold(hashes: Iterable[int]) -> int:
    result = 1
    for item in hashes:
        result = (31 * result + item) % (1 << 32)
    return _signed(result)


def _hash_text(text: str) -> int:
    """31 * h + unit over the UTF-16 units: in blocks, since an inline layer's location has millions of them."""
    units = memoryview(text.encode(f"utf-16-{sys.byteorder[0]}e")).cast("H")
    powers = [pow(31, exponent, 1 << 32) for exponent in reversed(range(min(len(units), _BLOCK)))]
    result = 0
    for start in range(0, len(units), _BLOCK):
        block = units[start : start + _BLOCK]
        result = result * pow(31, len(block), 1 << 32) + sum(map(mul, block, powers[len(powers) - len(block) :]))
        result %= 1 << 32
    return _signed(result)


def _signed(number: int) -> int:
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


# --- the image's name ------------------------------------------------------------------------------------------------


def target_image(
    repository: str, container_id: str, conda_file: str, strategy: NameStrategy | None, *, singularity: bool = False
) -> str:
    """What a build is pushed as: ``repository:tag``, with ``oras://`` in front for Singularity.

    The name says which packages are in it, where the strategy has room for that and they are known. It always keeps
    the distribution spec's grammar. Source: ``wave.md`` §4.9b, vectors V9.
    """
    packages = () if strategy == "none" else read_packages(conda_file)
    tag = container_id
    if packages and strategy == "imageSuffix":
        repository, version = _suffixed(repository, packages)
        tag = f"{version}--{container_id}" if version else container_id
    elif packages:
        prefix = normalise_tag(join_names(dict.fromkeys(str(package) for package in packages)))
        tag = f"{prefix}--{container_id}" if prefix else container_id
    return f"{'oras://' if singularity else ''}{repository}:{tag}"


def _suffixed(repository: str, packages: Sequence[Package]) -> tuple[str, str]:
    """The repository with the packages' names behind it, and the version that all of them have, else empty."""
    path = parse_reference(repository).repository
    names = join_names(dict.fromkeys(package.name for package in packages))
    suffix = normalise_name(names, MAX_NAME_LENGTH - len(path) - 1)
    if not suffix:
        return repository, ""
    versions = {package.version for package in packages}
    return f"{repository}/{suffix}", normalise_tag(versions.pop()) if len(versions) == 1 else ""


def join_names(names: Iterable[str]) -> str:
    """The names in a row; of more than five, four and ``pruned``. Source: ``wave.md`` §4.9b, vectors V12."""
    listed = list(names)
    return "_".join(listed if len(listed) <= MAX_PACKAGES else [*listed[: MAX_PACKAGES - 1], "pruned"])


def normalise_tag(text: str, limit: int = MAX_TAG_CHARS) -> str:
    """``text`` as a part of a tag; empty when nothing of it can stand there. Source: ``wave.md`` §4.9b, V11."""
    return _shortened(_NOT_IN_TAG.sub("", text), limit)


def normalise_name(text: str, limit: int = MAX_NAME_LENGTH) -> str:
    """``text`` as the last part of a repository; empty when nothing of it can stand there. Source: as normalise_tag."""
    name = _shortened(_NOT_IN_NAME.sub("", text).lower(), limit)
    if not name or is_repository(name):
        return name
    # Conda's names may hold what the grammar does not: `a..b`, `a/-b`.
    parts = (_SEPARATORS.sub("-", part).strip("-") for part in name.split("/"))
    return "/".join(part for part in parts if part)


def _shortened(text: str, limit: int) -> str:
    if len(text) > limit:
        text = "_".join(filter(None, text.split("_")))[: max(limit, 0)]
    return _EDGES.sub("", text)


# --- where it goes ---------------------------------------------------------------------------------------------------


def cache_repository(build: str, cache: str, *, default_build: str, default_cache: str) -> str:
    """Where the layers of a build are kept; empty for nowhere.

    ``build`` and ``cache`` are those of the request, or empty. The default holds for builds that go to the default
    repository only: nobody's own images are to share a place with others. Source: ``wave.md`` §4.9, 4, vectors V21.
    """
    return cache if cache or is_custom(build, default_build, default_cache) else default_cache


def is_custom(repository: str, *defaults: str) -> bool:
    """Whether a repository is named and is neither one of the server's own nor below one.

    Source: ``wave.md`` §4.6.
    """
    known = {default for default in defaults if default}
    return bool(repository) and not any(f"{repository}/".startswith(f"{default}/") for default in known)
