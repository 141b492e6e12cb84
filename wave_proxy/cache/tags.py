"""Which digest a tag stands for: asked upstream about once per ``tag_ttl``, kept for when upstream does not answer.

The rule, by the age of the answer that is known; one question a tag and worker is under way at a time:

- up to 80 % of the ttl: given, upstream is not asked;
- up to the ttl: given, and asked for in the background, so that a tag in use never keeps anybody waiting;
- past the ttl while the question is under way: given as stale, at most a second past the ttl;
- older, which is a tag that nobody wanted for a while: all wait for the answer, at most a second from when it was asked
  for; then, and when upstream can't answer (no connection, 429, 5xx), what is known is given as stale, however old;
- while the last question failed: given as stale at once; it is asked again in the background every few seconds.

So while upstream answers within a second, nobody gets a digest that is older than the ttl and a second. That upstream
refuses (404, 403) is an answer as well: it ends what this worker gives without asking.

``<root>/tags/<hash of key@registry/repository:tag>``, with the key of the login that was used, is JSON, so that the
workers of a machine share the answers.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import time

import orjson
import structlog

from wave_proxy.cache.blobs import write_whole
from wave_proxy.cache.flight import Flights
from wave_proxy.errors import HostUnknown, StorageFull, TooManyRequests, UpstreamError, WaveError

_log = structlog.get_logger()

_MEMORY = 20_000
_AHEAD = 0.8  # share of the ttl after which the question goes out
_PATIENCE_S = 1.0  # also how long past the ttl an answer is given while the question is under way
_AGAIN_S = 5.0  # after a question that failed
_HELD_S = 0.2  # an answer that waits for a better one is given on for so long without a look

Ask = Callable[[], Awaitable[tuple[str, bool]]]
"""Asks upstream: the digest, and whether its manifest had to be fetched."""

UNANSWERED = (UpstreamError, HostUnknown, TooManyRequests)
"""What is raised when upstream can't be asked, or answers nonsense: what is known is better."""


@dataclass(frozen=True, slots=True)
class TagAnswer:
    """What a tag stood for when upstream was last asked, at ``checked``.

    ``stale``: that is longer ago than the ttl. ``until``: the same answer may be given again until then, without
    another look. ``fetched``: this question brought a manifest that was not here. Times are epoch seconds.
    """

    digest: str
    checked: float
    until: float
    stale: bool = False
    fetched: bool = False


@dataclass(slots=True)
class _Known:
    """What this worker knows of a tag, and of the questions since then; times are epoch seconds."""

    digest: str
    checked: float
    asked: float = 0.0
    ask_again: float = 0.0  # not 0: the last question brought no answer
    refused: bool = False


class Tags:
    """The tags of one data folder."""

    def __init__(self, root: Path, ttl_s: float) -> None:
        self._folder = root / "tags"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ttl_s = ttl_s
        self._memory: OrderedDict[str, _Known] = OrderedDict()
        self._asking: Flights[str, TagAnswer] = Flights()

    async def find(self, name: str, ask: Ask) -> TagAnswer:
        """The digest of ``name`` (``key@registry/repository:tag``), from ``ask`` when what we know is too old.

        Where nothing is known, all wait for one question, and get its error.
        """
        now = time()
        known = self._recall(name, now)
        if known is None or known.refused:
            return await self._asking.run(name, lambda: self._ask(name, None, ask))
        if self._is_young(known, now, _AHEAD * self._ttl_s):
            return self._answer(known, known.checked + _AHEAD * self._ttl_s, now)
        begins = name not in self._asking and not 0 < known.ask_again - now <= _AGAIN_S
        if begins:
            known.asked = now
            self._asking.start(name, lambda: self._ask(name, known, ask))
        if known.ask_again:
            return self._answer(known, max(known.ask_again, now + _HELD_S), now)
        if self._is_young(known, now, self._ttl_s):
            return self._answer(known, min(now + _HELD_S, known.checked + self._ttl_s), now)
        return await self._wait(name, known, now, begins)

    async def _wait(self, name: str, known: _Known, now: float, begins: bool) -> TagAnswer:
        """What the question that is under way brings, for those who have to wait for it."""
        patience_s = known.asked + _PATIENCE_S - now
        recent = self._is_young(known, now, self._ttl_s + _PATIENCE_S)
        if patience_s > 0 and (begins or not recent):
            with suppress(TimeoutError):  # the question goes on without us
                async with asyncio.timeout(patience_s):
                    return await self._asking.join(name)
        return self._answer(known, time() + _HELD_S, time())

    async def _ask(self, name: str, known: _Known | None, ask: Ask) -> TagAnswer:
        try:
            digest, fetched = await ask()
        except UNANSWERED as err:
            if known is None:
                raise
            if not known.ask_again:
                _log.warning("upstream does not answer, serving what is known", name=_shown(name), error=str(err))
            known.ask_again = time() + _AGAIN_S
            return self._answer(known, known.ask_again, time())
        except WaveError:
            if known is not None:
                known.refused = True
            raise
        answer = _Known(digest, time())
        self._remember(name, answer)
        self._store(name, answer)
        until = answer.checked + _AHEAD * self._ttl_s
        return replace(self._answer(answer, until, answer.checked), fetched=fetched)

    async def close(self) -> None:
        """End what is being asked."""
        await self._asking.close()

    def _answer(self, known: _Known, until: float, now: float) -> TagAnswer:
        return TagAnswer(known.digest, known.checked, until, stale=not self._is_young(known, now, self._ttl_s))

    def _is_young(self, known: _Known, now: float, limit_s: float) -> bool:
        # An answer from the future was given before the clock was set back.
        return 0 <= now - known.checked < limit_s

    def _recall(self, name: str, now: float) -> _Known | None:
        """What is known; another worker may know more."""
        known = self._memory.get(name)
        if known is not None and (self._is_young(known, now, _AHEAD * self._ttl_s) or name in self._asking):
            return known
        try:
            document = orjson.loads(self._path(name).read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return known
        match document:
            case {"digest": str(digest), "checked": float(checked)} if known is None or checked > known.checked:
                known = _Known(digest, checked)
                self._remember(name, known)
        return known

    def _remember(self, name: str, known: _Known) -> None:
        self._memory[name] = known
        self._memory.move_to_end(name)
        if len(self._memory) > _MEMORY:
            self._memory.popitem(last=False)

    def _store(self, name: str, known: _Known) -> None:
        document = orjson.dumps({"digest": known.digest, "checked": known.checked})
        try:
            write_whole(self._path(name), document, sync=False)
        except StorageFull:
            _log.warning("data folder full, tag kept in memory", name=_shown(name))

    def _path(self, name: str) -> Path:
        hashed = sha256(name.encode()).hexdigest()
        return self._folder / hashed[:2] / hashed


def _shown(name: str) -> str:
    return name.rpartition("@")[2]  # what a key stands for could be guessed from it
