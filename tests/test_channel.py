"""Calls to Platforms over whichever process has the session: replies, their absence, and sessions that come and go."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
import pytest

from tests.patience import PATIENCE_S, patience
from tests.redis_faults import durable_redis
from wave_proxy.errors import StateUnavailable
from wave_proxy.image.platform import PlatformCall, PlatformReply
from wave_proxy.state.channel import Channel, NoSession
from wave_proxy.state.redis import cancel, connect

ENDPOINT = "https://platform.example/api"
CALL = PlatformCall("GET", f"{ENDPOINT}/user-info", "Bearer t", headers={"Accept": "application/json"})


@asynccontextmanager
async def channel(url: str, **arguments: Any) -> AsyncIterator[Channel]:
    """One process's part."""
    redis = connect(url)
    one = Channel(redis, **{"call_s": PATIENCE_S, **arguments})
    task = asyncio.create_task(one.run())
    try:
        yield one
    finally:
        await cancel(task)
        await redis.aclose()


class Far:
    """The far end of a session: keeps what it is sent, and answers unless told not to."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.sent: list[dict[str, Any]] = []
        self.silent = False
        self.session: Any = None

    async def take(self, text: str) -> None:
        message = orjson.loads(text)
        self.sent.append(message)
        if not self.silent:
            reply = {"msgId": message["msgId"], "status": 200, "body": self.name, "headers": {"X-A": ["1", "2"]}}
            await self.session.answer(reply)


@asynccontextmanager
async def session(one: Channel, far: Far) -> AsyncIterator[None]:
    with one.session(ENDPOINT, far.take) as far.session:
        await one.announce(ENDPOINT)
        task = asyncio.create_task(far.session.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    await one.announce(ENDPOINT)


async def test_a_call_is_answered_through_the_process_that_has_the_session(redis_url: str) -> None:
    async with channel(redis_url) as here, channel(redis_url) as there:
        far = Far("one")
        async with session(there, far):
            assert await here.call(ENDPOINT, CALL) == PlatformReply(200, "one", {"x-a": ("1", "2")})
            assert await there.call(ENDPOINT, CALL) == PlatformReply(200, "one", {"x-a": ("1", "2")})
        sent = far.sent[0]
        assert sent.pop("msgId")
        assert sent == {
            "@type": "proxy-http-request",
            "method": "GET",
            "uri": f"{ENDPOINT}/user-info",
            "auth": "Bearer t",
            "body": None,
            "headers": {"Accept": ["application/json"]},
        }


async def test_two_hundred_calls_at_once_each_get_their_own_reply(redis_url: str) -> None:
    async with channel(redis_url) as here, channel(redis_url) as there:
        async with session(there, Far("a")), session(there, Far("b")):
            replies = await asyncio.gather(*(here.call(ENDPOINT, CALL) for _ in range(200)))
        assert {reply.body for reply in replies} == {"a", "b"}


async def test_without_a_session_a_call_fails_at_once(redis_url: str) -> None:
    async with patience(), channel(redis_url, call_s=3600.0) as here, channel(redis_url) as there:
        with pytest.raises(NoSession):
            await here.call(ENDPOINT, CALL)
        async with session(there, Far("x")):
            assert (await here.call(ENDPOINT, CALL)).status == 200
        with pytest.raises(NoSession):
            await here.call(ENDPOINT, CALL)


async def test_a_session_that_does_not_answer_costs_the_caller_his_time_and_nobody_elses(redis_url: str) -> None:
    async with channel(redis_url, call_s=1.5) as here, channel(redis_url) as there:
        far = Far("x")
        async with session(there, far):
            far.silent = True
            calls = [here.call(ENDPOINT, CALL) for _ in range(100)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, TimeoutError) for result in results)
            far.silent = False
            assert (await here.call(ENDPOINT, CALL)).status == 200


async def test_odd_replies_are_dropped(redis_url: str) -> None:
    async with channel(redis_url) as here:
        far = Far("x")
        async with session(here, far):
            for reply in ({}, {"msgId": "none", "status": 200}, {"msgId": 3}):
                await far.session.answer(reply)
            assert (await here.call(ENDPOINT, CALL)).status == 200


async def test_calls_go_on_when_redis_comes_back() -> None:
    async with (
        durable_redis() as server,
        channel(server.url, call_s=2.0) as here,
        channel(server.url) as there,
        session(there, Far("x")),
    ):
        assert (await here.call(ENDPOINT, CALL)).status == 200
        server.stop()
        with pytest.raises(StateUnavailable):
            await here.call(ENDPOINT, CALL)
        await server.start()
        async with patience():
            while True:
                with suppress(StateUnavailable, NoSession, TimeoutError):
                    assert (await here.call(ENDPOINT, CALL)).status == 200
                    break
                await asyncio.sleep(0.05)
