"""Sizes as people read them."""

import pytest

from wave_proxy.image.size import format_size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (23_456, "23.5 kB"),
        (1_500_000, "1.5 MB"),
        (20 * 10**9, "20.0 GB"),
        (3 * 10**12, "3000.0 GB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert format_size(size) == text
