"""The one place that imports the Redis client: connecting, and one error for everything that can go wrong there."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import monotonic

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from wave_proxy.errors import StateUnavailable

__all__ = ["Redis", "answered", "cancel", "check", "connect", "place_of", "translated", "wait_until_up"]

TIMEOUT_S = 5.0
_CONNECTIONS = 32  # a process; a thousand requests at once wait for these rather than open a thousand
_START_S = 5.0
_MAX_SAID = 200

_log = structlog.get_logger()


def connect(url: str) -> Redis:
    """A client for ``redis://``, ``rediss://`` or ``unix://`` addresses; connects when it is first used.

    Raises ValueError for any other address.
    """
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=_CONNECTIONS,
        timeout=TIMEOUT_S,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), 3),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
        health_check_interval=30,
    )
    return Redis.from_pool(pool)


@contextmanager
def translated() -> Iterator[None]:
    """Turns the client library's errors into StateUnavailable, so that no other module has to know them.

    Its message is for clients: of the cause, which tells places and keys, only the log and ``__cause__`` know.
    """
    try:
        with _heeded():
            yield
    except ResponseError as err:
        # Of a pipeline's error, what Redis said: the command before it holds the client's data.
        said = str(err).rpartition("caused error:")[2].partition("wave:")[0].strip(" ()',\"")
        raise StateUnavailable(f"the state store (Redis) refuses: {said[:_MAX_SAID]}") from err
    except RedisError as err:
        _log.debug("the state store does not answer", error=str(err))
        raise StateUnavailable("the state store (Redis) does not answer; try again in a moment") from err


@asynccontextmanager
async def answered() -> AsyncIterator[None]:
    """As ``translated``, for one operation that must end within 5 s, the client library's own retries included."""
    with translated():
        try:
            async with asyncio.timeout(TIMEOUT_S):
                with _heeded():  # once more, within the time limit: that cancels, too
                    yield
        except TimeoutError as err:
            raise RedisTimeoutError(f"no answer within {TIMEOUT_S:g} s") from err


@contextmanager
def _heeded() -> Iterator[None]:
    """Ends what was cancelled meanwhile, when nobody else has.

    The client library sends through asyncio.wait_for, which before Python 3.12 forgets a cancellation (one for a time
    limit, too) that comes in the turn of the loop in which the sending ends.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    finally:
        if task and task.cancelling() > before:
            raise asyncio.CancelledError


async def cancel(*tasks: "asyncio.Task[None]") -> None:
    """Cancel tasks that use a client, and wait for their end.

    Within one ``translated`` block, a loop for instance, the client library may have forgotten a cancellation (see
    ``_heeded``): then it is told again.
    """
    running: Iterable[asyncio.Task[None]] = tasks
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=1.0)


async def check(client: Redis) -> None:
    """One round trip. Raises StateUnavailable."""
    async with answered():
        await client.ping()


async def wait_until_up(client: Redis) -> None:
    """Return when Redis answers, which one that was started just now does soon.

    Raises StateUnavailable after 5 s, for the operator: with the address and what the client library says.
    """
    deadline = monotonic() + _START_S
    while True:
        try:
            return await check(client)
        except StateUnavailable as err:
            if monotonic() > deadline:
                raise StateUnavailable(
                    f"the state store (Redis) at {place_of(client)} does not answer: {err.__cause__}"
                ) from err
        await asyncio.sleep(0.02)


def place_of(client: Redis) -> str:
    """Where a client's Redis is, for messages: without what its address may hold of a password."""
    told = client.connection_pool.connection_kwargs
    return told.get("path") or f"{told.get('host', 'localhost')}:{told.get('port', 6379)}"
