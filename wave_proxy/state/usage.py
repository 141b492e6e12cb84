"""How much the service is used, by day (UTC), organisation and architecture: owner of ``wave:{usage}:*``.

An organisation is the domain of a user's e-mail address, in lower case; what is done without a user counts under the
empty name. All hashes are of organisation to count, and kept for ever, since a day takes some hundred bytes:
``wave:{usage}:<kind>:<day>`` (``2026-01-31``), and ``wave:{usage}:<kind>`` for all days together, have everything;
``wave:{usage}:<kind>/<architecture>:<day>`` and ``wave:{usage}:<kind>/<architecture>`` what is known to be for one.

Processes gather in memory and flush a few times a second; one that crashes loses what it gathered since. A flush is
one Lua script with a number, the last of which is kept for each process in ``wave:{usage}:flushed:<process>``: one
that is repeated, as its answer was lost, counts once. The braces keep all these keys on one node of a cluster.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from secrets import token_hex
from time import time
from typing import Literal, NamedTuple, cast
from weakref import WeakValueDictionary

import structlog

from wave_proxy.errors import StateUnavailable
from wave_proxy.image.oci import ARCHITECTURES
from wave_proxy.state.redis import Redis, answered

_log = structlog.get_logger()

Job = Literal["builds", "mirrors", "scans"]
Kind = Literal["pulls", "fusion", "builds", "mirrors", "scans"]

_FLUSH_S = 0.4
_DAY_S = 86400.0
_LOOK_AT_CLOCK_S = 60.0
_FIELDS = 10_000  # of organisations and days, gathered and not flushed yet; more organisations count under no name
_FLUSHED_FIELDS = 1000  # at once
_REMEMBERED_S = 7 * 86400  # a process is: how long Redis may be away between a flush and its repetition
_MAX_DOMAIN = 253

# Keys: the process's last flush; then hashes. Arguments: number of this flush; seconds to remember it; then for each
# hash an organisation and what to add. Result: 1, or 0 when this flush was counted before.
_SCRIPT = """
if tonumber(redis.call('GET', KEYS[1]) or 0) >= tonumber(ARGV[1]) then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
for i = 2, #KEYS do
  redis.call('HINCRBY', KEYS[i], ARGV[2 * i - 1], ARGV[2 * i])
end
return 1
"""


class Cell:
    """Where the pulls of one organisation and architecture are counted on the hot path: ``cell.pulls += 1``."""

    __slots__ = ("__weakref__", "_at_end", "pulls")

    def __init__(self, at_end: Callable[[int], None]) -> None:
        """``at_end`` is given the pulls that were not gathered yet when nobody holds the cell any more."""
        self.pulls = 0
        self._at_end = at_end

    def __del__(self) -> None:
        if self.pulls:
            self._at_end(self.pulls)


@dataclass(frozen=True, slots=True)
class Counts:
    """An answer: ``count`` of all, and by organisation, without those that have none."""

    count: int
    organisations: dict[str, int]


class _Field(NamedTuple):
    """What counts together; ``architecture`` is empty where it is unknown, or where there are several."""

    kind: Kind
    organisation: str
    architecture: str


@dataclass(frozen=True, slots=True)
class _Flush:
    """What one execution of the script adds, by day and field."""

    number: int
    fields: dict[tuple[str, _Field], int]


class Usage:
    """Counts pulls and jobs: in memory at once, in Redis soon after, by ``run`` and ``follow_days`` beside it."""

    def __init__(self, redis: Redis, clock: Callable[[], float] = time) -> None:
        """``clock`` tells the day: epoch seconds."""
        self._redis = redis
        self._script = redis.register_script(_SCRIPT)
        self._clock = clock
        self._process = token_hex(8)
        self._flushes = 0
        self._down = False
        self._cells: WeakValueDictionary[tuple[str, bool, str], Cell] = WeakValueDictionary()
        self._day = _day_of(clock())  # of what is gathered
        self._gathered: dict[_Field, int] = {}
        self._waiting: dict[tuple[str, _Field], int] = {}
        self._pending: _Flush | None = None  # unanswered: Redis may have counted it or not

    def count(self, email: str | None, fusion: bool, architecture: str = "") -> None:
        """One pull by the user with that e-mail address, if there is one; ``fusion``: of an image with Fusion."""
        self._add_pulls(organisation_of(email), fusion, ARCHITECTURES.get(architecture, ""), 1)

    def count_job(self, kind: Job, email: str | None, platforms: str = "") -> None:
        """A job that was begun for the user with that e-mail address, if there is one: as many as it has platforms.

        Source: ``wave.md`` §8.3.
        """
        for platform in platforms.split(","):
            self._add(_Field(kind, organisation_of(email), architecture_of(platform)), 1)

    def cell(self, email: str | None, fusion: bool, architecture: str = "") -> Cell:
        """The cell of the user's organisation, to keep for as long as it is used; what it counts is not lost then."""
        key = organisation_of(email), fusion, ARCHITECTURES.get(architecture, "")
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = Cell(partial(self._add_pulls, *key))
        return cell

    async def run(self) -> None:
        """Flush twice a second until cancelled. Without Redis, gather until it is back."""
        while True:
            await asyncio.sleep(_FLUSH_S)
            try:
                await self._flush()
            except StateUnavailable as err:
                if not self._down:
                    _log.warning("usage is counted in memory until Redis is back", error=str(err))
                self._down = True
                continue
            if self._down:
                _log.info("usage is counted in Redis again")
            self._down = False

    async def follow_days(self) -> None:
        """End each day on time, whatever Redis does, until cancelled."""
        while True:
            left_s = _DAY_S - self._clock() % _DAY_S
            await asyncio.sleep(min(max(left_s, 0.001), _LOOK_AT_CLOCK_S))  # the clock may be set
            self._gather()

    async def close(self) -> None:
        """Flush what is left; what Redis does not take now is lost, and logged."""
        try:
            await self._flush()
        except StateUnavailable as err:
            left = [self._waiting, self._pending.fields if self._pending else {}]
            lost = sum(count for fields in left for (_, field), count in fields.items() if field.kind != "fusion")
            _log.warning("the last pulls and jobs are not counted", number=lost, error=str(err))

    async def read(
        self, kind: Kind, day: str | None = None, organisation: str | None = None, architecture: str | None = None
    ) -> Counts:
        """The counts of a day (``2026-01-31``) or of all, of one organisation or of all, and so for architectures.

        What was done without a user is in the count of a day or an architecture alone. Raises StateUnavailable.
        Source: ``wave.md`` §8.2.
        """
        key = _key(kind, day, architecture)
        if organisation is not None:
            name = organisation.lower()
            async with answered():
                count = int(cast(bytes | None, await self._redis.hget(key, name)) or 0)
            return Counts(count, {organisation: count})
        async with answered():
            fields = cast(dict[bytes, bytes], await self._redis.hgetall(key))
        counts = {name.decode(): int(count) for name, count in fields.items()}
        anonymous = counts.pop("", 0)
        return Counts(sum(counts.values()) + (anonymous if day or architecture else 0), counts)

    # --- gathering ---------------------------------------------------------------------------------------------------

    def _add_pulls(self, organisation: str, fusion: bool, architecture: str, count: int) -> None:
        self._add(_Field("pulls", organisation, architecture), count)
        if fusion:
            self._add(_Field("fusion", organisation, architecture), count)

    def _add(self, field: _Field, count: int) -> None:
        known = self._gathered.get(field)
        if known is None:
            if len(self._gathered) + len(self._waiting) >= _FIELDS:
                field = field._replace(organisation="")
            known = self._gathered.get(field, 0)
        self._gathered[field] = known + count

    def _gather(self) -> None:
        """Have all that was counted since the last time wait under the day on which that was."""
        for key, cell in list(self._cells.items()):
            count, cell.pulls = cell.pulls, 0
            if count:
                self._add_pulls(*key, count)
        gathered, self._gathered = self._gathered, {}
        for field, count in gathered.items():
            self._waiting[self._day, field] = self._waiting.get((self._day, field), 0) + count
        self._day = _day_of(self._clock())

    # --- flushing ----------------------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        """Add all that was counted so far; what was not answered is repeated as it was. Raises StateUnavailable."""
        self._gather()
        while self._pending or self._waiting:
            if self._pending is None:
                self._flushes += 1
                taken = list(self._waiting)[:_FLUSHED_FIELDS]
                self._pending = _Flush(self._flushes, {field: self._waiting.pop(field) for field in taken})
            await self._send(self._pending)
            self._pending = None

    async def _send(self, flush: _Flush) -> None:
        keys = [f"wave:{{usage}}:flushed:{self._process}"]
        arguments: list[str | int] = [flush.number, _REMEMBERED_S]
        for (day, (kind, organisation, architecture)), count in flush.fields.items():
            places = [_key(kind, day), _key(kind)]
            if architecture:
                places += _key(kind, day, architecture), _key(kind, None, architecture)
            keys += places
            arguments += [organisation, count] * len(places)
        async with answered():
            await self._script(keys, arguments)


@lru_cache(_FIELDS)
def organisation_of(email: str | None) -> str:
    """The domain of an e-mail address in lower case; empty when there is none."""
    _, at, domain = (email or "").strip().rpartition("@")
    if not at or len(domain) > _MAX_DOMAIN or not domain.isprintable():
        return ""
    return domain.lower()


def architecture_of(platform: str) -> str:
    """The architecture in a platform (``linux/arm64``), by its usual name; empty when there is none that we know."""
    parts = platform.split("/")
    return ARCHITECTURES.get(parts[1] if len(parts) > 1 else parts[0], "")


def _day_of(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def _key(kind: Kind, day: str | None = None, architecture: str | None = None) -> str:
    series = f"{kind}/{architecture}" if architecture else kind
    return f"wave:{{usage}}:{series}:{day}" if day else f"wave:{{usage}}:{series}"
