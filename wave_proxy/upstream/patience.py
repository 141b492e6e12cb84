"""Trying again what fails for a time, as long as jobs have time for it: after the time that the other side asks for."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from wave_proxy.errors import Offline, TooManyRequests, UpstreamFailing, UpstreamTimeout, UpstreamUnavailable

T = TypeVar("T")

_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.25
_MAX_PAUSE_S = 15.0


async def patiently(what: str, operation: Callable[[], Awaitable[T]], say: Callable[[str], None]) -> T:
    """What ``operation`` brings; tried again when it fails for a reason that passes. ``say`` is told in words.

    Raises what the last attempt has raised.
    """
    attempt = 1
    while True:
        try:
            return await operation()
        except (UpstreamUnavailable, UpstreamTimeout, TooManyRequests) as err:
            if attempt >= _ATTEMPTS or isinstance(err, Offline):
                raise
            pause_s = _pause_s(err, attempt)
            say(f"{what}: {err}; trying again in {pause_s:.1f} s")
        await asyncio.sleep(pause_s)
        attempt += 1


def _pause_s(err: Exception, attempt: int) -> float:
    if isinstance(err, TooManyRequests | UpstreamFailing) and err.retry_after_s is not None:
        return err.retry_after_s
    pause_s: float = min(_FIRST_PAUSE_S * 2.0**attempt, _MAX_PAUSE_S)
    return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries, hides nothing
