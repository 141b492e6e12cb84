"""Tokens of runs: short-lived, extended while their run goes on or the Platform is away, and left to end after that."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import time

import pytest

from api.platform.runs import RunLimits, Runs
from tests.test_platforms import ANA, ENDPOINT, Stage, stage
from wave_proxy.image.request import ContainerRequest, Identity
from wave_proxy.state.runs import RunTokens
from wave_proxy.state.tokens import TokenStore

RUN = Identity(7, "ana@lab.org", 12, "tok-1", "", ENDPOINT, "run-1")
LIMITS = RunLimits(lifetime_s=1200.0, max_lifetime_s=3000.0, check_s=180.0)


@dataclass
class Watch:
    """What looks after tokens, at a time that the test sets."""

    place: Stage
    runs: Runs
    tokens: TokenStore
    now: float

    def clock(self) -> float:
        return self.now

    async def record(self, identity: Identity = RUN, **members: object) -> tuple[str, ContainerRequest]:
        wanted = ContainerRequest("docker.io/a:1", identity=identity, created=self.now, expires=self.now + 36)
        return await self.runs.record(replace(wanted, **members), self.tokens.put)  # type: ignore[arg-type]

    async def lives_for(self, token: str, since: float) -> int:
        record = await self.tokens.find_record(token)
        assert record is not None
        return round(record.request.expires - since)


@asynccontextmanager
async def watching(url: str, status: str = "RUNNING") -> AsyncIterator[Watch]:
    async with stage(url) as place:
        place.world.users = {"tok-1": ANA}
        place.world.workflows = {"run-1": {"status": status, "computeEnv": {}}}
        tokens = TokenStore(place.redis)
        watch = Watch(place, None, tokens, time())  # type: ignore[arg-type]
        watch.runs = Runs(RunTokens(place.redis), tokens, place.platforms, LIMITS, watch.clock)
        yield watch


async def test_a_token_of_a_run_is_short_lived_and_told_to_last(redis_url: str) -> None:
    async with watching(redis_url) as watch:
        token, told = await watch.record()
        assert await watch.lives_for(token, watch.now) == 1200
        assert round(told.expires - watch.now) == 3000


@pytest.mark.parametrize(
    ("identity", "members"),
    [
        (replace(RUN, workflow_id=""), {}),
        (replace(RUN, access_token=""), {}),
        (RUN, {"build_id": "bd-1_1"}),
        (RUN, {"freeze": True}),
        (RUN, {"mirror": True}),
    ],
    ids=["no-run", "no-platform", "built", "frozen", "mirrored"],
)
async def test_other_tokens_live_as_they_would(identity: Identity, members: dict[str, object], redis_url: str) -> None:
    async with watching(redis_url) as watch:
        token, told = await watch.record(identity, **members)
        assert (await watch.lives_for(token, watch.now), round(told.expires - watch.now)) == (36, 36)
        watch.now += 200
        assert await watch.runs.check() == 0


@pytest.mark.parametrize(
    ("status", "cut", "lives", "is_kept"),
    [
        ("SUBMITTED", False, 1400, True),
        ("RUNNING", False, 1400, True),
        ("SUCCEEDED", False, 1200, False),
        ("FAILED", False, 1200, False),
        ("", True, 1400, True),
        ("gone", False, 1200, True),
    ],
    ids=["submitted", "running", "succeeded", "failed", "platform-away", "unknown-run"],
)
async def test_a_token_lives_on_while_its_run_does(
    status: str, cut: bool, lives: int, is_kept: bool, redis_url: str
) -> None:
    async with watching(redis_url, status) as watch:
        began = watch.now
        token, _ = await watch.record()
        if status == "gone":
            watch.place.world.workflows = {}
        watch.place.wire.cut = cut
        assert await watch.runs.check() == 0, "not due yet"
        watch.now += 200
        assert await watch.runs.check() == 1
        assert await watch.lives_for(token, began) == lives
        assert bool(await watch.place.redis.zcard("wave:runs")) is is_kept
        watch.now += 180
        assert await watch.runs.check() == int(is_kept)


async def test_no_token_outlives_the_most_that_it_may(redis_url: str) -> None:
    async with watching(redis_url) as watch:
        began = watch.now
        token, _ = await watch.record()
        for after in (1000, 2100):
            watch.now = began + after
            await watch.runs.check()
        assert await watch.lives_for(token, began) == 3000
        watch.now = began + 3001
        assert await watch.runs.check() == 1
        assert await watch.place.redis.zcard("wave:runs") == 0


async def test_a_run_is_asked_for_once_however_many_tokens_it_has(redis_url: str) -> None:
    async with watching(redis_url) as watch:
        for _ in range(30):
            await watch.record()
        watch.now += 200
        assert await watch.runs.check() == 30
        assert watch.place.world.seen == ["tok-1 GET /workflow/run-1?workspaceId=12"]
