"""Which digest a tag stands for: asked upstream at most once per ``tag_ttl``, kept for when upstream does not answer.

``<root>/tags/<hash of registry/repository:tag>`` is JSON, so that the workers of a machine share the answers.
"""

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
        self._asking: Flights[str, TagAnswer] = Flights()

    async def find(self, name: str, ask: Callable[[], Awaitable[str]]) -> TagAnswer:
        """The digest of ``name`` (``registry/repository:tag``), from ``ask`` when what we know is older than the ttl.

        One request asks, the others of this worker wait for it. When upstream can't answer (no connection, 429, 5xx),
        a known digest is given as stale; otherwise ``ask``'s error is raised.
        """
        known = self._recall(name)
        if known is not None and self._is_fresh(known):
            return known
        return await self._asking.run(name, lambda: self._ask(name, known, ask))

    async def _ask(self, name: str, known: TagAnswer | None, ask: Callable[[], Awaitable[str]]) -> TagAnswer:
        try:
            answer = TagAnswer(await ask(), time())
        except (UpstreamError, HostUnknown, TooManyRequests) as err:
            if known is None:
                raise
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
