"""Scans over the wire: how they stand and what they have found, their logs, and the packages of the image as SPDX."""

from itertools import chain
from re import compile as compile_pattern
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from api.answers import filled, format_instant, format_seconds
from api.endpoints import NOT_HERE, TEXT, UNKNOWN, Answer, endpoint, routes_of
from api.jobs.job_logs import sent_in_pieces
from api.replies import json_reply
from api.rules import not_enabled
from api.shapes import ScanShape
from wave_proxy.image.build import BuildRecord
from wave_proxy.image.scan import Vulnerability
from wave_proxy.state.builds import BuildStore
from wave_proxy.state.scans import ScanReports

_SCAN_ID = compile_pattern(r"(?:sc-)?([0-9a-f]{16})(?:_([0-9]{1,9}))?")
_MAX_LOG_CHARS = 10_000
_GROUP = "Scans"
_OCTETS = "application/octet-stream"
_ATTACHED = {"Content-Disposition": "The name of a file to keep it in."}


class Scans:
    """The endpoints of scans: ``sc-<16 hex>_<n>``, also without ``sc-``, and without ``_<n>`` the newest."""

    def __init__(self, builds: BuildStore, reports: ScanReports, *, enabled: bool) -> None:
        self._builds = builds
        self._reports = reports
        self._enabled = enabled
        self.routes = routes_of(self)

    @endpoint(
        "GET",
        "/v1alpha1/scans/{scan_id}",
        _GROUP,
        {200: Answer("The scan.", ScanShape), 404: UNKNOWN, 501: NOT_HERE},
    )
    async def describe(self, request: Request) -> Response:
        """A scan as it stands, with what it has found."""
        record = await self._find(request)
        if record is None:
            return Response(status_code=404)
        found = await self._reports.find_vulnerabilities(record.build_id) if record.succeeded else []
        log = await self._builds.read_log(record.build_id)
        return json_reply(described_scan(record, found, (log or b"").decode(errors="replace")))

    @endpoint(
        "GET",
        "/v1alpha1/scans/{scan_id}/logs",
        _GROUP,
        {200: Answer("The log.", media_types=(_OCTETS,), headers=_ATTACHED), 404: UNKNOWN, 501: NOT_HERE},
    )
    async def logs(self, request: Request) -> Response:
        """The log of a scan."""
        record = await self._find(request)
        if record is None or not await self._builds.has_log(record.build_id):
            return Response(status_code=404)
        headers = {"Content-Disposition": f"attachment; filename={record.build_id}.log"}
        return await sent_in_pieces(self._builds.read_pieces(record.build_id), headers, _OCTETS)

    @endpoint(
        "GET",
        "/v1alpha1/scans/{scan_id}/spdx",
        _GROUP,
        {200: Answer("An SPDX document.", media_types=(TEXT,), headers=_ATTACHED), 404: UNKNOWN, 501: NOT_HERE},
    )
    async def spdx(self, request: Request) -> Response:
        """The packages of a scanned image, as SPDX in JSON."""
        record = await self._find(request)
        document = await self._reports.find_spdx(record.build_id) if record else None
        if record is None or document is None:
            return Response(status_code=404)
        headers = {"Content-Disposition": f'attachment; filename="spdx-{record.build_id}.json"'}
        first, second = next(document, b""), next(document, b"")
        if not second:
            return Response(first, headers=headers, media_type=TEXT)
        return StreamingResponse(chain((first, second), document), headers=headers, media_type=TEXT)

    async def _find(self, request: Request) -> BuildRecord | None:
        """Raises NotImplementedHere where nothing is scanned."""
        if not self._enabled:
            raise not_enabled("Security scan", "scan", "[scan] program")
        match = _SCAN_ID.fullmatch(request.path_params["scan_id"])
        if match is None:
            return None
        image, number = match.groups()
        if number is None:
            return await self._builds.newest(f"sc-{image}")
        return await self._builds.find(f"sc-{image}_{number}")


def described_scan(record: BuildRecord, found: list[Vulnerability], log: str) -> dict[str, Any]:
    """A scan as it stands. The request that asked for it is not told, as its token is what lets pull the image.

    Source: ``wave.md`` §1.8.
    """
    spec = record.spec
    maker = "mirrorId" if spec.made_by.startswith("mr-") else "buildId"
    return filled(
        {
            "id": record.build_id,
            maker: spec.made_by,
            "containerImage": spec.target_image,
            "platform": spec.platform,
            "startTime": format_instant(record.created),
            "duration": None if record.duration_s is None else format_seconds(record.duration_s),
            "status": {None: "PENDING", True: "SUCCEEDED", False: "FAILED"}[record.succeeded],
            "vulnerabilities": [_vulnerability(one) for one in found],
            "exitCode": record.exit_status,
            "reason": record.reason,
            "logs": _shortened(log.replace("'", "")),
        }
    )


def _vulnerability(one: Vulnerability) -> dict[str, str]:
    return {
        "id": one.id,
        "severity": one.severity,
        "title": one.title,
        "pkgName": one.package,
        "installedVersion": one.installed,
        "fixedVersion": one.fixed,
        "primaryUrl": one.url,
    }


def _shortened(log: str) -> str:
    return log if len(log) <= _MAX_LOG_CHARS else f"{log[:_MAX_LOG_CHARS]} [truncated]"
