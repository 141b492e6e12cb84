"""How tests wait for what must come: as long as a slow and busy machine may take, and no longer than it does take."""

import asyncio
from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

PATIENCE_S = 120.0  # what takes longer hangs

_PAUSE_S = 0.01

T = TypeVar("T")
Problem = str | Callable[[], str]


def until(
    holds: Callable[[], T | None], problem: Problem = "it does not come about", within_s: float = PATIENCE_S
) -> T:
    """What ``holds`` returns as soon as that is true. Raises AssertionError with the problem when it takes too long."""
    deadline = monotonic() + within_s
    while not (found := holds()):
        assert monotonic() < deadline, _told(problem)
        sleep(_PAUSE_S)
    return found


async def eventually(holds: Callable[[], T | None], problem: Problem = "it does not come about") -> T:
    """The same, while other tasks go on."""
    deadline = monotonic() + PATIENCE_S
    while not (found := holds()):
        assert monotonic() < deadline, _told(problem)
        await asyncio.sleep(_PAUSE_S)
    return found


def patience() -> asyncio.Timeout:
    """A block that takes longer hangs: it ends with TimeoutError."""
    return asyncio.timeout(PATIENCE_S)


def _told(problem: Problem) -> str:
    return problem if isinstance(problem, str) else problem()
