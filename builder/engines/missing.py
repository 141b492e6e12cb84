"""Stands in for an engine that can't run: better a build that fails with the reason than one that waits for ever."""

from pathlib import Path

from builder.engines import EngineMissing, Job
from builder.failures import NOT_BUILT, BuildFailed


class MissingEngine:
    """Fails every build with that reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    @property
    def registry(self) -> str:
        """Nothing is pulled."""
        return "localhost"

    async def check(self) -> None:
        """Raises EngineMissing."""
        raise EngineMissing(self._reason)

    async def build(self, job: Job) -> Path:
        """Raises BuildFailed."""
        raise BuildFailed(f"the builder can't run builds: {self._reason}", NOT_BUILT)
