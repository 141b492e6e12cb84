"""Which digest a tag stands for: asked upstream at most once per ``tag_ttl``, kept for when upstream does not answer.

``<root>/tags/<hash of registry/repository:tag>`` is JSON, so that the workers of a machine share the answers.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import time

import orjson
import structlog

from wave_proxy.cache.blobs import write_whole
from wave_proxy.cache.flight import Flights
from wave_proxy.errors import HostUnknown, StorageFull, TooManyRequests, UpstreamError

_log = structlog.get_logger()

_MEMORY = 20_000
_PATIENCE_S = 1.0
_LEFT_ALONE_S = 10.0


@dataclass(frozen=True, slots=True)
class TagAnswer:
    """What a tag stood for when upstream was last asked, at ``checked`` (epoch seconds)."""

    digest: str
    checked: float
    stale: bool = False


class Tags:
    """The tags of one data folder."""

    def __init__(self, root: Path, ttl_s: float) -> None:
        self._folder = root / "tags"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ttl_s = ttl_s
        self._memory: OrderedDict[str, TagAnswer] = OrderedDict()
        self._down_until: dict[str, float] = {}  # by registry; only of registries that have answered before
        self._asking: Flights[str, TagAnswer] = Flights()

    async def find(self, name: str, ask: Callable[[], Awaitable[str]]) -> TagAnswer:
        """The digest of ``name`` (``registry/repository:tag``), from ``ask`` when what we know is older than the ttl.

        One request of this worker asks. Where a digest is known, the others get that meanwhile, and so does the one
        that asks when upstream is slow or can't answer (no connection, 429, 5xx), marked as stale; a registry that
        could not answer is left alone for some seconds. Where none is known, all wait, and get ``ask``'s error.
        """
        known = self._recall(name)
        if known is not None and self._is_fresh(known):
            return known
        if known is None:
            return await self._asking.run(name, lambda: self._ask(name, None, ask))
        stale = TagAnswer(known.digest, known.checked, stale=True)
        if name in self._asking or time() < self._down_until.get(_registry(name), 0):
            return stale
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await self._asking.run(name, lambda: self._ask(name, known, ask))
        except TimeoutError:  # the question goes on without us
            return stale

    async def _ask(self, name: str, known: TagAnswer | None, ask: Callable[[], Awaitable[str]]) -> TagAnswer:
        try:
            answer = TagAnswer(await ask(), time())
        except (UpstreamError, HostUnknown, TooManyRequests) as err:
            if known is None:
                raise
            self._down_until[_registry(name)] = time() + _LEFT_ALONE_S
            _log.warning("upstream does not answer, serving what is known", name=name, error=str(err))
            return TagAnswer(known.digest, known.checked, stale=True)
        self._remember(name, answer)
        try:
            write_whole(
                self._path(name), orjson.dumps({"digest": answer.digest, "checked": answer.checked}), sync=False
            )
        except StorageFull:
            _log.warning("data folder full, tag kept in memory", name=name)
        return answer

    async def close(self) -> None:
        """End what is being asked."""
        await self._asking.close()

    def _recall(self, name: str) -> TagAnswer | None:
        known = self._memory.get(name)
        if known is not None and self._is_fresh(known):
            return known
        try:
            document = orjson.loads(self._path(name).read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return known
        match document:
            case {"digest": str(digest), "checked": float(checked)}:
                self._remember(name, TagAnswer(digest, checked))
        return self._memory.get(name)

    def _is_fresh(self, answer: TagAnswer) -> bool:
        # An answer from the future was given before the clock was set back.
        return 0 <= time() - answer.checked < self._ttl_s

    def _remember(self, name: str, answer: TagAnswer) -> None:
        self._memory[name] = answer
        self._memory.move_to_end(name)
        if len(self._memory) > _MEMORY:
            self._memory.popitem(last=False)

    def _path(self, name: str) -> Path:
        hashed = sha256(name.encode()).hexdigest()
        return self._folder / hashed[:2] / hashed


def _registry(name: str) -> str:
    return name.partition("/")[0]
