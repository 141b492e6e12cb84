"""Builds in a real Redis, from several processes: one of each, and none lost whoever dies."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from multiprocessing import get_context
from random import Random
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import pytest

from tests.builds_state import (
    DIGEST,
    ONE_SLOT,
    admit,
    claimed,
    consumers,
    content,
    keys,
    known,
    run_out,
    scripts_run,
    spec,
    store,
    submitted,
)
from tests.redis_faults import Lossy
from wave_proxy.errors import TooManyRequests
from wave_proxy.image.request import Identity, Layer
from wave_proxy.state import build_scripts
from wave_proxy.state import builds as builds_module
from wave_proxy.state.builds import BuildCancelled, BuildLimits, LeaseLost
from wave_proxy.state.redis import connect

# --- submitting --------------------------------------------------------------------------------------------------


async def test_many_at_once_get_one_build_and_one_is_admitted(redis_url: str) -> None:
    admitted = 0

    async def count() -> None:
        nonlocal admitted
        admitted += 1
        await asyncio.sleep(0.05)

    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(store(redis_url)) for _ in range(4)]
        answers = await asyncio.gather(*(stores[i % 4].submit(spec(), count) for i in range(200)))
        assert await stores[0].queue_length() == (1, 0)
    assert admitted == 1
    assert {record.build_id for record, _ in answers} == {f"bd-{0:016x}_1"}
    assert sum(is_new for _, is_new in answers) == 1


async def test_who_is_not_admitted_leaves_it_to_the_others(redis_url: str) -> None:
    refusals = 3

    async def refuse() -> None:
        nonlocal refusals
        await asyncio.sleep(0.01)
        if refusals:
            refusals -= 1
            raise TooManyRequests("enough")

    async with store(redis_url) as one, store(redis_url) as other:
        waiting = [[one, other][i % 2].submit(spec(), refuse) for i in range(20)]
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert await one.queue_length() == (1, 0)
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert [type(error) for error in refused] == [TooManyRequests] * 3
    assert sum(answer[1] for answer in answers if not isinstance(answer, BaseException)) == 1


async def test_a_refused_submission_leaves_nothing(redis_url: str) -> None:
    async def refuse() -> None:
        raise TooManyRequests("enough")

    async with store(redis_url) as builds:
        with pytest.raises(TooManyRequests):
            await builds.submit(spec(), refuse)
    async with connect(redis_url) as redis:
        assert await keys(redis) == {}


async def test_a_submitter_that_goes_away_leaves_nothing(redis_url: str) -> None:
    begun = asyncio.Event()

    async def never() -> None:
        begun.set()
        await asyncio.Event().wait()

    async with store(redis_url) as builds, connect(redis_url) as redis:
        task = asyncio.create_task(builds.submit(spec(), never))
        await begun.wait()
        assert (await keys(redis)).keys() == {"reserved:registry.test/built:0"}
        task.cancel()
        await asyncio.wait([task])
        assert await keys(redis) == {}


async def test_a_submitter_that_dies_keeps_nobody_for_long(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert builds_module._RESERVED_MS <= 5000
    monkeypatch.setattr(builds_module, "_RESERVED_MS", 300)
    async with store(redis_url) as dead, store(redis_url) as other:
        assert await dead._reserve("registry.test/built:0", "dead", "") == ""
        began = monotonic()
        _, is_new = await other.submit(spec(), admit)
    assert is_new
    assert monotonic() - began >= 0.25


async def test_a_slow_admission_is_waited_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds_module, "_RESERVED_MS", 150)
    admitted: list[str] = []

    async def admit_slowly(name: str) -> None:
        admitted.append(name)
        await asyncio.sleep(0.6)

    async with store(redis_url) as one, store(redis_url) as other:
        first = asyncio.create_task(one.submit(spec(), lambda: admit_slowly("one")))
        while not admitted:
            await asyncio.sleep(0)
        (mine, is_new), (theirs, is_theirs_new) = await asyncio.gather(
            first, other.submit(spec(), lambda: admit_slowly("other"))
        )
    assert admitted == ["one"]
    assert (mine.build_id, is_new, is_theirs_new) == (theirs.build_id, True, False)


async def test_a_submission_whose_reservation_ran_out_joins_the_build_that_came_first(redis_url: str) -> None:
    async with store(redis_url) as one, store(redis_url) as other, connect(redis_url) as redis:

        async def overtaken() -> None:
            await redis.delete("wave:{builds}:reserved:registry.test/built:0")
            await other.submit(spec(), admit)

        record, is_new = await one.submit(spec(), overtaken)
        assert (record.build_id[-2:], is_new) == ("_1", False)
        assert await one.queue_length() == (1, 0)


async def test_what_is_recorded(redis_url: str) -> None:
    layer = Layer("https://registry.test/layer", DIGEST, 3, DIGEST)
    inline = replace(layer, location="data:SECRETBYTES")
    identity = Identity(7, "Ada@Test.org", access_token="SECRETACCESS", refresh_token="SECRETREFRESH")
    asked = spec(3, context=inline, layers=(layer, inline), identity=identity, timeout_s=60.0, epoch=5)
    async with store(redis_url) as builds, connect(redis_url) as redis:
        record, _ = await builds.submit(asked, admit)
        assert record.spec == replace(
            asked,
            context=replace(inline, location="data:"),
            layers=(layer, replace(inline, location="data:")),
            identity=Identity(7, "Ada@Test.org"),
        )
        assert (record.phase, record.exit_status, record.attempt, record.started) == ("queued", None, 0, 0.0)
        claim = await claimed(builds)
        assert claim.record.spec == asked
        assert (claim.record.phase, claim.record.attempt) == ("running", 1)
        assert claim.owner not in repr(claim)
        assert b"SECRET" in await content(redis)
        await builds.finish(claim, exit_status=0, digest=DIGEST)
        assert b"SECRET" not in await content(redis)
        done = await known(builds, record.build_id)
    assert (done.phase, done.succeeded, done.digest, done.reason) == ("done", True, DIGEST, "")
    assert done.created <= done.started <= done.finished
    assert done.spec == record.spec


@pytest.mark.parametrize("build_id", ["", "bd-", f"bd-{0:016x}", f"{0:016x}_1", "../../x", "9" * 300, "bd-é_1", "*"])
async def test_other_texts_are_no_build_ids(redis_url: str, build_id: str) -> None:
    async with store(redis_url) as builds:
        await submitted(builds)
        assert await builds.find(build_id) is None
        assert await builds.find(f"bd-{0:016x}_1") is not None


async def test_builds_are_found_by_container_and_by_target(redis_url: str) -> None:
    async with store(redis_url, failure_memory_s=0.0) as builds:
        first, other = await submitted(builds), await submitted(builds, 1)
        await builds.finish(await claimed(builds), exit_status=1)
        second = await submitted(builds)
        for number, expected in ((0, second), (1, other)):
            by_container = await builds.newest(f"{number:016x}")
            by_target = await builds.find_by_target(f"registry.test/built:{number}")
            assert by_container == by_target == await known(builds, expected)
        assert await builds.newest(f"{9:016x}") is None
        assert await builds.find_by_target("registry.test/built") is None
    assert (first[-2:], second[-2:]) == ("_1", "_2")


async def test_a_failure_is_remembered_for_a_while(redis_url: str) -> None:
    async with store(redis_url) as builds, store(redis_url, failure_memory_s=0.0) as forgetful:
        first = await submitted(builds)
        await builds.finish(await claimed(builds), exit_status=1, reason="broken")
        record, is_new = await builds.submit(spec(), admit)
        assert (record.build_id, record.succeeded, record.reason, is_new) == (first, False, "broken", False)
        record, is_new = await forgetful.submit(spec(), admit)
        assert (record.build_id[-2:], record.phase, is_new) == ("_2", "queued", True)
        assert (await builds.submit(spec(), admit))[0].build_id == record.build_id


async def test_a_success_is_given_back_until_its_image_is_gone(redis_url: str) -> None:
    async with store(redis_url) as builds:
        first = await submitted(builds)
        assert (await builds.submit(spec(), admit, gone=first))[1] is False  # it is not done
        await builds.finish(await claimed(builds), exit_status=0, digest=DIGEST)
        record, is_new = await builds.submit(spec(), admit)
        assert (record.build_id, is_new) == (first, False)
        answers = await asyncio.gather(*(builds.submit(spec(), admit, gone=first) for _ in range(20)))
        assert {(record.build_id[-2:], record.phase) for record, _ in answers} == {("_2", "queued")}
        assert sum(is_new for _, is_new in answers) == 1
        await builds.finish(await claimed(builds), exit_status=0, digest=DIGEST)
        assert (await builds.submit(spec(), admit, gone=first))[0].build_id[-2:] == "_2"  # who looked before its end


async def test_what_is_kept_runs_out_together(redis_url: str) -> None:
    async with store(redis_url, retention_s=600) as builds, connect(redis_url) as redis:
        build_id = await submitted(builds)
        container, target = f"count:{0:016x}", "target:registry.test/built:0"
        while_waiting = await keys(redis)
        assert {f"build:{build_id}", f"spec:{build_id}", container, target} <= while_waiting.keys()
        assert set(while_waiting.values()) == {-1}
        claim = await claimed(builds)
        await builds.append_log(claim, b"text\n")
        await builds.finish(claim, exit_status=0, lock=b"lock")
        left = await keys(redis)
        lasting = {name for name, ttl in left.items() if ttl < 0}
        assert lasting == {"ready", "served", "totals"}
        of_build = {f"build:{build_id}", f"kept:{build_id}", f"lock:{build_id}", container, target}
        assert left.keys() - lasting == of_build
        assert all(590 < left[name] <= 600 for name in of_build)
        await redis.delete(*(f"wave:{{builds}}:{name}" for name in of_build))
        assert (await builds.read_log(build_id), await builds.read_lock(build_id)) == (None, None)
        assert await builds.wait_done(build_id, 5) is None
        assert await submitted(builds) == build_id


async def test_a_number_is_not_given_twice(redis_url: str) -> None:
    async with store(redis_url) as builds, connect(redis_url) as redis:
        first = await submitted(builds)
        await redis.delete(f"wave:{{builds}}:count:{0:016x}")
        record, is_new = await builds.submit(spec(target_image="registry.test/other:1"), admit)
        assert is_new
        assert (first[-2:], record.build_id[-2:]) == ("_1", "_2")


# --- claiming ----------------------------------------------------------------------------------------------------


async def test_claim_waits_for_a_build(redis_url: str) -> None:
    async with store(redis_url) as builds, store(redis_url) as one, store(redis_url) as other:
        waiting = {asyncio.create_task(one.claim("one", 30)), asyncio.create_task(other.claim("other", 30))}
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
        task = asyncio.create_task(builds.claim("builder", 30))
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
        waiting = asyncio.create_task(builds.claim("other", 30))
        assert not (await asyncio.wait([waiting], timeout=0.1))[0]
        await builds.finish(claim, exit_status=0)
        found = await waiting
    assert found is not None
    assert found.record.build_id == second


async def test_a_lease_that_runs_out_is_taken_over(redis_url: str) -> None:
    async with store(redis_url, lease_s=0.3) as builds:
        build_id = await submitted(builds)
        first = await claimed(builds, "first")
        await builds.append_log(first, b"half a line")
        began = monotonic()
        second = await builds.claim("second", 30)
        assert monotonic() - began >= 0.2
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
            waiting = asyncio.create_task(builds.claim("other", 30))
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


# --- several processes -------------------------------------------------------------------------------------------


def submit_storm(url: str, seed: int, pipe: Any) -> None:
    """A process that submits 20 targets, 15 times each, in an order of its own; tells its answers."""

    async def storm() -> tuple[int, list[tuple[str, bool]]]:
        admitted = 0

        async def count() -> None:
            nonlocal admitted
            admitted += 1

        numbers = [number for number in range(20) for _ in range(15)]
        Random(seed).shuffle(numbers)
        async with store(url) as builds:
            pipe.send("ready")
            pipe.recv()
            answers = await asyncio.gather(*(builds.submit(spec(number, str(seed)), count) for number in numbers))
        return admitted, [(record.build_id, is_new) for record, is_new in answers]

    pipe.send(asyncio.run(storm()))


async def test_a_storm_from_three_processes_makes_one_build_each(redis_url: str) -> None:
    context = get_context("spawn")
    running = []
    for seed in range(3):
        pipe, theirs = context.Pipe()
        process = context.Process(target=submit_storm, args=(redis_url, seed, theirs))
        process.start()
        running.append((process, pipe))
    for _, pipe in running:
        assert pipe.recv() == "ready"
    for _, pipe in running:
        pipe.send("go")
    results = [await asyncio.to_thread(pipe.recv) for _, pipe in running]
    for process, pipe in running:
        process.join()
        pipe.close()
    assert sum(admitted for admitted, _ in results) == 20
    answers = [answer for _, of_process in results for answer in of_process]
    assert Counter(build_id for build_id, _ in answers) == {f"bd-{number:016x}_1": 45 for number in range(20)}
    assert sum(is_new for _, is_new in answers) == 20
    async with store(redis_url) as builds:
        assert await builds.queue_length() == (20, 0)


def hold_claims(url: str, name: str, pipe: Any) -> None:
    """A builder that claims what there is for ever, and renews its leases."""

    async def hold() -> None:
        claims = []
        async with store(url, BuildLimits(3), lease_s=0.3) as builds:
            while True:
                if claim := await builds.claim(name, 0.1):
                    claims.append(claim)
                    await builds.append_log(claim, b"building\n")
                    pipe.send(claim.record.build_id)
                for held in claims:
                    await builds.renew(held)

    asyncio.run(hold())


async def test_builders_that_are_killed_lose_nothing(redis_url: str) -> None:
    context = get_context("spawn")
    async with store(redis_url, BuildLimits(3), lease_s=0.3) as builds:
        ids = [await submitted(builds, number, f"owner {number % 2}") for number in range(8)]
        killed: Counter[str] = Counter()
        for kill in range(10):
            pipe, theirs = context.Pipe()
            process = context.Process(target=hold_claims, args=(redis_url, f"builder {kill}", theirs))
            process.start()
            theirs.close()
            killed[await asyncio.to_thread(pipe.recv)] += 1
            process.kill()
            process.join()
            while pipe.poll():
                try:
                    killed[pipe.recv()] += 1
                except EOFError:
                    break
            pipe.close()
            assert sum(await builds.queue_length()) + sum(
                [(await known(builds, build_id)).phase == "done" for build_id in ids]
            ) == len(ids)
        while claim := await builds.claim("last", 1.0):
            await builds.finish(claim, exit_status=0, digest=DIGEST)
        records = [await known(builds, build_id) for build_id in ids]
        assert await builds.queue_length() == (0, 0)
    assert all(record.phase == "done" for record in records)
    for record in records:
        if not record.succeeded:
            assert record.reason == "the builder died 3 times while building"
            assert record.attempt == 3
    assert sum(killed.values()) >= 10
    assert await consumers(redis_url) == []
