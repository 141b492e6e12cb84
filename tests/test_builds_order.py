"""Order and limits of builds in a real Redis: fair between owners, never too many, whatever happens."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any, cast

import pytest

from tests.builds_state import (
    ONE_SLOT,
    STREAM,
    admit,
    claimed,
    consumers,
    keys,
    known,
    leases,
    run_out,
    spec,
    store,
    submitted,
)
from wave_proxy.state.builds import BuildLimits, BuildStore, Claim, LeaseLost
from wave_proxy.state.redis import connect


async def take_turns(builds: BuildStore, count: int) -> list[str]:
    """The owners of the next builds, each of which ends before the next one is claimed."""
    owners = []
    for _ in range(count):
        claim = await claimed(builds)
        owners.append(claim.record.spec.owner)
        await builds.finish(claim, exit_status=0)
    return owners


async def test_builds_of_an_owner_go_in_order(redis_url: str) -> None:
    async with store(redis_url) as builds:
        expected = [await submitted(builds, number) for number in range(20)]
        assert [(await claimed(builds)).record.build_id for _ in range(4)] == expected[:4]
        assert await builds.claim("builder", 0.0) is None
        assert await builds.queue_length() == (16, 4)


async def test_many_builds_of_one_owner_hardly_delay_another(redis_url: str) -> None:
    async with store(redis_url, BuildLimits(2)) as builds:
        await asyncio.gather(*(builds.submit(spec(number, "many"), admit) for number in range(1000)))
        assert await take_turns(builds, 10) == ["many"] * 10
        running = [await claimed(builds), await claimed(builds)]
        await submitted(builds, 1000, "one")
        for claim in running:
            await builds.finish(claim, exit_status=0)
        assert "one" in await take_turns(builds, 2)
        await submitted(builds, 1001, "one")  # who comes one at a time has no more than every other turn
        for number in range(1002, 1006):
            await submitted(builds, number, "one")
        turns = await take_turns(builds, 10)
    assert turns.count("one") in (4, 5)
    assert "one" not in {mine for mine, following in pairwise(turns) if mine == following}


async def test_owners_have_equal_shares(redis_url: str) -> None:
    owners = [f"owner {letter}" for letter in "edcba"]
    async with store(redis_url, ONE_SLOT) as builds:
        for position, owner in enumerate(owners):
            for number in range(6):
                await submitted(builds, 10 * position + number, owner)
        turns = await take_turns(builds, 30)
    for count in range(5, 31, 5):
        assert Counter(turns[:count]) == dict.fromkeys(owners, count / 5)


async def test_ever_new_owners_do_not_starve_an_old_one(redis_url: str) -> None:
    turns: list[str] = []
    async with store(redis_url, ONE_SLOT) as builds:
        for number in range(10):
            await submitted(builds, number, "old")
        turns += await take_turns(builds, 1)
        for number in range(700):
            for newcomer in range(2):  # more than can be built
                await submitted(builds, 100 + 2 * number + newcomer, f"new {number} {newcomer}")
            turns += await take_turns(builds, 1)
        async with connect(redis_url) as redis:
            assert await redis.zcard("wave:{builds}:served") < 600
    assert turns.count("old") >= 3


async def test_nobody_has_more_than_his_limit(redis_url: str) -> None:
    async with store(redis_url, BuildLimits(4, 2)) as builds:
        for number in range(10):
            await submitted(builds, number, "many")
        mine = [await claimed(builds), await claimed(builds)]
        assert await builds.claim("builder", 0.0) is None
        await submitted(builds, 10, "other")
        assert (await claimed(builds)).record.spec.owner == "other"
        assert await builds.claim("builder", 0.0) is None
        await builds.finish(mine[0], exit_status=1)
        assert (await claimed(builds)).record.spec.owner == "many"
        assert await builds.claim("builder", 0.0) is None
        assert await builds.queue_length() == (7, 3)


async def test_limits_may_change(redis_url: str) -> None:
    async with store(redis_url, BuildLimits(4, 2)) as old, store(redis_url, BuildLimits(2, 1)) as new:
        for number in range(6):
            await submitted(old, number)
        claims = [await claimed(old), await claimed(old)]
        for claim in claims:
            assert await new.claim("builder", 0.0) is None
            await new.finish(claim, exit_status=0)
        claim = await claimed(new)
        assert await new.claim("builder", 0.0) is None
        await old.finish(claim, exit_status=0)  # a limit that has grown is seen when a build ends
        assert [await claimed(old), await claimed(old)]
        assert await old.claim("builder", 0.0) is None
        assert await old.queue_length() == (1, 2)


@dataclass
class Model:
    """What must hold, whatever happens in which order."""

    url: str
    limits: BuildLimits
    random: Random
    claims: dict[str, Claim] = field(default_factory=dict)  # by build
    lost: list[Claim] = field(default_factory=list)
    open: dict[str, str] = field(default_factory=dict)  # build to target
    attempts: Counter[str] = field(default_factory=Counter)
    cancelled: set[str] = field(default_factory=set)

    async def step(self, builds: BuildStore) -> None:
        """Do something at random, and look whether all is as it must be."""
        action = self.random.choices(
            [self.submit, self.claim, self.finish, self.cancel, self.die, self.return_late], [8, 8, 6, 1, 1, 1]
        )
        await action[0](builds)
        await self.check(builds)

    async def submit(self, builds: BuildStore) -> None:
        number = self.random.randrange(30)
        asked = spec(number, f"owner {self.random.randrange(4)}")
        last = await builds.find_by_target(asked.target_image)
        gone = last.build_id if last is not None and last.succeeded else ""
        record, is_new = await builds.submit(asked, admit, gone=gone)
        assert is_new == (asked.target_image not in self.open.values())
        if is_new:
            self.open[record.build_id] = asked.target_image
        assert self.open[record.build_id] == asked.target_image

    async def claim(self, builds: BuildStore) -> None:
        claim = await builds.claim(f"builder {self.random.randrange(3)}", 0.0)
        if claim is not None:
            assert claim.record.build_id not in self.claims
            self.claims[claim.record.build_id] = claim
            self.attempts[claim.record.build_id] += 1
            assert claim.record.attempt == self.attempts[claim.record.build_id] <= 3
        for build_id in [*self.open]:  # claim() buries what is hopeless
            if (await known(builds, build_id)).phase == "done":
                assert self.attempts[build_id] == 3 or build_id in self.cancelled
                del self.open[build_id]

    async def finish(self, builds: BuildStore) -> None:
        if self.claims:
            build_id = self.random.choice([*self.claims])
            if build_id not in self.cancelled:
                await builds.renew(self.claims[build_id])
            await builds.finish(self.claims.pop(build_id), exit_status=self.random.randrange(2))
            del self.open[build_id]

    async def cancel(self, builds: BuildStore) -> None:
        if self.open:
            build_id = self.random.choice([*self.open])
            assert await builds.cancel(build_id)
            self.cancelled.add(build_id)
            if not self.attempts[build_id]:
                del self.open[build_id]

    async def die(self, builds: BuildStore) -> None:
        await run_out(self.url)
        self.lost += self.claims.values()
        self.claims.clear()

    async def return_late(self, builds: BuildStore) -> None:
        for claim in self.lost:
            record = await builds.find(claim.record.build_id)
            if record is not None and (record.phase == "done" or record.attempt > claim.record.attempt):
                with pytest.raises(LeaseLost):
                    await builds.finish(claim, exit_status=0)

    async def check(self, builds: BuildStore) -> None:
        waiting, running = await builds.queue_length()
        assert waiting + running == len(self.open)
        async with connect(self.url) as redis:
            slots = cast(list[tuple[bytes, dict[bytes, bytes]]], await redis.xrange(STREAM))
            held = await leases(redis)
        owners = Counter([(await known(builds, entry[b"build"].decode())).spec.owner for _, entry in slots])
        assert len(slots) <= self.limits.max_running
        assert len(slots) - len(held) <= 1
        assert max(owners.values(), default=0) <= (self.limits.max_running_per_user or 99)
        if not slots:
            assert waiting == 0  # nothing waits while slots are free


@pytest.mark.parametrize("seed", range(6))
async def test_anything_in_any_order(redis_url: str, seed: int) -> None:
    random = Random(seed)
    limits = BuildLimits(random.randint(1, 5), random.choice([None, 1, 2]))
    options: dict[str, Any] = {"limits": limits, "failure_memory_s": 0.0}
    async with store(redis_url, **options) as one, store(redis_url, **options) as other:
        model = Model(redis_url, limits, random)
        for _ in range(300):
            await model.step(random.choice([one, other]))
        await model.die(one)
        while model.open:
            await model.claim(one)
            await model.finish(one)
        assert await one.queue_length() == (0, 0)
    assert await consumers(redis_url) == []
    async with connect(redis_url) as redis:
        left = {name.partition(":")[0] for name in await keys(redis)}
        assert left <= {"build", "kept", "count", "target", "ready", "served", "totals"}
        assert await redis.hget("wave:{builds}:totals", "waiting") == b"0"
