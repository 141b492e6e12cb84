"""Quotas over all processes and machines: owner of ``wave:quota:*``.

A quota is a sliding window, so in no span as long as its period are more than ``max`` let in. Processes lease permits
from one Lua script and decide in memory; what they know to be refused they don't ask again. The window is kept on
Redis' clock; processes measure only durations, so their clocks need not agree.

Whatever may have been used occupies its place. A leased permit does from the lease's begin until its end and one
period more, as if it were used at the last moment; when its holder reports, an unused one is free at once and a used
one after one period from its use. What a dead process leased comes back by itself in the same way.

A subject has three keys, ``wave:quota:{<kind>:<user|address>:<name>}:<part>``, that expire when the window is empty:

- ``free``: sorted set of the instants (microseconds) at which places become free, at most some 600 of them,
- ``counts``: hash of such an instant to how many, ``total``, and the ``period`` that the instants were reckoned with,
- ``leases``: hash of process to ``<call> <permits> <instant in free> <end of the lease>``, its last one.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from heapq import heappop, heappush
from math import ceil
from secrets import token_hex
from time import monotonic, time
from typing import Literal, cast

import structlog

from wave_proxy._fast.window import Ledger
from wave_proxy.errors import StateUnavailable, TooManyRequests
from wave_proxy.image.limit import Limit, parse_limit
from wave_proxy.state.networks import network_of
from wave_proxy.state.redis import Redis, translated

__all__ = ["Kind", "Limit", "Quotas", "Subject", "parse_limit", "subject_of"]

_log = structlog.get_logger()

Kind = Literal["pull", "build"]

_STEPS = 600  # a window's resolution; a use counts for up to two steps longer than the period
_LEASE_S = 1.0
_SAFE = 0.9  # of a lease's life it is used here; the rest is for its return, and for clocks that run unevenly
_CALL_S = 2.0
_PROBE_S = 0.5
_IDLE_S = 10.0
_MEMORY = 100_000  # subjects
_GROWTH = 4
_HELD_S = 0.1  # a wait this long is one for a permit to free; shorter ones are round trips
_MAX_RETRY_AFTER_S = 60  # clients sleep for as long as it says, some for an hour; the true time stands beside it

# Reports what became of a process's last lease, and leases anew. Calls are numbered: one that is repeated gets the
# same answer and changes nothing; one that arrives after a later one does nothing.
# Keys: free, counts, leases. Arguments: process; number of this call; number of the call whose lease is reported, 0 if
# none; limit; period and life of a lease (microseconds); permits wanted at once; permits wanted in all; then pairs of
# age (microseconds) and count of uses.
# Result: permits granted; when there are no more to be had, pairs of wait (microseconds) and count that may then free.
_SCRIPT = """
local free, counts, leases = KEYS[1], KEYS[2], KEYS[3]
local process, call, known = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local limit, period, life = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local urgent, wanted = tonumber(ARGV[7]), tonumber(ARGV[8])
local step = math.ceil(period / @STEPS)
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function text(number)
  return string.format('%.0f', number)
end

local function occupy(used_at, count)
  local at = text((math.floor(used_at / step) + 1) * step + period)
  redis.call('ZADD', free, at, at)
  redis.call('HINCRBY', counts, at, count)
  redis.call('HINCRBY', counts, 'total', count)
  return at
end

local function release(at, count)
  if redis.call('HINCRBY', counts, at, -count) <= 0 then
    redis.call('HDEL', counts, at)
    redis.call('ZREM', free, at)
  end
  redis.call('HINCRBY', counts, 'total', -count)
end

local function follow(counted)
  local moved = {}
  for _, at in ipairs(redis.call('ZRANGE', free, 0, -1)) do
    moved[text(tonumber(at) - counted + period)] = redis.call('HGET', counts, at) or '0'
    redis.call('HDEL', counts, at)
  end
  redis.call('DEL', free)
  for at, count in pairs(moved) do
    redis.call('ZADD', free, at, at)
    redis.call('HSET', counts, at, count)
  end
  local entries = redis.call('HGETALL', leases)
  for i = 1, #entries, 2 do
    local begin, count, at, ends = string.match(entries[i + 1], '(%d+) (%d+) (%d+) (%d+)')
    if tonumber(count) > 0 then
      at = text(tonumber(at) - counted + period)
      redis.call('HSET', leases, entries[i], table.concat({begin, count, at, ends}, ' '))
    end
  end
end

local counted = tonumber(redis.call('HGET', counts, 'period') or period)
if counted ~= period then
  follow(counted)
end
redis.call('HSET', counts, 'period', text(period))

for _, at in ipairs(redis.call('ZRANGEBYSCORE', free, '-inf', text(now))) do
  release(at, tonumber(redis.call('HGET', counts, at) or 0))
end

local mine, others, frees = {call = 0, count = 0, at = ''}, 0, {}
local entries = redis.call('HGETALL', leases)
for i = 1, #entries, 2 do
  local number, count, at, ends = string.match(entries[i + 1], '(%d+) (%d+) (%d+) (%d+)')
  local lease = {call = tonumber(number), count = tonumber(count), at = at, ends = tonumber(ends)}
  if tonumber(at) <= now then
    redis.call('HDEL', leases, entries[i])
  elseif entries[i] == process then
    mine = lease
  elseif lease.count > 0 and lease.ends > now then
    others = others + 1
    frees[#frees + 1] = {lease.ends, lease.count}
  end
end

local granted, own = 0, ''
if mine.call == call then
  granted, own = mine.count, mine.at
elseif mine.call < call then
  if mine.call == known and mine.count > 0 then
    release(mine.at, mine.count)
  end
  for i = 9, #ARGV, 2 do
    if tonumber(ARGV[i]) < period then
      occupy(now - tonumber(ARGV[i]), tonumber(ARGV[i + 1]))
    end
  end
  local room = limit - tonumber(redis.call('HGET', counts, 'total') or 0)
  local share = math.floor(room / (2 * (others + 1)))
  granted = math.max(0, math.min(room, math.max(urgent, math.min(wanted, share))))
  own = granted > 0 and occupy(now + life, granted) or text(now + 60000000)
  redis.call('HSET', leases, process, table.concat({text(call), text(granted), own, text(now + life)}, ' '))
end
for _, key in ipairs(KEYS) do
  redis.call('PEXPIRE', key, text(math.ceil((period + life + step) / 1000) + 60000))
end

local result = {granted}
local over = tonumber(redis.call('HGET', counts, 'total') or 0) - limit
if over >= 0 then
  local soonest = redis.call('ZRANGE', free, 0, 31)
  for _, at in ipairs(soonest) do
    local count = tonumber(redis.call('HGET', counts, at) or 0)
    frees[#frees + 1] = {tonumber(at), at == own and count - granted or count}
  end
  if #soonest < 32 then
    frees[#frees + 1] = {now + period, granted}
  end
  table.sort(frees, function(a, b) return a[1] < b[1] end)
  local last = now + period
  for _, pair in ipairs(frees) do
    local count = math.max(0, pair[2] - over)
    over = math.max(0, over - pair[2])
    last = pair[1]
    if count > 0 then
      result[#result + 1] = last - now
      result[#result + 1] = count
    end
  end
  if #result == 1 then
    result[2], result[3] = last - now, 0
  end
end
return result
""".replace("@STEPS", str(_STEPS))


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is counted, for what: a user by e-mail, or an address without one."""

    kind: Kind
    name: str
    identified: bool
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", f"{self.kind}:{'user' if self.identified else 'address'}:{self.name}")


@lru_cache(65536)
def subject_of(kind: Kind, email: str | None, address: str) -> Subject:
    """Who is counted: the e-mail if there is one, else the address, of which IPv6 counts by /64."""
    return Subject(kind, email, True) if email else Subject(kind, network_of(address), False)


@dataclass(frozen=True, slots=True)
class _Call:
    """One execution of the script. ``uses`` are (instant, count); ``known`` is the call whose lease it reports."""

    number: int
    known: int
    began: float
    urgent: int
    wanted: int
    uses: list[tuple[float, int]]


@dataclass(slots=True, eq=False)
class _Account:
    """One subject here. ``owes``: there is something to report even if nobody asks for a permit."""

    subject: Subject
    limit: Limit
    lease_s: float
    ledger: Ledger
    waiters: dict[asyncio.Future[None], float] = field(default_factory=dict)  # to the instant when they give up
    pump: asyncio.Task[None] | None = None
    pending: _Call | None = None  # unanswered: Redis may have taken it or not
    known: int = 0
    granted: int = 0
    exhausted: bool = False  # that lease took the last permits
    batch: int = 1
    owes: bool = False
    touched: float = 0.0


@dataclass(slots=True)
class QuotaStats:
    """Decisions about requests that have a limit.

    ``admitted`` were let in at once, ``held`` after they waited for a permit, ``refused`` not at all; ``uncounted``
    were let in without a permit, as Redis was away, and are reported to it later.
    """

    admitted: int = 0
    held: int = 0
    refused: int = 0
    uncounted: int = 0


class Quotas:
    """Decides who may go on. ``run`` must be running beside it."""

    def __init__(
        self,
        redis: Redis,
        limits: Mapping[tuple[str, bool], Limit | None],
        *,
        wait_s: float,
        max_waiting: int = 10_000,
        open_when_down: bool = True,
    ) -> None:
        """``limits`` by kind and whether the subject is identified; what is None or missing is not limited.

        Over its limit a request is held for up to ``wait_s`` seconds, and ``max_waiting`` of them at a time. With
        ``open_when_down`` requests go on (and are counted later) when Redis is away, else they fail.
        """
        self._script = redis.register_script(_SCRIPT)
        self._limits = limits
        self._wait_s = wait_s
        self._max_waiting = max_waiting
        self._open_when_down = open_when_down
        self._process = token_hex(8)
        self._calls = 0
        self._waiting = 0
        self._down = False
        self._accounts: OrderedDict[str, _Account] = OrderedDict()  # least recently asked first
        self._lease_ends: list[tuple[float, int, _Account]] = []  # heap
        self._pumps: set[asyncio.Task[None]] = set()
        periods = [limit.period_s for limit in limits.values() if limit is not None]
        self._pause_s = min((_SAFE * _lease_s(period_s) for period_s in periods), default=_LEASE_S)
        self.stats = QuotaStats()

    def try_admit(self, subject: Subject) -> bool:
        """Whether the request may go on: a permit is at hand and now used, or none is needed. If not, ``admit``."""
        account = self._accounts.get(subject.key)
        if account is None:
            return self._limits.get((subject.kind, subject.identified)) is None
        now = monotonic()
        if account.ledger.take(now):
            self.stats.admitted += 1
            return True
        if self._down and self._open_when_down and account.ledger.delay(now, 0) == 0.0:
            account.touched = now
            self._pass_unleased(account, now)
            return True
        return False

    async def admit(self, subject: Subject) -> None:
        """Return when the request may go on, after others of the subject that came before.

        Raises TooManyRequests when no permit frees in time, and StateUnavailable when Redis is away and must not be.
        """
        limit = self._limits.get((subject.kind, subject.identified))
        if limit is None:
            return
        now = monotonic()
        account = self._account(subject, limit, now)
        if account.ledger.take(now):
            self.stats.admitted += 1
            return
        delay_s = account.ledger.delay(now, len(account.waiters))
        if delay_s > self._wait_s:
            raise self._refusal(account, delay_s)
        if self._down and delay_s == 0.0:
            self._pass_unleased(account, now)
        elif self._waiting >= self._max_waiting:
            raise self._refusal(account, delay_s)
        else:
            await self._hold(account, now + self._wait_s)

    async def run(self) -> None:
        """Return what leases leave unused, and look whether Redis is back, until cancelled."""
        while True:
            now = monotonic()
            self._end_leases(now)
            self._forget_idle(now)
            if self._down:
                await self._probe()
            pause_s = _PROBE_S if self._down else self._pause_s
            if self._lease_ends:
                pause_s = min(pause_s, max(self._lease_ends[0][0] - monotonic(), 0.001))
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        """End what waits, and return what was not used."""
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for account in self._accounts.values():
            for waiter in account.waiters:
                if not waiter.done():
                    waiter.set_exception(StateUnavailable("the server is shutting down; try again"))
        if not self._down:
            await asyncio.gather(*(self._give_back(account) for account in self._accounts.values()))

    # --- one subject -----------------------------------------------------------------------------------------------

    def _account(self, subject: Subject, limit: Limit, now: float) -> _Account:
        account = self._accounts.get(subject.key)
        if account is None:
            ledger = Ledger(limit.period_s / _STEPS, limit.period_s)
            account = _Account(subject, limit, _lease_s(limit.period_s), ledger)
            self._accounts[subject.key] = account
        else:
            self._accounts.move_to_end(subject.key)
        account.touched = now
        return account

    async def _hold(self, account: _Account, gives_up_at: float) -> None:
        waiter = asyncio.get_running_loop().create_future()
        account.waiters[waiter] = gives_up_at
        self._waiting += 1
        self._start_pump(account)
        try:
            await waiter
        finally:
            account.waiters.pop(waiter, None)
            self._waiting -= 1

    def _start_pump(self, account: _Account) -> None:
        if account.pump is None:
            account.pump = asyncio.get_running_loop().create_task(self._pump(account))
            self._pumps.add(account.pump)
            account.pump.add_done_callback(self._pumps.discard)

    async def _pump(self, account: _Account) -> None:
        """Make a subject's calls, one at a time, for as long as somebody waits or something is owed."""
        try:
            while account.waiters or account.owes:
                now = monotonic()
                delay_s = account.ledger.delay(now, 0)
                if delay_s > 0 and not account.owes:
                    self._refuse_hopeless(account, now)
                    if account.waiters:
                        await asyncio.sleep(delay_s)
                    continue
                try:
                    await self._call(account)
                except StateUnavailable as err:
                    self._note_down(err)
                    return self._let_go(account)
                if not account.owes:  # else what went on without Redis is not reported yet
                    self._serve(account)
        finally:
            account.pump = None

    def _serve(self, account: _Account) -> None:
        """Let in whom the permits reach for, first come first."""
        now = monotonic()
        while account.waiters:
            waiter, gives_up_at = next(iter(account.waiters.items()))
            if not waiter.done():
                if account.ledger.take(now):
                    waiter.set_result(None)
                    held = now + self._wait_s - gives_up_at >= _HELD_S
                    self.stats.held += held
                    self.stats.admitted += not held
                elif now > gives_up_at + _CALL_S:  # answers come, but later than leases end
                    self.stats.refused += 1
                    waiter.set_exception(StateUnavailable("the state store (Redis) is too slow; try again"))
                else:
                    break
            del account.waiters[waiter]
        if account.granted and (account.ledger.unused or account.exhausted):
            heappush(self._lease_ends, (account.ledger.deadline, account.known, account))

    def _refuse_hopeless(self, account: _Account, now: float) -> None:
        """Refuse those for whom no permit can free while they wait."""
        hopeless: list[tuple[asyncio.Future[None], float]] = []
        for position, (waiter, gives_up_at) in enumerate(account.waiters.items()):
            delay_s = account.ledger.delay(now, position - len(hopeless))
            if now + delay_s > gives_up_at:
                hopeless.append((waiter, delay_s))
        for waiter, delay_s in hopeless:
            del account.waiters[waiter]
            if not waiter.done():
                waiter.set_exception(self._refusal(account, delay_s))

    def _refusal(self, account: _Account, delay_s: float) -> TooManyRequests:
        self.stats.refused += 1
        subject, limit, seconds = account.subject, account.limit, max(ceil(delay_s), 1)
        who = f"{'user' if subject.identified else 'IP'} {subject.name}"
        resets = datetime.fromtimestamp(ceil(time() + delay_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        hint = "" if subject.identified else self._hint(subject.kind)
        said = f"Request exceeded {subject.kind} rate limit for {who}: {limit}; try again in {seconds} s, at {resets}"
        retry_after_s = min(seconds, _MAX_RETRY_AFTER_S)
        return TooManyRequests(said + hint, retry_after_s, limit=limit.max, remaining=0, reset_s=seconds)

    def _hint(self, kind: str) -> str:
        identified = self._limits.get((kind, True))
        return f" (users with an access token have {identified})" if identified else ""

    # --- calls -----------------------------------------------------------------------------------------------------

    async def _call(self, account: _Account) -> None:
        """Report and lease; a call that was not answered is repeated as it was. Raises StateUnavailable."""
        call = account.pending or self._new_call(account, monotonic())
        account.pending = call
        result = await self._send(account.subject.key, account.limit, account.lease_s, call)
        now = monotonic()
        account.pending = None
        account.known = call.number
        account.granted, account.exhausted = result[0], len(result) > 1
        frees = [(now + wait / 1e6, count) for wait, count in zip(result[1::2], result[2::2], strict=True)]
        account.ledger.grant(result[0], call.began + _SAFE * account.lease_s, frees)

    def _new_call(self, account: _Account, now: float) -> _Call:
        """Settles the account: from here on nothing of the last lease is used."""
        ledger, urgent = account.ledger, len(account.waiters)
        if now < ledger.deadline and not ledger.unused:
            account.batch = min(account.batch * _GROWTH, account.limit.max)
        else:
            account.batch = max(account.granted - ledger.unused, 1)
        wanted = max(account.batch, urgent) if urgent else 0
        self._calls += 1
        account.owes = False
        return _Call(self._calls, account.known, now, urgent, wanted, ledger.settle())

    async def _send(self, key: str, limit: Limit, lease_s: float, call: _Call) -> list[int]:
        keys = [f"wave:quota:{{{key}}}:{part}" for part in ("free", "counts", "leases")]
        now = monotonic()
        arguments: list[str | int] = [self._process, call.number, call.known, limit.max]
        arguments += [round(limit.period_s * 1e6), round(lease_s * 1e6), call.urgent, call.wanted]
        for instant, count in call.uses:
            arguments += [max(round((now - instant) * 1e6), 0), count]
        try:
            with translated():
                async with asyncio.timeout(_CALL_S):
                    return cast(list[int], await self._script(keys, arguments))
        except TimeoutError as err:
            raise StateUnavailable(f"the state store (Redis) does not answer within {_CALL_S:g} s") from err

    # --- leases' ends ------------------------------------------------------------------------------------------------

    def _end_leases(self, now: float) -> None:
        while self._lease_ends and self._lease_ends[0][0] <= now:
            _, number, account = heappop(self._lease_ends)
            if account.known == number:
                account.owes = True
                if not self._down:
                    self._start_pump(account)

    def _forget_idle(self, now: float) -> None:
        """Drop who was not seen for long. An unreported use then counts from the end of its lease."""
        for _ in range(len(self._accounts)):
            key, account = next(iter(self._accounts.items()))
            keep_s = _IDLE_S + (account.limit.period_s if account.owes else 0.0)
            if now < account.touched + keep_s and len(self._accounts) <= _MEMORY:
                break
            if account.pump is None:
                del self._accounts[key]
            else:
                account.touched = now
                self._accounts.move_to_end(key)

    async def _give_back(self, account: _Account) -> None:
        with suppress(StateUnavailable):
            while account.pending or account.owes or account.ledger.unused:
                await self._call(account)

    # --- without Redis -----------------------------------------------------------------------------------------------

    def _note_down(self, err: StateUnavailable) -> None:
        if not self._down:
            self._down = True
            then = "requests go on uncounted" if self._open_when_down else "requests are refused"
            _log.warning(f"no permits can be leased: {then} until Redis is back", error=str(err))

    def _let_go(self, account: _Account) -> None:
        """Decide for all who wait, as there will be no permits."""
        account.owes = True
        now = monotonic()
        for waiter in account.waiters:
            if not waiter.done():
                try:
                    self._pass_unleased(account, now)
                    waiter.set_result(None)
                except StateUnavailable as err:
                    waiter.set_exception(err)
        account.waiters.clear()

    def _pass_unleased(self, account: _Account, now: float) -> None:
        if not self._open_when_down:
            self.stats.refused += 1
            raise StateUnavailable("quotas can't be checked: the state store (Redis) is away; try again")
        account.ledger.record(now)
        account.owes = True
        self.stats.uncounted += 1

    async def _probe(self) -> None:
        """Try what a subject's call would do; with Redis back, report what went on without it."""
        self._calls += 1
        call = _Call(self._calls, 0, monotonic(), 0, 0, [])
        try:
            await self._send("probe", Limit(0, 1.0), 0.1, call)
        except StateUnavailable:
            return
        self._down = False
        _log.info("permits can be leased again")
        for account in self._accounts.values():
            if account.owes:
                self._start_pump(account)


def _lease_s(period_s: float) -> float:
    """Life of a lease: what an unreported use costs, so a fraction of the period; yet some round trips long."""
    return min(_LEASE_S, max(period_s / 10, 0.05))
