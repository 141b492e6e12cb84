"""The page of a build."""

import asyncio
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from api.build_answers import described_build
from api.endpoints import HTML, Answer, endpoint, routes_of
from api.pages.formats import format_duration
from api.pages.jobs import end_of_log, entry_of, find_series, inspect_path, is_series, numbered, path_of, state_of
from api.pages.render import Fact, fact, given, message, page
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.builds import BuildStore


class BuildPages:
    """The pages of builds."""

    def __init__(self, store: BuildStore) -> None:
        self._store = store
        self.routes = routes_of(self)

    @endpoint(
        "GET",
        "/view/builds/{build_id}",
        "Pages",
        {
            200: Answer(
                "The build; for an id without a number, a list of the builds that have one.", media_types=(HTML,)
            ),
            301: Answer("To the same with `_` before the number.", headers={"Location": "The page."}),
            307: Answer("To the only build there is.", headers={"Location": "The page."}),
        },
    )
    async def show(self, request: Request) -> Response:
        """A build: how it stands, what it is made from, and its log while it grows."""
        asked: str = request.path_params["build_id"]
        if whole := numbered(asked):
            return RedirectResponse(path_of("builds", whole), 301)
        build_id = asked if asked.startswith("bd-") else f"bd-{asked}"
        if is_series(asked):
            return await self._list(asked, build_id)
        record = await self._store.find(build_id)
        if record is None or record.spec.kind != "build":
            return message("Build", f"Unknown build id '{asked}'")
        return await self._show(record)

    async def _list(self, asked: str, series: str) -> Response:
        records = await find_series(self._store, series)
        if len(records) == 1:
            return RedirectResponse(path_of("builds", records[0].build_id), 307)
        if not records:
            return message("Builds", f"Unknown build id '{asked}'")
        return page("jobs.html", f"Builds {asked}", jobs=[entry_of("builds", record) for record in records])

    async def _show(self, record: BuildRecord) -> Response:
        told = described_build(record)
        log, lock = await asyncio.gather(self._store.read_log(record.build_id), self._store.read_lock(record.build_id))
        path = f"/v1alpha1/builds/{record.build_id}"
        return page(
            "job.html",
            f"Build {record.build_id}",
            _facts(record, told, f"{path}/condalock" if lock else ""),
            state=state_of(record),
            going=record.phase != "done",
            reason=told.get("reason"),
            files=[("Container file", told.get("dockerFile")), ("Conda file", told.get("condaFile"))],
            log=end_of_log(log or b"", f"{path}/logs"),
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
            fact("User id", told.get("userId")),
        ),
    ]
