"""Claim: a decision takes some 40 ns, a refusal behind 60 others some 110 ns; the twin takes 3 to 5 times that."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests import oracles
from wave_proxy._fast.window import Ledger

N = 10_000
Maker = Callable[[float, float], Ledger | oracles.Ledger]
MAKERS: dict[str, Maker] = {"kernel": Ledger, "twin": oracles.Ledger}
INSTANTS = [n / 100_000 for n in range(N)]  # 100,000 requests a second
FREES = [(60.0 + n / 10, 3) for n in range(32)]


def take_all(ledger: Ledger | oracles.Ledger) -> int:
    """How many of the requests found a permit."""
    take, taken = ledger.take, 0
    for now in INSTANTS:
        taken += take(now)
    return taken


def refuse_all(ledger: Ledger | oracles.Ledger, position: int) -> float:
    """The sum of the delays."""
    delay, total = ledger.delay, 0.0
    for now in INSTANTS:
        total += delay(now, position)
    return total


def lease(make: Maker) -> Ledger | oracles.Ledger:
    """A ledger with a permit for half of the requests."""
    ledger = make(0.1, 60.0)
    ledger.grant(N // 2, 1.0, [])
    return ledger


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_take(benchmark: BenchmarkFixture, make: Maker) -> None:
    benchmark.group = f"{N} requests, permits for half of them"
    ledger = lease(make)
    assert take_all(ledger) == N // 2
    assert sum(count for _, count in ledger.settle()) == N // 2
    benchmark(lambda: take_all(lease(make)))


@pytest.mark.parametrize("position", [0, 60])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_refuse(benchmark: BenchmarkFixture, make: Maker, position: int) -> None:
    benchmark.group = f"{N} refused requests, {position} before them"
    ledger = make(0.1, 60.0)
    ledger.grant(0, 0.0, FREES)
    assert ledger.delay(0.0, position) == FREES[position // 3][0]
    benchmark(refuse_all, ledger, position)
