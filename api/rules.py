"""Rules over several members of a container request, and which of them ask for something that is not built in yet."""

from collections.abc import Iterator

from api.identities import HOW_TO_BE_KNOWN
from api.schema import PackagesSpec, Submission
from wave_proxy.errors import NotImplementedHere, RequestInvalid
from wave_proxy.image.mirror import target_registry
from wave_proxy.image.oci import parse_platforms
from wave_proxy.image.reference import parse_reference
from wave_proxy.image.request import Identity

NO_SINGULARITY = "Singularity images are not built by this version yet"

_MULTI_PLATFORM = ["linux/amd64", "linux/arm64"]
_PIXI = "conda/pixi:v1"
_TEMPLATES = {
    "CONDA": (None, "conda/micromamba:v1", "conda/micromamba:v2", _PIXI),
    "CRAN": (None, "cran/installr:v1", "conda/micromamba:v1"),
}


def check_rules(request: Submission, *, legacy: bool) -> None:
    """Raises RequestInvalid with every rule that the request breaks, in the order and words of ``wave.md`` §4.4-4.8.

    ``legacy`` is for requests to the deprecated endpoint.
    """
    broken = list(_mirror_rules(request, legacy=legacy) if request.mirror else _source_rules(request, legacy=legacy))
    if broken and request.format == "sif":
        broken.append(NO_SINGULARITY)  # else it takes as many tries as there are rules to find that out
    if broken:
        raise RequestInvalid("; ".join(dict.fromkeys(broken)))


def check_supported(request: Submission, *, scans: bool = False) -> None:
    """Raises NotImplementedHere, in the service's own words, for what takes a scan where there are none."""
    if request.scan_mode in ("async", "required") and not scans:
        raise not_enabled("Security scan", "scan", "[scan] program")


def check_known(request: Submission, identity: Identity) -> None:
    """Raises RequestInvalid for what nobody may ask for without saying who he is. Source: ``wave.md`` §4.4."""
    if request.mirror and not identity.key:
        raise RequestInvalid(
            "Container mirroring requires an authenticated request - specify the tower token attribute"
            f" - {HOW_TO_BE_KNOWN}"
        )


def not_enabled(service: str, key: str, here: str) -> NotImplementedHere:
    """What a server says that does not have a service, with our own setting after it. Source: ``wave.md`` §4.8, 5."""
    return NotImplementedHere(
        f"{service} service is not enabled - Check Wave configuration setting 'wave.{key}.enabled'"
        f" - HTTP status=501 - response=- - here: {here}"
    )


def _mirror_rules(request: Submission, *, legacy: bool) -> Iterator[str]:
    """Source: ``wave.md`` §4.4."""
    if legacy:
        yield "Container mirroring requires the use of v2 API"
    if not request.container_image:
        yield "Attribute `containerImage` is required when specifying `mirror` mode"
    conflicts = {
        "freeze": request.freeze,
        "containerFile": request.container_file,
        "containerIncludes": request.container_includes,
        "containerConfig": request.config,
        "packages": request.packages or request.conda_file,
    }
    for name, value in conflicts.items():
        if value:
            yield f"Attribute `mirror` and `{name}` conflict each other"
    if not request.build_repository:
        yield "Attribute `buildRepository` is required when specifying `mirror` mode"
    elif request.container_image and (
        target_registry(request.build_repository) == parse_reference(request.container_image).registry
    ):
        yield f"Source and target mirror registry are the same - offending value '{request.build_repository}'"


def _source_rules(request: Submission, *, legacy: bool) -> Iterator[str]:
    yield from _version_rules(request, legacy=legacy)
    yield from _freeze_rules(request)
    if request.packages and not legacy:
        yield from _package_rules(request.packages, request.build_template)
    yield from _platform_rules(request)
    if not (request.container_image or request.container_file or request.packages or request.conda_file):
        yield "Specify either 'containerImage' or 'containerFile' attribute"
    if request.container_image and request.container_file:
        yield "Attributes 'containerImage' and 'containerFile' cannot be used in the same request"
    if request.format == "sif" and not request.freeze:
        yield "Singularity build is only allowed enabling freeze mode - see 'wave.freeze' setting"


def _version_rules(request: Submission, *, legacy: bool) -> Iterator[str]:
    """Source: ``wave.md`` §4.6; condaFile of the newer endpoint stands for packages.environment (decision 7)."""
    if legacy:
        if request.packages:
            yield "Attribute `packages` is not allowed"
        if request.name_strategy:
            yield "Attribute `nameStrategy` is not allowed by legacy container endpoint"
        return
    if request.container_file and (request.packages or request.conda_file):
        yield "Attribute `containerFile` and `packages` conflicts each other"
    if request.packages and request.conda_file:
        yield "Attribute `condaFile` is deprecated - use `packages` instead"


def _freeze_rules(request: Submission) -> Iterator[str]:
    if not request.freeze or request.build_repository:
        return
    sources = (request.container_file, request.container_image, request.packages or request.conda_file)
    for number, source in enumerate(sources, 1):
        if source:
            yield f"Attribute `buildRepository` must be specified when using freeze mode [{number}]"
            return


def _package_rules(packages: PackagesSpec, template: str | None) -> Iterator[str]:
    """Source: ``wave.md`` §4.7a to c."""
    kind = packages.type
    if kind == "CRAN" and template == _PIXI:
        yield f"Package type 'CRAN' not supported by '{_PIXI}' build template"
    elif template not in _TEMPLATES.get(kind or "", ("conda/micromamba:v1",)):
        yield f"Unexpected or missing package type '{kind or '-'}' or build template '{(template or '-')[:100]}'"
    entries = packages.entries or []
    if any(entry.startswith(("http://", "https://")) for entry in entries):
        if template == _PIXI:
            yield f"Conda lock file is not supported by '{_PIXI}' template"
        elif len(entries) > 1:
            yield "No more than one Conda lock remote file can be specified at the same time"
    if any(entry.startswith("pip::") for entry in entries):
        yield "Invalid pip prefix - Likely you want to use 'pip:numpy' instead of 'pip::numpy'"


def _platform_rules(request: Submission) -> Iterator[str]:
    """Source: ``wave.md`` §4.5c."""
    platforms = parse_platforms(request.container_platform) if request.container_platform else ()
    if len(platforms) < 2:
        return
    if [str(platform) for platform in platforms] != _MULTI_PLATFORM:
        yield "Only linux/amd64,linux/arm64 multi-platform combination is currently supported"
    if not (request.container_file or request.packages or request.conda_file):
        yield "Multi-platform builds require either 'containerFile' or 'packages' attribute"
    if request.format == "sif":
        yield "Multi-platform builds are not supported for Singularity format"
    if request.container_includes:
        yield "Multi-platform builds can't be used together with 'containerIncludes'"
