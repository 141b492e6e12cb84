"""The quota kernel against its readable twin, and against what a ledger of permits must never do."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import oracles
from wave_proxy._fast.window import Ledger

QUANTUM_S, WINDOW_S = 0.5, 8.0

STEP_S = st.sampled_from([0.0, 0.0, 0.125, 0.25, 0.5, 0.75, 3.0, 9.0])
FREES = st.lists(st.tuples(st.integers(0, 40).map(lambda n: n / 4), st.integers(0, 3)), max_size=4).map(sorted)
GRANTS = st.tuples(st.just("grant"), st.integers(0, 5), st.sampled_from([0.0, 0.25, 1.0, 4.0]), FREES)
OPERATIONS = st.tuples(
    STEP_S,
    st.tuples(st.sampled_from(["take", "take", "take", "record", "settle"]))
    | st.tuples(st.just("delay"), st.integers(0, 6))
    | GRANTS,
)


def apply(ledger: Ledger | oracles.Ledger, now: float, operation: tuple[Any, ...]) -> Any:
    """What one operation answers."""
    match operation:
        case ("grant", permits, life_s, frees):
            return ledger.grant(permits, now + life_s, [(now + wait_s, count) for wait_s, count in frees])
        case ("delay", position):
            return ledger.delay(now, position)
        case ("settle",):
            return ledger.settle()
        case (name,):
            return getattr(ledger, name)(now)
    raise AssertionError(operation)


@given(st.lists(OPERATIONS, max_size=40))
def test_ledger_is_its_twin(operations: list[tuple[float, tuple[Any, ...]]]) -> None:
    kernel, twin, now = Ledger(QUANTUM_S, WINDOW_S), oracles.Ledger(QUANTUM_S, WINDOW_S), 100.0
    for step_s, operation in operations:
        now += step_s
        assert apply(kernel, now, operation) == apply(twin, now, operation)
        assert (kernel.unused, kernel.deadline) == (twin.unused, twin.deadline)
    assert kernel.settle() == twin.settle()


@given(st.lists(st.tuples(STEP_S, st.sampled_from(["take", "record"])), max_size=60), st.integers(0, 20))
def test_a_use_is_reported_once_and_never_as_older_than_it_is(uses: list[tuple[float, str]], permits: int) -> None:
    ledger, now, made = Ledger(QUANTUM_S, 1000.0), 0.0, list[float]()
    ledger.grant(permits, 500.0, [])
    for step_s, name in uses:
        now += step_s
        if apply(ledger, now, (name,)) is not False:
            made.append(now)
    reported = ledger.settle()
    instants = [instant for instant, count in reported for _ in range(count)]
    assert len(instants) == len(made)
    assert all(0 <= instant - use < QUANTUM_S for instant, use in zip(instants, made, strict=True))
    assert ledger.settle() == []


def test_a_lease_ends_with_its_last_permit_or_at_its_deadline() -> None:
    ledger = Ledger(QUANTUM_S, WINDOW_S)
    assert not ledger.take(0.0)
    ledger.grant(2, 10.0, [])
    assert [ledger.take(9.0), ledger.take(9.99), ledger.take(9.995)] == [True, True, False]
    ledger.grant(2, 20.0, [])
    assert not ledger.take(20.0)
    assert ledger.unused == 2
    ledger.settle()
    assert ledger.unused == 0
    assert not ledger.take(15.0)


def test_a_refusal_is_remembered_until_a_permit_can_free() -> None:
    ledger = Ledger(QUANTUM_S, WINDOW_S)
    assert ledger.delay(0.0, 0) == 0.0
    ledger.grant(0, 0.0, [(10.0, 2), (12.0, 1)])
    assert [ledger.delay(4.0, position) for position in range(5)] == [6.0, 6.0, 8.0, 8.0, 8.0]
    assert ledger.delay(10.0, 4) == 0.0
    ledger.grant(1, 5.0, [(10.0, 2)])
    assert ledger.delay(6.0, 0) == 0.0, "what is left of our own lease frees as soon as we say so"
    ledger.settle()
    assert ledger.delay(6.0, 0) == 4.0


def test_what_is_kept_of_uses_is_bounded() -> None:
    ledger = Ledger(QUANTUM_S, WINDOW_S)
    for n in range(100_000):
        ledger.record(n * 0.25)
    uses = ledger.settle()
    assert len(uses) <= WINDOW_S / QUANTUM_S + 2
    assert uses[-1] == (99_999 * 0.25, 2)
    assert sum(count for instant, count in uses if instant > 99_999 * 0.25 - WINDOW_S) >= WINDOW_S / 0.25 - 2


def test_ledger_takes_numbers_only() -> None:
    ledger: Any = Ledger(QUANTUM_S, WINDOW_S)
    frees: list[Any]
    for wrong in (None, "text"):
        with pytest.raises(TypeError):
            ledger.take(wrong)
        with pytest.raises(TypeError):
            ledger.grant(wrong, 0.0, [])
    with pytest.raises(TypeError):
        ledger.grant(1, 0.0, None)
    for frees in ([None], [()], [(1.0,)], [("text", 1)]):
        with pytest.raises((TypeError, ValueError)):
            ledger.grant(1, 0.0, frees)
    assert ledger.unused == 0
    for frees in ([(1.0, 0), None], [(1.0, 0), (2.0,)], [(1.0, 0), (2.0, None)]):
        ledger.grant(0, 0.0, frees)
        with pytest.raises((TypeError, ValueError)):
            ledger.delay(0.0, 0)
    with pytest.raises(AttributeError):
        ledger.unused = 5
