"""What a worker counts about its requests: plain numbers in memory, read once a second by ``serve/metrics.py``."""

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """How many values fell into each bucket; a bound belongs to the bucket below it."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # of each bucket alone, the last one is without end
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add(self, other: "Histogram") -> None:
        """Count what another one of the same bounds has counted."""
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


@dataclass(slots=True)
class RequestStats:
    """Seconds to the first byte by (kind, cache state, HTTP status), and the bytes of all bodies that were sent."""

    first_byte: defaultdict[tuple[str, str, int], Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    bytes: int = 0

    def count(self, kind: str, state: str, status: int, seconds: float) -> None:
        """Count a request. ``kind``: as ``kind_of`` says; ``state``: hit, miss, fill, stale, none."""
        self.first_byte[kind, state, status].observe(seconds)

    @property
    def requests(self) -> dict[tuple[str, str, int], int]:
        """How many requests there were by (kind, cache state, HTTP status)."""
        return {key: sum(seconds.counts) for key, seconds in self.first_byte.items()}
