"""The vulnerability database in its folder: renewed by one, read by many, also by several builders of a machine."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

from builder.failures import NOT_BUILT, BuildFailed

_RENEW_S = 3600.0  # after a download, and the program looks itself at how old the database is
_AGAIN_S = 300.0  # after a download that failed, while there is an old one
_PATIENCE_S = 20.0  # with those who read, before the old one is used once more
_POLL_S = 0.1

Download = Callable[[], Awaitable[int]]
"""Renews the database, if it is old; the exit status of the program that did."""


class Advisories:
    """The database of one builder process, in a folder that others may use as well."""

    def __init__(self, folder: Path, *, offline: bool) -> None:
        """With ``offline`` nothing is downloaded: the operator brings what there is."""
        self._folder = folder
        self._offline = offline
        self._renew_at = 0.0
        self._renewing = asyncio.Lock()

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._folder

    @property
    def offline(self) -> bool:
        """Whether nothing is downloaded."""
        return self._offline

    @property
    def has_java_index(self) -> bool:
        """Whether there is an index of Java archives as well, which only images with such need."""
        return (self._folder / "java-db" / "metadata.json").is_file()

    @asynccontextmanager
    async def reading(self, download: Download, say: Callable[[str], None]) -> AsyncIterator[None]:
        """There is a database, as new as can be, and it stays as it is until the end of the block.

        Raises BuildFailed when there is none.
        """
        if self._offline:
            if not self._is_there():
                raise BuildFailed(
                    "no vulnerability database: [scan] offline is set, and there is none in [scan] cache", NOT_BUILT
                )
        else:
            async with self._renewing:  # one for all of this process
                await self._renew(download, say)
        async with self._lock(fcntl.LOCK_SH):
            yield

    async def change(self, download: Download) -> None:
        """Do a download while nobody reads; a failure shows in what is missing after it."""
        async with self._renewing, self._lock(fcntl.LOCK_EX):
            await download()

    async def _renew(self, download: Download, say: Callable[[str], None]) -> None:
        if monotonic() < self._renew_at and self._is_there():
            return
        try:
            async with asyncio.timeout(_PATIENCE_S if self._is_there() else None) as limit:
                async with self._lock(fcntl.LOCK_EX):
                    limit.reschedule(None)
                    status = await download()
        except TimeoutError:
            if not limit.expired():
                raise
            return  # it is being read all the time: the next one may be luckier
        self._renew_at = monotonic() + (_RENEW_S if status == 0 else _AGAIN_S)
        if status == 0 and self._is_there():
            return
        if not self._is_there():
            raise BuildFailed(
                "no vulnerability database: it can't be downloaded, the log says why; let the builder reach it, name a "
                "mirror in [scan] arguments, or put one into [scan] cache and set [scan] offline",
                NOT_BUILT,
            )
        say("the vulnerability database can't be renewed: what there is has to do")

    def _is_there(self) -> bool:
        return (self._folder / "db" / "metadata.json").is_file()

    @asynccontextmanager
    async def _lock(self, kind: int) -> AsyncIterator[None]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        opened = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                if _try_lock(opened, kind):
                    break
                await asyncio.sleep(_POLL_S)
            yield
        finally:
            os.close(opened)


def _try_lock(opened: int, kind: int) -> bool:
    try:
        fcntl.flock(opened, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
