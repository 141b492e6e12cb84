"""Mirrors over the wire: how they stand, their logs as they grow, and their end on request (``wave.md`` §1.9)."""

from re import compile as compile_pattern

from starlette.requests import Request
from starlette.responses import Response

from api.callers import client_address
from api.endpoints import LOGIN, UNKNOWN, Answer, endpoint, routes_of
from api.jobs.build_answers import MAX_LOG_BYTES, described_mirror
from api.jobs.job_logs import LOG_ANSWERS, LOG_PARAMETERS, JobLogs
from api.replies import json_reply
from api.scan_orders import ScanOrders
from api.shapes import Message, Mirror
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.builds import BuildStore

_MIRROR_ID = compile_pattern(r"(mr-[0-9a-f]{16})(_[0-9]{1,9})?")

_GROUP = "Mirrors"


class Mirrors:
    """The endpoints of mirrors: ``mr-<16 hex>_<n>``, and without ``_<n>`` the newest."""

    def __init__(self, store: BuildStore, accounts: Accounts, scans: ScanOrders, logs: JobLogs) -> None:
        self._store = store
        self._scans = scans
        self._accounts = accounts
        self._logs = logs
        self.routes = routes_of(self)

    @endpoint("GET", "/v1alpha1/mirrors/{mirror_id}", _GROUP, {200: Answer("The mirror.", Mirror), 404: UNKNOWN})
    async def describe(self, request: Request) -> Response:
        """A mirror as it stands."""
        record = await self._find(request)
        return await self._described(record) if record else Response(status_code=404)

    @endpoint("GET", "/v1alpha1/mirrors/{mirror_id}/logs", _GROUP, LOG_ANSWERS, parameters=LOG_PARAMETERS)
    async def logs(self, request: Request) -> Response:
        """The log of a mirror, also while it grows.

        Without `follow` it is what there is so far. Who accepts `text/event-stream` gets it as server-sent events until
        the mirror ends; an event's id is the offset behind it.
        """
        record = await self._find(request)
        headers = {"Content-Disposition": f"attachment; filename={record.build_id}.log"} if record else {}
        return await self._logs.answer(request, record, headers)

    @endpoint(
        "DELETE",
        "/v1alpha1/mirrors/{mirror_id}",
        _GROUP,
        {
            202: Answer("The mirror; it will not go on.", Mirror),
            **LOGIN,
            404: UNKNOWN,
            409: Answer("The mirror is done.", Message),
        },
        login="account",
    )
    async def cancel(self, request: Request) -> Response:
        """End a mirror: soon when it runs, and at once when it waits."""
        await self._accounts.check(request.headers.get("authorization", ""), client_address(request))
        record = await self._find(request)
        if record is None:
            return Response(status_code=404)
        if not await self._store.cancel(record.build_id):
            return json_reply({"message": f"Mirror '{record.build_id}' is already completed"}, 409)
        return await self._described(await self._store.find(record.build_id) or record, 202)

    async def _described(self, record: BuildRecord, status: int = 200) -> Response:
        scans = await self._scans.known(record.spec, record.build_id)
        log, _ = await self._store.read_end(record.build_id, MAX_LOG_BYTES)
        return json_reply(described_mirror(record, log, scans), status)

    async def _find(self, request: Request) -> BuildRecord | None:
        match = _MIRROR_ID.fullmatch(request.path_params["mirror_id"])
        if match is None:
            return None
        return await (self._store.find(match[0]) if match[2] else self._store.newest(match[1]))
