"""What is known is served while upstream is down, slow or limits us, and offline; and one question serves a herd."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from time import time

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.cached import REPOSITORY, worker
from tests.patience import PATIENCE_S, eventually, patience
from tests.pulling import error_of, port
from tests.servers import Response, WaveProxy, pull_blob
from wave_proxy.cache import pages as pages_module
from wave_proxy.cache import tags as tags_module
from wave_proxy.cache.pages import TagsPages
from wave_proxy.errors import Denied, ManifestUnknown, UpstreamError, UpstreamUnavailable
from wave_proxy.upstream.breaker import FAILURES
from wave_proxy.upstream.registry import TagsPage

Start = Callable[..., Upstream]

TOOL = image([layer({"bin/tool": "old"})])
MOVED = image([layer({"bin/tool": "new"})])
OTHERS = [image([layer({"bin/tool": f"{number}"})]) for number in range(FAILURES)]


def serving(upstream: Start, **options: str) -> Upstream:
    server = upstream(**options)
    server.add(REPOSITORY, TOOL, "1.0")
    for number, other in enumerate(OTHERS):
        server.add(REPOSITORY, other, f"other-{number}")
    return server


def path_of(server: Upstream, kind: str = "manifests/1.0") -> str:
    return f"/v2/{server.address}/{REPOSITORY}/{kind}"


def state_of(answer: Response) -> tuple[int, str]:
    return answer.status, answer.headers["X-Cache"]


def break_it(server: Upstream, fault: str) -> None:
    if fault == "down":
        server.stop()
    elif fault == "silent":
        server.faults.only, server.faults.stall_at = "/v2/", -1
    else:
        server.faults.status, server.faults.retry_after = {"/v2/": int(fault)}, "30"


def mend_it(server: Upstream, fault: str) -> None:
    if fault == "down":
        server.start()
    server.faults.status, server.faults.stall_at = {}, None


@pytest.mark.parametrize("fault", ["down", "silent", "429", "500"])
async def test_outage_and_recovery(
    upstream: Start, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(tags_module, "_AGAIN_S", 0.1)
    monkeypatch.setattr(tags_module, "_PATIENCE_S", 0.1)
    monkeypatch.setattr("wave_proxy.upstream.breaker.FIRST_PAUSE_S", 0.1)
    server = serving(upstream)
    async with port(tmp_path, redis_url, server, ttl_s=0.05, response_timeout_s=1.0) as place:
        assert state_of(await place.get(path_of(server))) == (200, "MISS")
        assert state_of(await place.get(path_of(server, "tags/list"))) == (200, "MISS")
        await place.pull(f"{server.address}/{REPOSITORY}", "1.0")
        await asyncio.to_thread(break_it, server, fault)
        server.faults.retry_after = "0"
        await asyncio.sleep(0.15)
        for _ in range(5):
            answer = await place.get(path_of(server))
            assert (*state_of(answer), answer.body) == (200, "STALE", TOOL.manifest)
        await place.pull(f"{server.address}/{REPOSITORY}", "1.0")
        listed = await place.get(path_of(server, "tags/list"))
        assert state_of(listed) == (200, "STALE")
        await asyncio.to_thread(mend_it, server, fault)
        server.add(REPOSITORY, MOVED, "1.0")
        async with patience():
            while (answer := await place.get(path_of(server))).body != MOVED.manifest:
                assert answer.body == TOOL.manifest
                await asyncio.sleep(0.02)
        assert answer.headers["X-Cache"] in ("HIT", "MISS")


@pytest.mark.parametrize("fault", ["down", "429", "500"])
async def test_what_is_not_known_fails_at_once_during_an_outage(
    upstream: Start, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr("wave_proxy.upstream.breaker.FIRST_PAUSE_S", 30.0)
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        await place.pull(f"{server.address}/{REPOSITORY}", "1.0")
        await asyncio.to_thread(break_it, server, fault)
        await asyncio.gather(*(place.get(path_of(server, f"manifests/other-{n}")) for n in range(FAILURES)))
        server.clear_log()
        status, _, message = error_of(answer := await place.get(path_of(server, "manifests/other-1")))
        assert status == (429 if fault == "429" else 503)
        assert f"{server.address} {'limits requests' if fault == '429' else 'has failed'}" in message
        assert 1 <= int(answer.headers["Retry-After"]) <= 38
        await place.pull(f"{server.address}/{REPOSITORY}", "1.0")
    assert server.log == []


async def test_age_grows_until_upstream_is_asked_again(
    upstream: Start, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, clock = serving(upstream), [time()]
    for name in ("serve.pull.time", "cache.tags.time", "serve.ready.time", "serve.ready.monotonic"):
        monkeypatch.setattr(f"wave_proxy.{name}", lambda: clock[0])
    monkeypatch.setattr("wave_proxy.upstream.registry.time", lambda: clock[0])  # when upstream has answered
    async with port(tmp_path, redis_url, server, ttl_s=60) as place:
        first = await place.get(path_of(server))
        assert first.headers["Age"] == "0"
        ages = []
        for seconds in (30, 20, 5):
            clock[0] += seconds
            answer = await place.get(path_of(server))
            assert answer.headers["X-Cache"] == "HIT"
            ages.append(int(answer.headers["Age"]))
            await eventually(lambda: not place.worker.tags._asking._tasks)
    assert ages == [30, 50, 5]  # it was asked for in the background at 50
    assert sum(request.method == "HEAD" for request in server.log) == 2


async def test_tag_moves_on_only_to_what_is_here(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server, ttl_s=1e-6) as place:
        await place.get(path_of(server))
        server.add(REPOSITORY, MOVED, "1.0")
        server.faults.status, server.faults.retry_after = {MOVED.digest: 429}, "30"  # as Docker Hub, which counts GETs
        answer = await place.get(path_of(server))
        assert (*state_of(answer), answer.body) == (200, "STALE", TOOL.manifest)


# --- tags lists --------------------------------------------------------------------------------------------------


async def test_what_was_asked_for_counts_in_the_memory_of_tags_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "_MEMORY_BYTES", 100_000)
    pages = TagsPages()

    async def fetch() -> TagsPage:
        return TagsPage(b"{}", "")

    for number in range(100):
        await pages.find(("quay.io", "a", f"n={number}&{'x' * 40_000}"), fetch)
    assert len(pages._memory) == 2


async def test_tags_list_is_refused_where_upstream_refuses() -> None:
    pages, key = TagsPages(), ("quay.io", "a", "")

    async def fetch() -> TagsPage:
        if error:
            raise error
        return TagsPage(b"{}", "")

    error: Exception | None = None
    known = await pages.find(key, fetch)
    assert not known.stale
    error = Denied("private now")
    with pytest.raises(Denied):
        await pages.find(key, fetch)
    error = UpstreamUnavailable("down")
    assert (await pages.find(key, fetch)).stale
    with pytest.raises(UpstreamUnavailable):
        await pages.find(("quay.io", "a", "n=1"), fetch)


async def test_tags_lists_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "_MEMORY_BYTES", 10_000)
    pages = TagsPages()

    async def fetch() -> TagsPage:
        return TagsPage(bytes(1491), "")

    for number in range(20):
        await pages.find(("quay.io", f"{number % 15:02}", ""), fetch)
    assert len(pages._memory) == 4
    assert pages._bytes == 10_000


async def test_tags_list_of_a_silent_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "_PATIENCE_S", 0.02)
    pages, key, silent = TagsPages(), ("quay.io", "a", ""), asyncio.Event()

    async def fetch() -> TagsPage:
        return TagsPage(b"{}", "")

    async def dawdle() -> TagsPage:
        await silent.wait()
        return TagsPage(b"[]", "")

    await pages.find(key, fetch)
    assert (await pages.find(key, dawdle)).stale
    monkeypatch.setattr(pages_module, "_PATIENCE_S", PATIENCE_S)
    silent.set()
    assert (await pages.find(key, dawdle)).page.content == b"[]"
    await pages.close()


# --- offline -----------------------------------------------------------------------------------------------------


def test_offline_serves_what_is_stored(upstream: Start, wave: Callable[..., WaveProxy], tmp_path: Path) -> None:
    server = serving(upstream)
    data, config = tmp_path / "data", '[cache]\ntag_ttl = "1ms"\n'
    with WaveProxy(data, upstreams=[server.address], config=config) as online:
        pulled = online.pull(f"{online.address}/{server.address}/{REPOSITORY}:1.0")
        digest_only = online.request("GET", path_of(server, f"manifests/{OTHERS[0].digest}"))
        assert digest_only.status == 200
    server.clear_log()
    offline = wave(data=data, upstreams=[server.address], config=f"{config}[upstream]\noffline = true\n")
    assert offline.pull(f"{offline.address}/{server.address}/{REPOSITORY}:1.0") == pulled
    tag = offline.request("GET", path_of(server))
    assert state_of(tag) == (200, "STALE")
    assert int(tag.headers["Age"]) >= 0
    by_digest = offline.request("GET", path_of(server, f"manifests/{OTHERS[0].digest}"))
    assert (by_digest.status, by_digest.body) == (200, OTHERS[0].manifest)
    config_blob = OTHERS[0].blobs[0]
    for kind in ("manifests/other-0", f"manifests/{OTHERS[1].digest}", f"blobs/{config_blob.digest}", "tags/list"):
        answer = offline.request("GET", path_of(server, kind))
        status, _, message = error_of(answer)
        assert (status, answer.headers["Retry-After"]) == (503, None)
        assert "this proxy is offline" in message
    layer_blob = {"digest": TOOL.blobs[1].digest, "size": len(TOOL.blobs[1].content)}
    assert pull_blob(offline.address, f"{server.address}/{REPOSITORY}", layer_blob) == TOOL.blobs[1].content
    assert server.log == []


# --- the herd ----------------------------------------------------------------------------------------------------


async def test_manifest_is_everybodys_also_when_the_first_gives_up(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream)
    server.faults.only, server.faults.stall_at = "/manifests/", -1
    async with worker(tmp_path, server) as one:
        asking = [
            asyncio.create_task(one.repositories.fetch_manifest(server.address, REPOSITORY, TOOL.digest))
            for _ in range(20)
        ]
        await asyncio.sleep(0.05)
        for task in asking[:3]:
            task.cancel()
        await asyncio.gather(*asking[:3], return_exceptions=True)
        server.faults.release.set()
        assert {manifest.digest for manifest in await asyncio.gather(*asking[3:])} == {TOOL.digest}
    assert len(server.log) == 1


async def test_error_of_a_manifest_is_forgotten(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream)
    server.faults.status = {"/manifests/": 418}
    async with worker(tmp_path, server) as one:
        for find in (one.repositories.fetch_manifest, one.repositories.find_tag):
            server.faults.status = {"/manifests/": 418}
            errors = await asyncio.gather(
                *(find(server.address, REPOSITORY, TOOL.digest) for _ in range(5)), return_exceptions=True
            )
            assert {type(error) for error in errors} == {UpstreamError}
            server.faults.status = {}
            assert (await find(server.address, REPOSITORY, TOOL.digest)).digest == TOOL.digest


async def test_look_up_of_a_blob_is_everybodys_also_when_the_first_gives_up(upstream: Start, tmp_path: Path) -> None:
    server, wanted = serving(upstream), TOOL.blobs[0]
    server.faults.stall_at = -1
    async with worker(tmp_path, server) as one:
        asking = [
            asyncio.create_task(one.repositories.find_size(server.address, REPOSITORY, wanted.digest))
            for _ in range(20)
        ]
        await asyncio.sleep(0.05)
        asking[0].cancel()
        await asyncio.gather(asking[0], return_exceptions=True)
        server.faults.release.set()
        assert set(await asyncio.gather(*asking[1:])) == {len(wanted.content)}
    assert len(server.log) == 1


async def test_missing_tag_is_missing_for_all_and_not_for_ever(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream)
    async with worker(tmp_path, server) as one:
        errors = await asyncio.gather(
            *(one.repositories.find_tag(server.address, REPOSITORY, "2.0") for _ in range(5)), return_exceptions=True
        )
        assert {type(error) for error in errors} == {ManifestUnknown}
        server.add(REPOSITORY, MOVED, "2.0")
        assert (await one.repositories.find_tag(server.address, REPOSITORY, "2.0")).digest == MOVED.digest
    assert [request.method for request in server.log] == ["HEAD", "HEAD", "GET"]
