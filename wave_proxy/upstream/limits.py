"""How hard a registry may be pressed: requests at the same time, and bytes of blobs a second."""

import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from time import monotonic
from weakref import WeakValueDictionary

_STEP_S = 0.1


@dataclass(frozen=True, slots=True)
class Limit:
    """Of one registry; None: as many as are wanted."""

    connections: int | None = None
    bytes_per_second: int | None = None

    def share(self, workers: int) -> "Limit":
        """What one of so many processes may use: an equal part, and at least one connection."""
        return Limit(
            self.connections and max(self.connections // workers, 1),
            self.bytes_per_second and max(self.bytes_per_second // workers, 1),
        )


class Pace:
    """Bytes a second for all who share it, in the order in which they come."""

    def __init__(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second
        self._paid_until = 0.0  # the instant at which what was spent so far is paid for
        self.step = max(int(bytes_per_second * _STEP_S), 1)  # spend no more than this at once

    async def spend(self, size: int) -> None:
        """Return when so many bytes more may be taken."""
        now = monotonic()
        due = max(self._paid_until, now)
        self._paid_until = due + size / self._rate
        if due > now:
            await asyncio.sleep(due - now)


class Limits:
    """The limits of all registries, in one process. ``default`` is for those that have none of their own."""

    def __init__(self, limits: Mapping[str, Limit] | None = None, default: Limit | None = None) -> None:
        self._limits = dict(limits or {})
        self._default = default or Limit()
        self._paces = {
            name: Pace(limit.bytes_per_second) for name, limit in self._limits.items() if limit.bytes_per_second
        }
        # Clients name registries as they like: a semaphore is kept for as long as somebody has it or waits.
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def slot(self, registry: str) -> AbstractAsyncContextManager[object]:
        """One of the registry's connections for as long as the block runs, in the order of asking."""
        most = self._limits.get(registry, self._default).connections
        if most is None:
            return nullcontext()
        slots = self._slots.get(registry)
        if slots is None:
            slots = self._slots[registry] = asyncio.Semaphore(most)
        return slots

    def pace(self, registry: str) -> Pace | None:
        """The registry's byte rate, None without one."""
        return self._paces.get(registry)
