"""``python -m wave_proxy.exporter``: the ``/metrics`` that Prometheus reads, from the snapshots of all processes.

A process of its own, so that no scrape, however many or slow, costs a worker anything.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import uvloop
from prometheus_client import Metric, generate_latest
from setproctitle import setproctitle

from wave_proxy import __version__
from wave_proxy.serve.http import Limits, Server
from wave_proxy.serve.messages import Reply, Request
from wave_proxy.serve.snapshot import Family, Snapshot, add, counts, read

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FRESH_S = 0.5  # snapshots are a second apart: more often a page is not made anew
_LIMITS = Limits(header_timeout_s=5, idle_timeout_s=120, write_timeout_s=10, max_header_bytes=16384, max_body_bytes=0)


class Collector:
    """The metrics of all parts together, for ``prometheus_client``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        """One metric a family; of processes that ended, only what they have counted."""
        snapshots = [taken for path in sorted(self._folder.glob("*.json")) if (taken := read(path))]
        current = {taken.part: taken.is_current() for taken in snapshots}
        about = Metric("wave_info", "Version of the program.", "gauge")
        about.add_sample("wave_info", {"version": __version__}, 1)
        up = Metric("wave_up", "Whether a part's process runs and has told its numbers lately.", "gauge")
        for part, is_up in current.items():
            up.add_sample("wave_up", {"part": part}, float(is_up))
        yield from (about, up)
        for family in add(family for taken in snapshots for family in _shown(taken, current[taken.part])):
            yield _metric(family)


def _shown(taken: Snapshot, is_current: bool) -> list[Family]:
    return list(taken.families) if is_current else counts(taken.families)


def _metric(family: Family) -> Metric:
    metric = Metric(family.name, family.help, family.kind)
    for pairs, numbers in family.samples.items():
        labels = dict(pairs)
        match family.kind:
            case "counter":
                metric.add_sample(f"{family.name}_total", labels, numbers[0])
            case "gauge":
                metric.add_sample(family.name, labels, numbers[-1])
            case "histogram":
                *buckets, total = numbers
                seen = 0.0
                for bound, count in zip((*map(str, family.bounds), "+Inf"), buckets, strict=True):
                    seen += count
                    metric.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, seen)
                metric.add_sample(f"{family.name}_count", labels, seen)
                metric.add_sample(f"{family.name}_sum", labels, total)
    return metric


class Exporter:
    """Answers the requests of the metrics port."""

    def __init__(self, folder: Path) -> None:
        self._collector = Collector(folder)
        self._page = b""
        self._made_at = float("-inf")

    async def __call__(self, request: Request) -> Reply:
        """The page for GET and HEAD of /metrics, 404 for everything else."""
        if request.method not in ("GET", "HEAD") or request.target.partition("?")[0] != "/metrics":
            return Reply(404, [("Content-Type", "text/plain")], b"the metrics are at GET /metrics\n")
        if monotonic() - self._made_at > _FRESH_S:
            self._page = generate_latest(self._collector)
            self._made_at = monotonic()
        return Reply(200, [("Content-Type", _CONTENT_TYPE)], self._page)


async def _run(host: str, port: int, folder: Path) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = Server(Exporter(folder), _LIMITS)
    listener = await asyncio.get_running_loop().create_server(server, host or None, port)
    await stop.wait()
    listener.close()
    await server.shut_down(grace_s=1)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="", help="address to listen on; empty: all")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where the snapshots are")
    given = parser.parse_args()
    setproctitle("wave-proxy: metrics")
    try:
        uvloop.run(_run(given.host, given.port, given.folder))
    except OSError as err:
        sys.exit(f"wave-proxy: the metrics can't be served: {err}")


if __name__ == "__main__":
    main()
