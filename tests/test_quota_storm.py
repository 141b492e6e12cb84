"""Quotas of the whole program under storms: never one over, nearly all of it, and right again after Redis was away."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from time import monotonic, sleep

import pytest

from bench.images import Image, image, layer
from bench.quotas import interrupt, settled_permits, warm_path
from bench.redis_server import RedisServer, redis_that_may_die
from bench.storm import Outcome, Storm
from bench.upstream import Upstream
from bench.windows import Admissions, least_limit, most_up_to, share_admitted
from tests.patience import PATIENCE_S
from tests.servers import WaveProxy
from wave_proxy.image.limit import Limit
from wave_proxy.state.redis import connect
from wave_proxy.state.usage import Usage

WORKERS = 4
CONNECTIONS = 64
BEFORE_S, AWAY_S = 1.0, 6.0
# Workers look every half a second whether Redis is back, and then report what went on without it.
SETTLED_S = 4.0

Start = Callable[..., WaveProxy]


def quota(limit: str, when_redis_is_down: str = "open") -> str:
    return f'[quota]\npull_anonymous = "{limit}"\nwait = "0s"\nwhen_redis_is_down = "{when_redis_is_down}"\n'


def sample() -> Image:
    return image([layer({"file": "content"})])


@pytest.fixture
def source(upstream: Callable[..., Upstream]) -> Upstream:
    """A registry with an image."""
    started = upstream()
    started.add("library/tool", sample(), "1")
    return started


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_that_may_die() as server:
        yield server


# --- the measure -----------------------------------------------------------------------------------------------------


def admissions(*pairs: tuple[float, float]) -> Admissions:
    made = Admissions()
    for sent, answered in pairs:
        made.add(sent, answered)
    return made


@pytest.mark.parametrize(
    ("pairs", "least"),
    [
        ([], 0),
        ([(0.0, 0.0)], 1),
        ([(0.0, 0.0), (0.9, 0.9)], 2),
        ([(0.0, 0.0), (1.0, 1.0)], 1),  # a window has its begin and not its end
        ([(0.0, 0.0), (0.5, 1.0)], 1),  # the second one may have been let in as late as it was answered
        ([(0.0, 0.5), (0.0, 1.0)], 1),
        ([(0.0, 0.0), (0.5, 1.0), (1.0, 1.9)], 2),  # each window of two is possible, and not both
        ([(0.0, 0.0), (0.5, 1.0), (1.0, 2.0)], 1),
        ([(0.0, 0.0), (0.0, 9.0), (0.1, 0.2), (0.3, 0.4)], 3),
    ],
)
def test_the_least_limit_that_explains_what_was_seen(pairs: list[tuple[float, float]], least: int) -> None:
    assert least_limit(admissions(*pairs), 1.0) == least


@pytest.mark.parametrize("seed", range(20))
def test_the_measure_accuses_nobody_wrongly_and_finds_one_too_many(seed: int) -> None:
    random, limit = Random(seed), 5
    decided: list[float] = []
    for number in range(60):
        soonest = decided[number - limit] + 1.0 if number >= limit else 0.0
        decided.append(max(soonest, decided[-1] if decided else 0.0) + random.choice((0.0, 0.0, 0.0, 0.25)))
    seen = [(at - random.random() / 10, at + random.random() / 10) for at in decided]
    random.shuffle(seen)
    assert least_limit(admissions(*seen), 1.0) <= limit
    exact = [(at, at) for at in decided]
    assert least_limit(admissions(*exact), 1.0) == limit
    assert least_limit(admissions(*exact, exact[10]), 1.0) == limit + 1
    assert most_up_to(admissions(*exact), 1.0, -1.0) <= limit


def test_only_windows_that_end_after_an_instant_are_looked_at() -> None:
    made = admissions(*((at / 10, at / 10) for at in range(10)), (1.2, 1.3), (2.0, 2.1))
    assert most_up_to(made, 1.0, 0.95) == 7  # those from 0.3 to 0.9 and the one of 1.2 or so, less what is uncertain
    assert most_up_to(made, 1.0, 1.5) == 2
    assert most_up_to(made, 1.0, 2.0) == 0


def test_what_was_let_in_is_a_part_of_what_may_be() -> None:
    made = admissions((0.0, 0.0), (0.1, 0.1), (1.0, 1.0), (1.1, 2.1))
    assert share_admitted(made, 2, 1.0, 2) == 0.75  # the last one may have been let in later
    assert share_admitted(made, 2, 1.0, 1) == 1.0


# --- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [1, 2], ids=["four workers", "two programs of two workers"])
def test_a_storm_gets_the_limit_and_never_more(programs: int, source: Upstream, wave: Start, redis_url: str) -> None:
    limit, periods = Limit(300, 2.0), 3
    started = [
        wave(redis=redis_url, workers=WORKERS // programs, config=quota(str(limit)), upstreams=[source.address])
        for _ in range(programs)
    ]
    path = warm_path(started, f"{source.address}/library/tool:1")
    duration_s = periods * limit.period_s + 0.3
    with Storm([each.address for each in started], path, connections=CONNECTIONS, duration_s=duration_s) as storm:
        storm.begin()
        outcome = storm.outcome()
    assert outcome.errors == 0, outcome.others
    assert outcome.others[429] > len(outcome.admitted), "that was no storm"
    assert least_limit(outcome.admitted, limit.period_s) <= limit.max
    assert share_admitted(outcome.admitted, limit.max, limit.period_s, periods) >= 0.99


# --- Redis away ------------------------------------------------------------------------------------------------------


def storm_without_redis(
    wave: Start, source: Upstream, redis: RedisServer, config: str, after_s: float
) -> tuple[Outcome, float, float]:
    """A storm in whose middle Redis hangs, dies and comes back; with the instants when it went and when it was back."""
    started = wave(redis=redis.url, workers=WORKERS, config=config, upstreams=[source.address])
    path = warm_path([started], f"{source.address}/library/tool:1")
    duration_s = BEFORE_S + AWAY_S + after_s
    with Storm([started.address], path, connections=CONNECTIONS, duration_s=duration_s) as storm:
        storm.begin()
        wait(BEFORE_S)
        gone, back = interrupt(redis, AWAY_S)
        return storm.outcome(), gone, back


def wait(duration_s: float) -> None:
    """Let the storm go on."""
    for _ in range(round(duration_s / 0.1)):
        sleep(0.1)


async def pulls_counted(url: str) -> int:
    """Those of today, and of yesterday: a test may begin before midnight."""
    today = datetime.now(UTC).date()
    async with connect(url) as client:
        days = [await Usage(client).read("pulls", str(day)) for day in (today, today - timedelta(days=1))]
    return sum(day.count for day in days)


async def counted_in_the_end(url: str, expected: int) -> int:
    """The pulls in the usage counters when they are the expected ones, or do not become these."""
    deadline = monotonic() + PATIENCE_S
    while (counted := await pulls_counted(url)) != expected and monotonic() < deadline:
        await asyncio.sleep(0.05)
    return counted


def test_pulls_go_on_without_redis_and_all_are_counted_later(source: Upstream, wave: Start, redis: RedisServer) -> None:
    outcome, gone, back = storm_without_redis(wave, source, redis, quota("1000000000/1h"), SETTLED_S)
    admitted = outcome.admitted
    assert outcome.errors == 0, outcome.others
    assert outcome.others == {}
    assert admitted.between(gone, gone + (back - gone) / 2) > 0
    assert admitted.between(gone + (back - gone) / 2, back) > 0
    assert settled_permits(redis, len(admitted)) == len(admitted)
    assert asyncio.run(counted_in_the_end(redis.url, len(admitted))) == len(admitted)


def test_what_went_on_without_redis_counts_against_the_limit_afterwards(
    source: Upstream, wave: Start, redis: RedisServer
) -> None:
    limit = Limit(300, 3.0)
    outcome, gone, back = storm_without_redis(wave, source, redis, quota(str(limit)), 2 * SETTLED_S + limit.period_s)
    admitted = outcome.admitted
    assert outcome.errors == 0, outcome.others
    assert admitted.between(gone, back) > limit.max, "the limit was kept all the time"
    assert most_up_to(admitted, limit.period_s, back + SETTLED_S) <= limit.max
    assert admitted.between(back + SETTLED_S, back + 60.0) > 0, "nobody is let in any more"


def test_no_pull_goes_uncounted_when_so_configured(source: Upstream, wave: Start, redis: RedisServer) -> None:
    limit = Limit(300, 2.0)
    outcome, _, back = storm_without_redis(wave, source, redis, quota(str(limit), "closed"), SETTLED_S + limit.period_s)
    assert set(outcome.others) == {429, 503}
    assert outcome.lost == 0
    assert least_limit(outcome.admitted, limit.period_s) <= limit.max
    assert outcome.admitted.between(back, back + 60.0) > 0, "nobody is let in any more"
