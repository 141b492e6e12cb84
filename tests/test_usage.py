"""Usage counters over a real Redis: under the right day and organisation, nothing twice, nothing lost on the way."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from time import time
from typing import cast

import pytest
from structlog.testing import capture_logs

from tests.patience import eventually, patience
from tests.redis_faults import Lossy, durable_redis
from wave_proxy.state import usage as usage_module
from wave_proxy.state.redis import cancel, connect
from wave_proxy.state.usage import Counts, Usage, architecture_of, organisation_of

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
OLD_DAY, NEW_DAY = "2026-02-28", "2026-03-01"


def clock_at(epoch_s: float) -> Callable[[], float]:
    """A clock that shows ``epoch_s`` now, and goes on."""
    ahead_s = epoch_s - time()
    return lambda: time() + ahead_s


@asynccontextmanager
async def counting(url: str, clock: Callable[[], float] = time) -> AsyncIterator[Usage]:
    """One process's counters, flushed at the end as at a shutdown."""
    async with connect(url) as redis:
        usage = Usage(redis, clock)
        background = asyncio.create_task(usage.run()), asyncio.create_task(usage.follow_days())
        try:
            yield usage
        finally:
            await cancel(*background)
            await usage.close()


async def pulls(url: str, day: str | None = None, organisation: str | None = None) -> Counts:
    async with connect(url) as redis:
        return await Usage(redis).read("pulls", day, organisation)


async def fusion_pulls(url: str, day: str | None = None) -> Counts:
    async with connect(url) as redis:
        return await Usage(redis).read("fusion", day)


async def until_counted(url: str, count: int, day: str) -> None:
    async with patience():
        while (await pulls(url, day)).count < count:
            await asyncio.sleep(0.01)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("email", "organisation"),
    [
        ("user@example.com", "example.com"),
        ("foo@bar.co.uk", "bar.co.uk"),
        ("Ada@Example.COM", "example.com"),
        (" ada@example.com ", "example.com"),
        ('"a@b"@example.com', "example.com"),
        ("ada@büro.example", "büro.example"),
        ("invalid_email", ""),
        ("ada@", ""),
        ("", ""),
        (None, ""),
        ("ada@example.com\n", "example.com"),
        ("ada@exam\nple.com", ""),
        ("ada@\ud800.com", ""),
        ("ada@" + "x" * 254, ""),
    ],
)
def test_an_organisation_is_the_domain(email: str | None, organisation: str) -> None:
    assert organisation_of(email) == organisation


@pytest.mark.parametrize(
    ("platform", "architecture"),
    [
        ("linux/amd64", "amd64"),
        ("x86_64", "amd64"),
        ("linux/x86-64", "amd64"),
        ("linux/arm64/v8", "arm64"),
        ("linux/aarch64", "arm64"),
        ("linux/arm/v7", "arm"),
        ("linux/riscv64", ""),
        ("linux", ""),
        ("", ""),
    ],
)
def test_an_architecture_is_known_by_all_its_names(platform: str, architecture: str) -> None:
    assert architecture_of(platform) == architecture


# --- counts ----------------------------------------------------------------------------------------------------------


async def test_pulls_are_counted_by_day_and_organisation(redis_url: str) -> None:
    async with counting(redis_url, lambda: MIDNIGHT) as usage:
        for email in ("a@org1.com", "b@ORG1.com", "c@org2.com", "d@org2.com", None, ""):
            usage.count(email, fusion=False)
        usage.count("a@org1.com", fusion=True)
    async with counting(redis_url, lambda: MIDNIGHT - 1) as usage:
        usage.count("a@org1.com", fusion=False)
    assert await pulls(redis_url, NEW_DAY) == Counts(7, {"org1.com": 3, "org2.com": 2})
    assert await pulls(redis_url, OLD_DAY) == Counts(1, {"org1.com": 1})
    assert await pulls(redis_url) == Counts(6, {"org1.com": 4, "org2.com": 2})
    assert await pulls(redis_url, NEW_DAY, "ORG2.com") == Counts(2, {"ORG2.com": 2})
    assert await pulls(redis_url, None, "org1.com") == Counts(4, {"org1.com": 4})
    assert await pulls(redis_url, OLD_DAY, "org2.com") == Counts(0, {"org2.com": 0})
    assert await pulls(redis_url, "2026-13-45") == Counts(0, {})
    assert await fusion_pulls(redis_url) == Counts(1, {"org1.com": 1})
    assert await fusion_pulls(redis_url, OLD_DAY) == Counts(0, {})


async def test_builds_are_counted_apart_from_pulls(redis_url: str) -> None:
    async with counting(redis_url) as usage:
        usage.count_job("builds", "a@org1.com")
        usage.count_job("builds", None)
        usage.count("b@org2.com", fusion=False)
    async with counting(redis_url) as usage:
        builds = await usage.read("builds")
        today = await usage.read("builds", datetime.now(UTC).date().isoformat())
    assert (builds.count, builds.organisations) == (1, {"org1.com": 1})
    assert (today.count, today.organisations) == (2, {"org1.com": 1})


async def test_each_architecture_is_counted_apart_as_well(redis_url: str) -> None:
    async with counting(redis_url, lambda: MIDNIGHT) as usage:
        for architecture in ("amd64", "x86_64", "arm64", "", "riscv64"):
            usage.count("a@org1.com", fusion=False, architecture=architecture)
        usage.count(None, fusion=False, architecture="amd64")
        usage.cell("b@org2.com", fusion=True, architecture="aarch64").pulls += 10
        usage.count_job("builds", "a@org1.com", "linux/amd64,linux/arm64")
        usage.count_job("builds", "a@org1.com", "linux/arm64")
    async with connect(redis_url) as redis:
        read = Usage(redis).read
        assert await read("pulls") == Counts(15, {"org1.com": 5, "org2.com": 10})
        assert await read("pulls", NEW_DAY) == Counts(16, {"org1.com": 5, "org2.com": 10})
        assert await read("pulls", architecture="amd64") == Counts(3, {"org1.com": 2})
        assert await read("pulls", NEW_DAY, architecture="amd64") == Counts(3, {"org1.com": 2})
        assert await read("pulls", NEW_DAY, "org2.com", "arm64") == Counts(10, {"org2.com": 10})
        assert await read("fusion", architecture="arm64") == Counts(10, {"org2.com": 10})
        assert await read("pulls", OLD_DAY, architecture="arm64") == Counts(0, {})
        assert await read("builds") == Counts(3, {"org1.com": 3})
        assert await read("builds", architecture="arm64") == Counts(2, {"org1.com": 2})


async def test_counters_from_before_architectures_go_on(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        for key in ("wave:{usage}:pulls", f"wave:{{usage}}:pulls:{NEW_DAY}"):
            await redis.hset(key, mapping={"org1.com": 40, "": 2})
    async with counting(redis_url, lambda: MIDNIGHT) as usage:
        usage.count("a@org1.com", fusion=False, architecture="amd64")
    assert await pulls(redis_url) == Counts(41, {"org1.com": 41})
    assert await pulls(redis_url, NEW_DAY) == Counts(43, {"org1.com": 41})
    async with connect(redis_url) as redis:
        assert await Usage(redis).read("pulls", NEW_DAY, "org1.com", "amd64") == Counts(1, {"org1.com": 1})


async def test_pulls_of_several_processes_add_up_while_they_run(redis_url: str) -> None:
    clock = clock_at(MIDNIGHT + 3600)
    async with counting(redis_url, clock) as one, counting(redis_url, clock) as other:
        for _ in range(1000):
            one.count("a@org1.com", fusion=False)
            other.cell("b@org1.com", fusion=True).pulls += 1
        await until_counted(redis_url, 2000, NEW_DAY)
        assert (await fusion_pulls(redis_url)).count == 1000
    assert await pulls(redis_url, NEW_DAY) == Counts(2000, {"org1.com": 2000})


async def test_nothing_to_count_is_nothing_to_write(redis_url: str) -> None:
    async with counting(redis_url) as usage:
        cell = usage.cell("a@org1.com", fusion=False)
        await asyncio.sleep(2 * usage_module._FLUSH_S)
    assert cell.pulls == 0
    async with connect(redis_url) as redis:
        assert await redis.keys("*") == []


async def test_a_cell_is_one_organisations(redis_url: str) -> None:
    async with counting(redis_url, lambda: MIDNIGHT) as usage:
        plain, again = usage.cell("a@org1.com", fusion=False), usage.cell("b@org1.com", fusion=False)
        fusion, nobodys = usage.cell("a@org1.com", fusion=True), usage.cell(None, fusion=False)
        assert plain is again
        for cell, count in ((plain, 1), (fusion, 10), (nobodys, 100)):
            cell.pulls += count
        del cell, plain, again, fusion  # who drops a cell loses nothing
        usage.cell("a@org1.com", fusion=False).pulls += 1000
    assert nobodys.pulls == 0
    assert await pulls(redis_url, NEW_DAY) == Counts(1111, {"org1.com": 1011})
    assert await fusion_pulls(redis_url, NEW_DAY) == Counts(10, {"org1.com": 10})


async def test_a_day_ends_at_midnight(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "_FLUSH_S", 3600.0)  # so that the end of the day does not come by a flush
    assert usage_module._LOOK_AT_CLOCK_S > 30
    clock = clock_at(MIDNIGHT - 0.5)
    counted = {OLD_DAY: 0, NEW_DAY: 0}
    async with counting(redis_url, clock) as usage, patience():
        cell = usage.cell("a@org1.com", fusion=False)
        while counted[NEW_DAY] < 100:
            # Whoever counts around midnight itself is late by what the event loop is.
            day = usage._day
            assert MIDNIGHT <= clock() < MIDNIGHT + 30 if day == NEW_DAY else clock() < MIDNIGHT + 30
            counted[day] += 2
            usage.count("b@org2.com", fusion=False)
            cell.pulls += 1
            await asyncio.sleep(0.001)
    assert counted[OLD_DAY]
    assert {day: (await pulls(redis_url, day)).count for day in counted} == counted


# --- trouble ---------------------------------------------------------------------------------------------------------


async def test_without_redis_counts_wait_under_their_days() -> None:
    now = [MIDNIGHT - 3600]
    with capture_logs() as logs:
        async with durable_redis() as redis:
            async with counting(redis.url, lambda: now[0]) as usage:
                usage.count("a@org1.com", fusion=False)
                await until_counted(redis.url, 1, OLD_DAY)
                redis.stop()
                usage.count("a@org1.com", fusion=True)
                await eventually(lambda: usage._down and not usage._gathered)
                now[0] = MIDNIGHT
                await eventually(lambda: usage._day == NEW_DAY)
                usage.count("a@org1.com", fusion=False)
                await redis.start()
                await until_counted(redis.url, 1, NEW_DAY)
                await eventually(lambda: not usage._down)
            assert await pulls(redis.url) == Counts(3, {"org1.com": 3})
            assert (await pulls(redis.url, OLD_DAY)).count == 2
            assert await fusion_pulls(redis.url, OLD_DAY) == Counts(1, {"org1.com": 1})
    events = [entry["event"] for entry in logs if "usage" in entry["event"]]
    assert events == ["usage is counted in memory until Redis is back", "usage is counted in Redis again"]


async def test_what_redis_does_not_take_at_the_end_is_said() -> None:
    with capture_logs() as logs:
        async with durable_redis() as redis, counting(redis.url) as usage:
            redis.stop()
            usage.count("a@org1.com", fusion=True)
            await eventually(lambda: usage._down)
            usage.count("b@org2.com", fusion=False)
    assert [entry["number"] for entry in logs if "not counted" in entry["event"]] == [2]


async def test_an_answer_that_is_lost_and_a_flush_that_comes_late_count_once(redis_url: str) -> None:
    with TemporaryDirectory(prefix="lossy-") as folder:
        proxy = Lossy(redis_url, folder)
        async with await proxy.serve():
            async with counting(proxy.url, lambda: MIDNIGHT) as usage:
                for flushed in range(1, 4):
                    for _ in range(10):
                        usage.count("a@org1.com", fusion=True)
                    await until_counted(redis_url, 10 * flushed, NEW_DAY)
            assert proxy.lost >= 2
            await proxy.repeat()
    assert await pulls(redis_url) == Counts(30, {"org1.com": 30})
    assert await fusion_pulls(redis_url) == Counts(30, {"org1.com": 30})


async def test_a_flush_that_redis_can_not_add_does_not_stand_in_the_way(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        await redis.set("wave:{usage}:pulls:2026-02-28", "not a hash")
        async with counting(redis_url, clock_at(MIDNIGHT - 1)) as usage:
            usage.count("a@org1.com", fusion=False)
            await eventually(lambda: usage._down)
            await eventually(lambda: not usage._down)
    async with counting(redis_url, lambda: MIDNIGHT) as usage:
        usage.count("a@org1.com", fusion=False)
    assert (await pulls(redis_url, NEW_DAY)).count == 1


async def test_memory_is_bounded_and_days_stay_right(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "_FIELDS", 20)
    monkeypatch.setattr(usage_module, "_FLUSHED_FIELDS", 7)
    async with connect(redis_url) as redis:
        usage = Usage(redis, lambda: MIDNIGHT)
        for number in range(100):
            usage.count(f"a@org{number}.com", fusion=number % 2 == 0)
            usage._gather()
            usage.cell(f"b@org{number}.com", fusion=False).pulls += 1
        assert len(usage._waiting) + len(usage._gathered) <= 22
        await usage.close()
        sizes = {key: await redis.hlen(key) for key in cast(list[bytes], await redis.keys("*:20*"))}
    assert sum(sizes.values()) <= 22
    counts = await pulls(redis_url, NEW_DAY)
    assert counts.count == 200
    assert counts.organisations["org0.com"] == 2
    assert (await fusion_pulls(redis_url, NEW_DAY)).count == 50
