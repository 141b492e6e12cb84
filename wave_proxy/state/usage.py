"""How much the service is used, by day (UTC) and organisation: owner of ``wave:{usage}:*``.

An organisation is the domain of a user's e-mail address, in lower case; what is done without a user counts under the
empty name. There are two kinds of hashes of organisation to count, both kept for ever, since a day takes some hundred
bytes: ``wave:{usage}:<kind>:<day>`` (``2026-01-31``), and ``wave:{usage}:<kind>`` for all days together.

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
from typing import Literal, cast
from weakref import WeakValueDictionary

import structlog

from wave_proxy.errors import StateUnavailable
from wave_proxy.state.redis import Redis, answered

_log = structlog.get_logger()

Kind = Literal["pulls", "fusion", "builds", "mirrors"]

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
    """Where the pulls of one organisation are counted on the hot path: ``cell.pulls += 1``."""

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


@dataclass(frozen=True, slots=True)
class _Flush:
    """What one execution of the script adds, by day, kind and organisation."""

    number: int
    fields: dict[tuple[str, Kind, str], int]


class Usage:
    """Counts pulls and builds: in memory at once, in Redis soon after, by ``run`` and ``follow_days`` beside it."""

    def __init__(self, redis: Redis, clock: Callable[[], float] = time) -> None:
        """``clock`` tells the day: epoch seconds."""
        self._redis = redis
        self._script = redis.register_script(_SCRIPT)
        self._clock = clock
        self._process = token_hex(8)
        self._flushes = 0
        self._down = False
        self._cells: WeakValueDictionary[tuple[str, bool], Cell] = WeakValueDictionary()
        self._day = _day_of(clock())  # of what is gathered
        self._gathered: dict[tuple[Kind, str], int] = {}
        self._waiting: dict[tuple[str, Kind, str], int] = {}
        self._pending: _Flush | None = None  # unanswered: Redis may have counted it or not

    def count(self, email: str | None, fusion: bool) -> None:
        """One pull by the user with that e-mail address, if there is one; ``fusion``: of an image with Fusion."""
        self._add_pulls(organisation_of(email), fusion, 1)

    def count_build(self, email: str | None) -> None:
        """One build that was begun for the user with that e-mail address, if there is one."""
        self._add("builds", organisation_of(email), 1)

    def cell(self, email: str | None, fusion: bool) -> Cell:
        """The cell of the user's organisation, to keep for as long as it is used; what it counts is not lost then."""
        key = organisation_of(email), fusion
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
            lost = sum(count for fields in left for (_, kind, _), count in fields.items() if kind != "fusion")
            _log.warning("the last pulls and builds are not counted", number=lost, error=str(err))

    async def read(self, kind: Kind, day: str | None = None, organisation: str | None = None) -> Counts:
        """The counts of a day (``2026-01-31``) or of all, of one organisation or of all. Raises StateUnavailable.

        What was done without a user is in the count of a day alone. Source: ``wave.md`` §8.2.
        """
        key = _key(kind, day)
        if organisation is not None:
            name = organisation.lower()
            async with answered():
                count = int(cast(bytes | None, await self._redis.hget(key, name)) or 0)
            return Counts(count, {organisation: count})
        async with answered():
            fields = cast(dict[bytes, bytes], await self._redis.hgetall(key))
        counts = {name.decode(): int(count) for name, count in fields.items()}
        anonymous = counts.pop("", 0)
        return Counts(sum(counts.values()) + (anonymous if day else 0), counts)

    # --- gathering ---------------------------------------------------------------------------------------------------

    def _add_pulls(self, organisation: str, fusion: bool, count: int) -> None:
        self._add("pulls", organisation, count)
        if fusion:
            self._add("fusion", organisation, count)

    def _add(self, kind: Kind, organisation: str, count: int) -> None:
        key = kind, organisation
        known = self._gathered.get(key)
        if known is None:
            if len(self._gathered) + len(self._waiting) >= _FIELDS:
                key = kind, ""
            known = self._gathered.get(key, 0)
        self._gathered[key] = known + count

    def _gather(self) -> None:
        """Have all that was counted since the last time wait under the day on which that was."""
        for key, cell in list(self._cells.items()):
            count, cell.pulls = cell.pulls, 0
            if count:
                self._add_pulls(*key, count)
        gathered, self._gathered = self._gathered, {}
        for (kind, organisation), count in gathered.items():
            field = self._day, kind, organisation
            self._waiting[field] = self._waiting.get(field, 0) + count
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
        for (day, kind, organisation), count in flush.fields.items():
            keys += _key(kind, day), _key(kind)
            arguments += [organisation, count] * 2
        async with answered():
            await self._script(keys, arguments)


@lru_cache(_FIELDS)
def organisation_of(email: str | None) -> str:
    """The domain of an e-mail address in lower case; empty when there is none."""
    _, at, domain = (email or "").strip().rpartition("@")
    if not at or len(domain) > _MAX_DOMAIN or not domain.isprintable():
        return ""
    return domain.lower()


def _day_of(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def _key(kind: Kind, day: str | None = None) -> str:
    return f"wave:{{usage}}:{kind}:{day}" if day else f"wave:{{usage}}:{kind}"
