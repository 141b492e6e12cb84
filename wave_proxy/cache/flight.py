"""One call for many callers who want the same thing at the same time."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Flights(Generic[K, V]):
    """Calls under way, by key.

    A call belongs to this object, not to the caller that began it: callers may be cancelled without harm to it or to
    each other. Its error goes to those who wait for it and is forgotten with it.
    """

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[V]] = {}

    async def run(self, key: K, call: Callable[[], Awaitable[V]]) -> V:
        """The result of the call under way for ``key``, or of ``call``, begun now."""
        if key not in self._tasks:
            self.start(key, call)
        return await self.join(key)

    def start(self, key: K, call: Callable[[], Awaitable[V]]) -> None:
        """Begin a call where none is under way."""
        task = self._tasks[key] = asyncio.get_running_loop().create_task(_result(call))
        task.add_done_callback(lambda done: self._end(key, done))

    async def join(self, key: K) -> V:
        """The result of the call that is under way."""
        return await asyncio.shield(self._tasks[key])

    def __contains__(self, key: K) -> bool:
        """Whether a call is under way for ``key``."""
        return key in self._tasks

    def _end(self, key: K, task: "asyncio.Task[V]") -> None:
        # Not the call's own doing: one that is cancelled before its first step would stay, and be everybody's end.
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # without a waiter left, nobody would take it, and asyncio would complain of that

    async def close(self) -> None:
        """Cancel what is under way and wait for its end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _result(call: Callable[[], Awaitable[V]]) -> V:
    return await call()
