"""Metrics: what is counted, how the numbers of several processes become one page, and that no scrape does harm."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from socket import create_connection, socket
from time import monotonic, sleep
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bench.images import blob, image, layer, random_blob
from bench.upstream import Faults, Upstream
from tests.cached import REPOSITORY
from tests.outgoing import registry_at
from tests.patience import PATIENCE_S, until
from tests.redis_faults import durable_redis
from tests.servers import ROOT, WaveProxy, free_port, http_request, pull
from wave_proxy.cache.blobs import BlobStore
from wave_proxy.cache.evict import Evictor, EvictStats
from wave_proxy.cache.lead import FillStats
from wave_proxy.errors import AddressRefused, StateUnavailable, TooManyRequests
from wave_proxy.exporter import Collector
from wave_proxy.image.limit import Limit
from wave_proxy.serve import snapshot
from wave_proxy.serve.metrics import Publisher, Sources
from wave_proxy.serve.snapshot import Family, Snapshot
from wave_proxy.serve.stats import SECONDS, Histogram, RequestStats
from wave_proxy.state.quota import Quotas, QuotaStats, subject_of
from wave_proxy.state.redis import connect
from wave_proxy.upstream.stats import OTHER, UpstreamStats

Wave = Callable[..., WaveProxy]
Registry = Callable[..., Upstream]

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

ADA = subject_of("pull", "ada@example.com", "")


def parse(page: str) -> Samples:
    """A page's samples, by name and labels. Raises ValueError."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of those samples of a name that have these labels."""
    return sum(value for (key, has), value in samples.items() if key == name and labels.items() <= set(has))


def collected(folder: Path) -> Samples:
    return parse(generate_latest(Collector(folder)).decode())


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bucket"), [(0.0, 0), (0.0005, 0), (0.0006, 1), (30.0, len(SECONDS) - 1), (30.1, len(SECONDS))]
)
def test_a_bound_belongs_to_the_bucket_below_it(value: float, bucket: int) -> None:
    histogram = Histogram()
    histogram.observe(value)
    assert [n for n, count in enumerate(histogram.counts) if count] == [bucket]
    assert histogram.sum == value


def test_requests_are_counted_by_kind_state_and_status() -> None:
    stats = RequestStats()
    for status in (200, 200, 404):
        stats.count("manifest", "hit", status, 0.001)
    assert stats.requests == {("manifest", "hit", 200): 2, ("manifest", "hit", 404): 1}


@pytest.mark.parametrize(
    ("headers", "left"),
    [
        ({"RateLimit-Remaining": "76;w=21600"}, 76),
        ({"RateLimit-Remaining": "0"}, 0),
        ({"X-RateLimit-Remaining": " 4999"}, 4999),
        ({"RateLimit-Remaining": "5", "X-RateLimit-Remaining": "9"}, 5),
        ({"RateLimit-Remaining": "many"}, None),
        ({"RateLimit-Remaining": "-1"}, None),
        ({"RateLimit-Remaining": "9" * 40}, None),
        ({}, None),
    ],
)
def test_what_a_rate_limit_leaves_is_read(headers: dict[str, str], left: int | None) -> None:
    stats = UpstreamStats()
    stats.sent("docker.io")
    stats.answered("docker.io", 200, headers)
    assert {name: number for name, (_, number) in stats.remaining.items()} == (
        {} if left is None else {"docker.io": left}
    )
    assert stats.failures == {}


def test_clients_cannot_make_names_without_end() -> None:
    stats = UpstreamStats()
    for n in range(1000):
        stats.sent(f"host-{n}")
        stats.failed(f"host-{n}")
        stats.answered(f"host-{n}", 200, {"RateLimit-Remaining": "1"})
    assert len(stats.requests) == len(stats.failures) == len(stats.remaining) == 51
    assert stats.requests[OTHER] == stats.failures[OTHER] == 950


def test_registries_that_are_configured_keep_their_names() -> None:
    stats = UpstreamStats(named=frozenset({"docker.io"}))
    for n in range(1000):
        stats.sent(f"host-{n}")
    stats.sent("docker.io")
    assert stats.requests["docker.io"] == 1


async def test_upstream_requests_are_counted(upstream: Registry) -> None:
    server = upstream(faults=Faults(status={"manifests": 503}, fail_times=1))
    server.add(REPOSITORY, image([layer({"a": "b"})]), "latest")
    async with registry_at(server) as registry:
        await registry.fetch_manifest(server.address, REPOSITORY, "latest")
        assert registry.stats.requests == {server.address: 2}
        assert registry.stats.failures == registry.stats.retries == {server.address: 1}


async def test_a_request_without_an_answer_is_a_failure() -> None:
    async with registry_at() as registry:
        with pytest.raises(AddressRefused):
            await registry.fetch_manifest("127.0.0.1:1", REPOSITORY, "latest")
        assert registry.stats.requests == registry.stats.failures == {"127.0.0.1:1": 1}


def test_evictions_and_the_size_of_the_store_are_counted(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    for seed in range(10):
        item = blob(random_blob(1000, seed=seed))
        store.put(item.digest, item.content)
    roomy, tight = Evictor(tmp_path, 1 << 40), Evictor(tmp_path, 5000)
    assert roomy.stats == EvictStats()
    roomy.evict()
    assert (roomy.stats.store_bytes, roomy.stats.evicted_files) == (10_000, 0)
    freed = tight.evict()
    assert asdict(tight.stats) | {"measured_at": 0.0} == {
        "evicted_bytes": freed,
        "evicted_files": freed // 1000,
        "store_bytes": 10_000 - freed,
        "measured_at": 0.0,
    }
    assert tight.stats.measured_at > roomy.stats.measured_at > 0


async def test_quota_decisions_are_counted(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        quotas = Quotas(redis, {("pull", True): Limit(5, 5.0)}, wait_s=4.0)
        asked = [quotas.admit(ADA) for _ in range(20)]
        ended = await asyncio.gather(*asked, return_exceptions=True)
        refused = sum(isinstance(end, TooManyRequests) for end in ended)
        stats = quotas.stats
        await quotas.close()
    assert stats.refused == refused > 0
    assert stats.admitted + stats.held + stats.refused == 20
    assert stats.uncounted == 0


async def test_who_had_to_wait_for_a_permit_was_held(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        quotas = Quotas(redis, {("pull", True): Limit(1, 1.0)}, wait_s=PATIENCE_S)
        for _ in range(2):
            await quotas.admit(ADA)
        await quotas.close()
    assert quotas.stats.held >= 1
    assert quotas.stats.admitted + quotas.stats.held == 2


@pytest.mark.parametrize("is_open", [True, False])
async def test_decisions_without_redis_are_counted(is_open: bool) -> None:
    async with durable_redis() as server, connect(server.url) as redis:
        server.stop()
        quotas = Quotas(redis, {("pull", True): Limit(5, 60.0)}, wait_s=0.0, open_when_down=is_open)
        if is_open:
            await quotas.admit(ADA)
        else:
            with pytest.raises(StateUnavailable):
                await quotas.admit(ADA)
        await quotas.close()
    assert quotas.stats == (QuotaStats(uncounted=1) if is_open else QuotaStats(refused=1))


# --- snapshots -------------------------------------------------------------------------------------------------------

NO_LABELS = ()
HIT = (("cache", "hit"),)
MISS = (("cache", "miss"),)


def test_processes_add_up() -> None:
    one = [
        Family("n", "counter", "", {HIT: [1], MISS: [2]}),
        Family("h", "histogram", "", {NO_LABELS: [1, 2, 0.5]}, (1.0,)),
        Family("g", "gauge", "", {HIT: [10.0, 7], MISS: [10.0, 7]}),
    ]
    other = [
        Family("n", "counter", "", {HIT: [10]}),
        Family("h", "histogram", "", {NO_LABELS: [5, 6, 1.5]}, (1.0,)),
        Family("g", "gauge", "", {HIT: [11.0, 3], MISS: [9.0, 8]}),
    ]
    assert snapshot.add([*one, *other]) == [
        Family("n", "counter", "", {HIT: [11], MISS: [2]}),
        Family("h", "histogram", "", {NO_LABELS: [6, 8, 2.0]}, (1.0,)),
        Family("g", "gauge", "", {HIT: [11.0, 3], MISS: [10.0, 7]}),
    ]
    assert one[0].samples == {HIT: [1], MISS: [2]}, "what was added up has changed"


def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    families = (Family("n", "counter", "what", {HIT: [1.0]}), Family("h", "histogram", "", {(): [1.0, 2.0]}, (0.5,)))
    taken = Snapshot("proxy-0", 7, 1.5, families)
    snapshot.write(tmp_path, taken)
    assert snapshot.read(snapshot.path_of(tmp_path, "proxy-0")) == taken
    assert [path.name for path in tmp_path.iterdir()] == ["proxy-0.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"part": "x"}',
        b'{"part": "x", "pid": 1, "at": 0, "families": [1]}',
        b'{"part": "x", "pid": "me", "at": 0, "families": []}',
        b'{"part": "x", "pid": 1, "at": 0, "families": [{"name": "n", "kind": "counter", "help": "", "samples": 1}]}',
    ],
)
def test_a_snapshot_that_cannot_be_read_does_not_count(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.json").write_bytes(content)
    snapshot.write(tmp_path, taken_by(os.getpid()))
    assert snapshot.read(tmp_path / "broken.json") is None
    assert total(collected(tmp_path), "n_total") == 3


def taken_by(pid: int, age_s: float = 0.0) -> Snapshot:
    families = (
        Family("n", "counter", "", {(): [3]}),
        Family("g", "gauge", "", {(("part", "proxy-0"),): [8]}),
        Family("h", "histogram", "", {(): [1, 2, 4, 0.5]}, (0.1, 2.5)),
    )
    return Snapshot("proxy-0", pid, monotonic() - age_s, families)


def test_a_page_is_made_of_a_snapshot(tmp_path: Path) -> None:
    snapshot.write(tmp_path, taken_by(os.getpid()))
    samples = collected(tmp_path)
    assert total(samples, "wave_up", part="proxy-0") == 1
    assert total(samples, "g", part="proxy-0") == 8
    assert [total(samples, "h_bucket", le=le) for le in ("0.1", "2.5", "+Inf")] == [1, 3, 7]
    assert (total(samples, "h_count"), total(samples, "h_sum")) == (7, 0.5)


def gone() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("has_ended", [True, False], ids=["ended", "silent"])
def test_a_part_that_is_gone_is_not_shown_as_living_but_what_it_counted_stays(tmp_path: Path, has_ended: bool) -> None:
    snapshot.write(tmp_path, taken_by(gone()) if has_ended else taken_by(os.getpid(), snapshot.STALE_S + 1))
    samples = collected(tmp_path)
    assert total(samples, "wave_up", part="proxy-0") == 0
    assert ("g", frozenset({("part", "proxy-0")})) not in samples
    assert (total(samples, "n_total"), total(samples, "h_count")) == (3, 7)


# --- publishing ------------------------------------------------------------------------------------------------------


async def answers() -> None:
    """A Redis that is up."""


def sources() -> Sources:
    return Sources(
        RequestStats(), FillStats(), UpstreamStats(), EvictStats(), QuotaStats(), connections=lambda: 4, ping=answers
    )


async def test_a_process_goes_on_where_the_one_before_it_has_ended(tmp_path: Path) -> None:
    first, second = sources(), sources()
    first.requests.count("blob", "hit", 200, 0.01)
    first.upstream.sent("a")
    await Publisher(tmp_path, "proxy-0", first).close()
    successor = Publisher(tmp_path, "proxy-0", second)
    second.requests.count("blob", "hit", 206, 0.01)
    second.upstream.sent("b")
    for _ in range(2):  # what was there before counts once
        await successor.close()
    samples = collected(tmp_path)
    assert total(samples, "wave_requests_total", kind="blob", cache="hit", status="2xx") == 2
    assert total(samples, "wave_first_byte_seconds_count", kind="blob", cache="hit") == 2
    assert total(samples, "wave_upstream_requests_total") == 2
    assert total(samples, "wave_part_starts_total", part="proxy-0") == 2
    assert total(samples, "wave_open_connections", part="proxy-0") == 4


async def test_every_number_has_a_place_on_the_page(tmp_path: Path) -> None:
    one = sources()
    one.fills.begun, one.fills.followers, one.fills.bytes = 1, 2, 3
    one.fills.resumed, one.fills.failed, one.fills.mismatched = 4, 5, 6
    one.quotas.admitted, one.quotas.held, one.quotas.refused, one.quotas.uncounted = 7, 8, 9, 10
    one.evictions.evicted_bytes, one.evictions.evicted_files = 11, 12
    one.evictions.store_bytes, one.evictions.measured_at = 13, monotonic()
    one.upstream.remaining["docker.io"] = monotonic(), 14
    one.requests.bytes = 15
    await Publisher(tmp_path, "proxy-0", one).close()
    samples = collected(tmp_path)
    fills = ("fills", "fill_followers", "fetched_bytes", "fill_resumes", "fill_failures", "verify_failures")
    assert [total(samples, f"wave_{name}_total") for name in fills] == [1, 2, 3, 4, 5, 6]
    decisions = ("admitted", "held", "refused", "uncounted")
    assert [total(samples, "wave_quota_decisions_total", decision=name) for name in decisions] == [7, 8, 9, 10]
    assert [total(samples, f"wave_evicted_{name}_total") for name in ("bytes", "files")] == [11, 12]
    assert total(samples, "wave_store_bytes") == 13
    assert total(samples, "wave_upstream_remaining", registry="docker.io") == 14
    assert total(samples, "wave_sent_bytes_total") == 15
    assert total(samples, "wave_process_resident_memory_bytes") > 1 << 20
    assert total(samples, "wave_process_cpu_seconds_total") > 0


async def test_every_metric_is_in_the_documentation(tmp_path: Path) -> None:
    one = sources()
    await Publisher(tmp_path, "proxy-0", one).close()
    page = generate_latest(Collector(tmp_path)).decode()
    documented = set(re.findall(r"`(wave_[a-z_]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    assert documented == set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))


async def test_redis_and_the_event_loop_are_watched(tmp_path: Path) -> None:
    asked = asyncio.Event()

    async def ping() -> None:
        asked.set()
        raise StateUnavailable("away")

    publisher = Publisher(tmp_path, "proxy-0", replace(sources(), ping=ping))
    watches = [asyncio.create_task(watch) for watch in (publisher.watch_redis(), publisher.watch_loop())]
    await asked.wait()
    sleep(0.15)  # nothing else runs meanwhile
    await asyncio.sleep(0.01)
    await publisher.close()
    for watch in watches:
        watch.cancel()
    await asyncio.gather(*watches, return_exceptions=True)
    samples = collected(tmp_path)
    assert total(samples, "wave_redis_up", part="proxy-0") == 0
    assert total(samples, "wave_event_loop_lag_max_seconds", part="proxy-0") >= 0.04
    assert total(samples, "wave_event_loop_lag_seconds_count") >= 1


async def test_a_folder_that_cannot_be_written_does_not_end_the_worker(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path / "none", "proxy-0", sources())
    await publisher.close()
    (tmp_path / "none").mkdir()
    await publisher.close()
    assert total(collected(tmp_path / "none"), "wave_up", part="proxy-0") == 1


# --- the whole program -----------------------------------------------------------------------------------------------


class Scraper:
    """Asks a program's metrics port as Prometheus does."""

    def __init__(self, proxy: WaveProxy) -> None:
        self._proxy = proxy
        where = r"http://(127\.0\.0\.1:\d+)/metrics"
        self.address: str = until(lambda: re.search(where, proxy.stderr), lambda: proxy.stderr)[1]

    def scrape(self) -> Samples:
        """All samples. Raises OSError when nothing listens yet."""
        answer = http_request(self.address, "GET", "/metrics")
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return parse(answer.body.decode())

    def until(self, condition: Callable[[Samples], bool]) -> Samples:
        """The first samples that are so."""

        def look() -> Samples | None:
            try:
                samples = self.scrape()
            except OSError:
                return None
            return samples if condition(samples) else None

        return until(look, lambda: self._proxy.stderr)


@pytest.fixture
def measured(upstream: Registry, wave: Wave) -> tuple[WaveProxy, str, Scraper]:
    """A program of two workers, what there is to pull, and its metrics."""
    server = upstream()
    server.add(REPOSITORY, image([layer({"a": random_blob(100_000, seed=1)})]), "latest")
    proxy = wave(workers=2, upstreams=[server.address], args=["--metrics-port", "0"])
    return proxy, f"{server.address}/{REPOSITORY}", Scraper(proxy)


Measured = tuple[WaveProxy, str, Scraper]


def manifests(samples: Samples) -> float:
    return total(samples, "wave_requests_total", kind="manifest", status="2xx")


def test_the_numbers_of_all_workers_add_up_and_never_go_back(measured: Measured) -> None:
    proxy, repository, scraper = measured
    pulls, sent = 20, 0
    for _ in range(pulls):
        pulled = pull(proxy.address, repository, "latest")
        sent += len(pulled.manifest) + sum(entry["size"] for entry in descriptors(pulled.document))

    def are_told(samples: Samples) -> bool:
        """Each process tells what it has done once a second."""
        blobs = total(samples, "wave_requests_total", kind="blob", status="2xx")
        return (manifests(samples), blobs, total(samples, "wave_up")) == (pulls, 2 * pulls, 2)

    before = scraper.until(are_told)
    assert total(before, "wave_first_byte_seconds_count", kind="manifest") == pulls
    assert total(before, "wave_sent_bytes_total") == sent
    assert total(before, "wave_fills_total") == 2
    assert total(before, "wave_upstream_requests_total") >= 3

    os.kill(proxy.workers()[0], signal.SIGKILL)
    after = scraper.until(lambda samples: total(samples, "wave_part_starts_total") == 3)
    for key, value in before.items():
        if key[0].endswith(("_total", "_bucket", "_count", "_sum")):
            assert after[key] >= value, key
    assert manifests(after) == pulls
    pull(proxy.address, repository, "latest")
    scraper.until(lambda samples: manifests(samples) == pulls + 1 and total(samples, "wave_up") == 2)


def descriptors(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [manifest["config"], *manifest["layers"]]


def test_other_paths_and_slow_clients_do_no_harm(measured: Measured) -> None:
    proxy, _, scraper = measured
    scraper.until(lambda samples: total(samples, "wave_up") == 2)
    page = http_request(scraper.address, "HEAD", "/metrics")
    assert (page.status, page.body) == (200, b"")
    assert int(page.headers["Content-Length"]) > 1000
    for method, path in (("GET", "/"), ("GET", "/v2/"), ("POST", "/metrics")):
        assert http_request(scraper.address, method, path).status == 404
    assert proxy.request("GET", "/metrics").status == 404, "metrics are not for those who pull"
    host, _, port = scraper.address.partition(":")
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(create_connection((host, int(port)))).sendall(b"GET /metrics HTTP/1.1\r\nHost: ")
        assert total(scraper.scrape(), "wave_up") == 2


def test_without_a_port_for_them_there_are_no_metrics(wave: Wave, tmp_path: Path) -> None:
    proxy = wave(data=tmp_path / "data")
    assert not any("metrics" in title for title in proxy.processes().values())
    assert list((tmp_path / "data" / "run").glob("metrics-*")) == []


def test_nothing_of_them_is_left_at_the_end(wave: Wave, redis_url: str, tmp_path: Path) -> None:
    port = free_port()
    proxy = wave(data=tmp_path / "data", config=f"metrics_port = {port}", redis=redis_url)
    scraper = Scraper(proxy)
    assert scraper.address == f"127.0.0.1:{port}"
    scraper.until(lambda samples: total(samples, "wave_up") == 1)
    assert proxy.stop() == 0
    assert list(tmp_path.rglob("metrics-*")) == []


def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    with socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert refused(tmp_path, free_port(), port) == (
            f"wave-proxy: can't listen on 127.0.0.1:{port}: [Errno 98] Address already in use; "
            "choose another with --metrics-port\n"
        )


def test_the_metrics_cannot_share_the_port(tmp_path: Path) -> None:
    port = free_port()
    assert "metrics_port: metrics need a port of their own" in refused(tmp_path, port, port, code=2)


def refused(tmp_path: Path, port: int, metrics_port: int, code: int = 1) -> str:
    """What a program that does not start says, in one line."""
    command = [sys.executable, "-m", "wave_proxy", "serve", "--host", "127.0.0.1", "--data", str(tmp_path / "data")]
    command += ["--port", str(port), "--metrics-port", str(metrics_port)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert ended.returncode == code
    assert ended.stderr.count("\n") == 1
    return ended.stderr
