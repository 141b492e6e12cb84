"""Quotas over several processes and one real Redis: exact, complete, in order, and what is left when something dies."""

import asyncio
import gc
import multiprocessing
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from tests.patience import PATIENCE_S, eventually, patience
from tests.redis_faults import DurableRedis, Lossy, durable_redis
from wave_proxy._fast.window import Ledger
from wave_proxy.errors import StateUnavailable, TooManyRequests
from wave_proxy.image.limit import Limit
from wave_proxy.state import quota
from wave_proxy.state.quota import Quotas, Subject, subject_of
from wave_proxy.state.redis import connect

ADA = subject_of("pull", "ada@example.com", "10.0.0.1")
OPTIONS: Mapping[str, Any] = {"wait_s": 0.0}

Admission = tuple[float, float]  # the decision was between these instants


class Watched(Quotas):
    """Tells when it decided about those whom it holds, who run only when the machine comes to them."""

    served_at = 0.0

    def _serve(self, account: quota._Account) -> None:
        self.served_at = monotonic()
        super()._serve(account)


@asynccontextmanager
async def running(url: str, limit: Limit | None, **options: Any) -> AsyncIterator[Watched]:
    """One process's quotas, with their background work, closed at the end."""
    async with connect(url) as redis:
        quotas = Watched(redis, {("pull", True): limit}, **{**OPTIONS, **options})
        background = asyncio.create_task(quotas.run())
        try:
            yield quotas
        finally:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
            await quotas.close()


async def admitted(quotas: Quotas, subject: Subject = ADA) -> bool:
    """Whether a request may go on, asked as the port does."""
    if quotas.try_admit(subject):
        return True
    try:
        await quotas.admit(subject)
    except TooManyRequests:
        return False
    return True


async def count(quotas: Quotas, tries: int, subject: Subject = ADA) -> int:
    """How many of so many requests, one after the other, may go on."""
    return sum([await admitted(quotas, subject) for _ in range(tries)])


async def calls(url: str) -> int:
    """How often the script was run."""
    async with connect(url) as redis:
        stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))


async def keys(url: str) -> list[bytes]:
    async with connect(url) as redis:
        return sorted(cast(list[bytes], await redis.keys("wave:quota:*")))


async def places(url: str) -> int:
    """How many places are taken."""
    async with connect(url) as redis:
        return int(await redis.hget("wave:quota:{pull:user:ada@example.com}:counts", "total") or 0)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("email", "address", "name"),
    [
        ("ada@example.com", "10.0.0.1", "ada@example.com"),
        (None, "10.0.0.1", "10.0.0.1"),
        ("", "10.0.0.1", "10.0.0.1"),
        (None, "2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        (None, "2001:db8:1:2::9", "2001:db8:1:2::/64"),
        (None, "::ffff:10.0.0.1", "10.0.0.1"),
        (None, "fe80::1%eth0", "fe80::/64"),
        (None, "unknown", "unknown"),
    ],
)
def test_who_is_counted(email: str | None, address: str, name: str) -> None:
    assert subject_of("pull", email, address) == Subject("pull", name, bool(email))


def test_an_address_is_never_a_user() -> None:
    assert subject_of("pull", "10.0.0.1", "").key != subject_of("pull", None, "10.0.0.1").key
    assert subject_of("pull", None, "10.0.0.1").key != subject_of("build", None, "10.0.0.1").key


# --- one process -----------------------------------------------------------------------------------------------------


async def test_the_limit_is_let_in_and_no_more(redis_url: str) -> None:
    async with running(redis_url, Limit(20, 600.0)) as quotas:
        assert await count(quotas, 50) == 20
        assert await count(quotas, 50, subject_of("pull", "bob@example.com", "")) == 20


async def test_without_a_limit_redis_is_not_asked(redis_url: str) -> None:
    async with running(redis_url, None) as quotas:
        assert quotas.try_admit(ADA)
        assert await count(quotas, 1000) == 1000
        await quotas.admit(subject_of("build", None, "10.0.0.1"))
    assert await calls(redis_url) == 0
    assert await keys(redis_url) == []


async def test_a_limit_of_zero_lets_nobody_in(redis_url: str) -> None:
    async with running(redis_url, Limit(0, 60.0)) as quotas:
        assert await count(quotas, 3) == 0


async def test_a_refusal_says_who_what_and_when(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        quotas = Quotas(redis, {("pull", False): Limit(2, 60.0), ("pull", True): Limit(9, 1.0)}, wait_s=0.0)
        someone, began = subject_of("pull", None, "2001:db8::1"), monotonic()
        assert await count(quotas, 2, someone) == 2
        with pytest.raises(TooManyRequests) as raised:
            await quotas.admit(someone)
        passed_s = monotonic() - began
        await quotas.close()
    error, message = raised.value, str(raised.value)
    assert (error.limit, error.remaining) == (2, 0)
    assert error.reset_s is not None
    assert 60 - passed_s <= error.reset_s <= 61
    assert error.retry_after_s == min(error.reset_s, 60)
    assert message.startswith("Request exceeded pull rate limit for IP 2001:db8::/64: 2/1m; try again in ")
    assert message.endswith("Z (users with an access token have 9/1s)")


async def test_the_common_case_is_decided_in_memory(redis_url: str) -> None:
    async with running(redis_url, Limit(100_000, 60.0)) as quotas:
        assert await count(quotas, 5000) == 5000
        assert await calls(redis_url) < 30


async def test_a_refusal_is_remembered(redis_url: str) -> None:
    async with running(redis_url, Limit(3, 600.0)) as quotas:
        assert await count(quotas, 4) == 3
        # What the last lease was used for is reported when it ends, whether anybody asks or not.
        before = await calls(redis_url)
        assert await count(quotas, 2000) == 0
        assert await calls(redis_url) <= before + 1


async def test_single_permits_are_a_period_apart(redis_url: str) -> None:
    decided: list[Admission] = []
    async with running(redis_url, Limit(1, 0.3), wait_s=PATIENCE_S) as quotas:
        for _ in range(6):
            before = monotonic()
            await quotas.admit(ADA)
            decided.append((before, monotonic()))
    gaps = [after - before for (before, _), (_, after) in pairwise(decided)]
    assert min(gaps) >= 0.3


async def test_who_waits_is_let_in_in_order(redis_url: str) -> None:
    order: list[int] = []

    async def wait(quotas: Quotas, number: int) -> None:
        await quotas.admit(ADA)
        order.append(number)

    async with running(redis_url, Limit(5, 0.5), wait_s=PATIENCE_S) as quotas:
        async with asyncio.TaskGroup() as group:
            for number in range(18):
                group.create_task(wait(quotas, number))
        assert order == list(range(18))


async def test_who_gives_up_waiting_takes_nobodys_place(redis_url: str) -> None:
    number, limit = 200, Limit(2, 2.0)
    turn_s = number / limit.max * limit.period_s
    async with running(redis_url, limit, wait_s=2 * turn_s) as quotas:
        assert await count(quotas, 2) == 2
        gone = [asyncio.create_task(quotas.admit(ADA)) for _ in range(number)]
        await eventually(lambda: quotas._waiting == number)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        assert turn_s > PATIENCE_S, "it would not be seen that their places are taken"
        async with patience():
            await asyncio.gather(quotas.admit(ADA), quotas.admit(ADA))
        assert all(task.cancelled() for task in gone)


async def test_nobody_is_held_who_can_not_be_let_in_within_the_wait(redis_url: str) -> None:
    async with running(redis_url, Limit(4, 600.0), wait_s=10.0) as quotas:
        assert await count(quotas, 4) == 4
        assert await count(quotas, 100) == 0
    async with running(redis_url, Limit(3, 2.0), wait_s=3.5) as quotas:
        bob = subject_of("pull", "bob@example.com", "")
        assert await count(quotas, 3, bob) == 3
        await asyncio.sleep(0.3)  # the last lease is reported: it is known when each permit frees
        assert await count(quotas, 1, bob) == 1


async def test_only_so_many_are_held(redis_url: str) -> None:
    async with running(redis_url, Limit(2, 1.0), wait_s=PATIENCE_S, max_waiting=3) as quotas:
        assert await count(quotas, 2) == 2
        answers = await asyncio.gather(*(admitted(quotas) for _ in range(10)))
        assert answers == [True] * 3 + [False] * 7
        assert await count(quotas, 1) == 1


async def test_who_is_not_seen_for_long_is_forgotten_here_but_not_in_redis(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # what other tests have left
    monkeypatch.setattr(quota, "_IDLE_S", 3600.0)
    somebodies = [subject_of("pull", f"{n}@example.com", "") for n in range(200)]

    def remembered() -> int:
        return sum(isinstance(thing, Ledger) for thing in gc.get_objects())

    async with running(redis_url, Limit(3, 600.0)) as quotas:
        assert await asyncio.gather(*(count(quotas, 2, somebody) for somebody in somebodies)) == [2] * 200
        assert remembered() == 200
        monkeypatch.setattr(quota, "_IDLE_S", 0.1)
        await eventually(lambda: remembered() == 0)
        assert await count(quotas, 3, somebodies[7]) == 1


# --- a limit that is changed by the operator --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "then", "left"),
    [
        pytest.param(Limit(2, 3600.0), Limit(5, 600.0), 3, id="shorter and more"),
        pytest.param(Limit(9, 3600.0), Limit(4, 600.0), 0, id="shorter and fewer"),
        pytest.param(Limit(2, 600.0), Limit(5, 3600.0), 3, id="longer and more"),
        pytest.param(Limit(4, 600.0), Limit(3, 3600.0), 0, id="longer and fewer"),
        pytest.param(Limit(2, 600.0), Limit(5, 600.0), 3, id="more"),
        pytest.param(Limit(5, 600.0), Limit(2, 600.0), 0, id="fewer"),
    ],
)
async def test_what_was_used_under_another_limit_counts_for_the_new_period(
    redis_url: str, before: Limit, then: Limit, left: int
) -> None:
    async with running(redis_url, before) as quotas:
        assert await count(quotas, 20) == before.max
    async with running(redis_url, then) as quotas:
        assert await count(quotas, 20) == left
        with pytest.raises(TooManyRequests) as raised:
            await quotas.admit(ADA)
    # A place frees a period after its use, give or take a step of the longer window.
    assert raised.value.reset_s is not None
    assert raised.value.reset_s <= then.period_s + 3600 / 600 + 1


async def test_what_is_older_than_a_shortened_period_does_not_count(redis_url: str) -> None:
    async with running(redis_url, Limit(3, 120.0)) as quotas:
        assert await count(quotas, 5) == 3
    before = monotonic()
    async with running(redis_url, Limit(2, 0.4), wait_s=60.0) as quotas:
        await asyncio.gather(quotas.admit(ADA), quotas.admit(ADA))
        assert monotonic() - before < 60.0
        await quotas.admit(ADA)
        assert monotonic() - before >= 0.4
    assert await places(redis_url) <= 3


async def test_what_a_lease_left_unused_comes_back_under_another_period(redis_url: str) -> None:
    async with running(redis_url, Limit(100, 600.0)) as first:
        used = await hold_permits(first)
        async with running(redis_url, Limit(100, 1200.0)) as second:
            assert await count(second, 1) == 1
    async with running(redis_url, Limit(100, 600.0)) as third:
        assert await count(third, 200) == 99 - used


# --- several processes -----------------------------------------------------------------------------------------------


async def hold_permits(quotas: Quotas) -> int:
    """Use permits so fast that the next are leased ahead; returns how many were used."""
    used = await count(quotas, 10)
    while not quotas.try_admit(ADA):  # the machine was so slow that the lease is over
        used += (more := await count(quotas, 10))
        assert more == 10, "nothing is leased ahead"
    return used + 1


async def test_what_a_process_does_not_use_comes_back_when_the_lease_ends(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "_LEASE_S", 3.0)
    limit = Limit(100, 600.0)
    async with running(redis_url, limit) as first, running(redis_url, limit) as second:
        used = await hold_permits(first)
        leased = await count(second, 200)
        assert leased < 100 - used, "the first one's lease was free"
        before = await calls(redis_url)
        async with patience():
            while leased + used < 100:
                leased += await count(second, 200)
                await asyncio.sleep(0.01)
        assert await count(second, 200) == 0
        assert await calls(redis_url) < before + 20


async def test_what_a_process_does_not_use_comes_back_when_it_closes(redis_url: str) -> None:
    limit = Limit(100, 600.0)
    async with running(redis_url, limit) as second:
        async with running(redis_url, limit) as first:
            used = await hold_permits(first)
        assert used + await count(second, 200) == 100


async def test_what_is_kept_in_redis_is_bounded_and_expires(redis_url: str) -> None:
    async with AsyncExitStack() as stack:
        several = [await stack.enter_async_context(running(redis_url, Limit(10**9, 2.0))) for _ in range(3)]
        ends = monotonic() + 3.0
        while monotonic() < ends:
            for quotas in several:
                assert await count(quotas, 20) == 20
        found = await keys(redis_url)
        assert found == [f"wave:quota:{{pull:user:ada@example.com}}:{p}".encode() for p in ("counts", "free", "leases")]
        async with connect(redis_url) as redis:
            async with redis.pipeline() as look:  # at once: leases end meanwhile
                look.hlen(found[0])
                look.zcard(found[1])
                look.hlen(found[2])
                counts, instants, leases = await look.execute()
            assert 2 < instants <= 700
            assert counts == instants + 2
            assert leases == 3
            assert all([0 < await redis.ttl(key) <= 63 for key in found])


@dataclass(frozen=True)
class Storm:
    """What one process does to one subject."""

    url: str
    limit: Limit
    wait_s: float
    clients: int
    duration_s: float


def storm_process(storm: Storm, pipe: Connection) -> None:
    """Says that it is ready, waits for the word to begin, and sends its admissions."""
    asyncio.run(_storm(storm, pipe))


async def _storm(storm: Storm, pipe: Connection) -> None:
    log: list[Admission] = []
    async with running(storm.url, storm.limit, wait_s=storm.wait_s) as quotas:
        pipe.send("ready")
        began: float = pipe.recv()
        ends = began + storm.duration_s
        async with asyncio.TaskGroup() as group:
            for _ in range(storm.clients):
                group.create_task(_storm_client(quotas, ends, log))
    pipe.send(log)


async def _storm_client(quotas: Watched, ends: float, log: list[Admission]) -> None:
    while (before := monotonic()) < ends:
        if quotas.try_admit(ADA):
            log.append((before, monotonic()))
            continue
        try:
            await quotas.admit(ADA)
        except TooManyRequests:
            await asyncio.sleep(0)
        else:
            log.append((max(before, quotas.served_at), monotonic()))


@contextmanager
def processes(storms: list[Storm]) -> Iterator[list[tuple[Any, Connection]]]:
    """One process a storm, all of them ready; killed at the end if they still run."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        started = []
        for storm in storms:
            ours, theirs = context.Pipe()
            process = context.Process(target=storm_process, args=(storm, theirs))
            process.start()
            theirs.close()
            stack.callback(process.close)
            stack.callback(process.join)
            stack.callback(process.kill)
            stack.callback(ours.close)
            started.append((process, ours))
        for _, pipe in started:
            assert pipe.recv() == "ready"
        yield started


def most_in_a_period(decided: list[Admission], period_s: float) -> int:
    """The greatest number of decisions that certainly fell into one window."""
    decided = sorted(decided)
    ends = (before + period_s for before, _ in decided)
    return max(sum(after < end for _, after in decided[i:]) for i, end in enumerate(ends))


def test_the_measure_itself() -> None:
    decided = [(0.0, 0.1), (0.5, 0.6), (0.9, 1.05), (1.0, 1.0), (1.2, 1.3)]
    assert most_in_a_period(decided, 1.0) == 4
    assert most_in_a_period(decided[:4], 1.0) == 3
    assert most_in_a_period(decided[:2], 1.0) == 2


@pytest.mark.parametrize(("wait_s", "clients"), [(0.0, 4), (20.0, 4), (3.0, 300)])
def test_a_storm_of_four_processes_gets_the_limit_and_never_more(redis_url: str, wait_s: float, clients: int) -> None:
    limit, periods = Limit(200, 2.0), 3
    storm = Storm(redis_url, limit, wait_s, clients, periods * limit.period_s + 0.2)
    with processes([storm] * 4) as started:
        for _, pipe in started:
            pipe.send(monotonic())
        decided = sorted(admission for _, pipe in started for admission in pipe.recv())
    assert most_in_a_period(decided, limit.period_s) <= limit.max
    first = decided[0][0]
    within = sum(before < first + periods * limit.period_s for before, _ in decided)
    assert within >= 0.99 * periods * limit.max


def test_leases_of_a_killed_process_come_back(redis_url: str) -> None:
    limit = Limit(200, 1.0)
    doomed = Storm(redis_url, limit, 10.0, 50, 60.0)
    other = Storm(redis_url, limit, 10.0, 4, 8.0)
    with processes([doomed, doomed, other]) as started:
        began = monotonic()
        for _, pipe in started:
            pipe.send(began)
        other_pipe = started[2][1]
        assert not other_pipe.poll(0.5)
        for process, _ in started[:2]:
            process.kill()
        killed = monotonic()
        decided: list[Admission] = other_pipe.recv()
    assert most_in_a_period(decided, limit.period_s) <= limit.max
    # A lease ends after a tenth of the period, and what it stood for a period later.
    free_from = killed + 1.2 * limit.period_s
    begins = sorted(before for before, _ in decided if before >= free_from)
    within = max(sum(begin <= at < begin + 2 * limit.period_s for at in begins) for begin in begins)
    assert within >= 0.99 * 2 * limit.max


async def test_what_a_dead_process_used_last_counts_from_then(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "_lease_s", lambda _: 1.0)  # so long that the machine may be slow
    limit = Limit(40, 2.0)
    async with connect(redis_url) as redis:
        dead = Quotas(redis, {("pull", True): limit}, wait_s=0.0)  # never reports its last lease
        used = await hold_permits(dead)
        await asyncio.sleep(0.1)  # its lease goes on for a little
        decided: list[Admission] = []
        while (before := monotonic()) and dead.try_admit(ADA):
            decided.append((before, monotonic()))
    assert decided, "the lease was over already"
    async with running(redis_url, limit, wait_s=PATIENCE_S) as quotas:
        for _ in range(limit.max):
            before = monotonic()
            await quotas.admit(ADA)
            decided.append((max(before, quotas.served_at), monotonic()))
    assert used > 0
    assert most_in_a_period(decided, limit.period_s) <= limit.max


# --- without Redis ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def durable() -> AsyncIterator[DurableRedis]:
    async with durable_redis() as redis:
        yield redis


def events(logs: list[Any], word: str) -> int:
    return sum(word in entry["event"] for entry in logs)


async def test_without_redis_leases_serve_first_and_then_requests_go_on_uncounted(durable: DurableRedis) -> None:
    limit = Limit(100, 600.0)
    with capture_logs() as logs:
        async with running(durable.url, limit, open_when_down=True) as quotas:
            used = await hold_permits(quotas)
            durable.stop()
            assert quotas.try_admit(ADA)
            assert await count(quotas, 300) == 300
            assert all(quotas.try_admit(ADA) for _ in range(50)), "without a wait, now that it is known"
            used += 351
            assert events(logs, "no permits can be leased") == 1
            await durable.start()
            await eventually(lambda: events(logs, "can be leased again") == 1)
            # What went on meanwhile counts: far more than the limit did.
            assert await count(quotas, 100) == 0
            assert await places(durable.url) == used
    assert events(logs, "no permits can be leased") == 1


async def test_without_redis_requests_fail_when_so_configured(durable: DurableRedis) -> None:
    with capture_logs() as logs:
        async with running(durable.url, Limit(100, 600.0), open_when_down=False) as quotas:
            await hold_permits(quotas)
            durable.stop()
            assert quotas.try_admit(ADA)
            with pytest.raises(StateUnavailable):
                while True:
                    await quotas.admit(ADA)
            for _ in range(50):
                assert not quotas.try_admit(ADA)
                with pytest.raises(StateUnavailable):
                    await quotas.admit(ADA)
            assert events(logs, "no permits can be leased") == 1
            await durable.start()
            await eventually(lambda: events(logs, "can be leased again") == 1)
            assert await admitted(quotas)


async def test_a_remembered_refusal_outlives_redis(durable: DurableRedis) -> None:
    async with running(durable.url, Limit(2, 600.0)) as quotas:
        assert await count(quotas, 3) == 2
        durable.stop()
        assert await count(quotas, 100) == 0


async def test_an_answer_that_is_lost_and_a_call_that_comes_late_change_nothing(redis_url: str) -> None:
    with TemporaryDirectory(prefix="lossy-") as folder:
        proxy = Lossy(redis_url, folder)
        async with await proxy.serve(), running(proxy.url, Limit(30, 600.0)) as quotas:
            assert await count(quotas, 100) == 30
            assert proxy.lost > 2
            assert await places(redis_url) == 30
            await proxy.repeat()
            assert await places(redis_url) == 30
            assert await count(quotas, 100) == 0
