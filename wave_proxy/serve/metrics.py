"""Tells what this worker counts: once a second, all its numbers go into a snapshot that the exporter reads."""

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import monotonic

import structlog

from wave_proxy.cache.evict import EvictStats
from wave_proxy.cache.lead import FillStats
from wave_proxy.errors import StateUnavailable
from wave_proxy.serve import snapshot
from wave_proxy.serve.snapshot import Family, Labels, Snapshot
from wave_proxy.serve.stats import SECONDS, Histogram, RequestStats
from wave_proxy.state.quota import QuotaStats
from wave_proxy.upstream.stats import UpstreamStats

_log = structlog.get_logger()

_INTERVAL_S = 1.0
_BEAT_S = 0.1  # how often the event loop is asked whether it is late
_WORST_OF = 60  # intervals
_PING_S = 5.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a worker's numbers are. ``ping`` raises StateUnavailable when Redis does not answer."""

    requests: RequestStats
    fills: FillStats
    upstream: UpstreamStats
    evictions: EvictStats
    quotas: QuotaStats
    connections: Callable[[], int]
    ping: Callable[[], Awaitable[None]]


class Publisher:
    """Writes the snapshots of one part. It goes on counting where a process of the same part before it has ended."""

    def __init__(self, folder: Path, part: str, sources: Sources) -> None:
        self._folder = folder
        self._part = part
        self._sources = sources
        before = snapshot.read(snapshot.path_of(folder, part))
        self._before = snapshot.counts(before.families) if before else []
        self._lag = Histogram()
        self._worst = deque([0.0], maxlen=_WORST_OF)
        self._redis_up = True
        self._writing = Lock()
        self._written_at = 0.0
        self._failing = False

    async def run(self) -> None:
        """Publish every second until cancelled. The two watches must be running beside it."""
        while True:
            await self._publish()
            await asyncio.sleep(_INTERVAL_S)

    async def close(self) -> None:
        """Publish for the last time."""
        await self._publish()

    async def _publish(self) -> None:
        families = snapshot.add([*self._before, *_count(self._sources), *self._own()])
        self._worst.append(0.0)
        taken = Snapshot(self._part, os.getpid(), monotonic(), tuple(families))
        try:
            await asyncio.to_thread(self._write, taken)  # a busy disk must not hold up the event loop
        except OSError as err:
            if not self._failing:
                _log.warning("metrics can't be written: they stand still", error=str(err))
            self._failing = True
        else:
            self._failing = False

    def _write(self, taken: Snapshot) -> None:
        with self._writing:
            if taken.at > self._written_at:
                snapshot.write(self._folder, taken)
                self._written_at = taken.at

    async def watch_loop(self) -> None:
        """Measure how late the event loop is, until cancelled."""
        while True:
            due = monotonic() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            late_s = max(monotonic() - due, 0.0)
            self._lag.observe(late_s)
            self._worst[-1] = max(self._worst[-1], late_s)

    async def watch_redis(self) -> None:
        """Ask every 5 s whether Redis is there, until cancelled."""
        while True:
            try:
                await self._sources.ping()
                self._redis_up = True
            except StateUnavailable:
                self._redis_up = False
            await asyncio.sleep(_PING_S)

    def _own(self) -> list[Family]:
        """What is one process's alone, and what this one measures itself."""
        part = (("part", self._part),)
        times = os.times()
        return [
            _counter("part_starts", "Processes that a part has had: one, and one more for each restart.", {part: 1}),
            _counter("process_cpu_seconds", "CPU time, user and system.", {part: times.user + times.system}),
            _gauge("process_resident_memory_bytes", "Memory in use.", {part: [_resident_bytes()]}),
            _gauge("open_connections", "Connections of clients.", {part: [self._sources.connections()]}),
            _gauge("redis_up", "Whether Redis answers this process, asked every 5 s.", {part: [float(self._redis_up)]}),
            _gauge(
                "event_loop_lag_max_seconds",
                "How late the event loop was at most in the last minute.",
                {part: [max(self._worst)]},
            ),
            _histogram(
                "event_loop_lag_seconds", "How late the event loop is, looked at 10 times a second.", {(): self._lag}
            ),
        ]


def _count(sources: Sources) -> list[Family]:
    return [*_requests(sources.requests), *_fills(sources), *_upstream(sources.upstream), *_store(sources)]


def _requests(stats: RequestStats) -> list[Family]:
    requests: dict[Labels, float] = {}
    first_byte: dict[Labels, Histogram] = {}
    for (kind, state, status), seconds in list(stats.first_byte.items()):
        labels = (("kind", kind), ("cache", state))
        with_status = (*labels, ("status", f"{status // 100}xx"))
        requests[with_status] = requests.get(with_status, 0) + sum(seconds.counts)
        first_byte.setdefault(labels, Histogram()).add(seconds)
    return [
        _counter("requests", "Requests answered.", requests),
        _histogram("first_byte_seconds", "From a request's head to the first byte of its answer.", first_byte),
        _counter("sent_bytes", "Bytes of bodies sent to clients.", {(): stats.bytes}),
    ]


def _fills(sources: Sources) -> list[Family]:
    stats, quotas = sources.fills, sources.quotas
    decisions = ("admitted", "held", "refused", "uncounted")
    by_decision: dict[Labels, float] = {(("decision", name),): getattr(quotas, name) for name in decisions}
    return [
        _counter("fills", "Fetches of a blob from upstream that were begun.", {(): stats.begun}),
        _counter("fill_followers", "Requests that read along with a fill that was under way.", {(): stats.followers}),
        _counter("fill_resumes", "Times that a fill went on after upstream broke off.", {(): stats.resumed}),
        _counter("fill_failures", "Fills that were given up.", {(): stats.failed}),
        _counter("fetched_bytes", "Bytes of blobs fetched from upstream.", {(): stats.bytes}),
        _counter("verify_failures", "Blobs that were not what their digest or size says.", {(): stats.mismatched}),
        _counter("quota_decisions", "Pulls that have a limit, by what became of them.", by_decision),
    ]


def _upstream(stats: UpstreamStats) -> list[Family]:
    remaining: dict[Labels, list[float]] = {
        (("registry", name),): [at, left] for name, (at, left) in stats.remaining.items()
    }
    return [
        _counter("upstream_requests", "Requests sent to a registry.", _by_registry(stats.requests)),
        _counter("upstream_retries", "Those of them that repeat a failed one.", _by_registry(stats.retries)),
        _counter("upstream_failures", "Those that got no answer, or 429 or 5xx.", _by_registry(stats.failures)),
        _gauge("upstream_remaining", "Requests that the registry's rate limit leaves, as it said last.", remaining),
    ]


def _by_registry(numbers: Mapping[str, int]) -> dict[Labels, float]:
    return {(("registry", name),): number for name, number in numbers.items()}


def _store(sources: Sources) -> list[Family]:
    stats = sources.evictions
    size: dict[Labels, list[float]] = {(): [stats.measured_at, stats.store_bytes]} if stats.measured_at else {}
    return [
        _gauge("store_bytes", "Size of the blobs, manifests and spools in the data folder.", size),
        _counter("evicted_bytes", "Bytes that the cap of the store has cost.", {(): stats.evicted_bytes}),
        _counter("evicted_files", "Blobs and manifests that the cap of the store has cost.", {(): stats.evicted_files}),
    ]


def _counter(name: str, text: str, samples: Mapping[Labels, float]) -> Family:
    return Family(f"wave_{name}", "counter", text, {labels: [number] for labels, number in samples.items()})


def _gauge(name: str, text: str, samples: Mapping[Labels, Iterable[float]]) -> Family:
    return Family(f"wave_{name}", "gauge", text, {labels: [*numbers] for labels, numbers in samples.items()})


def _histogram(name: str, text: str, samples: Mapping[Labels, Histogram]) -> Family:
    numbers = {labels: [*values.counts, values.sum] for labels, values in samples.items()}
    return Family(f"wave_{name}", "histogram", text, numbers, SECONDS)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
