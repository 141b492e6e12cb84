"""A blob on its way from upstream: over one connection, or in parts over several that come out in order."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from re import compile as compile_pattern

from aiohttp import ClientResponse

from wave_proxy.errors import UpstreamError, UpstreamTimeout, UpstreamUnavailable, clip
from wave_proxy.upstream.egress import Egress, authority_of
from wave_proxy.upstream.limits import Limits

PART_BYTES = 4 << 20

_OK_OR_PART = frozenset({200, 206})
_OK_OR_PART_OR_REFUSED = frozenset({200, 206, 400, 416, 501})
_MAX_WHOLE = 1024
_CONTENT_RANGE = compile_pattern(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")

Ask = Callable[[dict[str, str], frozenset[int]], Awaitable[ClientResponse]]
"""Sends the request for a blob with those headers; returns an answer with one of those statuses, else raises."""

Retried = Callable[[str, str, Callable[[], Awaitable[ClientResponse]]], Awaitable[ClientResponse]]
Slot = Callable[[str, str], AbstractAsyncContextManager[object]]


@dataclass(slots=True)
class BlobStream:
    """A blob on its way: size of the whole blob (None when upstream does not tell), offset where the chunks start."""

    size: int | None
    start: int
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to transfer: from the registry or origin ``place``, named in messages, from byte ``start`` on.

    ``size`` is the whole blob's, when it is known.
    """

    place: str
    name: str
    ask: Ask
    start: int
    size: int | None


class Transfers:
    """The transfers of one process. ``parallel`` is the number of connections for one blob.

    ``retried`` makes a request, again where that may help, and ``slot`` waits for a connection to make it on.
    """

    def __init__(self, egress: Egress, retried: Retried, slot: Slot, limits: Limits, parallel: int) -> None:
        self._egress = egress
        self._retried = retried
        self._slot = slot
        self._limits = limits
        self._parallel = parallel
        self._whole: dict[str, None] = {}  # places that don't give parts as they should

    @asynccontextmanager
    async def open(self, wanted: Wanted) -> AsyncIterator[BlobStream]:
        """The blob, from ``wanted.start`` on, or from 0 where upstream ignores Range."""
        async with AsyncExitStack() as stack:
            stream = await self._open_parts(wanted, stack) if self._parallel > 1 else None
            if stream is None:
                response = await stack.enter_async_context(self._answer(wanted, wanted.start, wanted.size))
                stream = await self._open_whole(wanted, response, stack)
            yield stream

    async def _open_whole(self, wanted: Wanted, response: ClientResponse, stack: AsyncExitStack) -> BlobStream:
        first, total = _placed(response, wanted)
        end = total if wanted.size is None else wanted.size
        chunks = self._counted(response, None if end is None else end - first, wanted)
        return BlobStream(total, first, await stack.enter_async_context(aclosing(chunks)))

    async def _open_parts(self, wanted: Wanted, stack: AsyncExitStack) -> BlobStream | None:
        """None where parts can't be had."""
        if wanted.place in self._whole:
            return None
        end = wanted.start + PART_BYTES if wanted.size is None else min(wanted.start + PART_BYTES, wanted.size)
        first = await stack.enter_async_context(AsyncExitStack())  # ends before the others
        response = await first.enter_async_context(self._answer(wanted, wanted.start, end, _OK_OR_PART_OR_REFUSED))
        if response.status == 200:
            return await self._open_whole(wanted, response, stack)
        total = _total_of_part(response, wanted.start, end)
        if total is None or wanted.size not in (None, total):
            await first.aclose()
            self._note_whole(wanted.place)
            return None
        chunks = self._in_order(wanted, total, _handed_over(first, response))
        return BlobStream(total, wanted.start, await stack.enter_async_context(aclosing(chunks)))

    async def _counted(
        self, response: ClientResponse, expected: int | None, wanted: Wanted
    ) -> AsyncGenerator[bytes, None]:
        pace = self._limits.pace(wanted.place)
        seen = 0
        async with aclosing(self._egress.chunks(response)) as chunks:
            async for chunk in chunks:
                seen += len(chunk)
                if pace is None:
                    yield chunk
                    continue
                for offset in range(0, len(chunk), pace.step):
                    piece = chunk[offset : offset + pace.step]
                    await pace.spend(len(piece))
                    yield piece
        if expected is not None and seen < expected:
            raise UpstreamUnavailable(f"{wanted.name} ended after {seen} of {expected} bytes")

    @asynccontextmanager
    async def _answer(
        self, wanted: Wanted, start: int, end: int | None, statuses: frozenset[int] = _OK_OR_PART
    ) -> AsyncIterator[ClientResponse]:
        """The answer to a request for these bytes. A closed Range where the end is known: some object stores answer an
        open one with everything.
        """
        is_part = start or end != wanted.size
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if is_part else {}
        async with self._slot(wanted.place, wanted.name):
            response = await self._retried(wanted.place, wanted.name, partial(wanted.ask, headers, statuses))
            try:
                yield response
            finally:
                response.close()

    # --- in parts ------------------------------------------------------------------------------------------------

    async def _in_order(
        self, wanted: Wanted, total: int, opened: AbstractAsyncContextManager[ClientResponse] | None
    ) -> AsyncGenerator[bytes, None]:
        """All bytes; the part whose turn it is and those behind it come at the same time, each into memory."""
        starts = deque(range(wanted.start, total, PART_BYTES))
        ahead: deque[_Ahead] = deque()
        try:
            while ahead or starts:
                while starts and len(ahead) < self._parallel:
                    start = starts.popleft()
                    part = self._part(wanted, total, start, min(start + PART_BYTES, total), opened)
                    ahead.append(_Ahead(part))
                    opened = None
                async for chunk in ahead[0]:
                    yield chunk
                ahead.popleft()
        finally:
            await asyncio.gather(*(part.cancel() for part in ahead), return_exceptions=True)

    async def _part(
        self,
        wanted: Wanted,
        total: int,
        at: int,
        end: int,
        opened: AbstractAsyncContextManager[ClientResponse] | None,
    ) -> AsyncGenerator[bytes, None]:
        """Bytes ``at`` to ``end`` (exclusive); asks for the rest again when it breaks off after some."""
        while at < end:
            before = at
            try:
                async with opened or self._answer(wanted, at, end, _OK_OR_PART_OR_REFUSED) as response:
                    opened = None
                    if _total_of_part(response, at, end) != total:
                        self._note_whole(wanted.place)
                        raise UpstreamUnavailable(f"{authority_of(response.url)} does not give parts of {wanted.name}")
                    async with aclosing(self._counted(response, end - at, wanted)) as chunks:
                        async for chunk in chunks:
                            at += len(chunk)
                            yield chunk
            except (UpstreamUnavailable, UpstreamTimeout):
                if at == before:
                    raise

    def _note_whole(self, place: str) -> None:
        if len(self._whole) >= _MAX_WHOLE:
            del self._whole[next(iter(self._whole))]
        self._whole[place] = None


class _Ahead:
    """A part that comes before its turn. Read it to its end, or cancel it."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        self._chunks: deque[bytes] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._task = asyncio.create_task(self._take(source))

    async def _take(self, source: AsyncGenerator[bytes, None]) -> None:
        try:
            async with aclosing(source):
                async for chunk in source:
                    self._chunks.append(chunk)
                    self._changed.set()
        finally:
            self._ended = True
            self._changed.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._chunks or not self._ended:
            while self._chunks:
                yield self._chunks.popleft()
            if not self._ended:
                self._changed.clear()
                await self._changed.wait()
        await self._task  # raises what ended it

    async def cancel(self) -> None:
        self._task.cancel()
        await self._task


@asynccontextmanager
async def _handed_over(stack: AsyncExitStack, response: ClientResponse) -> AsyncIterator[ClientResponse]:
    async with stack:
        yield response


def _placed(response: ClientResponse, wanted: Wanted) -> tuple[int, int | None]:
    """Offset of the answer's first byte, size of the whole blob. Raises UpstreamError for a part not asked for."""
    start, size, name = wanted.start, wanted.size, wanted.name
    if response.status == 200:
        return 0, response.content_length
    given = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(given)
    if match is None or start == 0 or int(match[1]) != start:
        raise UpstreamError(f"{authority_of(response.url)} sent {clip(given)} of {name}, asked for byte {start} and on")
    total = None if match[3] == "*" else int(match[3])
    if total is not None and size is not None and total != size:
        raise UpstreamError(f"{authority_of(response.url)} says that {name} has {total} bytes, expected {size}")
    return start, total


def _total_of_part(response: ClientResponse, start: int, end: int) -> int | None:
    """Size of the whole blob; None when this is not just the part asked for, which may end where the blob does."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "")) if response.status == 206 else None
    if match is None or match[3] == "*":
        return None
    first, last, total = (int(group) for group in match.groups())
    length = response.content_length
    is_it = first == start and last == min(end, total) - 1 and length in (None, last + 1 - first)
    return total if is_it else None
