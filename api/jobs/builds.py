"""Builds over the wire: how they stand, their logs as they grow, their Conda lock, and their end on request."""

from re import compile as compile_pattern

from starlette.requests import Request
from starlette.responses import Response

from api.callers import client_address
from api.endpoints import LOGIN, TEXT, UNKNOWN, Answer, endpoint, routes_of
from api.jobs.build_answers import build_status, described_build
from api.jobs.job_logs import LOG_ANSWERS, LOG_PARAMETERS, JobLogs
from api.jobs.statuses import REPEATED_S
from api.replies import json_reply, repeated
from api.scan_orders import ScanOrders
from api.shapes import Build, BuildStatus, Message
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.builds import BuildStore

_BUILD_ID = compile_pattern(r"(?:bd-)?([0-9a-f]{16})(?:_([0-9]{1,9}))?")

_GROUP = "Builds"


class Builds:
    """The endpoints of builds: ``bd-<16 hex>_<n>``, also without ``bd-``, and without ``_<n>`` the newest."""

    def __init__(self, store: BuildStore, accounts: Accounts, scans: ScanOrders, logs: JobLogs) -> None:
        self._store = store
        self._scans = scans
        self._accounts = accounts
        self._logs = logs
        self.routes = routes_of(self)

    @endpoint("GET", "/v1alpha1/builds/{build_id}", _GROUP, {200: Answer("The build.", Build), 404: UNKNOWN})
    async def describe(self, request: Request) -> Response:
        """A build as it stands."""
        record = await self._find(request)
        if record is None:
            return Response(status_code=404)
        return json_reply(described_build(record, await self._scans.known(record.spec, record.build_id)))

    @endpoint(
        "GET",
        "/v1alpha1/builds/{build_id}/status",
        _GROUP,
        {200: Answer("How far it is.", BuildStatus), 404: UNKNOWN},
    )
    async def status(self, request: Request) -> Response:
        """How far a build is."""
        record = await self._find(request)
        if record is None:
            return Response(status_code=404)
        # Which build is the newest may change without a change of any that is known.
        is_whole = "_" in request.path_params["build_id"]
        headers = repeated(REPEATED_S, record.build_id) if is_whole else None
        return json_reply(build_status(record), headers=headers)

    @endpoint(
        "GET",
        "/v1alpha1/builds/{build_id}/condalock",
        _GROUP,
        {200: Answer("The lock file.", media_types=(TEXT,)), 404: UNKNOWN},
    )
    async def conda_lock(self, request: Request) -> Response:
        """The Conda lock file that a build has made."""
        record = await self._find(request)
        lock = await self._store.read_lock(record.build_id) if record else None
        return Response(lock, media_type=TEXT) if lock else Response(status_code=404)

    @endpoint(
        "DELETE",
        "/v1alpha1/builds/{build_id}",
        _GROUP,
        {
            202: Answer("How far the build is; it will not go on.", BuildStatus),
            **LOGIN,
            404: UNKNOWN,
            409: Answer("The build is done.", Message),
        },
        login="account",
    )
    async def cancel(self, request: Request) -> Response:
        """End a build: soon when it runs, and at once when it waits."""
        await self._accounts.check(request.headers.get("authorization", ""), client_address(request))
        record = await self._find(request)
        if record is None:
            return Response(status_code=404)
        if not await self._store.cancel(record.build_id):
            return json_reply({"message": f"Build '{record.build_id}' is already completed"}, 409)
        return json_reply(build_status(await self._store.find(record.build_id) or record), 202)

    @endpoint("GET", "/v1alpha1/builds/{build_id}/logs", _GROUP, LOG_ANSWERS, parameters=LOG_PARAMETERS)
    async def logs(self, request: Request) -> Response:
        """The log of a build, also while it grows.

        Without `follow` it is what there is so far. Who accepts `text/event-stream` gets it as server-sent events until
        the build ends; an event's id is the offset behind it.
        """
        return await self._logs.answer(request, await self._find(request))

    async def _find(self, request: Request) -> BuildRecord | None:
        match = _BUILD_ID.fullmatch(request.path_params["build_id"])
        if match is None:
            return None
        container_id, number = match.groups()
        if number is None:
            return await self._store.newest(f"bd-{container_id}")
        return await self._store.find(f"bd-{container_id}_{number}")
