"""Word of jobs that begin and end, and what it does to ready-made replies."""

import asyncio
from collections.abc import Callable

import pytest

from api.jobs.statuses import REPEATED_S
from tests.builds_state import ONE_SLOT, admit, claimed, spec, store, submitted
from tests.patience import PATIENCE_S, eventually
from tests.redis_faults import durable_redis
from tests.servers import Response, WaveProxy
from tests.test_ready import asked, replies
from wave_proxy.serve import jobs
from wave_proxy.serve.jobs import follow_jobs
from wave_proxy.serve.messages import Reply, Request, Terms
from wave_proxy.serve.ready import ReadyReplies
from wave_proxy.state.builds import BuildLimits, BuildStore, Claim
from wave_proxy.state.redis import cancel, connect


async def test_beginnings_and_ends_are_announced(redis_url: str) -> None:
    async with store(redis_url) as builds, store(redis_url) as other:
        changes = other.changes()
        assert await anext(changes) == ""  # it listens
        build_id = await submitted(builds)
        scan, _ = await builds.submit(spec(0, kind="scan"), admit, after=build_id)
        claim = await claimed(builds)
        assert await anext(changes) == build_id
        await builds.finish(claim, exit_status=1)
        assert [await anext(changes), await anext(changes)] == [build_id, scan.build_id]
        waiting = await submitted(builds, 2)
        await builds.cancel(waiting)
        assert await anext(changes) == waiting
        await changes.aclose()


def keep(kept: ReadyReplies, number: int, *names: str) -> Request:
    """A reply that these end is kept."""
    request, _ = asked(number)
    terms = Terms(until=float("inf"), token="", kind="api", state="hit", ended_by=names)
    kept.keep(request, Reply(200, [], b"x", terms=terms), kept.endings)
    assert kept.answer(request) is not None
    return request


async def test_a_change_ends_replies_about_the_job(redis_url: str) -> None:
    async with replies(redis_url) as kept, store(redis_url) as builds:
        following = asyncio.create_task(follow_jobs(builds, kept))
        await eventually(lambda: kept.endings == 1)
        build_id = await submitted(builds)
        mine, others = keep(kept, 1, "a" * 32, build_id), keep(kept, 2, "bd-other")
        await claimed(builds)
        await eventually(lambda: kept.answer(mine) is None)
        assert kept.answer(others) is not None
        assert set(kept._by_name) == {"bd-other"}
        await cancel(following)


async def test_a_reply_that_was_overtaken_is_not_kept(redis_url: str) -> None:
    async with replies(redis_url) as kept:
        request, reply = asked(1)
        assert reply.terms is not None
        before = kept.endings
        kept.forget("bd-any")
        kept.keep(
            request, Reply(200, [], b"x", terms=type(reply.terms)(9e9, "", "api", "hit", ended_by=("b",))), before
        )
        assert kept.answer(request) is None


async def test_after_a_break_nothing_is_taken_for_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_RECONNECT_S", 0.05)
    async with durable_redis() as server, replies(server.url) as kept, connect(server.url) as redis:
        following = asyncio.create_task(follow_jobs(BuildStore(redis, BuildLimits(1)), kept))
        await eventually(lambda: kept.endings == 1)
        request = keep(kept, 1, "bd-1")
        server.stop()
        await server.start()
        await eventually(lambda: kept.answer(request) is None)
        await cancel(following)


async def test_whoever_waits_hears_of_the_end_at_once(wave: Callable[..., WaveProxy], redis_url: str) -> None:
    config = '[build]\nengine = "buildkit"\nbuildkit_address = "tcp://127.0.0.1:1"\nmax_running = 1\n'
    async with store(redis_url, ONE_SLOT) as builds:
        await submitted(builds)
        running = await claimed(builds)  # so that nothing else runs
        renewing = asyncio.create_task(renew(builds, running))
        port = await asyncio.to_thread(wave, workers=2, redis=redis_url, config=config)

        async def ask() -> Response:
            return await asyncio.to_thread(port.request, "GET", path)

        answer = await asyncio.to_thread(port.submit, containerFile="RlJPTSBzY3JhdGNoCg==")
        path = f"/v1alpha2/container/{answer['requestId']}/status"
        answers = [await ask() for _ in range(12)]  # both workers know it then
        assert {found.json()["status"] for found in answers} == {"PENDING"}
        assert "HIT" in [found.headers["X-Cache"] for found in answers]
        assert {found.headers["X-Frame-Options"] for found in answers} == {"DENY"}
        await cancel(renewing)
        await builds.finish(running, exit_status=0)
        ended = asyncio.create_task(builds.wait_done(answer["buildId"], PATIENCE_S))  # as the builder can't run it
        while not ended.done():
            await ask()
        record = await ended
        assert record is not None
        assert record.phase == "done"
        async with asyncio.timeout(REPEATED_S / 2):
            while (await ask()).json()["status"] != "DONE":
                await asyncio.sleep(0.02)


async def renew(builds: BuildStore, claim: Claim) -> None:
    """Hold a claim until cancelled."""
    while True:
        await builds.renew(claim)
        await asyncio.sleep(1)
