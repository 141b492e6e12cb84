"""What a container request is on the wire: its members, their types, and the rules that each keeps by itself.

Unknown members are ignored, null and empty text mean absent, a single value stands for an array of one, and digits in
a string for a number (``wave.md`` §0.2). Every member that breaks a rule is reported, all in one error.
"""

from collections.abc import Callable
from re import compile as compile_pattern
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, cast

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, PydanticCustomError

from api.locations import OpenHosts, blob_digest, check_location
from wave_proxy.errors import RequestInvalid, clip
from wave_proxy.image.mirror import is_registry_alone
from wave_proxy.image.oci import MAX_BLOB_BYTES, parse_digest, parse_platforms
from wave_proxy.image.reference import parse_reference
from wave_proxy.image.request import ContainerConfig, Layer

MAX_INCLUDES = 10
MAX_LAYERS = 100  # clients and overlayfs stop at about 127, those of the image included
MAX_ITEMS = 4096
MAX_CONDA_FILE_CHARS = 50_000
MAX_CONTAINER_FILE_CHARS = 10_000
MAX_NAME_CHARS = 512
MAX_TEXT_BYTES = 4 << 10
MAX_ARGUMENT_BYTES = (128 << 10) - 1  # Linux: MAX_ARG_STRLEN, less the NUL at the end
MAX_COMPRESSION_LEVEL = 22  # zstd's
MAX_REPORTED = 20

_DIGITS = compile_pattern(r"-?[0-9]{1,18}")
# Values of these are never repeated in a message: secrets, and base64 by the megabyte.
_HIDDEN = frozenset(
    {
        "towerAccessToken",
        "towerRefreshToken",
        "password",
        "location",
        "containerFile",
        "condaFile",
        "environment",
        "env",
    }
)


# --- kinds of members ------------------------------------------------------------------------------------------------


def _broken(text: str) -> NoReturn:
    raise PydanticCustomError("rule", "{text}", {"text": text})


def _rule(check: Callable[[str], object]) -> AfterValidator:
    """Text that ``check``, which raises RequestInvalid, finds nothing wrong with; the text itself stays as it is."""

    def validate(value: str) -> str:
        try:
            check(value)
        except RequestInvalid as err:
            _broken(str(err))
        return value

    return AfterValidator(validate)


def _check_place(value: str, info: ValidationInfo) -> str:
    try:
        check_location(value, cast(OpenHosts, info.context))
    except RequestInvalid as err:
        _broken(str(err))
    return value


def _blank_is_absent(value: object) -> object:
    return None if value == "" else value


def _as_list(value: object) -> object:
    items = value if isinstance(value, list) else [value]
    if len(items) > MAX_ITEMS:
        _broken(f"has {len(items)} items, and may have {MAX_ITEMS}")
    return items


def _as_number(value: object) -> object:
    return int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value


def _check_image_name(text: str) -> None:
    """Source: ``wave.md`` §4.3, rules 4 and 5."""
    if len(text) > MAX_NAME_CHARS:
        raise RequestInvalid(f"Invalid container image name — longer than {MAX_NAME_CHARS} characters")
    if "://" in text:
        raise RequestInvalid(f"Invalid container repository name — offending value: '{text[:200]}'")
    reference = parse_reference(text)
    if reference.is_digest:
        parse_digest(reference.reference)


def _check_repository(text: str, label: str, *, may_be_host: bool = False) -> None:
    """Source: ``wave.md`` §4.3, rules 6 to 8; a digest is refused like a tag."""
    if len(text) > MAX_NAME_CHARS:
        raise RequestInvalid(f"{label} is longer than {MAX_NAME_CHARS} characters")
    shown = f"offending value: '{text[:200]}'"
    if "://" in text:
        raise RequestInvalid(f"{label} should not include any protocol prefix - {shown}")
    if may_be_host:
        text = text.rstrip("/")
        if is_registry_alone(text):
            return
    head, slash, last = text.rpartition("/")
    name, suffix, _ = last.replace("@", ":").partition(":")
    is_host = not slash and "." in name
    try:
        parse_reference(f"{head}{slash}{name}")
    except RequestInvalid:
        is_host = True
    if is_host:
        raise RequestInvalid(f"{label} is invalid or incomplete - {shown}")
    if suffix:
        raise RequestInvalid(f"{label} should not include any tag suffix - {shown}")


def _check_cache_repository(text: str) -> None:
    _check_repository(text, "Container build cache repository")


def _size_rule(label: str, limit: int) -> AfterValidator:
    def check(text: str) -> None:
        if len(text) > limit:
            raise RequestInvalid(f"{label} file size exceeds the maximum allowed size of {limit} bytes")

    return _rule(check)


def _check_sha256(text: str) -> None:
    if not parse_digest(text).startswith("sha256:"):
        raise RequestInvalid(f"{clip(text)} is not a sha256 digest: expected sha256:<64 lower-case hex digits>")


def _check_length(text: str, limit: int = MAX_TEXT_BYTES) -> None:
    size = len(text.encode())
    if size > limit:
        raise RequestInvalid(f"has {size} bytes, and may have {limit}")


def _check_filled(text: str) -> None:
    _check_length(text)
    if not text.strip():
        raise RequestInvalid("required, and not blank")


def _check_platform(text: str) -> None:
    _check_length(text)
    parse_platforms(text)


# Container runtimes do not start anything whose settings hold something else.
def _check_setting(text: str, limit: int = MAX_TEXT_BYTES) -> None:
    _check_length(text, limit)
    if "\0" in text:
        raise RequestInvalid("must not contain the character NUL")


def _check_argument(text: str) -> None:
    _check_setting(text, MAX_ARGUMENT_BYTES)


def _check_variable(text: str) -> None:
    _check_argument(text)
    if text.find("=") < 1:
        raise RequestInvalid("expected NAME=value")


def _check_includes(names: list[str]) -> list[str]:
    if len(names) > MAX_INCLUDES:
        _broken(f"The number of container inclusions cannot be greater than {MAX_INCLUDES}")
    return names


_ABSENT = BeforeValidator(_blank_is_absent)
_LISTED = BeforeValidator(_as_list)

Text = Annotated[Annotated[str, _rule(_check_length)] | None, _ABSENT]
Filled = Annotated[str, _rule(_check_filled)]
Number = Annotated[int, BeforeValidator(_as_number)]
Texts = Annotated[list[str], _LISTED] | None
Arguments = Annotated[list[Annotated[str, _rule(_check_argument)]], _LISTED] | None
Digest = Annotated[str, _rule(_check_sha256)]
ImageName = Annotated[str, _rule(_check_image_name)]


# --- the request -----------------------------------------------------------------------------------------------------


class Wire(BaseModel):
    """An object on the wire."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="ignore", frozen=True, strict=True, use_attribute_docstrings=True
    )


_W = TypeVar("_W", bound=Wire)


class LayerSpec(Wire):
    """A layer to add, or a build context."""

    location: Annotated[str, AfterValidator(_check_place)]
    """Where the gzipped tar is: its base64 behind `data:`, an address with `http://` or `https://`, or a blob as
    `docker://<registry>/v2/<repository>/blobs/<digest>`."""
    gzip_digest: Digest
    """The SHA-256 digest of the gzipped tar: `sha256:<64 hex digits>`."""
    gzip_size: Annotated[Number, Field(gt=0, le=MAX_BLOB_BYTES)]
    """The size of the gzipped tar in bytes."""
    tar_digest: Digest
    """The SHA-256 digest of the tar that is in it."""

    @model_validator(mode="after")
    def _is_one_blob(self) -> Self:
        digest = blob_digest(self.location)
        if digest and digest != self.gzip_digest:
            _broken(f"location names the blob {digest}, and gzipDigest is {self.gzip_digest}")
        return self

    def to_layer(self) -> Layer:
        """The layer in the words of the domain."""
        return Layer(self.location, self.gzip_digest, self.gzip_size, self.tar_digest)


class ConfigSpec(Wire):
    """Settings and layers to put into the image."""

    entrypoint: Arguments = None
    """The entrypoint, word by word."""
    cmd: Arguments = None
    """The command, word by word."""
    env: Annotated[list[Annotated[str, _rule(_check_variable)]], _LISTED] | None = None
    """Variables to set, as `NAME=value`."""
    working_dir: Annotated[Annotated[str, _rule(_check_setting)] | None, _ABSENT] = None
    """The folder that a container starts in."""
    layers: Annotated[list[LayerSpec], Field(max_length=MAX_LAYERS), _LISTED] | None = None
    """Layers to put on top, the lowest first."""

    def to_config(self) -> ContainerConfig:
        """The settings in the words of the domain; false when nothing is set."""
        return ContainerConfig(
            entrypoint=tuple(self.entrypoint or ()),
            cmd=tuple(self.cmd or ()),
            env=tuple(self.env or ()),
            working_dir=self.working_dir or "",
            layers=tuple(layer.to_layer() for layer in self.layers or ()),
        )


class CondaOptions(Wire):
    """How Conda images are built."""

    mamba_image: Text = None
    """The image that has Micromamba."""
    commands: Texts = None
    """Lines to add to the container file."""
    base_packages: Text = None
    """Packages that every image gets."""
    base_image: Text = None
    """The image of the last stage, for templates with several."""


class PixiOptions(Wire):
    """How Conda images are built with Pixi."""

    pixi_image: Text = None
    """The image that has Pixi."""
    commands: Texts = None
    """Lines to add to the container file."""
    base_packages: Text = None
    """Packages that every image gets."""
    base_image: Text = None
    """The image of the last stage."""


class CranOptions(Wire):
    """How R images are built."""

    r_image: Text = None
    """The image that has R."""
    commands: Texts = None
    """Lines to add to the container file."""
    base_packages: Text = None
    """Packages of its system that every image gets."""


class PackagesSpec(Wire):
    """Packages to build an image from."""

    type: Annotated[Literal["CONDA", "CRAN"] | None, _ABSENT] = None
    """Whose packages they are."""
    environment: Annotated[Annotated[str, _size_rule("Conda", MAX_CONDA_FILE_CHARS)] | None, _ABSENT] = None
    """A Conda environment file, in base64: instead of `entries`."""
    entries: Texts = None
    """Names of packages, with versions if they matter; for Conda also the address of a lock file."""
    channels: Texts = None
    """Conda channels or CRAN repositories."""
    conda_opts: CondaOptions | None = None
    """How Conda images are built."""
    pixi_opts: PixiOptions | None = None
    """How images are built with Pixi."""
    cran_opts: CranOptions | None = None
    """How R images are built."""


class Compression(Wire):
    """How built layers are compressed."""

    mode: Annotated[Literal["gzip", "estargz", "zstd"] | None, _ABSENT] = None
    """How the layers of the image are compressed."""
    level: Annotated[Number, Field(ge=0, le=MAX_COMPRESSION_LEVEL)] | None = None
    """How hard, 0 to 22: the more, the smaller and slower."""
    force: bool | None = None
    """Whether layers that are compressed in another way are compressed anew."""


class Claiming(Wire):
    """What says who asks."""

    tower_access_token: Annotated[Text, Field(repr=False)] = None
    """A token of the Platform, or one that this server's operator has issued."""
    tower_refresh_token: Annotated[Text, Field(repr=False)] = None
    """What a new token of the Platform is got with, when the other has ended."""
    tower_endpoint: Text = None
    """The API of the Platform that knows the token. Default: `https://api.cloud.seqera.io`."""
    tower_workspace_id: Annotated[Number | None, _ABSENT] = None
    """The workspace whose credentials of registries count. Default: the user's own."""


class Submission(Claiming):
    """A container request."""

    # Rules over several members are in api.rules.

    mirror: bool | None = None  # before buildRepository, whose rules depend on it
    """Whether the image is to be copied to `buildRepository`, with all its platforms and digests."""
    container_image: Annotated[ImageName | None, _ABSENT] = None
    """The image to serve, such as `docker.io/library/ubuntu:24.04`: in lower case, but for the tag. With `packages`:
    the one that they go on top of."""
    container_file: Annotated[
        Annotated[str, _size_rule("Container", MAX_CONTAINER_FILE_CHARS)] | None, _ABSENT, Field(repr=False)
    ] = None
    """A container file (Dockerfile) to build, in base64."""
    container_config: ConfigSpec | None = None
    """Settings and layers to put into the image."""
    conda_file: Annotated[
        Annotated[str, _size_rule("Conda", MAX_CONDA_FILE_CHARS)] | None, _ABSENT, Field(repr=False)
    ] = None
    """Deprecated: `packages.environment` takes its place."""
    container_platform: Annotated[Annotated[str, _rule(_check_platform)] | None, _ABSENT] = None
    """What it is for, such as `linux/amd64`; for builds two, joined by a comma. Default: all that an image has,
    and `linux/amd64` for what is built."""
    build_repository: Text = None
    """Where a built or mirrored image goes. Default: the operator's."""
    cache_repository: Annotated[Annotated[str, _rule(_check_cache_repository)] | None, _ABSENT] = None
    """Where layers of builds are kept to be used again."""
    timestamp: Text = None
    """When the client has asked, as ISO-8601 with an offset."""
    fingerprint: Text = None
    """A text that the client knows the request by."""
    freeze: bool | None = None
    """Whether the image is to stay, under a name of its own in `buildRepository`."""
    build_context: LayerSpec | None = None
    """The files that a container file can use."""
    format: Text = None
    """`docker`, or `sif` for a Singularity image."""
    dry_run: bool | None = None
    """Whether only names are wanted: nothing is built."""
    workflow_id: Text = None
    """The run of the Platform that the request is for: the token works as long as that runs."""
    container_includes: Annotated[list[ImageName], AfterValidator(_check_includes), _LISTED] | None = None
    """Images whose layers go on top of the image."""
    packages: PackagesSpec | None = None
    """Packages to build an image from."""
    name_strategy: Annotated[Literal["none", "tagPrefix", "imageSuffix"] | None, _ABSENT] = None
    """Where the names of the packages show in the name of a built image."""
    scan_mode: Annotated[Literal["none", "async", "required"] | None, _ABSENT] = None
    """Whether the image is scanned, and whether the request succeeds only with that."""
    scan_levels: Annotated[list[Literal["LOW", "MEDIUM", "HIGH", "CRITICAL"]], _LISTED] | None = None
    """Severities that a required scan may find."""
    build_compression: Compression | None = None
    """How the layers of a built image are compressed."""
    build_template: Text = None
    """The template of the container file for packages, such as `conda/pixi:v1`."""

    @field_validator("build_repository")
    @classmethod
    def _is_repository(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        try:
            _check_repository(value, "Container build repository", may_be_host=bool(info.data.get("mirror")))
        except RequestInvalid as err:
            _broken(str(err))
        return value

    @property
    def config(self) -> ContainerConfig:
        """The asked-for changes; false when there are none, as with an object of nulls."""
        return self.container_config.to_config() if self.container_config else ContainerConfig()


def parse_submission(document: dict[str, Any], hosts: OpenHosts) -> Submission:
    """Read the body of a container request. Raises RequestInvalid as ``parse_body``."""
    return parse_body(Submission, document, hosts)


def parse_body(kind: type[_W], document: dict[str, Any], hosts: OpenHosts | None = None) -> _W:
    """Read a body of that kind; ``hosts`` are for those that carry layers.

    Raises RequestInvalid whose message names every wrong member by its path, with the value (cut short; never that of
    a secret) and the rule.
    """
    try:
        return kind.model_validate(document, context=hosts)
    except ValidationError as err:
        found = [_explain(error) for error in err.errors(include_url=False)]
    more = [f"and {len(found) - MAX_REPORTED} more"] if len(found) > MAX_REPORTED else []
    raise RequestInvalid("; ".join(found[:MAX_REPORTED] + more))


# --- what was wrong --------------------------------------------------------------------------------------------------

_RULES = {
    "string_type": "expected a string",
    "int_type": "expected a whole number",
    "bool_type": "expected true or false",
    "list_type": "expected an array",
    "model_type": "expected an object",
    "greater_than": "expected a number greater than 0",
}


def _explain(error: ErrorDetails) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    match error:
        case {"type": "missing"} | {"input": None}:
            return f"{path}: required"
        case {"type": "rule"}:
            return f"{path}: {error['msg']}"
        case {"type": "too_long", "ctx": {"actual_length": actual, "max_length": limit}}:
            return f"{path}: has {actual} items, and may have {limit}"
        case {"type": "less_than_equal", "ctx": {"le": limit}}:
            rule = f"expected a number of at most {limit}"
        case {"type": "greater_than_equal", "ctx": {"ge": limit}}:
            rule = f"expected a number of at least {limit}"
        case {"type": "literal_error", "ctx": {"expected": expected}}:
            rule = f"expected {expected}"
        case _:
            rule = _RULES.get(error["type"], error["msg"])
    return f"{path}: {rule}, got {_shown(error)}"


def _shown(error: ErrorDetails) -> str:
    value = error["input"]
    kind = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number")
    if isinstance(value, dict | list) or not _HIDDEN.isdisjoint(error["loc"]):
        return kind
    text = orjson.dumps(value[:80] if isinstance(value, str) else value).decode()
    return text if len(text) <= 60 else f"{text[:59]}…"
