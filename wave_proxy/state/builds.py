"""Builds from request to result, and the one contract between api and builder: owner of ``wave:{builds}:*``.

Of each build there are, under its id:

- ``build:<id>``: hash, the record,
- ``spec:<id>``: the spec as it is built, with secrets and content, until the build is done,
- ``log:<id>``: the log while it grows, byte for byte; then ``kept:<id>``, the log, and ``lock:<id>``, both compressed.

``count:<series>`` is the number of its last build and ``target:<slot>`` the id of its last build; they and
what is left of a build expire together. ``reserved:<slot>`` is the submission that is being admitted, and
``followers:<id>`` the jobs that wait for the end of a build, to run after it if it succeeds.

The queue is ``waiting:<owner>``, a list of ids for each owner, and ``turns``, the owners in the order of their turns:
start-time fair queueing, with a build as the unit. ``served`` says where an owner's next turn is, ``running`` is a
hash of owner to slots in use, ``totals`` one of the present turn and the number of waiting builds. Builds that have a
slot are in the stream ``ready``. A pending entry of its consumer group is a claim, and its idle time the lease's age.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from secrets import token_hex
from time import monotonic
from typing import cast
from weakref import WeakValueDictionary

from wave_proxy.errors import StateUnavailable
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.state.build_records import BuildRecords, key, pack_spec, record_of
from wave_proxy.state.build_scripts import (
    ABANDON,
    APPEND,
    CANCEL,
    CLAIM,
    FINISH,
    HOLD,
    MAX_ATTEMPTS,
    RELEASE,
    RENEW,
    RESERVE,
    STREAM,
    SUBMIT,
)
from wave_proxy.state.redis import Redis, answered, cancel

__all__ = ["FAILED", "BuildCancelled", "BuildLimits", "BuildStore", "Claim", "LeaseLost", "no_quota"]

FAILED = 255  # the exit status of builds that end without one

_RESERVED_MS = 3000
_RESERVED_POLL_S = 0.1
_ROUND_S = 4.0  # less than the client's own limit on an answer
_UNLIMITED = 1_000_000
_DOING = {"build": "building", "mirror": "mirroring", "scan": "scanning"}


@dataclass(frozen=True, slots=True)
class BuildLimits:
    """How many builds run at the same time: in all, and of one owner (None: all)."""

    max_running: int
    max_running_per_user: int | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A build in a builder's hands, for as long as the lease is renewed; ``owner`` is the claim's own secret."""

    record: BuildRecord
    owner: str = field(repr=False)


class LeaseLost(Exception):
    """The build is somebody else's now, or done: whoever still works on it must end that at once."""


class BuildCancelled(Exception):
    """The build is not wanted any more, for the reason that is the message: end it, then ``finish`` it."""


class BuildStore(BuildRecords):
    """Builds of all processes."""

    def __init__(
        self,
        redis: Redis,
        limits: BuildLimits,
        *,
        retention_s: float = 7 * 86400,
        failure_memory_s: float = 50.0,
        lease_s: float = 15.0,
    ) -> None:
        """Records are kept for ``retention_s`` after the end; one that failed answers for ``failure_memory_s``."""
        super().__init__(redis)
        self._retention_s = max(int(retention_s), 1)
        self._failure_memory_s = failure_memory_s
        self._lease_ms = max(int(lease_s * 1000), 1)
        self._limits = (limits.max_running, limits.max_running_per_user or _UNLIMITED)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    # --- the api's side ----------------------------------------------------------------------------------------------

    async def submit(
        self, spec: BuildSpec, admit: Callable[[], Awaitable[None]], *, gone: str = "", after: str = ""
    ) -> tuple[BuildRecord, bool]:
        """The build of ``spec.slot``, and whether it is a new one.

        It is new when there is none, when the last one failed some time ago, and when the last one is ``gone``: the id
        of a build that succeeded, but whose image was then found missing. ``admit`` is awaited before a new one is
        recorded, by one of all that ask for it; what it raises ends that one's submission, and another one tries.
        A new one that is to come ``after`` a build waits for its end: then it gets in line, or fails as that one has.
        Raises StateUnavailable.
        """
        submission = token_hex(8)
        async with self._locks.setdefault(spec.slot, asyncio.Lock()):  # one asks for all who wait here
            found = await self._reserve(spec.slot, submission, gone)
            is_new = False
            if not found:
                await self._admit(spec.slot, submission, admit)
                found, is_new = await self._record(spec, submission, gone, after)
        record = await self.find(found)
        if record is None:
            raise StateUnavailable("the build's record is lost; try again")
        return record, is_new

    async def cancel(self, build_id: str, reason: str = "cancelled") -> bool:
        """End a build that waits, or have its builder told; False when it is done or unknown. Raises StateUnavailable.

        As long as failures are remembered, it answers as one that failed.
        """
        return bool(
            await self._run(
                CANCEL, build_id, reason or "cancelled", token_hex(8), self._retention_s, FAILED, *self._limits
            )
        )

    async def _reserve(self, target: str, submission: str, gone: str) -> str:
        """The id of the build that is there; empty when the target is reserved for this submission."""
        while True:
            found = await self._run(RESERVE, target, submission, _RESERVED_MS, gone, self._failure_memory_s)
            if found != b"wait":
                return "" if found == b"reserved" else cast(bytes, found).decode()
            await asyncio.sleep(_RESERVED_POLL_S)

    async def _admit(self, target: str, submission: str, admit: Callable[[], Awaitable[None]]) -> None:
        """Await ``admit`` under the reservation, which is given back if it raises."""
        holding = asyncio.create_task(self._hold(target, submission))
        try:
            await admit()
        except BaseException:
            await cancel(holding)
            with suppress(StateUnavailable):  # it runs out by itself
                await self._run(HOLD, target, submission, 0)
            raise
        await cancel(holding)

    async def _hold(self, target: str, submission: str) -> None:
        while True:
            await asyncio.sleep(_RESERVED_MS / 3000)
            with suppress(StateUnavailable):
                await self._run(HOLD, target, submission, _RESERVED_MS)

    async def _record(self, spec: BuildSpec, submission: str, gone: str, after: str) -> tuple[str, bool]:
        wanted = (spec.slot, submission, gone, self._failure_memory_s)
        job = (spec.series, spec.owner, *pack_spec(spec))
        build_id, is_new = await self._run(SUBMIT, *wanted, *job, *self._limits, after)
        return build_id.decode(), bool(is_new)

    # --- the builder's side ------------------------------------------------------------------------------------------

    async def claim(self, builder: str, block_s: float) -> Claim | None:
        """The next build, or one whose builder died; None when there is none for ``block_s`` seconds.

        ``builder`` is the process's name. A build that is not to go on, as it was cancelled or has had too many
        builders, is finished here. Raises StateUnavailable.
        """
        ends, secret = monotonic() + block_s, token_hex(16)
        while True:
            answer = await self._run(CLAIM, builder, secret, self._lease_ms, *self._limits)
            if len(answer) == 2:
                left_s = ends - monotonic()
                if left_s <= 0:
                    return None
                last_entry, lease_left_ms = answer
                await self._wait_for_entry(last_entry, lease_left_ms, left_s)
                continue
            build_id, verdict, spec, pairs = answer
            fields = dict(zip(pairs[::2], pairs[1::2], strict=True))
            claim = Claim(record_of(build_id.decode(), fields, spec), secret)
            if verdict == b"build":
                return claim
            with suppress(LeaseLost):
                await self._bury(claim, fields.get(b"cancelled", b"").decode())
            secret = token_hex(16)

    async def renew(self, claim: Claim) -> None:
        """Begin the lease anew; to be called every third of it.

        Raises LeaseLost, BuildCancelled (the lease is renewed all the same) and StateUnavailable: a builder that does
        not get through for as long as the lease must take it for lost.
        """
        told = cast(bytes | None, await self._run(RENEW, claim.record.build_id, claim.owner))
        if told is None:
            raise _lost(claim)
        if told:
            raise BuildCancelled(told.decode())

    async def release(self, claim: Claim) -> None:
        """Give the build back: the next claim gets it at once. Raises LeaseLost, StateUnavailable."""
        if not await self._run(RELEASE, claim.record.build_id, claim.owner):
            raise _lost(claim)

    async def abandon(self, build_id: str, attempt: int) -> None:
        """Of an attempt whose builder is known to be dead: the next claim gets the build at once, as if the lease had
        run out. Raises StateUnavailable.
        """
        await self._run(ABANDON, build_id, attempt, self._lease_ms)

    async def append_log(self, claim: Claim, text: bytes) -> None:
        """Add to the log, one call of a claim after the other. Raises LeaseLost, StateUnavailable."""
        if text and not await self._run(APPEND, claim.record.build_id, claim.owner, token_hex(8), text):
            raise _lost(claim)

    async def finish(
        self, claim: Claim, *, exit_status: int, digest: str = "", reason: str = "", lock: bytes | None = None
    ) -> None:
        """End the build: 0 and the pushed manifest's digest, or another status and in one line why.

        With the same stroke its slot is free for the next one, and its log and lock are kept, compressed. It may be
        repeated. Raises LeaseLost, StateUnavailable.
        """
        build_id = claim.record.build_id
        packed_lock = await asyncio.to_thread(zlib.compress, lock) if lock is not None else b""
        outcome = b"grown"
        while outcome == b"grown":  # a text was under way whose call was given up
            log = await self._read_live(build_id)
            packed = await asyncio.to_thread(zlib.compress, log)
            kept = (len(log), packed, packed_lock, self._retention_s)
            result = (exit_status, digest, reason)
            outcome = cast(bytes, await self._run(FINISH, build_id, claim.owner, *result, *kept, *self._limits))
        if outcome == b"lost":
            raise _lost(claim)

    async def _wait_for_entry(self, last_entry: bytes, lease_left_ms: int, left_s: float) -> None:
        """Return when the stream has a new entry, a lease may have run out, or the time is over."""
        pause_s = min(left_s, _ROUND_S)
        if lease_left_ms >= 0:
            pause_s = min(pause_s, lease_left_ms / 1000)
        async with answered():
            await self._redis.xread({STREAM: last_entry}, count=1, block=int(pause_s * 1000) + 1)

    async def _bury(self, claim: Claim, cancelled: str) -> None:
        """Finish a build that nobody works on any more."""
        reason = cancelled or f"the builder died {MAX_ATTEMPTS} times while {_DOING[claim.record.spec.kind]}"
        log = await self._read_live(claim.record.build_id)
        line_break = "" if not log or log.endswith(b"\n") else "\n"
        await self.append_log(claim, f"{line_break}>> The build ends here: {reason}.\n".encode())
        await self.finish(claim, exit_status=FAILED, reason=reason)

    async def _read_live(self, build_id: str) -> bytes:
        async with answered():
            return cast(bytes | None, await self._redis.get(key("log", build_id))) or b""


async def no_quota() -> None:
    """What ``submit`` awaits for jobs that nobody is limited in."""


def _lost(claim: Claim) -> LeaseLost:
    return LeaseLost(f"build {claim.record.build_id} is not this builder's any more")
