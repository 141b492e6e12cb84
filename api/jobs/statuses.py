"""How far a container request is: from the records of its image's job and of its scan to the answer."""

from collections.abc import Sequence
from typing import Any

from api.answers import filled, format_instant, format_seconds
from wave_proxy.image.build import BuildRecord
from wave_proxy.image.scan import Scan
from wave_proxy.state.tokens import TokenRecord

REPEATED_S = 15.0  # a change ends that sooner; only where the word of it is lost this is how long that goes unseen
_SCAN = "Container security scan"
_KINDS = {"build": "builds", "mirror": "mirrors", "scan": "scans"}


def container_status(
    record: TokenRecord, job: BuildRecord | None, scans: Sequence[Scan], *, now: float, public_url: str
) -> dict[str, Any]:
    """The status of a request whose image ``job`` builds or mirrors, None for one that was there.

    ``scans`` are those that the request requires to succeed, one for each platform. ``now`` is epoch seconds. Source:
    ``wave.md`` §1.6, vectors V36; a job that waits for its turn is ``PENDING``.
    """
    request = record.request
    answer = {
        "id": record.token,
        "status": "DONE",
        **_job_id(request.build_id),
        "scanId": request.scan_ids[0] if request.scan_ids else "",
        "creationTime": format_instant(job.created if job else request.created),
    }
    if job is not None and job.phase != "done":
        return filled({**answer, "status": "PENDING" if job.phase == "queued" else "BUILDING"})
    if job is not None and not job.succeeded:
        return filled({**answer, **_duration(job), **_failed_job(job, public_url)})
    if not scans:
        done = _duration(job) if job else {"duration": format_seconds(now - request.created)}
        return filled({**answer, **done, "succeeded": True})
    if any(scan.record.phase != "done" for scan in scans):
        return filled({**answer, "status": "SCANNING"})
    longest = max((scan.record for scan in scans), key=lambda record: record.duration_s or 0.0)
    verdicts = [_judged(scan, request.scan_levels, public_url) for scan in scans]
    verdict = next((one for one in verdicts if not one["succeeded"]), verdicts[-1])
    return filled({**answer, **_duration(job, longest), **verdict})


def details_uri(public_url: str, job: BuildRecord) -> str:
    """The page that tells people about a job."""
    return f"{public_url}/view/{_KINDS[job.spec.kind]}/{job.build_id}"


def _job_id(job_id: str) -> dict[str, str]:
    return {"mirrorId" if job_id.startswith("mr-") else "buildId": job_id}


def _duration(*jobs: BuildRecord | None) -> dict[str, Any]:
    return {"duration": format_seconds(sum(job.duration_s or 0.0 for job in jobs if job))}


def _failed_job(job: BuildRecord, public_url: str) -> dict[str, Any]:
    reason = f"Container {job.spec.kind} did not complete successfully"
    return {"succeeded": False, "reason": reason, "detailsUri": details_uri(public_url, job)}


def _judged(scan: Scan, levels: tuple[str, ...], public_url: str) -> dict[str, Any]:
    """What a finished scan means for a request that bears vulnerabilities of those ``levels``."""
    details = details_uri(public_url, scan.record)
    if not scan.record.succeeded:
        reason = f"{_SCAN} did not complete successfully"
        return {"succeeded": False, "reason": reason, "detailsUri": details}
    if not scan.counts:
        return {"succeeded": True}
    found = f"{_SCAN} operation found one or more vulnerabilities"
    refused = [severity for severity in scan.counts if severity not in levels]
    reason = (
        f"{found} with severity: {','.join(refused)}"
        if refused
        else f"{found} that are compatible with requested security levels: {','.join(levels)}"
    )
    return {"vulnerabilities": scan.counts, "succeeded": not refused, "reason": reason, "detailsUri": details}
