"""What builds and mirrors look like in answers (``wave.md`` §1.7 and 1.9)."""

from collections.abc import Sequence
from typing import Any

from api.answers import filled, format_instant, format_seconds, scan_ids
from wave_proxy.image.build import BuildRecord, Compression

MAX_LOG_BYTES = 100_000


def described_build(record: BuildRecord, scans: Sequence[str] = ()) -> dict[str, Any]:
    """A build as it stands, with the ids of its scans.

    Who asked for it is told by number alone; ``reason`` is there once it has failed.
    """
    spec = record.spec
    return filled(
        {
            "buildId": record.build_id,
            "dockerFile": spec.container_file,
            "condaFile": spec.conda_file,
            "targetImage": f"oras://{spec.target_image}" if spec.format == "sif" else spec.target_image,
            "userId": spec.identity.user_id,
            "startTime": format_instant(record.created),
            "offsetId": "Z",
            "duration": _duration(record),
            "exitStatus": record.exit_status,
            "platform": spec.platform,
            "format": "SINGULARITY" if spec.format == "sif" else "DOCKER",
            "digest": record.digest,
            "compression": _compression(spec.compression),
            "buildTemplate": spec.template,
            **scan_ids(scans, spec.platforms),
            "reason": record.reason,
        }
    )


def described_mirror(record: BuildRecord, log: bytes | None, scans: Sequence[str] = ()) -> dict[str, Any]:
    """A mirror as it stands, with the end of its log and the ids of its scans. Who asked is told by number alone."""
    spec = record.spec
    return filled(
        {
            "mirrorId": record.build_id,
            "digest": record.digest,
            "sourceImage": spec.source_image,
            "targetImage": spec.target_image,
            "platform": spec.platform,
            "creationTime": format_instant(record.created),
            "offsetId": "Z",
            "userId": spec.identity.user_id,
            **scan_ids(scans),
            "status": "PENDING" if record.phase != "done" else "COMPLETED",
            "duration": _duration(record),
            "exitCode": record.exit_status,
            "logs": (log or b"")[-MAX_LOG_BYTES:].decode(errors="replace"),
            "reason": record.reason,
        }
    )


def build_status(record: BuildRecord) -> dict[str, Any]:
    """How far a build is: ``PENDING`` until it is done, and only then with ``succeeded`` and ``duration``."""
    return filled(
        {
            "id": record.build_id,
            "status": "PENDING" if record.phase != "done" else "COMPLETED",
            "startTime": format_instant(record.created),
            "duration": _duration(record),
            "succeeded": record.succeeded,
            "reason": record.reason,
        }
    )


def _duration(record: BuildRecord) -> Any:
    return None if record.duration_s is None else format_seconds(record.duration_s)


def _compression(compression: Compression) -> dict[str, Any] | None:
    given = filled({"mode": compression.mode, "level": compression.level, "force": compression.force})
    return given or None
