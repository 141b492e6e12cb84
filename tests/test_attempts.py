"""The limit on attempts of one address."""

import pytest

from wave_proxy.errors import TooManyRequests
from wave_proxy.state.attempts import Attempts


def test_so_many_and_no_more() -> None:
    attempts = Attempts("wrong logins from here", limit=3)
    for _ in range(3):
        attempts.check("192.0.2.1")
        attempts.count("192.0.2.1")
    with pytest.raises(TooManyRequests, match=r"^too many wrong logins from here; try again in (59|60) s$") as refused:
        attempts.check("192.0.2.1")
    assert refused.value.retry_after_s in range(30, 61)
    attempts.check("192.0.2.2")


def test_several_at_once() -> None:
    attempts = Attempts("bytes", limit=3)
    attempts.count("ada@example.org", 2)
    attempts.check("ada@example.org")
    attempts.count("ada@example.org", 2)
    with pytest.raises(TooManyRequests):
        attempts.check("ada@example.org")


def test_nobody_is_told_to_sleep_for_an_hour() -> None:
    attempts = Attempts("bytes", limit=3, period_s=3600.0)
    attempts.count("192.0.2.1", 3)
    with pytest.raises(TooManyRequests, match=r"try again in 3[56]\d\d s") as refused:
        attempts.check("192.0.2.1")
    error = refused.value
    assert (error.retry_after_s, error.limit, error.remaining) == (60, 3, 0)
    assert error.reset_s in (3599, 3600)


def test_what_came_to_nothing_is_taken_back() -> None:
    attempts = Attempts("bytes", limit=3)
    attempts.take_back("192.0.2.1", 3, 0.0)
    until = attempts.count("192.0.2.1", 3)
    attempts.take_back("192.0.2.1", 1, until - 1)  # of another period
    with pytest.raises(TooManyRequests):
        attempts.check("192.0.2.1")
    attempts.take_back("192.0.2.1", 1, until)
    attempts.check("192.0.2.1")
    assert attempts.count("192.0.2.1") == until


def test_they_are_forgotten_after_the_period() -> None:
    attempts = Attempts("wrong logins", limit=1, period_s=0.0)
    attempts.count("192.0.2.1")
    attempts.count("192.0.2.1")
    attempts.check("192.0.2.1")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("unix", "unix", True),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    attempts = Attempts("wrong logins", limit=1)
    attempts.count(one)
    if same:
        with pytest.raises(TooManyRequests):
            attempts.check(other)
    else:
        attempts.check(other)


def test_of_many_addresses_the_oldest_are_forgotten() -> None:
    attempts = Attempts("wrong logins", limit=1)
    for number in range(10_001):
        attempts.count(f"10.0.{number >> 8}.{number & 255}")
    attempts.check("10.0.0.0")
    with pytest.raises(TooManyRequests):
        attempts.check("10.0.0.1")
