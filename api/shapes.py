"""What answers look like: the members of each JSON document, as the API page and ``api.openapi`` tell them.

Members that are not required are left out while there is nothing to tell (``wave.md`` §0.1). The tests' server holds
every answer against these.
"""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, WithJsonSchema, with_config
from typing_extensions import TypedDict

Instant = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]
"""ISO-8601 in UTC."""

Seconds = Annotated[float, Field(ge=0)]
"""A duration in seconds, with nine decimals."""

_answer = with_config(ConfigDict(extra="forbid", use_attribute_docstrings=True))


# --- errors ----------------------------------------------------------------------------------------------------------


@_answer
class Message(TypedDict):
    """Why a request is not answered as it was meant."""

    message: str
    """For people: what was wrong, with which value, and what to do."""


@_answer
class ErrorLink(TypedDict):
    """A link of a framework error."""

    href: str
    templated: bool


@_answer
class ErrorLinks(TypedDict):
    """The links of a framework error."""

    self: list[ErrorLink]


@_answer
class EmbeddedErrors(TypedDict):
    """The messages of a framework error."""

    errors: list[Message]


@_answer
class FrameworkError(TypedDict):
    """The answer to requests that no endpoint is there for: unknown paths, other methods, other content types."""

    _links: ErrorLinks
    _embedded: EmbeddedErrors
    message: str


# --- container requests ----------------------------------------------------------------------------------------------


@_answer
class ChildId(TypedDict):
    """The id of what was done for one platform."""

    id: str
    value: str
    """The platform."""


@_answer
class ChildIds(TypedDict):
    """Ids by platform."""

    refs: list[ChildId]


@_answer
class Submitted(TypedDict):
    """What was made of a container request."""

    requestId: str
    """The id that the request is described under."""
    containerToken: NotRequired[str]
    """The token in the image's name; missing with `freeze` and `mirror`, whose images need none."""
    targetImage: str
    """The image to pull."""
    expiration: NotRequired[Instant]
    """When the token ends."""
    containerImage: NotRequired[str]
    """The image that it is made from, or the one that is built or copied."""
    buildId: NotRequired[str]
    """The build or mirror of the image; missing when the image was there, and nobody knows who made it."""
    cached: NotRequired[bool]
    """Whether the image was there, or was being built already."""
    freeze: NotRequired[bool]
    mirror: NotRequired[bool]
    scanId: NotRequired[str]
    """The scan of the image."""
    succeeded: NotRequired[bool]
    """Missing while nobody knows, and where there is a scan: ask for the status."""


@_answer
class SubmittedLegacy(TypedDict):
    """What was made of a container request, in the older form."""

    requestId: str
    containerToken: str
    targetImage: str
    expiration: Instant
    containerImage: NotRequired[str]
    buildId: NotRequired[str]


@_answer
class User(TypedDict):
    """A known user: of this server or of a Platform."""

    id: int


@_answer
class LayerShape(TypedDict):
    """A layer that was added."""

    location: str
    """Where it comes from; `data:DATA+OMITTED` for one that was part of the request."""
    gzipDigest: str
    gzipSize: int
    tarDigest: str


@_answer
class ConfigShape(TypedDict):
    """Settings and layers that are put into the image."""

    entrypoint: NotRequired[list[str]]
    cmd: NotRequired[list[str]]
    env: NotRequired[list[str]]
    workingDir: NotRequired[str]
    layers: NotRequired[list[LayerShape]]


@_answer
class Asked(TypedDict):
    """What was asked for, as it was recorded."""

    user: NotRequired[User]
    workspaceId: NotRequired[int]
    containerImage: NotRequired[str]
    containerConfig: NotRequired[ConfigShape]
    platform: NotRequired[str]
    """One platform or several, joined by commas."""
    towerEndpoint: NotRequired[str]
    fingerprint: NotRequired[str]
    timestamp: NotRequired[Instant]
    """The client's time, or that of the request when it gave none."""
    zoneId: NotRequired[str]
    """The client's offset from UTC."""
    ipAddress: NotRequired[str]


@_answer
class BuildOfRequest(TypedDict):
    """The build of a request's image."""

    buildId: NotRequired[str]
    buildNew: NotRequired[bool]
    """Whether the build was begun for this request."""
    freeze: NotRequired[bool]
    containerFile: NotRequired[str]
    """The container file as it was used."""
    condaFile: NotRequired[str]
    """The Conda environment file as it was used."""
    buildRepository: NotRequired[str]
    cacheRepository: NotRequired[str]


@_answer
class Container(Asked, BuildOfRequest):
    """A container request as it was recorded."""

    id: str
    sourceImage: NotRequired[str]
    sourceDigest: NotRequired[str]
    """The digest that the first pull found upstream."""
    waveImage: NotRequired[str]
    waveDigest: NotRequired[str]
    """The digest that the first pull was answered with."""
    expiration: NotRequired[Instant]
    fusionVersion: NotRequired[str]
    mirror: NotRequired[bool]
    scanId: NotRequired[str]
    scanChildIds: NotRequired[ChildIds]
    """The scans of an image for several platforms."""


@_answer
class ImageAndDigest(TypedDict):
    """An image, and its digest once it has been pulled."""

    image: NotRequired[str]
    digest: NotRequired[str]


@_answer
class ContainerLegacy(TypedDict):
    """A container request as it was recorded, in the older form."""

    token: str
    expiration: Instant
    request: Asked
    build: BuildOfRequest
    source: ImageAndDigest
    wave: ImageAndDigest


@_answer
class ContainerStatus(TypedDict):
    """How far a container request is."""

    id: str
    status: Literal["PENDING", "BUILDING", "SCANNING", "DONE"]
    buildId: NotRequired[str]
    mirrorId: NotRequired[str]
    scanId: NotRequired[str]
    vulnerabilities: NotRequired[dict[Literal["LOW", "MEDIUM", "HIGH", "CRITICAL", "UNKNOWN"], int]]
    """What the scan has found: numbers by severity."""
    succeeded: NotRequired[bool]
    """There once it is done."""
    reason: NotRequired[str]
    """Why it did not succeed."""
    detailsUri: NotRequired[str]
    """A page that says more."""
    creationTime: Instant
    duration: NotRequired[Seconds]


# --- builds ----------------------------------------------------------------------------------------------------------


@_answer
class CompressionShape(TypedDict):
    """How the layers of a built image are compressed."""

    mode: NotRequired[Literal["gzip", "estargz", "zstd"]]
    level: NotRequired[int]
    force: NotRequired[bool]


@_answer
class Build(TypedDict):
    """A build as it stands."""

    buildId: str
    dockerFile: NotRequired[str]
    """The container file as it is used."""
    condaFile: NotRequired[str]
    targetImage: str
    userId: NotRequired[int]
    startTime: Instant
    """When it was asked for."""
    offsetId: str
    duration: NotRequired[Seconds]
    """From the request to the end; there once it is done."""
    exitStatus: NotRequired[int]
    """0 is success; there once it is done."""
    platform: NotRequired[str]
    format: Literal["DOCKER", "SINGULARITY"]
    digest: NotRequired[str]
    """Of the manifest that was pushed."""
    compression: NotRequired[CompressionShape]
    buildTemplate: NotRequired[str]
    scanId: NotRequired[str]
    """The scan of the image."""
    scanChildIds: NotRequired[ChildIds]
    """The scans of an image for several platforms."""
    reason: NotRequired[str]
    """Why it failed."""


@_answer
class BuildStatus(TypedDict):
    """How far a build is."""

    id: str
    status: Literal["PENDING", "COMPLETED"]
    startTime: Instant
    duration: NotRequired[Seconds]
    succeeded: NotRequired[bool]
    """There once it is done."""
    reason: NotRequired[str]
    """Why it failed."""


# --- mirrors ---------------------------------------------------------------------------------------------------------


@_answer
class Mirror(TypedDict):
    """A mirror as it stands."""

    mirrorId: str
    digest: NotRequired[str]
    """Of the manifest, at the source and at the target; there once it has succeeded."""
    sourceImage: str
    targetImage: str
    platform: NotRequired[str]
    """Missing, as all platforms are copied."""
    creationTime: Instant
    """When it was asked for."""
    offsetId: str
    userId: NotRequired[int]
    scanId: NotRequired[str]
    status: Literal["PENDING", "COMPLETED"]
    duration: NotRequired[Seconds]
    """From the request to the end; there once it is done."""
    exitCode: NotRequired[int]
    """0 is success; there once it is done."""
    logs: NotRequired[str]
    """The end of the log, as far as there is one."""
    reason: NotRequired[str]
    """Why it failed."""


# --- scans -----------------------------------------------------------------------------------------------------------


@_answer
class VulnerabilityShape(TypedDict):
    """One advisory about one package of the image; what is not known is empty."""

    id: str
    severity: Literal["UNKNOWN", "LOW", "MEDIUM", "HIGH", "CRITICAL"]
    title: str
    pkgName: str
    installedVersion: str
    fixedVersion: str
    primaryUrl: str


@_answer
class ScanShape(TypedDict):
    """A scan as it stands."""

    id: str
    buildId: NotRequired[str]
    """The build of the image."""
    mirrorId: NotRequired[str]
    """The mirror of the image."""
    containerImage: str
    platform: NotRequired[str]
    startTime: Instant
    duration: NotRequired[Seconds]
    status: Literal["PENDING", "SUCCEEDED", "FAILED"]
    vulnerabilities: NotRequired[list[VulnerabilityShape]]
    """The worst ones, the most severe first."""
    exitCode: NotRequired[int]
    reason: NotRequired[str]
    """Why it failed."""
    logs: NotRequired[str]
    """The beginning of the log."""


# --- images ----------------------------------------------------------------------------------------------------------

_IndexPlatform = TypedDict(
    "_IndexPlatform",
    {
        "architecture": NotRequired[str],
        "os": NotRequired[str],
        "variant": NotRequired[str],
        "os.version": NotRequired[str],
        "os.features": NotRequired[list[str]],
    },
)


@_answer
class IndexPlatform(_IndexPlatform):
    """What an image runs on."""


@_answer
class ImageDescriptor(TypedDict):
    """What an image consists of, by its digest."""

    mediaType: NotRequired[str]
    digest: NotRequired[str]
    size: NotRequired[int]
    annotations: NotRequired[dict[str, str]]


@_answer
class IndexEntry(ImageDescriptor):
    """A manifest that an index names."""

    platform: NotRequired[IndexPlatform]


@_answer
class ImageIndex(TypedDict):
    """An index: one image for several platforms."""

    schemaVersion: NotRequired[int]
    mediaType: str
    manifests: NotRequired[list[IndexEntry]]
    digest: str


@_answer
class ImageManifest(TypedDict):
    """A manifest."""

    schemaVersion: NotRequired[int]
    mediaType: str
    config: NotRequired[ImageDescriptor]
    layers: NotRequired[list[ImageDescriptor]]
    annotations: NotRequired[dict[str, str]]
    artifactType: NotRequired[str]


@_answer
class ImageSettings(TypedDict):
    """What a container made of an image starts with."""

    hostName: NotRequired[str]
    domainName: NotRequired[str]
    user: NotRequired[str]
    attachStdin: bool
    attachStdout: bool
    attachStderr: bool
    tty: bool
    env: NotRequired[list[str]]
    cmd: NotRequired[list[str]]
    image: NotRequired[str]
    workingDir: NotRequired[str]
    entrypoint: NotRequired[list[str]]
    labels: NotRequired[dict[str, str]]


@_answer
class ImageRootfs(TypedDict):
    """The digests of the unpacked layers, the lowest first."""

    type: NotRequired[str]
    diff_ids: NotRequired[list[str]]


@_answer
class ImageConfig(TypedDict):
    """An image's config."""

    architecture: NotRequired[str]
    config: NotRequired[ImageSettings]
    container: NotRequired[str]
    created: NotRequired[Instant]
    rootfs: NotRequired[ImageRootfs]


@_answer
class Image(TypedDict):
    """An image for one platform."""

    registry: str
    hostName: str
    """The registry's own address, scheme included."""
    imageName: str
    reference: str
    """The tag or digest as it was asked for."""
    digest: str
    config: ImageConfig
    manifest: ImageManifest
    v1: bool
    """Whether the manifest is of schema 1."""
    v2: bool
    oci: bool
    """Whether the manifest is an OCI one."""


@_answer
class Inspected(TypedDict):
    """What a name stands for: an image, or an index of several."""

    container: NotRequired[Image]
    index: NotRequired[ImageIndex]


# --- usage -----------------------------------------------------------------------------------------------------------


@_answer
class Usage(TypedDict):
    """How often something was done."""

    metric: NotRequired[Literal["builds", "pulls", "fusion", "mirrors", "scans"]]
    """What is counted; missing with both `date` and `org`."""
    count: int
    """All of it. What was done without a user is in here with `date`, and not without."""
    orgs: NotRequired[dict[str, int]]
    """By organisation."""


@_answer
class UsageByArchitecture(TypedDict):
    """How often something was done, of everything or for one architecture."""

    metric: Literal["builds", "pulls", "fusion", "mirrors", "scans"]
    """What is counted."""
    count: int
    """All of it. What was done without a user is in here with `date` or `arch`, and not without."""
    orgs: NotRequired[dict[str, int]]
    """By organisation."""
    arch: NotRequired[Literal["amd64", "arm64", "arm"]]
    """The architecture that was asked for."""


# --- the service -----------------------------------------------------------------------------------------------------


@_answer
class ServiceVersion(TypedDict):
    """Versions of this server."""

    version: str
    """The version of Wave whose API this is, in strict semver."""
    commitId: str
    waveProxyVersion: str
    """This server's own version."""


@_answer
class ServiceInfo(TypedDict):
    """What this server is."""

    serviceInfo: ServiceVersion


@_answer
class HealthShape(TypedDict):
    """Whether the service works."""

    status: Literal["UP", "DOWN"]
    message: NotRequired[str]
    """Why it does not."""


Document = dict[str, Any]
"""An OpenAPI document."""
