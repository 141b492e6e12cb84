"""Durations and sizes: what people write, read and written again."""

import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers

from wave_proxy.config.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("36h", 129600.0, "36h"),
        ("48h", 172800.0, "2d"),
        ("90", 90.0, "90s"),
        (" 1.5 m ", 90.0, "90s"),
        ("500ms", 0.5, "500ms"),
        ("0h", 0.0, "0s"),
        ("0.0005s", 0.0005, "0.0005s"),
    ],
)
def test_durations(text: str, seconds: float, shown: str) -> None:
    assert parse_duration(text) == seconds
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("text", "size", "shown"),
    [
        ("50GB", 50 * 10**9, "50GB"),
        ("50000000000", 50 * 10**9, "50GB"),
        ("65536", 65536, "64KiB"),
        ("1.5 MB", 1_500_000, "1500KB"),
        ("7B", 7, "7B"),
    ],
)
def test_sizes(text: str, size: int, shown: str) -> None:
    assert parse_size(text) == size
    assert format_size(size) == shown


@given(floats(0, 1e9))
def test_a_duration_that_is_written_is_the_same_again(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(integers(1, 1 << 63))
def test_a_size_that_is_written_is_the_same_again(size: int) -> None:
    assert parse_size(format_size(size)) == size


@pytest.mark.parametrize("text", ["", "1w", "-1s", "one hour", "1h 5m"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="expected a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["", "1gb", "-1MB", "lots"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as"):
        parse_size(text)
