"""The page of a mirror."""

from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.endpoints import endpoint, routes_of
from api.jobs.build_answers import described_mirror
from api.pages.formats import format_duration
from api.pages.jobs import (
    JOB_ANSWERS,
    commands_for,
    inspect_path,
    locate,
    read_end_of_log,
    scan_facts,
    state_of,
    unknown,
)
from api.pages.reasons import read_reason
from api.pages.render import Fact, fact, given, page
from api.scan_orders import ScanOrders
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.builds import BuildStore


class MirrorPages:
    """The pages of mirrors."""

    def __init__(self, store: BuildStore, scans: ScanOrders) -> None:
        self._store = store
        self._scans = scans
        self.routes = routes_of(self)

    @endpoint("GET", "/view/mirrors/{mirror_id}", "Pages", JOB_ANSWERS)
    async def show(self, request: Request) -> Response:
        """A mirror: what is copied to where, and its log while it grows."""
        asked: str = request.path_params["mirror_id"]
        found = await locate(self._store, "mirror", asked)
        if found is None:
            return unknown("mirror", f"Unknown container mirror id '{asked}'")
        return await self._show(found) if isinstance(found, BuildRecord) else found

    async def _show(self, record: BuildRecord) -> Response:
        log = await read_end_of_log(self._store, record.build_id, f"/v1alpha1/mirrors/{record.build_id}/logs")
        told = described_mirror(record, None, await self._scans.known(record.spec, record.build_id))
        return page(
            "job.html",
            f"Mirror {record.build_id}",
            _facts(record, told),
            state=state_of(record),
            going=record.phase != "done",
            reason=read_reason(record.reason, log.text),
            files=(),
            log=log,
            commands=commands_for(told["targetImage"]) if record.succeeded else (),
        )


def _facts(record: BuildRecord, told: dict[str, Any]) -> list[Fact]:
    return [
        fact("Source", told["sourceImage"], inspect_path(told["sourceImage"])),
        fact("Target", told["targetImage"], inspect_path(told["targetImage"]) if record.succeeded else ""),
        fact("Digest", told.get("digest")),
        fact("Platform", told.get("platform", "(all)")),
        fact("Started", datetime.fromisoformat(told["creationTime"])),
        fact("Duration", format_duration(record.duration_s)),
        fact("Exit code", told.get("exitCode")),
        *scan_facts(told),
        *given(fact("User id", told.get("userId"))),
    ]
