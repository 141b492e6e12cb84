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
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.get_running_loop().create_task(self._finish(key, call))
            task.add_done_callback(_take_exception)
        return await asyncio.shield(task)

    def __contains__(self, key: K) -> bool:
        """Whether a call is under way for ``key``."""
        return key in self._tasks

    async def _finish(self, key: K, call: Callable[[], Awaitable[V]]) -> V:
        try:
            return await call()
        finally:
            del self._tasks[key]

    async def close(self) -> None:
        """Cancel what is under way and wait for its end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _take_exception(task: "asyncio.Task[V]") -> None:
    # Without a waiter left, nobody would take the exception, and asyncio would complain of that.
    if not task.cancelled():
        task.exception()
