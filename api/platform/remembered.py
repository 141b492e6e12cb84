"""What Platforms have answered: asked for once at a time, and used on while a Platform does not answer."""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic, time
from typing import Any

import structlog

from wave_proxy.errors import PlatformError, UpstreamTimeout, UpstreamUnavailable, WaveError
from wave_proxy.state.answers import Answers

_log = structlog.get_logger()

_BRIEF_S = 0.0  # one attempt, where there is an answer to go on with
_LEEWAY_S = 10.0  # beyond the patience: what one call takes, and one more after a refreshed token
_REST_S = 30.0  # so long a Platform that does not answer is not asked what can be answered without it

Fetch = Callable[[float], Awaitable[tuple[Any, float]]]
"""Asks a Platform, for up to so many seconds; returns its answer as JSON values, and for how many more it is fresh."""


class Remembered:
    """One process's way to answers; all processes share what is known."""

    def __init__(self, answers: Answers, patience_s: float) -> None:
        self._answers = answers
        self._patience_s = patience_s
        self._flights: dict[tuple[object, ...], asyncio.Task[Any]] = {}
        self._resting: dict[str, float] = {}  # by endpoint, until when (monotonic)

    async def get(self, endpoint: str, fetch: Fetch, *asked: object) -> Any:
        """The answer to what was asked of a Platform, as fresh as can be had.

        Raises what ``fetch`` raises: when the Platform refuses, or when it does not answer and never has.
        """
        key = (endpoint, *asked)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._renewed(key, endpoint, fetch))
            flight.add_done_callback(lambda done: self._land(key, done))
        return await asyncio.shield(flight)

    def _land(self, key: tuple[object, ...], done: "asyncio.Task[Any]") -> None:
        del self._flights[key]
        if not done.cancelled():
            done.exception()  # nobody may be left to take it

    async def _renewed(self, key: tuple[object, ...], endpoint: str, fetch: Fetch) -> Any:
        kept = await self._answers.find(*key)
        if kept is not None and (kept.fresh_until > time() or self._resting.get(endpoint, 0.0) > monotonic()):
            return kept.value
        try:
            value, fresh_s = await _in_time(endpoint, fetch, self._patience_s if kept is None else _BRIEF_S)
        except (PlatformError, UpstreamUnavailable, UpstreamTimeout) as err:
            if _is_refusal(err):
                await self._answers.drop(*key)
                raise
            if kept is None:
                raise
            self._resting[endpoint] = monotonic() + _REST_S
            _log.warning("a Platform does not answer, its last answer is used", endpoint=endpoint, error=str(err))
            return kept.value
        await self._answers.keep(value, time() + fresh_s, *key)
        return value

    async def close(self) -> None:
        """End what is being asked."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)


async def _in_time(endpoint: str, fetch: Fetch, patience_s: float) -> tuple[Any, float]:
    try:
        async with asyncio.timeout(patience_s + _LEEWAY_S):
            return await fetch(patience_s)
    except TimeoutError:
        raise PlatformError(408, f"Timeout error connecting to '{endpoint}'") from None


def _is_refusal(err: WaveError) -> bool:
    return isinstance(err, PlatformError) and not err.is_temporary
