"""What container requests look like in answers: names, forms, and which members are left out (``wave.md`` §0.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from wave_proxy.image.build import BuildRecord
from wave_proxy.image.reference import Reference, parse_reference
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Layer
from wave_proxy.state.tokens import TokenRecord


def filled(document: Mapping[str, Any]) -> dict[str, Any]:
    """The members that an answer shows: null, empty text and empty arrays are left out, false and 0 stay."""
    return {name: value for name, value in document.items() if value is not None and value not in ("", [], ())}


def format_instant(time: float) -> str:
    """Epoch seconds as ISO-8601 in UTC with ``Z``, to the microsecond."""
    return datetime.fromtimestamp(time, UTC).isoformat().replace("+00:00", "Z")


def format_seconds(duration_s: float) -> orjson.Fragment:
    """A duration as a JSON number of seconds with nine decimals: clients read digits without a point as nanoseconds."""
    return orjson.Fragment(f"{max(duration_s, 0.0):.9f}")


def parse_timestamp(text: str) -> datetime | None:
    """A client's time with its offset; None for what is no such thing, which the service takes for no time at all."""
    try:
        time = datetime.fromisoformat(text)
        time.astimezone(UTC)  # which may be in no year that there is
        return time if time.utcoffset() is not None else None
    except (ValueError, OverflowError):
        return None


def target_image(authority: str, token: str, request: ContainerRequest) -> str:
    """The name that clients pull: ``host:port/wt/<token>/<repository>:<tag>``.

    An image named by digest keeps the digest, unless the request changes its content: then a tag made of the digest
    stands for it, since clients verify what they pull by digest.
    """
    return f"{authority}/wt/{token}/{_public_name(parse_reference(request.image), request.config)}"


def _public_name(reference: Reference, config: ContainerConfig) -> str:
    if not (reference.is_digest and config):
        return reference.name_and_reference
    return f"{reference.repository}:{'-'.join(reference.reference.split(':'))[:19]}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request for an image that is built.

    ``cached``: nothing was begun for it. ``succeeded`` is None while nobody knows. Without ``build_id`` the image was
    there, and no record of who built it.
    """

    build_id: str = ""
    cached: bool = False
    succeeded: bool | None = None


def submitted(
    token: str, request: ContainerRequest, authority: str, *, legacy: bool, built: Outcome | None = None
) -> dict[str, Any]:
    """The answer to a container request. Source: ``wave.md`` §1.2, vectors V17."""
    answer: dict[str, Any] = {
        "requestId": token,
        "containerToken": token,
        "targetImage": request.image if request.is_durable else target_image(authority, token, request),
        "expiration": format_instant(request.expires),
        "containerImage": request.image,
    }
    if legacy:
        return filled({**answer, "buildId": built.build_id if built and not built.cached else None})
    if request.is_durable:
        del answer["containerToken"], answer["expiration"]
    ids = {"buildId": built.build_id, "cached": built.cached} if built and built.build_id else {}
    how = {"freeze": request.freeze, "mirror": request.mirror, **scan_ids(request.scan_ids)}
    # With a scan, clients ask for the status, and it is there that the scan counts.
    succeeded = None if request.scan_ids else built.succeeded if built else True
    return filled({**answer, **ids, **how, "succeeded": succeeded})


def scan_ids(ids: Sequence[str], platforms: Sequence[str] = ()) -> dict[str, Any]:
    """How scans are named: the first one, and of several each one with its platform, where these are told."""
    answer: dict[str, Any] = {"scanId": ids[0] if ids else None}
    if len(ids) > 1 and platforms:
        refs = [{"id": scan_id, "value": value} for scan_id, value in zip(ids, platforms, strict=False)]
        answer["scanChildIds"] = {"refs": refs}
    return answer


def described(record: TokenRecord, build: BuildRecord | None, authority: str) -> dict[str, Any]:
    """A request as it was recorded, with the build of its image, if there is one. Source: ``wave.md`` §1.5."""
    request = record.request
    return filled(
        {
            "id": record.token,
            **_asked(request),
            **_build(request, build),
            "sourceImage": request.image,
            "sourceDigest": record.source_digest,
            "waveImage": _own_name(record, authority),
            "waveDigest": record.wave_digest,
            "expiration": format_instant(request.expires),
            "fusionVersion": request.config.fusion_version,
            "mirror": request.mirror,
            **({"containerImage": build.spec.source_image} if build and request.mirror else {}),
            **scan_ids(request.scan_ids, request.platforms),
        }
    )


def described_legacy(record: TokenRecord, build: BuildRecord | None, authority: str) -> dict[str, Any]:
    """The same in the older form. Source: ``wave.md`` §1.3."""
    request = record.request
    return {
        "token": record.token,
        "expiration": format_instant(request.expires),
        "request": _asked(request),
        "build": filled(_build(request, build)),
        "source": filled({"image": request.image, "digest": record.source_digest}),
        "wave": filled({"image": _own_name(record, authority), "digest": record.wave_digest}),
    }


def _own_name(record: TokenRecord, authority: str) -> str:
    request = record.request
    return request.image if request.is_durable else target_image(authority, record.token, request)


def _build(request: ContainerRequest, build: BuildRecord | None) -> dict[str, Any]:
    """What is told of the build: its texts as they were used, and where its image and its layers went."""
    if not request.build_id:
        return {}
    answer = {"buildId": request.build_id, "buildNew": request.build_new, "freeze": request.freeze}
    if build is None:
        return answer
    spec = build.spec
    return {
        **answer,
        "containerFile": spec.container_file,
        "condaFile": spec.conda_file,
        "buildRepository": spec.build_repository,
        "cacheRepository": spec.cache_repository,
    }


def _asked(request: ContainerRequest) -> dict[str, Any]:
    identity = request.identity
    time = parse_timestamp(request.timestamp) or datetime.fromtimestamp(request.created, UTC)
    zone = time.isoformat()[-6:]
    return filled(
        {
            "user": {"id": identity.user_id} if identity.user_id is not None else None,
            "workspaceId": identity.workspace_id,
            "containerImage": request.image,
            "containerConfig": _config(request.config) if request.config else None,
            "platform": ",".join(request.platforms),
            "towerEndpoint": identity.endpoint,
            "fingerprint": request.fingerprint,
            "timestamp": time.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "zoneId": "Z" if zone == "+00:00" else zone,
            "ipAddress": request.ip_address,
        }
    )


def _config(config: ContainerConfig) -> dict[str, Any]:
    return filled(
        {
            "entrypoint": config.entrypoint,
            "cmd": config.cmd,
            "env": config.env,
            "workingDir": config.working_dir,
            "layers": [_layer(layer) for layer in config.layers],
        }
    )


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "location": "data:DATA+OMITTED" if layer.is_inline else layer.location,
        "gzipDigest": layer.gzip_digest,
        "gzipSize": layer.gzip_size,
        "tarDigest": layer.tar_digest,
    }
