"""Jobs that come after a build: started with its end, in one stroke, whoever is alive then."""

import pytest

from tests.builds_state import (
    DIGEST,
    FOUR_SLOTS,
    ONE_SLOT,
    admit,
    claimed,
    keys,
    known,
    run_out,
    spec,
    store,
    submitted,
)
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.state.build_scripts import MAX_ATTEMPTS
from wave_proxy.state.builds import BuildStore
from wave_proxy.state.redis import connect


def scan_of(number: int = 0) -> BuildSpec:
    """A scan of what the build with that number makes."""
    return spec(number, kind="scan", container_file="", source_image=f"registry.test/built:{number}")


async def follow(builds: BuildStore, build_id: str, number: int = 0) -> BuildRecord:
    record, is_new = await builds.submit(scan_of(number), admit, after=build_id)
    assert is_new
    return record


async def test_it_waits_for_the_build_and_runs_after_it(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        build_id = await submitted(builds)
        scan = await follow(builds, build_id)
        assert scan.build_id == f"sc-{0:016x}_1"
        assert scan.phase == "queued"
        claim = await claimed(builds)
        assert claim.record.build_id == build_id
        assert await builds.claim("other", 0.0) is None
        assert await builds.queue_length() == (0, 1)
        await builds.finish(claim, exit_status=0, digest=DIGEST)
        follower = await claimed(builds)
        assert follower.record.build_id == scan.build_id
        assert follower.record.created >= (await known(builds, build_id)).finished > scan.created
        await builds.finish(follower, exit_status=0)
        assert await builds.queue_length() == (0, 0)
    async with connect(redis_url) as redis:
        left = [name for name in await keys(redis) if name.startswith(("followers", "waiting", "running"))]
    assert left == []


async def test_equal_ones_share_it(redis_url: str) -> None:
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        first = await follow(builds, build_id)
        again, is_new = await builds.submit(scan_of(), admit, after=build_id)
        assert (again.build_id, is_new) == (first.build_id, False)
        await builds.finish(await claimed(builds), exit_status=0)
        assert (await claimed(builds)).record.build_id == first.build_id
        assert await builds.claim("other", 0.0) is None


async def test_it_fails_with_the_build(redis_url: str) -> None:
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        scan = await follow(builds, build_id)
        await builds.finish(await claimed(builds), exit_status=3, reason="broken")
        ended = await known(builds, scan.build_id)
        assert (ended.phase, ended.exit_status, ended.reason) == ("done", 3, f"there is no image: {build_id} failed")
        assert await builds.queue_length() == (0, 0)
        assert await builds.claim("other", 0.0) is None
    async with connect(redis_url) as redis:
        lifetimes = await keys(redis)
    assert all(lifetimes[f"{kind}:{scan.build_id}"] > 0 for kind in ("build",))
    assert f"spec:{scan.build_id}" not in lifetimes


async def test_it_fails_with_a_build_that_is_cancelled_in_line(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        running = await submitted(builds, 1)
        claim = await claimed(builds)
        assert claim.record.build_id == running
        scan = await follow(builds, await submitted(builds))
        assert await builds.cancel(f"bd-{0:016x}_1")
        assert (await known(builds, scan.build_id)).succeeded is False
        assert await builds.queue_length() == (0, 1)


async def test_it_fails_with_a_build_whose_builders_die(redis_url: str) -> None:
    async with store(redis_url) as builds:
        scan = await follow(builds, await submitted(builds))
        for _ in range(MAX_ATTEMPTS):
            await claimed(builds)
            await run_out(redis_url)
        assert await builds.claim("last", 0.0) is None
        assert (await known(builds, scan.build_id)).succeeded is False


@pytest.mark.parametrize("build_id", [f"bd-{0:016x}_1", f"bd-{9:016x}_9"], ids=["done", "unknown"])
async def test_there_is_nothing_to_wait_for(redis_url: str, build_id: str) -> None:
    async with store(redis_url) as builds:
        await submitted(builds)
        await builds.finish(await claimed(builds), exit_status=0)
        scan = await follow(builds, build_id)
        assert (await claimed(builds)).record.build_id == scan.build_id


async def test_it_is_cancelled_while_it_waits_for_the_build(redis_url: str) -> None:
    async with store(redis_url, FOUR_SLOTS) as builds:
        scan = await follow(builds, await submitted(builds))
        assert await builds.cancel(scan.build_id)
        await builds.finish(await claimed(builds), exit_status=0)
        assert await builds.claim("other", 0.0) is None
        assert await builds.queue_length() == (0, 0)
        assert (await known(builds, scan.build_id)).reason == "cancelled"


async def test_scans_of_one_image_for_two_platforms_are_two(redis_url: str) -> None:
    async with store(redis_url) as builds:
        one, _ = await builds.submit(scan_of(), admit)
        other, is_new = await builds.submit(spec(0, kind="scan", platform="linux/arm64"), admit)
        assert is_new
        assert (one.build_id[-1], other.build_id[-1]) == ("1", "2")
