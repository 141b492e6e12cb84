"""The Range header: which part of a blob it asks for (needs.md C3.6)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wave_proxy.errors import RangeInvalid
from wave_proxy.serve.ranges import parse_range


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-", (0, 100)),
        ("bytes=5-", (5, 100)),
        ("bytes=99-", (99, 100)),
        ("bytes=10-19", (10, 20)),
        ("bytes=10-99", (10, 100)),
        ("bytes=10-100", (10, 100)),
        ("bytes=10-999999999999999999", (10, 100)),
        ("bytes=-1", (99, 100)),
        ("bytes=-100", (0, 100)),
        ("bytes=-999999999999999999", (0, 100)),
        ("bytes= 1-2 ", (1, 3)),
    ],
)
def test_parts(header: str, span: tuple[int, int]) -> None:
    assert parse_range(header, 100) == span


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=--1",
        "bytes=a-b",
        "bytes=1-b",
        "bytes=1.5-2",
        "bytes=0x1-2",
        "bytes=+1-2",
        "bytes=5-3",
        "items=0-1",
        "bytes 0-1",
        "bytes=0-1,5-6",
        "bytes=" + ",".join("0-0" for _ in range(10_000)),
        "bytes=" + "9" * 5000 + "-",
        "bytes=0-" + "9" * 5000,
        "bytes=" + " " * 300 + "0-1",
        "bytes=" + " " * 60_000 + "x",
        "bytes=1 - 2",
        "bytes=\u0661-\u0662",
    ],
)
def test_everything_else_means_the_whole(header: str | None) -> None:
    assert parse_range(header, 100) is None


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=999999999999999999-", "bytes=-0"])
def test_parts_behind_the_end(header: str) -> None:
    with pytest.raises(RangeInvalid) as caught:
        parse_range(header, 100)
    assert (caught.value.status, caught.value.size) == (416, 100)


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=-1"])
def test_an_empty_blob_has_no_parts(header: str) -> None:
    with pytest.raises(RangeInvalid):
        parse_range(header, 0)


@given(st.text(alphabet="bytes=0123456789-, ", max_size=30), st.integers(0, 1000))
def test_a_part_lies_inside(tail: str, size: int) -> None:
    try:
        span = parse_range(f"bytes={tail}", size)
    except RangeInvalid:
        return
    assert span is None or 0 <= span[0] < span[1] <= size
