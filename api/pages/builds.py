"""The page of a build."""

import asyncio
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from api.endpoints import endpoint, routes_of
from api.jobs.build_answers import described_build
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


class BuildPages:
    """The pages of builds."""

    def __init__(self, store: BuildStore, scans: ScanOrders) -> None:
        self._store = store
        self._scans = scans
        self.routes = routes_of(self)

    @endpoint("GET", "/view/builds/{build_id}", "Pages", JOB_ANSWERS)
    async def show(self, request: Request) -> Response:
        """A build: how it stands, what it is made from, and its log while it grows."""
        asked: str = request.path_params["build_id"]
        found = await locate(self._store, "build", asked)
        if found is None:
            return unknown("build", f"Unknown build id '{asked}'")
        return await self._show(found) if isinstance(found, BuildRecord) else found

    async def _show(self, record: BuildRecord) -> Response:
        told = described_build(record, await self._scans.known(record.spec, record.build_id))
        path = f"/v1alpha1/builds/{record.build_id}"
        log, lock = await asyncio.gather(
            read_end_of_log(self._store, record.build_id, f"{path}/logs"), self._store.read_lock(record.build_id)
        )
        return page(
            "job.html",
            f"Build {record.build_id}",
            _facts(record, told, f"{path}/condalock" if lock else ""),
            state=state_of(record),
            going=record.phase != "done",
            reason=read_reason(record.reason, log.text),
            files=[("Container file", told.get("dockerFile")), ("Conda file", told.get("condaFile"))],
            log=log,
            commands=commands_for(told["targetImage"]) if record.succeeded else (),
        )


def _facts(record: BuildRecord, told: dict[str, Any], lock_path: str) -> list[Fact]:
    return [
        fact("Image", told["targetImage"], inspect_path(told["targetImage"]) if record.succeeded else ""),
        fact("Digest", told.get("digest")),
        fact("Platform", told.get("platform")),
        fact("Format", told.get("format")),
        fact("Started", datetime.fromisoformat(told["startTime"])),
        fact("Duration", format_duration(record.duration_s)),
        fact("Exit status", told.get("exitStatus")),
        fact("Compression", told.get("compression", {}).get("mode", "(default)")),
        *given(
            fact("Template", told.get("buildTemplate")),
            fact("Conda lock file", "the packages that were chosen" if lock_path else None, lock_path),
        ),
        *scan_facts(told),
        *given(fact("User id", told.get("userId"))),
    ]
