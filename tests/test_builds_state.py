"""Builds in a real Redis, from several processes: one of each, and none lost whoever dies."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from multiprocessing import get_context
from random import Random
from time import monotonic
from typing import Any

import pytest

from tests.builds_state import (
    DIGEST,
    admit,
    claimed,
    consumers,
    content,
    keys,
    known,
    spec,
    store,
    submitted,
)
from tests.patience import PATIENCE_S, patience
from wave_proxy.errors import TooManyRequests
from wave_proxy.image.request import Identity, Layer
from wave_proxy.state import builds as builds_module
from wave_proxy.state.builds import BuildLimits
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
        began = monotonic()
        assert await dead._reserve("registry.test/built:0", "dead", "") == ""
        _, is_new = await other.submit(spec(), admit)
    assert is_new
    assert monotonic() - began >= 0.25


async def test_a_slow_admission_is_waited_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds_module, "_RESERVED_MS", 1500)
    admitted: list[str] = []

    async def admit_slowly(name: str) -> None:
        admitted.append(name)
        await asyncio.sleep(3.2)

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
            by_container = await builds.newest(f"bd-{number:016x}")
            by_target = await builds.find_by_target(f"registry.test/built:{number}")
            assert by_container == by_target == await known(builds, expected)
        assert await builds.newest(f"bd-{9:016x}") is None
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
        container, target = f"count:bd-{0:016x}", "target:registry.test/built:0"
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
        assert all(600 - PATIENCE_S < left[name] <= 600 for name in of_build)
        await redis.delete(*(f"wave:{{builds}}:{name}" for name in of_build))
        assert (await builds.read_log(build_id), await builds.read_lock(build_id)) == (None, None)
        assert await builds.wait_done(build_id, PATIENCE_S) is None
        assert await submitted(builds) == build_id


async def test_a_number_is_not_given_twice(redis_url: str) -> None:
    async with store(redis_url) as builds, connect(redis_url) as redis:
        first = await submitted(builds)
        await redis.delete(f"wave:{{builds}}:count:bd-{0:016x}")
        record, is_new = await builds.submit(spec(target_image="registry.test/other:1"), admit)
        assert is_new
        assert (first[-2:], record.build_id[-2:]) == ("_1", "_2")


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
        async with patience():
            while await builds.queue_length() != (0, 0):
                if claim := await builds.claim("last", 1.0):
                    await builds.finish(claim, exit_status=0, digest=DIGEST)
        records = [await known(builds, build_id) for build_id in ids]
    assert all(record.phase == "done" for record in records)
    for record in records:
        if not record.succeeded:
            assert record.reason == "the builder died 3 times while building"
            assert record.attempt == 3
    assert sum(killed.values()) >= 10
    assert await consumers(redis_url) == []
