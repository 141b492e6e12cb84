"""``python -m builder``: one builder process, configured as the proxy is (WAVE_CONFIG_FILE and environment)."""

import asyncio
import signal
import sys

import structlog

from builder.worker import Worker
from wave_proxy.config import ConfigInvalid, Settings, receive
from wave_proxy.errors import StateUnavailable
from wave_proxy.logs import configure
from wave_proxy.state.redis import connect

log = structlog.get_logger()


async def run(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT. Raises StateUnavailable when Redis does not answer."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    redis = connect(settings.redis_url.get_secret_value())
    try:
        await Worker(redis).run(stop)
    finally:
        await redis.aclose()
    log.info("builder stopped")


def main() -> int:
    """The exit code: 0 after a signal, 2 for settings that can't be used, 1 without Redis."""
    try:
        settings = receive()
    except ConfigInvalid as err:
        print(f"error: {err}", file=sys.stderr)  # noqa: T201
        return 2
    configure(settings.log.format, settings.log.level, "builder")
    if not settings.redis_url.get_secret_value():
        log.error("redis_url is empty: a builder on its own needs the Redis that the proxy uses; set WAVE_REDIS_URL")
        return 2
    try:
        asyncio.run(run(settings))
    except StateUnavailable as err:
        log.error(str(err))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
