"""Pulls of images that are still building: held until the build ends, as long as clients bear it.

Docker does not try again and kubelet backs off after an error, so an answer that comes late is better than a refusal.
What each client bears: the spec's decisions, 16.
"""

import asyncio
from collections import OrderedDict
from re import compile as compile_pattern

import structlog

from wave_proxy.cache.flight import Flights
from wave_proxy.errors import ManifestUnknown, StateUnavailable, StillBuilding
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.builds import BuildStore

_log = structlog.get_logger()

_CONTAINERD = compile_pattern(r"\bcontainerd/v?([0-9]+)\.([0-9]+)")
_IMPATIENT = (2, 3)  # from this version on, containerd wants a response's head within 30 s
_IMPATIENT_S = 25.0
_ROUND_S = 60.0
_REMEMBERED = 10_000
_TAIL_LINES = 20
_TAIL_CHARS = 2000
_TAIL_BYTES = 8000  # hold so many characters, or more


class Holds:
    """What one worker knows of builds, by the image that they make."""

    def __init__(self, builds: BuildStore, wait_s: float) -> None:
        self._builds = builds
        self._wait_s = wait_s
        self._built: OrderedDict[str, None] = OrderedDict()
        self._waiting: Flights[str, BuildRecord | None] = Flights()

    async def wait(self, image: str, user_agent: str, *, afresh: bool = False) -> bool:
        """Return when no build of ``image`` (a whole reference) is due: True when one has made it, False without one.

        What is remembered of builds that succeeded is not used ``afresh``. Without Redis nothing is held.
        Raises ManifestUnknown, with the end of its log, when the last build of it has failed; StillBuilding when it
        takes longer than the client waits; StateUnavailable when Redis goes away meanwhile.
        """
        if image in self._built and not afresh:
            self._built.move_to_end(image)
            return True
        try:
            record = await self._builds.find_by_target(image)
        except StateUnavailable as err:
            _log.warning("nothing is known of builds", error=str(err))
            return False
        if record is not None and record.phase != "done":
            record = await self._join(record, user_agent)
        if record is None:
            return False
        if not record.succeeded:
            raise ManifestUnknown(await self._explain(record))
        self._built[image] = None
        if len(self._built) > _REMEMBERED:
            self._built.popitem(last=False)
        return True

    async def _join(self, record: BuildRecord, user_agent: str) -> BuildRecord | None:
        """The record at the build's end; the question to the store is one for all who wait for the same build."""
        build_id, found = record.build_id, record
        try:
            async with asyncio.timeout(patience_s(user_agent, self._wait_s)):
                while found.phase != "done":
                    now = await self._waiting.run(build_id, lambda: self._builds.wait_done(build_id, _ROUND_S))
                    if now is None:
                        return None
                    found = now
        except TimeoutError:
            raise StillBuilding(f"the image is still being built ({build_id}): try again in a moment") from None
        return found

    async def _explain(self, record: BuildRecord) -> str:
        log, _ = await self._builds.read_end(record.build_id, _TAIL_BYTES)
        lines = log.decode(errors="replace").rstrip().splitlines()[-_TAIL_LINES:]
        text = f"the build of this image has failed ({record.build_id}): {record.reason or 'no reason is known'}"
        tail = "\n".join(lines)[-_TAIL_CHARS:]
        return f"{text}\nIts log ends with:\n{tail}" if tail else text

    async def close(self) -> None:
        """End what is being waited for."""
        await self._waiting.close()


def patience_s(user_agent: str, wait_s: float) -> float:
    """How long a pull by that client may be held: ``wait_s``, less for those that give up sooner."""
    match = _CONTAINERD.search(user_agent)
    if match is not None and (int(match[1]), int(match[2])) >= _IMPATIENT:
        return min(wait_s, _IMPATIENT_S)
    return wait_s
