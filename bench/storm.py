"""Clients that ask for one manifest as fast as they can, and note when each one that was let in asked and had it."""

import asyncio
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from time import monotonic
from types import TracebackType
from typing import Self, cast

import uvloop

from bench.children import child, raise_file_limit
from bench.windows import Admissions
from wave_proxy.image.oci import ACCEPT_MANIFESTS

ANSWER_LIMIT_S = 120.0  # how long after its end a storm waits for the last answers
_RECONNECT_S = 0.05
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass
class Outcome:
    """What a storm got. ``others`` are answers that let nobody in, by status; ``lost`` counts requests without one."""

    admitted: Admissions = field(default_factory=Admissions)
    others: Counter[int] = field(default_factory=Counter)
    lost: int = 0

    @property
    def errors(self) -> int:
        """What is neither let in nor refused for a quota."""
        return self.lost + sum(count for status, count in self.others.items() if status != 429)


class _Client(asyncio.Protocol):
    """One connection: asks again as soon as it has an answer."""

    def __init__(self, request: bytes, ends: float, outcome: Outcome) -> None:
        self._request = request
        self._ends = ends
        self._outcome = outcome
        self._answer = b""
        self._sent = 0.0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it
        self._ask()

    def _ask(self) -> None:
        self._sent = monotonic()
        if self._sent < self._ends:
            self._transport.write(self._request)
        else:
            self._sent = 0.0
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = monotonic()
        self._answer += data
        head = self._answer.find(b"\r\n\r\n")
        length = _LENGTH.search(self._answer, 0, head + 2) if head >= 0 else None
        if length is None or len(self._answer) < head + 4 + int(length[1]):
            return
        status = int(self._answer[9:12])
        if status == 200:
            self._outcome.admitted.add(self._sent, now)
        else:
            self._outcome.others[status] += 1
        self._answer = b""
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._outcome.lost += self._sent > 0
        self.closed.set_result(None)


async def _storm(address: str, request: bytes, connections: int, ends: float) -> Outcome:
    outcome = Outcome()
    with suppress(TimeoutError):
        async with asyncio.timeout(ends - monotonic() + ANSWER_LIMIT_S):
            await asyncio.gather(*(_keep_asking(address, request, ends, outcome) for _ in range(connections)))
    return outcome


async def _keep_asking(address: str, request: bytes, ends: float, outcome: Outcome) -> None:
    host, _, port = address.rpartition(":")
    while monotonic() < ends:
        try:
            _, client = await asyncio.get_running_loop().create_connection(
                lambda: _Client(request, ends, outcome), host, int(port)
            )
        except OSError:
            outcome.lost += 1
            await asyncio.sleep(_RECONNECT_S)
            continue
        try:
            await client.closed
        except asyncio.CancelledError:  # the storm is over, and this one has no answer yet
            outcome.lost += 1
            raise


async def _storms(addresses: Sequence[str], path: str, connections: int, duration_s: float) -> Outcome:
    ends = monotonic() + duration_s
    accept = f"Accept: {ACCEPT_MANIFESTS}\r\n"
    requests = {address: f"GET {path} HTTP/1.1\r\nHost: {address}\r\n{accept}\r\n".encode() for address in addresses}
    merged = Outcome()
    share = connections // len(addresses)
    for outcome in await asyncio.gather(*(_storm(place, text, share, ends) for place, text in requests.items())):
        merged.admitted.merge(outcome.admitted)
        merged.others += outcome.others
        merged.lost += outcome.lost
    return merged


def _run(pipe: Pipe, addresses: Sequence[str], path: str, connections: int, duration_s: float) -> None:
    raise_file_limit()
    pipe.send(None)
    with suppress(EOFError):
        pipe.recv()
        pipe.send(uvloop.run(_storms(addresses, path, connections, duration_s)))


class Storm:
    """Connections, spread over the addresses, in a process of their own. A context manager; nothing goes on after it.

    Their instants are of the machine's monotonic clock, which all its processes share.
    """

    def __init__(self, addresses: Sequence[str], path: str, *, connections: int, duration_s: float) -> None:
        self._arguments = list(addresses), path, connections, duration_s
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._pipe = self._stack.enter_context(child(_run, *self._arguments))
        self._pipe.recv()  # imports are done
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self) -> float:
        """Let it begin; returns the instant."""
        self._pipe.send(None)
        return monotonic()

    def outcome(self) -> Outcome:
        """Wait for its end. Raises RuntimeError when its process ended before that."""
        try:
            outcome: Outcome = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process of clients ended before its work did") from None
        return outcome


def told(statuses: Mapping[int, int]) -> str:
    """Counts by status, for notes: ``503: 12, 500: 1``."""
    return ", ".join(f"{status}: {count:,}" for status, count in statuses.items())
