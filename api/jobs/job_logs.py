"""Logs of jobs over the wire: what there is so far, or all that is still to come, as text or as events."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from re import compile as compile_pattern

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from api.endpoints import INVALID, STRING, TEXT, UNKNOWN, Answer, Parameter
from api.jobs.build_answers import build_status
from api.jobs.events import end_event, log_events, resume_offset
from api.jobs.tails import Tails
from wave_proxy.errors import RequestInvalid, clip
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.builds import BuildStore

_OFFSET = compile_pattern(r"[0-9]{1,15}")
_EVENTS = "text/event-stream"
_LIVE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

BEAT_S = 15.0  # without a byte; what stands between us and a client may close a connection that is quiet for a minute

LOG_PARAMETERS = (
    Parameter("follow", "`1`: all that is still to come as well, until the job ends."),
    Parameter("offset", "Leave out so many bytes at the beginning.", {"type": "integer", "minimum": 0}),
    Parameter("Last-Event-ID", "The id of the last event that was received: goes on behind it.", STRING, "header"),
)
LOG_ANSWERS = {
    200: Answer(
        "The log as text, or as server-sent events `log` and, at last, `end` with the job's status.",
        media_types=(TEXT, _EVENTS),
        headers={"X-Build-Status": "`PENDING` while the job goes on, else `COMPLETED`."},
    ),
    204: Answer("To a client whose last event was `end`: there is nothing more."),
    400: INVALID,
    404: UNKNOWN,
}


class JobLogs:
    """The logs of builds and mirrors, for those who ask for them."""

    def __init__(self, store: BuildStore, *, beat_s: float = BEAT_S) -> None:
        self._store = store
        self._tails = Tails(store, beat_s)

    async def close(self) -> None:
        """End what is left of following logs."""
        await self._tails.close()

    async def answer(
        self, request: Request, record: BuildRecord | None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """The answer to a request for the log of a job, with ``headers`` where it is the log. Raises RequestInvalid."""
        as_events = _EVENTS in request.headers.get("accept", "")
        offset = _offset(request, as_events)
        if record is None:
            return Response(status_code=404)
        if offset is None:
            return Response(status_code=204)  # what tells a browser not to come back
        is_done = record.phase == "done"
        sent = {"X-Build-Status": "COMPLETED" if is_done else "PENDING", **_LIVE, **(headers or {})}
        if not is_done and request.method == "GET" and (as_events or _is_set(request, "follow")):
            pieces = self._tails.follow(record.build_id, offset)
            if not as_events:
                return _Stream(_without_beats(pieces), sent, TEXT)
            return _Stream(self._events(record.build_id, pieces, offset), sent, _EVENTS)
        if not await self._store.has_log(record.build_id):
            return Response(status_code=404)
        pieces = self._store.read_pieces(record.build_id, offset)
        if not as_events:
            return await sent_in_pieces(pieces, sent, TEXT)
        return _Stream(self._events(record.build_id, pieces, offset), sent, _EVENTS)

    async def _events(self, build_id: str, pieces: AsyncGenerator[bytes], offset: int) -> AsyncGenerator[bytes]:
        async with aclosing(pieces):
            async for event in log_events(pieces, offset):
                yield event
        record = await self._store.find(build_id)
        if record is not None:
            yield end_event(build_status(record))


class _Stream(StreamingResponse):
    """One that leaves nothing suspended when the client goes away."""

    def __init__(self, pieces: AsyncGenerator[bytes], headers: Mapping[str, str], media_type: str) -> None:
        super().__init__(pieces, headers=headers, media_type=media_type)
        self._pieces = pieces

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._pieces):
            await super().stream_response(send)


async def sent_in_pieces(pieces: AsyncGenerator[bytes], headers: Mapping[str, str], media_type: str) -> Response:
    """An answer with its length where all of it is one piece, as it mostly is."""
    first, second = await anext(pieces, b""), await anext(pieces, b"")
    if not second:
        return Response(first, headers=headers, media_type=media_type)

    async def joined() -> AsyncGenerator[bytes]:
        async with aclosing(pieces):
            yield first
            yield second
            async for piece in pieces:
                yield piece

    return _Stream(joined(), headers, media_type)


async def _without_beats(pieces: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async with aclosing(pieces):
        async for piece in pieces:
            if piece:
                yield piece


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
