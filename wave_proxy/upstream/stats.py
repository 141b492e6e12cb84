"""What is counted about upstream registries: plain numbers in memory, by registry."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from re import compile as compile_pattern
from time import monotonic

OTHER = "other"

_MAX_NAMES = 50
_REMAINING = ("RateLimit-Remaining", "X-RateLimit-Remaining")
_LEADING_NUMBER = compile_pattern(r"\s*([0-9]{1,15})\b")


def _numbers() -> defaultdict[str, int]:
    return defaultdict(int)


@dataclass(slots=True)
class UpstreamStats:
    """Requests that were sent, those of them that repeat a failed one, and those that failed.

    A request fails when it brings no answer, or status 429 or 5xx. ``remaining`` is (instant of the monotonic clock,
    requests that the registry's rate limit then left). Clients name registries as they like, so besides those in
    ``named`` only the first 50 are counted by name.
    """

    named: frozenset[str] = frozenset()

    requests: defaultdict[str, int] = field(default_factory=_numbers)
    retries: defaultdict[str, int] = field(default_factory=_numbers)
    failures: defaultdict[str, int] = field(default_factory=_numbers)
    remaining: dict[str, tuple[float, int]] = field(default_factory=dict)

    def sent(self, registry: str) -> None:
        """A request goes out."""
        self.requests[self._name(registry)] += 1

    def retried(self, registry: str) -> None:
        """A failed request is made again."""
        self.retries[self._name(registry)] += 1

    def failed(self, registry: str) -> None:
        """A request has brought no answer."""
        self.failures[self._name(registry)] += 1

    def answered(self, registry: str, status: int, headers: Mapping[str, str]) -> None:
        """A request was answered."""
        if status == 429 or status >= 500:
            self.failed(registry)
        for name in _REMAINING:
            if match := _LEADING_NUMBER.match(headers.get(name, "")):  # Docker Hub's is `76;w=21600`
                self.remaining[self._name(registry)] = monotonic(), int(match[1])
                break

    def _name(self, registry: str) -> str:
        if registry in self.named or registry in self.requests or len(self.requests) < _MAX_NAMES:
            return registry
        return OTHER
