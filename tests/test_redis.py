"""The one place that imports the Redis client: what is cancelled ends, whatever the client was about to do."""

import asyncio

import pytest

from tests.patience import PATIENCE_S
from wave_proxy.errors import StateUnavailable
from wave_proxy.state.redis import answered, cancel, connect, translated


@pytest.mark.parametrize("turns", range(40))
async def test_a_cancellation_at_any_moment_is_heeded(redis_url: str, turns: int) -> None:
    async with connect(redis_url) as redis:
        asked = 0

        async def ask() -> None:
            nonlocal asked
            while True:
                async with answered():
                    await redis.ping()
                asked += 1

        asking = asyncio.create_task(ask())
        while not asked:
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        before = asked
        asking.cancel()
        ended, _ = await asyncio.wait([asking], timeout=PATIENCE_S)
        await cancel(asking)
        assert ended
        assert asked == before


async def test_what_goes_on_after_its_own_cancellation_may_ask(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        answers = []

        async def ask() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                with translated():
                    answers.append(await redis.ping())
                async with answered():
                    answers.append(await redis.ping())

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert answers == [True, True]


async def test_a_cancellation_counts_for_more_than_an_error(redis_url: str) -> None:
    async def ask() -> None:
        with translated():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise StateUnavailable("as a library says that confuses the two") from None

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
