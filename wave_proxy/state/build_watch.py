"""Which builds go on and how long their logs are, asked once for all who want to know it in a process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from time import monotonic

from wave_proxy.errors import StateUnavailable
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.redis import cancel

_PAUSE_S = 0.3
_PATIENCE_S = 10.0  # a state store that restarts is away for less


class Progress:
    """How far a build is: the bytes of its log that there are at least, and whether it is done (or forgotten)."""

    def __init__(self) -> None:
        self.watchers = 0
        self._record: BuildRecord | None = None
        self._lock = asyncio.Lock()
        self._size = 0
        self._ended = False
        self._error: StateUnavailable | None = None
        self._changed = asyncio.Event()

    async def wait_for(self, size: int) -> None:
        """Return when the log has more than ``size`` bytes or the build is done. Raises StateUnavailable."""
        while self._size <= size:
            await self._change()
            if self._ended:
                return

    async def wait_for_end(self) -> None:
        """Return when the build is done. Raises StateUnavailable."""
        while not self._ended:
            await self._change()

    async def record(self, find: Callable[[], Awaitable[BuildRecord | None]]) -> BuildRecord | None:
        """What ``find`` has found after the end; it is called by one for all, and again only when it has found none."""
        async with self._lock:
            if self._record is None:
                self._record = await find()
            return self._record

    async def _change(self) -> None:
        if not self._ended and self._error is None:
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    def note(self, size: int, ended: bool) -> None:
        """Tell what has been found."""
        if size != self._size or ended:
            self._size, self._ended = size, ended
            self._tell()

    def fail(self, error: StateUnavailable) -> None:
        """Tell that nothing more will be found."""
        self._error = error
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Watches:
    """The builds that somebody in this process waits for."""

    def __init__(self, look: Callable[[Iterable[str]], Awaitable[list[tuple[int, bool]]]]) -> None:
        """``look`` tells for each of the build ids the size of its log and whether it is done (or forgotten)."""
        self._look = look
        self._watched: dict[str, Progress] = {}
        self._task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def watch(self, build_id: str) -> AsyncIterator[Progress]:
        """The progress of a build, for as long as it is watched here."""
        progress = self._watched.setdefault(build_id, Progress())
        progress.watchers += 1
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            yield progress
        finally:
            progress.watchers -= 1
            if not progress.watchers and self._watched.get(build_id) is progress:
                del self._watched[build_id]
            await self._rest()

    async def _rest(self) -> None:
        if not self._watched and self._task is not None:
            task, self._task = self._task, None
            await cancel(task)

    async def _run(self) -> None:
        """Look at all that is watched every 0.3 s."""
        answered_at = monotonic()
        while True:
            watched = dict(self._watched)
            try:
                found = await self._look(watched)
            except StateUnavailable as err:
                if monotonic() - answered_at > _PATIENCE_S:
                    self._fail(err)
            else:
                answered_at = monotonic()
                for progress, (size, ended) in zip(watched.values(), found, strict=True):
                    progress.note(size, ended)
            await asyncio.sleep(_PAUSE_S)

    def _fail(self, error: StateUnavailable) -> None:
        failed, self._watched = self._watched, {}
        for progress in failed.values():
            progress.fail(error)
