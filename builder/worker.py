"""The builder's life: claims builds, holds their leases while they run, and reports how they end."""

import asyncio
from contextlib import suppress
from typing import Any

import structlog

from builder.failures import CANCELLED, NOT_BUILT, BuildFailed
from builder.logbook import LogBook
from builder.work import Work, Works, until_answered
from wave_proxy.errors import StateUnavailable
from wave_proxy.image.build import split_build_id
from wave_proxy.state.builds import BuildCancelled, BuildStore, Claim, LeaseLost

_BLOCK_S = 1.0  # how long a claim waits, and thereby how long it takes to notice that the builder is to stop
_PAUSE_S = 1.0
_TOLD_AGAIN_S = 10.0
_EARLIER = 10  # builds that are asked for a lock

log = structlog.get_logger()


class Worker:
    """One builder process, which runs up to ``slots`` builds at a time.

    ``name`` tells it from the other builders. Leases are renewed every ``lease_s`` / 3, as the store has them.
    """

    def __init__(self, store: BuildStore, works: Works, name: str, *, slots: int, lease_s: float = 15.0) -> None:
        self._store = store
        self._works = works
        self._name = name
        self._slots = slots
        self._renew_s = lease_s / 3

    async def run(self, stop: asyncio.Event, grace_s: float) -> None:
        """Work until ``stop`` is set; then give back what runs, within ``grace_s``."""
        running: set[asyncio.Task[None]] = set()
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                if len(running) >= self._slots:
                    await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
                elif claim := await self._claim(stop):
                    running.add(asyncio.create_task(self._work(claim)))
                running = {task for task in running if not task.done()}
        finally:
            stopping.cancel()
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running, timeout=grace_s)

    async def _claim(self, stop: asyncio.Event) -> Claim | None:
        try:
            claim = await self._store.claim(self._name, _BLOCK_S)
        except StateUnavailable as err:
            log.warning("no word of builds", error=str(err))
            await _pause(stop)
            return None
        if claim is None or (self._works.does(claim.record.spec.kind) and not stop.is_set()):
            return claim
        await self._give_back(claim)
        await _pause(stop)  # another builder claims it meanwhile
        return None

    async def _work(self, claim: Claim) -> None:
        """One build to its end, whatever that is. A cancellation gives it back."""
        record = claim.record
        log.info("build begins", build=record.build_id, image=record.spec.target_image, attempt=record.attempt)
        try:
            await _Attempt(self._store, self._works, claim, self._renew_s).run()
        except LeaseLost:
            log.warning("build was taken over by another builder", build=record.build_id)
        except asyncio.CancelledError:
            await self._give_back(claim)
        except Exception:
            log.exception("build is left to another builder", build=record.build_id)

    async def _give_back(self, claim: Claim) -> None:
        with suppress(LeaseLost, StateUnavailable):  # then its lease runs out
            await self._store.release(claim)
        log.info("build is given back", build=claim.record.build_id)


class _Attempt:
    """One claim: the build, its log and its lease, side by side."""

    def __init__(self, store: BuildStore, works: Work, claim: Claim, renew_s: float) -> None:
        self._store = store
        self._works = works
        self._claim = claim
        self._renew_s = renew_s
        self._book = LogBook(self._append)

    async def run(self) -> None:
        """Raises LeaseLost, also in the middle; when it ends, nothing of the build runs any more."""
        sending = asyncio.create_task(self._book.run())
        leasing = asyncio.create_task(self._hold())
        try:
            exit_status, digest, reason = await self._outcome({sending, leasing})
            reason = self._book.shown(reason)
            if reason:
                self._book.say(f"failed: {reason}")
            self._book.close()
            await sending
            lock = await until_answered(lambda: self._lock(exit_status))
            await until_answered(
                lambda: self._store.finish(
                    self._claim, exit_status=exit_status, digest=digest, reason=reason, lock=lock
                )
            )
            log.info("build ended", build=self._claim.record.build_id, exit_status=exit_status, reason=reason)
        except asyncio.CancelledError:
            self._book.say("this builder is stopped, the build begins anew at the next one")
            self._book.close()
            with suppress(Exception):
                await sending
            raise
        finally:
            await _end(sending, leasing)

    async def _outcome(self, others: set[asyncio.Task[None]]) -> tuple[int, str, str]:
        """Exit status, digest and reason. Raises LeaseLost."""
        building = asyncio.create_task(self._works.run(self._claim.record, self._book, self._confirm))
        try:
            await asyncio.wait({building, *others}, return_when=asyncio.FIRST_COMPLETED)
            for task in others:
                if task.done():
                    task.result()
            return 0, building.result(), ""
        except BuildCancelled as err:
            return CANCELLED, "", str(err)
        except BuildFailed as err:
            return err.exit_status, "", err.reason
        except (LeaseLost, asyncio.CancelledError):
            raise
        except Exception as err:
            log.exception("the builder has a fault", build=self._claim.record.build_id)
            return NOT_BUILT, "", f"a fault of the builder ({type(err).__name__}), which its operator finds in its log"
        finally:
            await _end(building)

    async def _hold(self) -> None:
        """Renew the lease until cancelled. Raises LeaseLost, BuildCancelled."""
        while True:
            await asyncio.sleep(self._renew_s)
            try:
                await self._store.renew(self._claim)
            except StateUnavailable as err:
                # Nobody else can have taken it either; if they do later, the next renewal says so.
                log.warning("a lease can't be renewed", build=self._claim.record.build_id, error=str(err))

    async def _confirm(self) -> None:
        """Return when the build is certainly still ours. Raises LeaseLost, BuildCancelled."""
        await until_answered(lambda: self._store.renew(self._claim))

    async def _append(self, text: bytes) -> None:
        await until_answered(lambda: self._store.append_log(self._claim, text))

    async def _lock(self, exit_status: int) -> bytes | None:
        """The Conda lock that the build printed; when the step that prints it came out of a cache, an earlier one's."""
        if self._book.lock is not None or exit_status != 0 or not self._book.echoed_lock:
            return self._book.lock
        series, number = split_build_id(self._claim.record.build_id) or ("", 0)
        for earlier in range(number - 1, max(number - 1 - _EARLIER, 0), -1):
            record = await self._store.find(f"{series}_{earlier}")
            if record is not None and record.succeeded:
                return await self._store.read_lock(record.build_id)
        return None


async def _pause(stop: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_PAUSE_S):
            await stop.wait()


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and wait for its end however long that takes; what it raises is of no interest."""
    cancelled = False
    while waiting := [task for task in tasks if not task.done()]:
        for task in waiting:
            task.cancel()
        try:
            # The state store's client sometimes takes a cancellation for a limit of its own: then it is told again.
            await asyncio.wait(waiting, timeout=_TOLD_AGAIN_S)
        except asyncio.CancelledError:
            cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()
    if cancelled:
        raise asyncio.CancelledError
