"""Logs that are followed, builds that are waited for, and a Redis that goes away or forgets."""

import asyncio
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from tests.builds_state import (
    DIGEST,
    ONE_SLOT,
    STREAM,
    admit,
    claimed,
    run_out,
    spec,
    store,
    submitted,
)
from tests.patience import PATIENCE_S
from tests.redis_faults import durable_redis
from wave_proxy.errors import StateUnavailable
from wave_proxy.state import build_records, build_watch
from wave_proxy.state.builds import BuildLimits, BuildStore, LeaseLost
from wave_proxy.state.redis import connect

# --- logs --------------------------------------------------------------------------------------------------------


async def gather_log(builds: BuildStore, build_id: str, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in builds.follow_log(build_id, offset)])


async def test_followers_get_every_byte_once(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_watch, "_PAUSE_S", 0.01)
    monkeypatch.setattr(build_records, "_PIECE_BYTES", 1000)
    random = Random(1)
    text = b""
    async with store(redis_url) as builds, store(redis_url) as readers:
        build_id = await submitted(builds)
        offsets = [0, 0, 1, 4999, 20_000, 10**9]
        followers = [asyncio.create_task(gather_log(readers, build_id, offset)) for offset in offsets]
        claim = await claimed(builds)
        for step in range(60):
            piece = random.randbytes(random.choice([0, 1, 10, 700, 5000]))
            await builds.append_log(claim, piece)
            await asyncio.sleep(random.choice([0, 0, 0.005, 0.02]))
            if step % 10 == 0:
                followers.append(asyncio.create_task(gather_log(readers, build_id, len(text))))
                offsets.append(len(text))
            text += piece
            if step == 40:
                await run_out(redis_url)
                claim = await claimed(builds)
                text = await builds.read_log(build_id) or b""
        await builds.finish(claim, exit_status=0)
        for offset, follower in zip(offsets, followers, strict=True):
            assert await follower == text[offset:]
        for offset in (0, 5, len(text) - 1, len(text), len(text) + 1):
            assert await gather_log(readers, build_id, offset) == text[offset:]
        assert await builds.read_log(build_id) == text
        assert readers._watches._task is None


@pytest.mark.parametrize(
    "text",
    [bytes(3_000_000), Random(2).randbytes(700_000), b"a line\n" * 100_000, b"x"],
    ids=["zeros", "noise", "lines", "short"],
)
async def test_what_there_is_comes_in_pieces(redis_url: str, text: bytes) -> None:
    """None is large, so that nobody who is slow to take them holds much."""
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        assert not await builds.has_log(build_id)
        claim = await claimed(builds)
        for start in range(0, len(text), 1 << 20):
            await builds.append_log(claim, text[start : start + (1 << 20)])

        async def check() -> None:
            assert await builds.has_log(build_id)
            for offset in (0, 1, 300_000, len(text), len(text) + 1):
                pieces = [piece async for piece in builds.read_pieces(build_id, offset)]
                assert b"".join(pieces) == text[offset:]
                assert max(map(len, pieces), default=0) <= 1 << 18
            for most in (1, 1000, len(text), len(text) + 1):
                assert await builds.read_end(build_id, most) == (text[-most:], max(len(text) - most, 0))

        await check()
        await builds.finish(claim, exit_status=0)
        await check()


async def test_a_line_is_there_before_the_next_one(redis_url: str) -> None:
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        log = builds.follow_log(build_id)
        first = asyncio.create_task(anext(log))
        assert not (await asyncio.wait([first], timeout=0.1))[0]
        claim = await claimed(builds)
        await builds.append_log(claim, b"one\n")
        assert await first == b"one\n"
        await builds.append_log(claim, b"two\n")
        assert await anext(log) == b"two\n"
        await builds.finish(claim, exit_status=0)
        assert [piece async for piece in log] == []


async def test_a_log_that_is_not_there_ends_at_once(redis_url: str) -> None:
    async with store(redis_url) as builds:
        assert await gather_log(builds, f"bd-{0:016x}_1") == b""
        build_id = await submitted(builds)
        await builds.cancel(build_id)
        assert await gather_log(builds, build_id) == b""


async def test_a_follower_that_goes_away_leaves_nothing(redis_url: str) -> None:
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        before = asyncio.all_tasks()
        followers = [asyncio.create_task(gather_log(builds, build_id)) for _ in range(10)]
        await asyncio.sleep(0.05)
        for follower in followers:
            follower.cancel()
        await asyncio.wait(followers)
        assert asyncio.all_tasks() == before
        assert builds._watches._watched == {}


# --- waiting -----------------------------------------------------------------------------------------------------


async def test_ten_thousand_wait_cheaply_for_ten_builds(redis_url: str) -> None:
    async with store(redis_url, BuildLimits(10)) as builds, store(redis_url) as readers:
        ids = [await submitted(builds, number) for number in range(10)]
        waiting = [asyncio.create_task(readers.wait_done(ids[i % 10], PATIENCE_S)) for i in range(10_000)]
        claims = [await claimed(builds) for _ in ids]
        await asyncio.sleep(0.1)
        async with connect(redis_url) as redis:
            before = (await redis.info("stats"))["total_commands_processed"]
            await asyncio.sleep(0.19)
            asked = (await redis.info("stats"))["total_commands_processed"] - before
        assert asked < 1000
        assert not any(task.done() for task in waiting)
        for claim in claims:
            await builds.finish(claim, exit_status=0, digest=DIGEST)
        records = await asyncio.gather(*waiting)
        async with connect(redis_url) as redis:
            assert (await redis.info("commandstats"))["cmdstat_hgetall"]["calls"] < 1000
        assert all(record is not None and record.digest == DIGEST for record in records)
        assert Counter(record.build_id for record in records if record) == dict.fromkeys(ids, 1000)
        assert readers._watches._task is None


async def test_who_waits_too_short_gets_the_record_as_it_stands(redis_url: str) -> None:
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        for seconds in (0.0, 0.05):
            record = await builds.wait_done(build_id, seconds)
            assert record is not None
            assert record.phase == "queued"
        assert await builds.wait_done(f"bd-{1:016x}_1", PATIENCE_S) is None
        assert builds._watches._watched == {}


# --- Redis goes away -----------------------------------------------------------------------------------------------


async def test_without_redis_everything_says_so() -> None:
    async with durable_redis() as redis, store(redis.url) as builds:
        build_id = await submitted(builds)
        claim = await claimed(builds)
        redis.stop()
        calls: list[Callable[[], Any]] = [
            lambda: builds.submit(spec(1), admit),
            lambda: builds.find(build_id),
            lambda: builds.newest(f"bd-{0:016x}"),
            lambda: builds.find_by_target("registry.test/built:0"),
            lambda: builds.cancel(build_id),
            builds.queue_length,
            lambda: builds.read_log(build_id),
            lambda: builds.has_log(build_id),
            lambda: builds.read_end(build_id, 1),
            lambda: builds.read_lock(build_id),
            lambda: gather_log(builds, build_id),
            lambda: builds.wait_done(build_id, 0.01),
            lambda: builds.claim("builder", 1),
            lambda: builds.renew(claim),
            lambda: builds.append_log(claim, b"text"),
            lambda: builds.finish(claim, exit_status=0),
        ]
        for call in calls:
            with pytest.raises(StateUnavailable):
                await call()


async def test_waiting_outlives_a_restart_of_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    async with durable_redis() as redis, store(redis.url) as builds, store(redis.url) as readers:
        build_id, second = await submitted(builds), await submitted(builds, 1)
        claim = await claimed(builds)
        await builds.append_log(claim, b"before\n")
        log = readers.follow_log(build_id)
        assert await anext(log) == b"before\n"
        waiting = asyncio.create_task(readers.wait_done(build_id, PATIENCE_S))
        following = asyncio.create_task(anext(log))
        await asyncio.sleep(0.05)
        redis.stop()
        await asyncio.sleep(0.19)
        await redis.start()
        await builds.renew(claim)
        await builds.append_log(claim, b"after\n")
        assert await following == b"after\n"
        await builds.finish(claim, exit_status=0)
        record = await waiting
        assert record is not None
        assert record.succeeded
        assert [piece async for piece in log] == []
        assert (await claimed(builds)).record.build_id == second


async def test_who_waits_is_told_when_redis_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_watch._PATIENCE_S > 5
    monkeypatch.setattr(build_watch, "_PATIENCE_S", 0.0)
    async with durable_redis() as redis, store(redis.url) as builds:
        build_id = await submitted(builds)
        waiting = [asyncio.create_task(builds.wait_done(build_id, PATIENCE_S)) for _ in range(3)]
        await asyncio.sleep(0.05)
        redis.stop()
        for task in waiting:
            with pytest.raises(StateUnavailable):
                await task
        assert builds._watches._watched == {}


async def test_a_redis_that_has_forgotten_everything_is_used_anew(redis_url: str) -> None:
    async with store(redis_url) as builds, connect(redis_url) as redis:
        build_id = await submitted(builds)
        claim = await claimed(builds)
        waiting = asyncio.create_task(builds.wait_done(build_id, PATIENCE_S))
        blocked = asyncio.create_task(builds.claim("other", PATIENCE_S))
        await asyncio.sleep(0.05)
        await redis.flushall()
        assert await waiting is None
        with pytest.raises(LeaseLost):
            await builds.renew(claim)
        with pytest.raises(LeaseLost):
            await builds.finish(claim, exit_status=0)
        assert await submitted(builds) == build_id
        found = await blocked
        assert found is not None
        assert found.record.attempt == 1
        assert await builds.queue_length() == (0, 1)


async def test_a_consumer_group_that_is_gone_is_made_again(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds, connect(redis_url) as redis:
        first, second = await submitted(builds), await submitted(builds, 1)
        lost = await claimed(builds)
        await redis.xgroup_destroy(STREAM, "builders")
        assert await builds.queue_length() == (2, 0)
        again = await claimed(builds)
        assert (again.record.build_id, again.record.attempt) == (first, 2)
        with pytest.raises(LeaseLost):
            await builds.renew(lost)
        assert await builds.claim("builder", 0.0) is None
        await builds.finish(again, exit_status=0)
        assert (await claimed(builds)).record.build_id == second
