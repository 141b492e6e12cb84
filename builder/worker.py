"""The builder's life: connected to the state store until it is told to stop."""

import asyncio

import structlog

from wave_proxy.state.redis import Redis, wait_until_up

log = structlog.get_logger()


class Worker:
    """One builder process. There are no build engines yet, so it claims nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop`` is set. Raises StateUnavailable when the state store does not answer at the start."""
        await wait_until_up(self._redis)
        log.debug("builder is running; this version has no build engines, so there is nothing to build")
        await stop.wait()
