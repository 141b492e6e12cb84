"""What the worker asks of those who do its jobs: builds, mirrors and scans each have a pipeline."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

from builder.logbook import LogBook
from wave_proxy.errors import StateUnavailable
from wave_proxy.image.build import BuildRecord, Kind

T = TypeVar("T")

Confirm = Callable[[], Awaitable[None]]
"""Returns when the job is certainly still this builder's; raises LeaseLost or BuildCancelled."""

_PAUSE_S = 1.0


class Work(Protocol):
    """Does the jobs of one kind."""

    async def run(self, record: BuildRecord, book: LogBook, confirm: Confirm) -> str:
        """Do one job; returns the digest of the image that it was about. ``book`` takes its log.

        ``confirm`` is awaited before anything is changed that others see. Nothing of the job is left on this machine.
        Raises BuildFailed, and what ``confirm`` raises.
        """


class Works:
    """The kinds of jobs that this builder does, each done by its own."""

    def __init__(self, kinds: Mapping[Kind, Work]) -> None:
        self._kinds = dict(kinds)

    def does(self, kind: str) -> bool:
        """Whether jobs of that kind are for this builder: others give them back, for one that does them."""
        return kind in self._kinds

    async def run(self, record: BuildRecord, book: LogBook, confirm: Confirm) -> str:
        """As Work has it, for the kinds that this builder does."""
        return await self._kinds[record.spec.kind].run(record, book, confirm)


async def until_answered(operation: Callable[[], Awaitable[T]]) -> T:
    """What ``operation`` brings, however long the state store is away: jobs have a limit of their own on time."""
    while True:
        try:
            return await operation()
        except StateUnavailable:
            await asyncio.sleep(_PAUSE_S)
