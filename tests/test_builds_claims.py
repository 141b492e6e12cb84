"""Builds in the hands of builders, in a real Redis: claimed, given back, lost, finished and cancelled."""

import asyncio
from tempfile import TemporaryDirectory
from time import monotonic

import pytest

from tests.builds_state import (
    DIGEST,
    ONE_SLOT,
    admit,
    claimed,
    consumers,
    known,
    run_out,
    scripts_run,
    spec,
    store,
    submitted,
)
from tests.patience import PATIENCE_S
from tests.redis_faults import Lossy
from wave_proxy.state import build_scripts
from wave_proxy.state import builds as builds_module
from wave_proxy.state.builds import BuildCancelled, LeaseLost
from wave_proxy.state.redis import connect

# --- claiming ----------------------------------------------------------------------------------------------------


async def test_claim_waits_for_a_build(redis_url: str) -> None:
    async with store(redis_url) as builds, store(redis_url) as one, store(redis_url) as other:
        waiting = {
            asyncio.create_task(one.claim("one", PATIENCE_S)),
            asyncio.create_task(other.claim("other", PATIENCE_S)),
        }
        assert not (await asyncio.wait(waiting, timeout=0.1))[0]
        for number in range(2):
            build_id = await submitted(builds, number)
            (first, *others), waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            assert others == []
            claim = first.result()
            assert claim is not None
            assert claim.record.build_id == build_id


async def test_claim_gives_up_and_does_not_poll(redis_url: str) -> None:
    async with store(redis_url) as builds:
        before = await scripts_run(redis_url)
        began = monotonic()
        assert await builds.claim("builder", 0.5) is None
        assert monotonic() - began >= 0.5
        assert await scripts_run(redis_url) - before <= 3
    assert await consumers(redis_url) == []


async def test_claim_blocks_for_longer_than_a_connection_may_be_silent(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert builds_module._ROUND_S < 5.0
    monkeypatch.setattr(builds_module, "_ROUND_S", 0.05)
    async with store(redis_url) as builds:
        task = asyncio.create_task(builds.claim("builder", PATIENCE_S))
        assert not (await asyncio.wait([task], timeout=0.3))[0]
        build_id = await submitted(builds)
        claim = await task
    assert claim is not None
    assert claim.record.build_id == build_id


async def test_a_slot_that_is_freed_wakes_who_waits(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        await submitted(builds)
        second = await submitted(builds, 1)
        claim = await claimed(builds)
        waiting = asyncio.create_task(builds.claim("other", PATIENCE_S))
        assert not (await asyncio.wait([waiting], timeout=0.1))[0]
        await builds.finish(claim, exit_status=0)
        found = await waiting
    assert found is not None
    assert found.record.build_id == second


async def test_a_lease_that_runs_out_is_taken_over(redis_url: str) -> None:
    async with store(redis_url, lease_s=0.3) as builds:
        build_id = await submitted(builds)
        began = monotonic()
        first = await claimed(builds, "first")
        await builds.append_log(first, b"half a line")
        second = await builds.claim("second", PATIENCE_S)
        assert monotonic() - began >= 0.25
        assert second is not None
        assert (second.record.build_id, second.record.attempt) == (build_id, 2)
        assert second.record.started > first.record.started
        assert second.owner != first.owner
        log = b"half a line\n>> The builder died. Attempt 2 of 3 begins here.\n"
        assert await builds.read_log(build_id) == log
        before = await known(builds, build_id)
        for late in (
            builds.renew(first),
            builds.append_log(first, b"late"),
            builds.finish(first, exit_status=0, digest=DIGEST, lock=b"late"),
        ):
            with pytest.raises(LeaseLost, match=f"^build {build_id} is not"):
                await late
        assert await known(builds, build_id) == before
        assert await builds.read_log(build_id) == log
        assert await consumers(redis_url) == ["second"]
        await builds.finish(second, exit_status=0)
        assert await consumers(redis_url) == []


async def test_a_lease_that_is_renewed_is_not_taken_over(redis_url: str) -> None:
    async with store(redis_url, lease_s=30) as builds:
        await submitted(builds)
        claim = await claimed(builds)
        await run_out(redis_url)
        await builds.renew(claim)
        assert await builds.claim("other", 0.0) is None
        await run_out(redis_url)
        assert (await claimed(builds, "other")).record.attempt == 2


async def test_a_builder_may_take_over_from_itself(redis_url: str) -> None:
    async with store(redis_url) as builds:
        await submitted(builds)
        first = await claimed(builds)
        await run_out(redis_url)
        second = await claimed(builds)
        with pytest.raises(LeaseLost):
            await builds.renew(first)
        await builds.renew(second)
        assert await consumers(redis_url) == ["builder"]


async def test_a_build_that_is_given_back_is_claimed_at_once_and_anew(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        build_id = await submitted(builds)
        for _ in range(5):
            claim = await claimed(builds, "stops")
            assert claim.record.attempt == 1
            await builds.append_log(claim, b"stopped\n")
            waiting = asyncio.create_task(builds.claim("other", PATIENCE_S))
            assert not (await asyncio.wait([waiting], timeout=0.05))[0]
            await builds.release(claim)
            with pytest.raises(LeaseLost):
                await builds.release(claim)
            found = await waiting
            assert found is not None
            assert (found.record.build_id, found.record.attempt) == (build_id, 1)
            await builds.release(found)
        assert await builds.read_log(build_id) == b"stopped\n" * 5
        assert await builds.queue_length() == (1, 0)
        assert await consumers(redis_url) == []


async def test_a_build_that_is_given_back_can_be_cancelled(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        build_id = await submitted(builds)
        claim = await claimed(builds)
        await builds.append_log(claim, b"stopped\n")
        await builds.release(claim)
        assert await builds.cancel(build_id, "not needed") is True
        assert await builds.claim("other", 0.0) is None
        assert (await known(builds, build_id)).reason == "not needed"
        assert (await builds.read_log(build_id) or b"").startswith(b"stopped\n")
        assert await builds.queue_length() == (0, 0)


async def test_after_three_builders_a_build_has_failed(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        build_id, following = await submitted(builds), await submitted(builds, 1)
        for attempt in (1, 2, 3):
            claim = await claimed(builds, f"builder {attempt}")
            assert (claim.record.build_id, claim.record.attempt) == (build_id, attempt)
            await builds.append_log(claim, b"working\n")
            await run_out(redis_url)
        assert (await claimed(builds)).record.build_id == following
        record = await known(builds, build_id)
        assert (record.phase, record.exit_status, record.attempt) == ("done", builds_module.FAILED, 3)
        assert record.reason == "the builder died 3 times while building"
        log = await builds.read_log(build_id)
        assert log is not None
        assert log.endswith(b"working\n>> The build ends here: the builder died 3 times while building.\n")
        assert await consumers(redis_url) == ["builder"]
        assert await builds.queue_length() == (0, 1)


async def test_the_end_of_a_hopeless_build_is_not_lost_either(redis_url: str) -> None:
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        for _ in range(3):
            await claimed(builds)
            await run_out(redis_url)
        answer = await builds._run(build_scripts.CLAIM, "dies", "secret", 1000, 4, 4)  # and then nothing
        assert answer[1] == b"dead"
        await run_out(redis_url)
        assert await builds.claim("builder", 0.0) is None
        record = await known(builds, build_id)
        assert (record.phase, record.attempt) == ("done", 3)


# --- finishing ---------------------------------------------------------------------------------------------------


async def test_finish_keeps_log_and_lock(redis_url: str) -> None:
    text = b"".join(b"line %d of a log that repeats itself\n" % i for i in range(10_000))
    async with store(redis_url) as builds, connect(redis_url) as redis:
        build_id = await submitted(builds)
        assert await builds.read_log(build_id) is None
        claim = await claimed(builds)
        for start in range(0, len(text), 50_000):
            await builds.append_log(claim, text[start : start + 50_000])
        assert await builds.read_log(build_id) == text
        assert await builds.read_lock(build_id) is None
        await builds.finish(claim, exit_status=0, lock=b"@EXPLICIT\n" * 1000)
        assert await builds.read_log(build_id) == text
        assert await builds.read_lock(build_id) == b"@EXPLICIT\n" * 1000
        assert await redis.strlen(f"wave:{{builds}}:kept:{build_id}") < len(text) / 5
        with pytest.raises(LeaseLost):
            await builds.append_log(claim, b"late")


async def test_finish_may_be_repeated(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        build_id = await submitted(builds)
        for number in (1, 2):
            await submitted(builds, number)
        claim = await claimed(builds)
        await builds.finish(claim, exit_status=0, digest=DIGEST)
        await builds.finish(claim, exit_status=1, reason="late")
        assert await builds.queue_length() == (2, 0)
        record = await known(builds, build_id)
    assert (record.exit_status, record.digest, record.reason) == (0, DIGEST, "")


async def test_lost_answers_change_nothing(redis_url: str) -> None:
    with TemporaryDirectory(prefix="lossy-") as folder:
        lossy = Lossy(redis_url, folder)
        server = await lossy.serve()
        async with server, store(lossy.url, ONE_SLOT) as builds:
            answers = [await builds.submit(spec(number), admit) for number in (0, 1)]
            assert [is_new for _, is_new in answers] == [True, True]
            claim = await claimed(builds)
            for text in (b"one\n", b"two\n", b"three\n"):
                await builds.append_log(claim, text)
            await builds.renew(claim)
            assert await builds.queue_length() == (1, 1)
            await builds.finish(claim, exit_status=0)
            second = await claimed(builds)
            assert (second.record.build_id[-2:], second.record.attempt) == ("_1", 1)
            assert await builds.cancel(second.record.build_id) is True
            third, _ = await builds.submit(spec(3), admit)
            assert await builds.cancel(third.build_id) is True
            assert await builds.queue_length() == (0, 1)
            assert await builds.read_log(claim.record.build_id) == b"one\ntwo\nthree\n"
            assert lossy.lost >= 14


# --- cancelling --------------------------------------------------------------------------------------------------


async def test_builds_that_wait_are_cancelled_at_once(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        promoted, waiting, last = [await submitted(builds, number) for number in range(3)]
        for build_id in (waiting, promoted):
            assert await builds.cancel(build_id, "not needed") is True
            assert await builds.cancel(build_id) is False
            record = await known(builds, build_id)
            assert (record.phase, record.succeeded, record.reason) == ("done", False, "not needed")
            assert (record.started, record.duration_s is not None) == (0.0, True)
            assert await builds.read_log(build_id) is None
        assert await builds.queue_length() == (1, 0)
        assert (await claimed(builds)).record.build_id == last
        assert await builds.cancel(f"bd-{0:016x}_9") is False


async def test_the_last_waiting_build_of_an_owner_leaves_no_turn(redis_url: str) -> None:
    async with store(redis_url, ONE_SLOT) as builds:
        await submitted(builds)
        await builds.cancel(await submitted(builds, 1, "other"))
        await builds.finish(await claimed(builds), exit_status=0)
        assert await builds.claim("builder", 0.0) is None
        await submitted(builds, 2, "other")
        await claimed(builds)


async def test_the_builder_of_a_cancelled_build_is_told(redis_url: str) -> None:
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        claim = await claimed(builds)
        assert await builds.cancel(build_id, "not needed") is True
        assert (await known(builds, build_id)).phase == "running"
        for _ in range(2):
            with pytest.raises(BuildCancelled, match=r"^not needed$"):
                await builds.renew(claim)
        await builds.append_log(claim, b"cancelled\n")
        await builds.finish(claim, exit_status=255, reason="not needed")
        assert await builds.cancel(build_id) is False
        assert (await known(builds, build_id)).reason == "not needed"
        assert await builds.read_log(build_id) == b"cancelled\n"


async def test_a_cancelled_build_whose_builder_dies_is_not_built_again(redis_url: str) -> None:
    async with store(redis_url) as builds:
        build_id = await submitted(builds)
        await claimed(builds)
        await builds.cancel(build_id, "not needed")
        await run_out(redis_url)
        assert await builds.claim("other", 0.0) is None
        record = await known(builds, build_id)
        assert (record.phase, record.succeeded, record.reason, record.attempt) == ("done", False, "not needed", 1)
        assert await builds.read_log(build_id) == b">> The build ends here: not needed.\n"
        assert await consumers(redis_url) == []
