"""Readable twins of the Cython kernels: what ``_fast`` must do, without how."""

import hashlib
import json
from typing import Any

from wave_proxy.errors import DigestMismatch, SizeMismatch


class Verifier:
    """Twin of ``_fast.digest.Verifier``."""

    def __init__(self, digest: str, size: int = -1) -> None:
        self.size = 0
        self._digest = digest
        self._announced = size
        self._algorithm = digest.partition(":")[0]
        self._hash = hashlib.new(self._algorithm)

    def update(self, chunk: bytes) -> None:
        """Take the next bytes. Raises SizeMismatch when there are more than announced."""
        if self._announced != -1 and self.size + len(chunk) > self._announced:
            raise SizeMismatch("too many bytes")
        self._hash.update(chunk)
        self.size += len(chunk)

    def finish(self) -> None:
        """End of the stream. Raises SizeMismatch or DigestMismatch."""
        if self._announced not in (-1, self.size):
            raise SizeMismatch("too few bytes")
        if f"{self._algorithm}:{self._hash.hexdigest()}" != self._digest:
            raise DigestMismatch("other bytes")


def has(container: Any, step: str | int) -> bool:
    """Whether a decoded object or array has that member."""
    if isinstance(container, dict):
        return step in container
    return isinstance(container, list) and isinstance(step, int) and 0 <= step < len(container)


def find(document: Any, path: tuple[str | int, ...]) -> Any:
    """The value at ``path`` of a decoded document. Raises ValueError when there is none."""
    for step in path:
        if not has(document, step):
            raise ValueError(f"no member {step!r}")
        document = document[step]
    return document


def set_member(document: bytes, path: tuple[str | int, ...], value: bytes) -> bytes:
    """Twin of ``_fast.manifest.set_member`` that keeps the meaning, but not the bytes, of what it doesn't change."""
    if not path:
        raise ValueError("empty path")
    decoded, last = json.loads(document), path[-1]
    container = find(decoded, path[:-1])
    if not (has(container, last) or (isinstance(container, dict) and isinstance(last, str))):
        raise ValueError(f"no place for {last!r}")
    container[last] = json.loads(value)
    return json.dumps(decoded).encode()


def append_items(document: bytes, path: tuple[str | int, ...], items: bytes) -> bytes:
    """Twin of ``_fast.manifest.append_items``, in the same sense."""
    try:
        array = find(json.loads(document), path)
    except ValueError:
        array = None  # set_member says whether one can be added there
    if not isinstance(array, list | None):
        raise ValueError("no array")
    return set_member(document, path, json.dumps([*(array or []), *json.loads(b"[" + items + b"]")]).encode())


class Ledger:
    """Twin of ``_fast.window.Ledger``."""

    def __init__(self, quantum_s: float, window_s: float) -> None:
        self.unused = 0
        self.deadline = 0.0
        self._quantum_s = quantum_s
        self._window_s = window_s
        self._uses: list[list[float]] = []  # instant of the first, of the last
        self._counts: list[int] = []
        self._frees: list[tuple[float, int]] = []

    def take(self, now: float) -> bool:
        """Use a permit; False when none is at hand."""
        if self.unused == 0 or now >= self.deadline:
            return False
        self.unused -= 1
        self.record(now)
        return True

    def record(self, now: float) -> None:
        """Note a use."""
        if self._uses and now - self._uses[-1][0] < self._quantum_s:
            self._uses[-1][1] = max(self._uses[-1][1], now)
            self._counts[-1] += 1
            return
        while self._uses and self._uses[0][1] <= now - self._window_s:
            del self._uses[0], self._counts[0]
        self._uses.append([now, now])
        self._counts.append(1)

    def settle(self) -> list[tuple[float, int]]:
        """Give up the unused permits and hand over the uses."""
        uses = [(last, count) for (_, last), count in zip(self._uses, self._counts, strict=True)]
        self._uses, self._counts, self.unused = [], [], 0
        return uses

    def grant(self, permits: int, deadline: float, frees: list[tuple[float, int]]) -> None:
        """Begin a lease."""
        self.unused, self.deadline, self._frees = permits, deadline, frees

    def delay(self, now: float, position: int) -> float:
        """Seconds in which the permit for ``position`` can't free; 0.0: ask now."""
        if self.unused or not self._frees or now >= self._frees[0][0]:
            return 0.0
        freed = 0
        for instant, count in self._frees:
            freed += count
            if freed > position:
                return instant - now
        return self._frees[-1][0] - now
