"""The page of a scan, and the form that has an image scanned."""

from datetime import datetime
from typing import Any
from urllib.parse import parse_qs

import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from api.body import read_text
from api.callers import client_address, is_from_other_site
from api.containers import Containers
from api.endpoints import ASKING_UPSTREAM, HTML, NOT_HERE, Answer, endpoint, routes_of
from api.jobs.scans import described_scan
from api.pages.audience import varying, wants_page
from api.pages.formats import format_duration
from api.pages.jobs import JOB_ANSWERS, State, inspect_path, locate, path_of, state_of, unknown
from api.pages.reasons import read_reason
from api.pages.render import Fact, fact, given, message, page
from api.replies import json_reply
from api.rules import not_enabled
from api.shapes import Message
from wave_proxy.errors import NotImplementedHere, RequestInvalid, WaveError
from wave_proxy.image.build import BuildRecord
from wave_proxy.image.scan import SEVERITIES
from wave_proxy.state.builds import BuildStore
from wave_proxy.state.scans import ScanReports

_MAX_BODY_BYTES = 10_000
_FORM = "application/x-www-form-urlencoded"
_KINDS = {"LOW": "good", "MEDIUM": "going", "HIGH": "bad", "CRITICAL": "bad", "UNKNOWN": "going"}
_REFUSALS = {
    status: Answer(answer.text, media_types=(HTML,), headers=answer.headers)
    for status, answer in {**ASKING_UPSTREAM, 501: NOT_HERE}.items()
}

_OFF = Answer(NOT_HERE.text, Message, (HTML,))


class ScanPages:
    """The pages of scans; ``authority`` is the host and port that people reach us by."""

    def __init__(
        self, store: BuildStore, reports: ScanReports, containers: Containers, authority: str, *, enabled: bool
    ) -> None:
        self._store = store
        self._reports = reports
        self._containers = containers
        self._authority = authority
        self._enabled = enabled
        self.routes = routes_of(self)

    @endpoint(
        "GET",
        "/view/scans/{scan_id}",
        "Pages",
        {**JOB_ANSWERS, 404: Answer("There is no scan of that image.", Message, (HTML,)), 501: _OFF},
    )
    async def show(self, request: Request) -> Response:
        """A scan: how it stands, and what it has found."""
        if not self._enabled:
            if wants_page(request):
                return varying(_switched_off())
            raise not_enabled("Security scan", "scan", "[scan] program")
        asked: str = request.path_params["scan_id"]
        found = await locate(self._store, "scan", asked)
        if found is not None:
            return await self._show(found) if isinstance(found, BuildRecord) else found
        if "_" in asked:
            return unknown("scan", f"No scan report exists with id: {asked}")
        text = f"Unknown container scan id '{asked}'"
        if wants_page(request):
            return varying(unknown("scan", text, 404))
        return varying(json_reply({"message": text}, 404))

    @endpoint(
        "POST",
        "/view/scans",
        "Pages",
        {301: Answer("To the page of the scan.", headers={"Location": "The page."}), **_REFUSALS},
    )
    async def submit(self, request: Request) -> Response:
        """Have an image scanned, for everybody.

        The body is the image's name: as it is, as JSON, or as the member `image` of a form.
        """
        if not self._enabled:
            return _switched_off()
        try:
            if is_from_other_site(request, self._authority):
                return message("Scan", "This form can only be sent from this site's own pages.", 403)
            image = _image_of(await read_text(request, _MAX_BODY_BYTES), request.headers.get("content-type", ""))
            document = {"containerImage": image, "scanMode": "required"}
            answer = await self._containers.order(document, "", client_address(request))
        except WaveError as err:
            return _refused(err)
        return RedirectResponse(path_of("scan", answer["scanId"]), 301, {"Cache-Control": "no-store"})

    async def _show(self, record: BuildRecord) -> Response:
        found = await self._reports.find_vulnerabilities(record.build_id) if record.succeeded else []
        log = (await self._store.read_log(record.build_id) or b"").decode(errors="replace")
        has_packages = await self._reports.find_spdx(record.build_id) is not None
        path = f"/v1alpha1/scans/{record.build_id}"
        told = described_scan(record, found, log)
        vulnerabilities = [_row(one) for one in told.get("vulnerabilities", [])]
        return page(
            "scan.html",
            f"Scan {record.build_id}",
            _facts(record, told, f"{path}/spdx" if has_packages else ""),
            state=_verdict(record, await self._reports.find_counts(record.build_id)),
            going=record.phase != "done",
            reason=read_reason(record.reason, log),
            vulnerabilities=vulnerabilities,
            log=told.get("logs", ""),
            path=path,
        )


def _image_of(text: str, media_type: str) -> str:
    """Raises RequestInvalid for a body that names none."""
    image: Any = text.strip()
    if media_type.startswith(_FORM) and "=" in image:
        image = parse_qs(image).get("image", [""])[0].strip()
    elif image.startswith(("{", '"')):
        try:
            document = orjson.loads(image)
        except orjson.JSONDecodeError as err:
            raise RequestInvalid(f"The request body is not valid JSON: {err}") from None
        image = document.get("image") if isinstance(document, dict) else document
    if not isinstance(image, str) or not image:
        raise RequestInvalid("Missing container image")
    return image


def _switched_off() -> Response:
    hint = "The operator switches scans on with `[scan] program`, which names the program that scans."
    return message("Scan", "No images are scanned here.", NotImplementedHere.status, hint=hint)


def _refused(err: WaveError) -> Response:
    refused = message("Scan", f"Error processing scan request - cause: {err}", err.status)
    if err.retry_after_s is not None:
        refused.headers["Retry-After"] = str(err.retry_after_s)
    return refused


def _verdict(record: BuildRecord, counts: dict[str, int]) -> State:
    """How a scan stands, and in the colour of the worst that it has found how many there are."""
    if not record.succeeded:
        return state_of(record)
    if not counts:
        return State("good", "No vulnerability was found")
    found = ", ".join(f"{counts[name]} {name}" for name in reversed(SEVERITIES) if name in counts)
    worst = next(name for name in ("CRITICAL", "HIGH", "MEDIUM", "UNKNOWN", "LOW") if name in counts)
    return State(_KINDS[worst], f"Vulnerabilities: {found}")


def _row(one: dict[str, str]) -> dict[str, str]:
    """A vulnerability, with a link only where that leads to the web."""
    url = one["primaryUrl"]
    return {**one, "kind": _KINDS[one["severity"]], "href": url if url.startswith(("https://", "http://")) else ""}


def _facts(record: BuildRecord, told: dict[str, Any], packages_path: str) -> list[Fact]:
    build_id, mirror_id = told.get("buildId", ""), told.get("mirrorId", "")
    return [
        fact("Image", told["containerImage"], inspect_path(told["containerImage"])),
        *given(
            fact("Platform", told.get("platform")),
            fact("Build", build_id, path_of("build", build_id)),
            fact("Mirror", mirror_id, path_of("mirror", mirror_id)),
        ),
        fact("Started", datetime.fromisoformat(told["startTime"])),
        fact("Duration", format_duration(record.duration_s)),
        fact("Exit code", told.get("exitCode")),
        *given(fact("Packages", "all of the image, as an SPDX document" if packages_path else None, packages_path)),
    ]
