"""Builds over the wire: how they stand, their logs as they grow, their Conda lock, and their end on request."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from re import compile as compile_pattern

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from api.build_answers import build_status, described_build
from api.callers import client_address
from api.endpoints import INVALID, LOGIN, STRING, TEXT, UNKNOWN, Answer, Parameter, endpoint, routes_of
from api.events import end_event, log_events, resume_offset
from api.replies import json_reply
from api.scan_orders import ScanOrders
from api.shapes import Build, BuildStatus, Message
from api.tails import Tails
from wave_proxy.errors import RequestInvalid, clip
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.accounts import Accounts
from wave_proxy.state.builds import BuildStore

_BUILD_ID = compile_pattern(r"(?:bd-)?([0-9a-f]{16})(?:_([0-9]{1,9}))?")
_OFFSET = compile_pattern(r"[0-9]{1,15}")
_EVENTS = "text/event-stream"
_LIVE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_BEAT_S = 15.0  # without a byte; what stands between us and a client may close a connection that is quiet for a minute

_GROUP = "Builds"
_LOG_PARAMETERS = (
    Parameter("follow", "`1`: all that is still to come as well, until the build ends."),
    Parameter("offset", "Leave out so many bytes at the beginning.", {"type": "integer", "minimum": 0}),
    Parameter("Last-Event-ID", "The id of the last event that was received: goes on behind it.", STRING, "header"),
)


class Builds:
    """The endpoints of builds: ``bd-<16 hex>_<n>``, also without ``bd-``, and without ``_<n>`` the newest."""

    def __init__(self, store: BuildStore, accounts: Accounts, scans: ScanOrders, *, beat_s: float = _BEAT_S) -> None:
        self._store = store
        self._scans = scans
        self._accounts = accounts
        self._tails = Tails(store, beat_s)
        self.routes = routes_of(self)

    async def close(self) -> None:
        """End what is left of following logs."""
        await self._tails.close()

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
        return json_reply(build_status(record)) if record else Response(status_code=404)

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

    @endpoint(
        "GET",
        "/v1alpha1/builds/{build_id}/logs",
        _GROUP,
        {
            200: Answer(
                "The log as text, or as server-sent events `log` and, at last, `end` with the build's status.",
                media_types=(TEXT, _EVENTS),
                headers={"X-Build-Status": "`PENDING` while the build goes on, else `COMPLETED`."},
            ),
            204: Answer("To a client whose last event was `end`: there is nothing more."),
            400: INVALID,
            404: UNKNOWN,
        },
        parameters=_LOG_PARAMETERS,
    )
    async def logs(self, request: Request) -> Response:
        """The log of a build, also while it grows.

        Without `follow` it is what there is so far. Who accepts `text/event-stream` gets it as server-sent events until
        the build ends; an event's id is the offset behind it.
        """
        record, as_events = await self._find(request), _EVENTS in request.headers.get("accept", "")
        offset = _offset(request, as_events)
        if record is None:
            return Response(status_code=404)
        if offset is None:
            return Response(status_code=204)  # what tells a browser not to come back
        is_done = record.phase == "done"
        headers = {"X-Build-Status": "COMPLETED" if is_done else "PENDING", **_LIVE}
        if not is_done and request.method == "GET" and (as_events or _is_set(request, "follow")):
            pieces = self._tails.follow(record.build_id, offset)
            if not as_events:
                return _Stream(_without_beats(pieces), headers, TEXT)
            return _Stream(self._events(record.build_id, pieces, offset), headers, _EVENTS)
        log = await self._store.read_log(record.build_id)
        if log is None:
            return Response(status_code=404)
        if not as_events:
            return Response(log[offset:], headers=headers, media_type=TEXT)
        pieces = _once(log[offset:])
        return _Stream(self._events(record.build_id, pieces, offset), headers, _EVENTS)

    async def _events(self, build_id: str, pieces: AsyncGenerator[bytes], offset: int) -> AsyncGenerator[bytes]:
        async with aclosing(pieces):
            async for event in log_events(pieces, offset):
                yield event
        record = await self._store.find(build_id)
        if record is not None:
            yield end_event(build_status(record))

    async def _find(self, request: Request) -> BuildRecord | None:
        match = _BUILD_ID.fullmatch(request.path_params["build_id"])
        if match is None:
            return None
        container_id, number = match.groups()
        if number is None:
            return await self._store.newest(f"bd-{container_id}")
        return await self._store.find(f"bd-{container_id}_{number}")


class _Stream(StreamingResponse):
    """One that leaves nothing suspended when the client goes away."""

    def __init__(self, pieces: AsyncGenerator[bytes], headers: Mapping[str, str], media_type: str) -> None:
        super().__init__(pieces, headers=headers, media_type=media_type)
        self._pieces = pieces

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._pieces):
            await super().stream_response(send)


async def _without_beats(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        async for piece in pieces:
            if piece:
                yield piece


async def _once(content: bytes) -> AsyncGenerator[bytes]:
    yield content


def _is_set(request: Request, name: str) -> bool:
    return request.query_params.get(name, "0").lower() not in ("0", "false", "no")


def _offset(request: Request, as_events: bool) -> int | None:
    """Where in the log the answer begins; None for a client that has had its last event. Raises RequestInvalid."""
    event_id = request.headers.get("last-event-id")
    if as_events and event_id is not None:
        return resume_offset(event_id)
    text = request.query_params.get("offset", "0")
    if not _OFFSET.fullmatch(text):
        raise RequestInvalid(f"offset: {clip(text)} is not a number of bytes")
    return int(text)
