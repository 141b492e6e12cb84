"""Which repositories a login opens: upstream said so, and is asked again once that is ``permission_ttl`` ago.

What upstream shows without a login is shown to everybody, and needs none of this. With a login, each answer of upstream
about a repository says that the login opens it, as of when it saw the login: a bearer token may outlive that. A refusal
ends it at once, on the disk as well; another worker that has heard otherwise before finds out when that is too old.
When upstream can't be asked (no connection, 429, 5xx), what was known goes on.

``<root>/permissions/<hash of login and repository>`` is empty; its time is when upstream last said so.
"""

import asyncio
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from time import time

import structlog

from wave_proxy.cache.flight import Flights
from wave_proxy.cache.tags import UNANSWERED
from wave_proxy.errors import WaveError

_log = structlog.get_logger()

_MEMORY = 20_000
_AHEAD = 0.8  # share of the ttl
_PATIENCE_S = 1.0
_AGAIN_S = 5.0  # after a question that failed
_NOTED_S = 1.0  # the file's time needs no better

Ask = Callable[[], Awaitable[float]]
"""Asks upstream for something of the repository; gives when it saw the login (epoch seconds), as late as can be."""


class Permissions:
    """The logins' permissions in one data folder."""

    def __init__(self, root: Path, ttl_s: float) -> None:
        self._folder = root / "permissions"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._ttl_s = ttl_s
        self._confirmed: OrderedDict[str, float] = OrderedDict()
        self._ask_again: dict[str, float] = {}  # names whose last question brought no answer
        self._asking: Flights[tuple[str, str], None] = Flights()

    def confirm(self, name: str, seen: float) -> None:
        """Upstream has given something of ``name`` (``key@registry/repository``) for a login that it saw then."""
        self._ask_again.pop(name, None)
        known = self._confirmed.get(name, 0.0)
        if seen - known >= _NOTED_S or known > time():
            self._remember(name, seen)
            with suppress(OSError):  # on a full disk, for this worker only
                path = self._path(name)
                path.parent.mkdir(exist_ok=True)
                path.touch()
                os.utime(path, (seen, seen))

    @property
    def oldest(self) -> float:
        """A login that was seen before that (epoch seconds) is better seen again when upstream is asked anyway."""
        return time() - _AHEAD * self._ttl_s

    def end(self, name: str) -> None:
        """Upstream refuses."""
        self._confirmed.pop(name, None)
        self._ask_again.pop(name, None)
        with suppress(FileNotFoundError):
            self._path(name).unlink()

    def until(self, name: str) -> float:
        """Until when nobody has to be asked (epoch seconds)."""
        return max(self._confirmed.get(name, 0.0) + self._ttl_s, self._ask_again.get(name, 0.0))

    async def ensure(self, name: str, what: str, ask: Ask) -> None:
        """Return when the login opens the repository, by what is known or by ``ask``, which is about ``what`` in it.

        Raises what ``ask`` raises where upstream refuses, or where nothing is known and it can't be asked.
        """
        now, confirmed = time(), self._recall(name)
        if self._is_young(confirmed, now) or (confirmed and 0 < self._ask_again.get(name, 0.0) - now <= _AGAIN_S):
            return
        try:
            async with asyncio.timeout(_PATIENCE_S if confirmed else None):  # the question goes on without us
                await self._asking.run((name, what), lambda: self._ask(name, ask))
        except (*UNANSWERED, TimeoutError) as err:
            if not confirmed or not self._recall(name):
                raise
            self._ask_again[name] = time() + _AGAIN_S
            place = name.rpartition("@")[2]
            _log.warning("upstream does not answer, permission is taken for granted", name=place, error=str(err))

    async def _ask(self, name: str, ask: Ask) -> None:
        try:
            seen = await ask()
        except UNANSWERED:
            raise
        except WaveError:
            self.end(name)
            raise
        self.confirm(name, seen)

    def _is_young(self, confirmed: float, now: float) -> bool:
        # One from the future was given before the clock was set back.
        return 0 <= now - confirmed < self._ttl_s

    def _recall(self, name: str) -> float:
        """When upstream last said so (epoch seconds), 0 when it never has; another worker may know more."""
        confirmed = self._confirmed.get(name, 0.0)
        if not self._is_young(confirmed, time()):
            try:
                noted = os.stat(self._path(name)).st_mtime
            except FileNotFoundError:
                noted = 0.0
            if noted != confirmed and noted:
                self._remember(name, noted)
            elif not noted:
                self._confirmed.pop(name, None)
            confirmed = noted
        return confirmed

    def _remember(self, name: str, confirmed: float) -> None:
        self._confirmed[name] = confirmed
        self._confirmed.move_to_end(name)
        if len(self._confirmed) > _MEMORY:
            forgotten, _ = self._confirmed.popitem(last=False)
            self._ask_again.pop(forgotten, None)

    def _path(self, name: str) -> Path:
        hashed = sha256(name.encode()).hexdigest()
        return self._folder / hashed[:2] / hashed

    async def close(self) -> None:
        """End what is being asked."""
        await self._asking.close()
