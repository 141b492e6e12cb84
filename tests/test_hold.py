"""Pulls of what is still being built are held, for as long as each client bears."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.patience import PATIENCE_S
from tests.redis_faults import durable_redis
from wave_proxy.errors import ManifestUnknown, StillBuilding
from wave_proxy.image.build import BuildSpec
from wave_proxy.serve.hold import Holds, patience_s
from wave_proxy.state.builds import BuildLimits, BuildStore, Claim
from wave_proxy.state.redis import connect

IMAGE = "wave.example/local/build:0123456789abcdef"
SPEC = BuildSpec("0123456789abcdef", IMAGE, "FROM base\n")
DIGEST = f"sha256:{'1' * 64}"


@asynccontextmanager
async def stores(url: str) -> AsyncIterator[tuple[BuildStore, BuildStore]]:
    """The store as the proxy has it, and as a builder has it."""
    clients = connect(url), connect(url)
    try:
        yield BuildStore(clients[0], BuildLimits(4)), BuildStore(clients[1], BuildLimits(4))
    finally:
        for client in clients:
            await client.aclose()


@asynccontextmanager
async def holding(store: BuildStore, wait_s: float = PATIENCE_S) -> AsyncIterator[Holds]:
    holds = Holds(store, wait_s)
    try:
        yield holds
    finally:
        await holds.close()


async def begin(store: BuildStore) -> Claim:
    """A build of the image in the hands of a builder."""

    async def admit() -> None:
        """Everybody may."""

    await store.submit(SPEC, admit)
    claim = await store.claim("test", PATIENCE_S)
    assert claim is not None
    return claim


async def end(store: BuildStore, claim: Claim, **result: Any) -> None:
    await store.append_log(claim, b"".join(b"line %d\n" % number for number in range(30)))
    await store.finish(claim, **result)


@pytest.mark.parametrize(
    ("user_agent", "seconds"),
    [
        ("containerd/v2.3.0", 25.0),
        ("containerd/2.10.1", 25.0),
        ("cri-tools containerd/v3.0", 25.0),
        ("containerd/v2.2.9", 270.0),
        ("containerd/1.7.20", 270.0),
        ("docker/28.2.2 go/go1.24", 270.0),
        ("", 270.0),
    ],
)
def test_each_client_is_held_for_as_long_as_it_bears(user_agent: str, seconds: float) -> None:
    assert patience_s(user_agent, 270.0) == seconds


async def test_nothing_is_held_without_a_build(redis_url: str) -> None:
    async with stores(redis_url) as (store, _), holding(store) as holds:
        assert await holds.wait(IMAGE, "") is False


async def test_all_who_wait_go_on_when_the_build_succeeds(redis_url: str) -> None:
    async with stores(redis_url) as (store, other), holding(store) as holds:
        claim = await begin(other)
        waiting = [asyncio.create_task(holds.wait(IMAGE, "")) for _ in range(500)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        await end(other, claim, exit_status=0, digest=DIGEST)
        assert await asyncio.gather(*waiting) == [True] * 500
        assert await holds.wait(IMAGE, "") is True


async def test_a_failure_is_told_with_the_end_of_the_log(redis_url: str) -> None:
    async with stores(redis_url) as (store, other), holding(store) as holds:
        claim = await begin(other)
        waiting = asyncio.create_task(holds.wait(IMAGE, ""))
        await asyncio.sleep(0.05)
        await end(other, claim, exit_status=137, reason="out of memory: the build used its limit of 4.0 GB")
        with pytest.raises(ManifestUnknown) as told:
            await waiting
        lines = str(told.value).splitlines()
        assert lines[0].startswith(f"the build of this image has failed ({claim.record.build_id}): out of memory")
        assert lines[2:] == [f"line {number}" for number in range(10, 30)]
        with pytest.raises(ManifestUnknown):
            await holds.wait(IMAGE, "")


async def test_who_waits_too_long_is_told_to_come_back(redis_url: str) -> None:
    async with stores(redis_url) as (store, other), holding(store, wait_s=0.1) as holds:
        await begin(other)
        with pytest.raises(StillBuilding) as told:
            await holds.wait(IMAGE, "docker/28")
        assert told.value.status == 503
        assert told.value.retry_after_s


async def test_a_client_that_goes_away_does_not_end_the_wait_of_others(redis_url: str) -> None:
    async with stores(redis_url) as (store, other), holding(store) as holds:
        claim = await begin(other)
        first, second = (asyncio.create_task(holds.wait(IMAGE, "")) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await end(other, claim, exit_status=0, digest=DIGEST)
        assert await second is True


async def test_an_image_that_is_built_again_is_waited_for_again(redis_url: str) -> None:
    async def admit() -> None:
        """Everybody may."""

    async with stores(redis_url) as (store, other), holding(store, wait_s=0.1) as holds:
        claim = await begin(other)
        await end(other, claim, exit_status=0, digest=DIGEST)
        assert await holds.wait(IMAGE, "") is True
        await other.submit(SPEC, admit, gone=claim.record.build_id)
        assert await holds.wait(IMAGE, "") is True
        with pytest.raises(StillBuilding):
            await holds.wait(IMAGE, "", afresh=True)


async def test_without_redis_nothing_is_held() -> None:
    async with durable_redis() as redis, stores(redis.url) as (store, _), holding(store) as holds:
        redis.stop()
        assert await holds.wait(IMAGE, "") is False
