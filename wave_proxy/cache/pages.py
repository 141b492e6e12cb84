"""Pages of tags lists: asked upstream each time, and as they last were when upstream can't answer. In memory only."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from time import time

from wave_proxy.cache.flight import Flights
from wave_proxy.cache.tags import UNANSWERED
from wave_proxy.upstream.registry import TagsPage

_MEMORY_BYTES = 8 << 20
_OVERHEAD_BYTES = 1000  # of a page, beside its content and what was asked
_PATIENCE_S = 5.0

Key = tuple[str, str, str]
"""Registry (with the key of the login that is used, and an @ in front), repository and query."""


@dataclass(frozen=True, slots=True)
class ListedTags:
    """A page as upstream gave it at ``checked`` (epoch seconds); ``stale`` when it could not be asked again now."""

    page: TagsPage
    checked: float
    stale: bool = False


class TagsPages:
    """The last pages that this worker has seen."""

    def __init__(self) -> None:
        self._memory: OrderedDict[Key, ListedTags] = OrderedDict()
        self._bytes = 0
        self._asking: Flights[Key, ListedTags] = Flights()

    async def find(self, key: Key, fetch: Callable[[], Awaitable[TagsPage]]) -> ListedTags:
        """The page from ``fetch``, of which one a page is under way at a time; a known one when that fails, or dawdles.

        Raises what ``fetch`` raises where upstream refuses, or where nothing is known.
        """

        async def ask() -> ListedTags:
            listed = ListedTags(await fetch(), time())
            self._remember(key, listed)
            return listed

        known = self._memory.get(key)
        try:
            async with asyncio.timeout(None if known is None else _PATIENCE_S):
                return await self._asking.run(key, ask)
        except (*UNANSWERED, TimeoutError):
            if known is None:
                raise
            return replace(known, stale=True)

    async def close(self) -> None:
        """End what is being asked."""
        await self._asking.close()

    def _remember(self, key: Key, listed: ListedTags) -> None:
        self._forget(key)
        self._memory[key] = listed
        self._bytes += _size(key, listed)
        while self._bytes > _MEMORY_BYTES:
            self._forget(next(iter(self._memory)))

    def _forget(self, key: Key) -> None:
        listed = self._memory.pop(key, None)
        if listed is not None:
            self._bytes -= _size(key, listed)


def _size(key: Key, listed: ListedTags) -> int:
    return sum(map(len, key)) + len(listed.page.content) + len(listed.page.link) + _OVERHEAD_BYTES
