"""Pulls over the port: what clients get of manifests, blobs, tags and layers, and what they are told else."""

import asyncio
import http.client
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from bench.images import Blob, blob, image, index, layer, random_blob
from bench.upstream import Faults, Upstream
from tests.cached import files_in
from tests.outgoing import answer as http_answer
from tests.outgoing import scripted
from tests.patience import PATIENCE_S, eventually
from tests.pulling import Port, at, error_of, inline, port
from tests.servers import Response, WaveProxy
from wave_proxy.image.oci import OCI_INDEX, OCI_MANIFEST
from wave_proxy.image.request import ContainerConfig

Start = Callable[..., Upstream]

REPOSITORY = "lib/tool"
TOOL = image([layer({"bin/tool": "x"})], env=["PATH=/bin"])
BIG = blob(random_blob(700_000, seed=41))
EXTRA = layer({"opt/extra": random_blob(50_000, seed=42)})
MISSING = f"sha256:{'0' * 64}"


def serving(upstream: Start, *contents: Blob, **arguments: Any) -> Upstream:
    server = upstream(**arguments)
    server.add(REPOSITORY, TOOL, "1.0", "latest")
    for content in (BIG, *contents):
        server.add_blob(REPOSITORY, content)
    return server


def blob_path(server: Upstream, digest: str = BIG.digest) -> str:
    return f"/v2/{server.address}/{REPOSITORY}/blobs/{digest}"


def manifest_path(server: Upstream, reference: str = "1.0") -> str:
    return f"/v2/{server.address}/{REPOSITORY}/manifests/{reference}"


def same_headers(one: Response, other: Response, *, but: tuple[str, ...] = ("Date", "X-Cache")) -> bool:
    kept = [{name: value for name, value in answer.headers.items() if name not in but} for answer in (one, other)]
    return kept[0] == kept[1]


# --- manifests ---------------------------------------------------------------------------------------------------


async def test_ping(tmp_path: Path, redis_url: str) -> None:
    async with port(tmp_path, redis_url) as place:
        for path in ("/v2", "/v2/", "/v2/?x=y"):
            answer = await place.get(path)
            assert (answer.status, answer.body) == (200, b"{}")
            assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"


@pytest.mark.parametrize("reference", ["1.0", TOOL.digest])
async def test_manifest(upstream: Start, tmp_path: Path, redis_url: str, reference: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        token = await place.submit(f"{server.address}/{REPOSITORY}:1.0")
        for path in (manifest_path(server, reference), f"/v2/{token}/{REPOSITORY}/manifests/{reference}"):
            head, got = await place.request("HEAD", path), await place.get(path)
            assert (head.status, got.status) == (200, 200)
            assert (head.body, got.body) == (b"", TOOL.manifest)
            assert same_headers(head, got)
            assert got.headers["Content-Type"] == OCI_MANIFEST
            assert got.headers["Content-Length"] == str(len(TOOL.manifest))
            assert got.headers["Docker-Content-Digest"] == TOOL.digest
            assert got.headers["ETag"] == f'"{TOOL.digest}"'


@pytest.mark.parametrize("accept", ["", "*/*", OCI_INDEX, f"{OCI_MANIFEST} , text/html;q=0.1", "application/json"])
async def test_accept_changes_nothing(upstream: Start, tmp_path: Path, redis_url: str, accept: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        answer = await place.get(f"{manifest_path(server)}?ns=docker.io", {"Accept": accept} if accept else {})
    assert (answer.status, answer.body, answer.headers["Content-Type"]) == (200, TOOL.manifest, OCI_MANIFEST)


async def test_whole_images(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    several = index([TOOL, image([layer({"bin/tool": "y"})], platform="linux/arm64")])
    server = serving(upstream)
    server.add("lib/several", several, "1.0")
    async with port(tmp_path, redis_url, server) as place:
        pulled = await place.pull(f"{server.address}/lib/several", "1.0")
        assert [child.digest for child in pulled.children] == [child.digest for child in several.children]
        server.stop()  # a tag that was checked a moment ago, and everything that it named
        assert await place.pull(f"{server.address}/lib/several", "1.0") == pulled


async def test_manifest_is_asked_for_once(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        answers = await asyncio.gather(*(place.get(manifest_path(server)) for _ in range(40)))
        assert {answer.body for answer in answers} == {TOOL.manifest}
        await place.get(manifest_path(server, TOOL.digest))
    assert [(request.method, request.path[-20:]) for request in server.log] == [
        ("HEAD", f"/v2/{REPOSITORY}/manifests/1.0"[-20:]),
        ("GET", TOOL.digest[-20:]),
    ]


@pytest.mark.parametrize("fault", ["down", "503", "429", "stalled"])
async def test_known_tag_is_served_while_upstream_fails(
    upstream: Start, tmp_path: Path, redis_url: str, fault: str
) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server, ttl_s=1e-6, response_timeout_s=1.0) as place:
        fresh = await place.get(manifest_path(server))
        if fault == "down":
            server.stop()
        elif fault == "stalled":
            server.faults.only, server.faults.stall_at = "/manifests/", -1
        else:
            server.faults.status = {"/manifests/": int(fault)}
        stale = await place.get(manifest_path(server))
    assert (stale.status, stale.body) == (200, TOOL.manifest)
    assert fresh.headers["X-Cache"] != "STALE"
    assert stale.headers["X-Cache"] == "STALE"


async def test_tag_that_moved(upstream: Start, tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wave_proxy.cache.tags._PATIENCE_S", PATIENCE_S)
    server = serving(upstream)
    moved = image([layer({"bin/tool": "new"})])
    async with port(tmp_path, redis_url, server, ttl_s=1e-6) as place:
        assert (await place.get(manifest_path(server))).body == TOOL.manifest
        server.add(REPOSITORY, moved, "1.0")
        answer = await place.get(manifest_path(server))
        assert (answer.body, answer.headers["Docker-Content-Digest"]) == (moved.manifest, moved.digest)
        assert (await place.get(manifest_path(server, TOOL.digest))).body == TOOL.manifest


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "faults", "expected"),
    [
        ("manifests/none", {}, (404, "MANIFEST_UNKNOWN")),
        (f"manifests/{MISSING}", {}, (404, "MANIFEST_UNKNOWN")),
        (f"blobs/{MISSING}", {}, (404, "BLOB_UNKNOWN")),
        ("tags/list", {"status": {"tags": 404}}, (404, "NAME_UNKNOWN")),
        ("manifests/1.0", {"status": {"manifests": 403}}, (403, "DENIED")),
        (f"blobs/{BIG.digest}", {"status": {"blobs": 403}}, (403, "DENIED")),
        ("tags/list", {"bearer_loop": True}, (403, "DENIED")),
        ("manifests/1.0", {"bearer_loop": True}, (403, "DENIED")),
        (f"blobs/{BIG.digest}", {"bearer_loop": True}, (403, "DENIED")),
        ("manifests/1.0", {"status": {"manifests": 429}, "retry_after": "30"}, (429, "TOOMANYREQUESTS")),
        (f"blobs/{BIG.digest}", {"status": {"blobs": 429}, "retry_after": "30"}, (429, "TOOMANYREQUESTS")),
        ("manifests/1.0", {"status": {"manifests": 500}}, (503, "UNKNOWN")),
        (f"blobs/{BIG.digest}", {"status": {"blobs": 503}}, (503, "UNKNOWN")),
        ("manifests/1.0", {"status": {"manifests": 418}}, (502, "UNKNOWN")),
        ("manifests/1.0", {"html_login": True}, (502, "UNKNOWN")),
        ("tags/list", {"html_login": True}, (502, "UNKNOWN")),
        (f"blobs/{BIG.digest}", {"stall_at": -1}, (504, "UNKNOWN")),
    ],
)
async def test_upstreams_answers_are_told(
    upstream: Start, tmp_path: Path, redis_url: str, kind: str, faults: dict[str, Any], expected: tuple[int, str]
) -> None:
    server = serving(upstream, auth="bearer", username="", faults=Faults(**faults))
    timeout_s = 0.1 if "stall_at" in faults else PATIENCE_S
    async with port(tmp_path, redis_url, server, response_timeout_s=timeout_s) as place:
        answer = await place.get(f"/v2/{server.address}/{REPOSITORY}/{kind}")
        head = await place.request("HEAD", f"/v2/{server.address}/{REPOSITORY}/{kind}")
    status, code, message = error_of(answer)
    assert (status, code) == expected
    assert head.status == status
    assert REPOSITORY in message or server.address in message
    assert answer.headers["Retry-After"] == ("30" if status == 429 else "5" if status == 503 else None)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/a/blobs/sha256:abc", (400, "DIGEST_INVALID")),
        ("/v2/../../etc/passwd", (400, "NAME_INVALID")),
        ("/v2/A/manifests/1", (400, "NAME_INVALID")),
        (f"/v2/wt/{'0' * 32}/a/manifests/1", (404, "NAME_UNKNOWN")),
        ("/v2/wt/abc/a/manifests/1", (404, "NAME_UNKNOWN")),
    ],
)
async def test_bad_paths(tmp_path: Path, redis_url: str, path: str, expected: tuple[int, str]) -> None:
    async with port(tmp_path, redis_url) as place:
        assert error_of(await place.get(path))[:2] == expected


async def test_other_methods(tmp_path: Path, redis_url: str) -> None:
    async with port(tmp_path, redis_url) as place:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            answer = await place.request(method, f"/v2/{REPOSITORY}/manifests/1")
            assert error_of(answer)[:2] == (405, "UNSUPPORTED")
            assert answer.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("target", ["*", "ftp://quay.io/v2/"])
async def test_targets_that_are_no_paths(tmp_path: Path, redis_url: str, target: str) -> None:
    async with port(tmp_path, redis_url) as place:
        answer = await place.request("OPTIONS", target)
    assert (answer.status, list(answer.json())) == (400, ["message"])
    assert target in answer.json()["message"]


async def test_token_errors_do_not_tell_why(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        name = f"{server.address}/{REPOSITORY}:1.0"
        deleted = await place.submit(name)
        foreign, unknown = await place.submit(name), f"wt/{'f' * 32}"
        await place.tokens.delete(deleted.removeprefix("wt/"))
        told = set()
        for prefix, repository in ((deleted, REPOSITORY), (foreign, "lib/x"), (unknown, "a/b")):
            status, code, message = error_of(await place.get(f"/v2/{prefix}/{repository}/manifests/1.0"))
            assert (status, code) == (404, "NAME_UNKNOWN")
            told.add(message.replace(prefix.removeprefix("wt/"), "TOKEN"))
        assert len(told) == 1


async def test_an_ended_token_says_so(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        expired = await place.submit(f"{server.address}/{REPOSITORY}:1.0", lifetime_s=-86400)
        ended = f"{datetime.fromtimestamp(time() - 86400, UTC):%Y-%m-%d}"
        for path in ("manifests/1.0", f"blobs/sha256:{'0' * 64}", "tags/list"):
            status, code, message = error_of(await place.get(f"/v2/{expired}/{REPOSITORY}/{path}"))
            assert (status, code) == (404, "NAME_UNKNOWN")
            assert f"has expired: it ended on {ended}" in message
            assert "Request the container again" in message
        # Who does not know what it was for is told nothing.
        assert "was never issued" in error_of(await place.get(f"/v2/{expired}/lib/other/manifests/1.0"))[2]
    assert server.log == []


async def test_bug_of_ours_is_an_error_in_the_right_shape(tmp_path: Path, redis_url: str) -> None:
    async with port(tmp_path, redis_url) as place:
        (tmp_path / "tags").rmdir()
        (tmp_path / "tags").write_bytes(b"")  # the data folder is broken
        status, code, message = error_of(await place.get("/v2/127.0.0.1:1/a/manifests/1"))
        assert (status, code) == (500, "UNKNOWN")
        assert "tags" not in message
        assert str(tmp_path) not in message


# --- blobs -------------------------------------------------------------------------------------------------------


async def test_blob(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        head = await place.request("HEAD", blob_path(server))
        assert server.fetches(BIG.digest) == 0
        answers = [await place.get(blob_path(server))]
        await eventually(lambda: not place.worker.is_filling(BIG.digest))
        answers.append(await place.get(blob_path(server)))
        warm_head = await place.request("HEAD", blob_path(server))
    assert [answer.body for answer in answers] == [BIG.content] * 2
    assert [answer.headers["X-Cache"] for answer in answers] == ["MISS", "HIT"]
    for answer in (*answers, warm_head):
        assert same_headers(head, answer)
    assert head.body == b""
    assert head.headers["Content-Length"] == str(len(BIG.content))
    assert head.headers["Docker-Content-Digest"] == BIG.digest
    assert head.headers["Accept-Ranges"] == "bytes"
    assert "immutable" in head.headers["Cache-Control"]
    assert server.fetches(BIG.digest) == 1


SIZE = len(BIG.content)
RANGES = [
    ("bytes=0-0", 0, 1),
    ("bytes=-1", SIZE - 1, SIZE),
    ("bytes=5-", 5, SIZE),
    ("bytes=600000-600010", 600_000, 600_011),
    ("bytes=100000-599999", 100_000, 600_000),
    ("bytes=699999-800000", SIZE - 1, SIZE),
    ("bytes=5-3", None, None),
    ("bytes=0-1,5-6", None, None),
    ("bytes=x-y", None, None),
    (f"bytes={SIZE}-", -1, -1),
    ("bytes=-0", -1, -1),
]


@pytest.mark.parametrize("state", ["cold", "filling", "warm"])
@pytest.mark.parametrize(("header", "start", "end"), RANGES, ids=[header for header, _, _ in RANGES])
async def test_ranges(
    upstream: Start, tmp_path: Path, redis_url: str, state: str, header: str, start: int | None, end: int | None
) -> None:
    server = serving(upstream, faults=Faults(chunk_bytes=1 << 16))
    if state == "filling":
        server.faults.stall_at = 300_000
    async with port(tmp_path, redis_url, server) as place:
        other = asyncio.create_task(place.get(blob_path(server))) if state != "cold" else None
        if state == "filling":
            await eventually(lambda: place.worker.is_filling(BIG.digest))
        elif other is not None:
            await other
            await eventually(lambda: not place.worker.is_filling(BIG.digest))
        asking = asyncio.create_task(place.get(blob_path(server), {"Range": header}))
        await asyncio.sleep(0.02)
        server.faults.release.set()
        answer = await asking
        assert other is None or (await other).body == BIG.content
        await eventually(lambda: not place.worker.is_filling(BIG.digest))
        assert (await place.get(blob_path(server))).body == BIG.content  # no part was taken for the whole
    if start == -1:
        assert error_of(answer)[:2] == (416, "RANGE_INVALID")
        assert answer.headers["Content-Range"] == f"bytes */{SIZE}"
    elif start is None:
        assert (answer.status, answer.body) == (200, BIG.content)
    else:
        assert end is not None
        assert (answer.status, answer.body) == (206, BIG.content[start:end])
        assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert server.fetches(BIG.digest) == 1


@pytest.mark.parametrize(("condition", "status"), [(f'"{BIG.digest}"', 206), ('"other"', 200)])
async def test_if_range(upstream: Start, tmp_path: Path, redis_url: str, condition: str, status: int) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        answer = await place.get(blob_path(server), {"Range": "bytes=1-2", "If-Range": condition})
    assert (answer.status, len(answer.body)) == (status, 2 if status == 206 else SIZE)


async def test_head_ignores_a_range(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        answer = await place.request("HEAD", blob_path(server), {"Range": "bytes=1-2"})
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(SIZE))


@pytest.mark.parametrize("fault", [{"corrupt_last_byte": True}, {"extra_bytes": 10}])
async def test_wrong_blob_is_cut_and_not_kept(
    upstream: Start, tmp_path: Path, redis_url: str, fault: dict[str, Any]
) -> None:
    server = serving(upstream, faults=Faults(**fault, delay_s=0.001, chunk_bytes=1 << 16))
    async with port(tmp_path, redis_url, server) as place:
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            await place.get(blob_path(server))
        assert files_in(tmp_path, "blobs", "spool") == []
        server.faults.corrupt_last_byte, server.faults.extra_bytes = False, 0
        assert (await place.get(blob_path(server))).body == BIG.content


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_blob_of_unknown_size(upstream: Start, tmp_path: Path, redis_url: str, method: str) -> None:
    async def vague(head: str) -> bytes:
        body = b"" if head.startswith("HEAD") else b"5\r\nhello\r\n0\r\n\r\n"
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body

    hello = blob(b"hello")
    server = serving(upstream)
    async with scripted(vague) as vaguely:
        server.faults.redirect_blobs_to = f"http://127.0.0.1:{vaguely.port}"
        vague_upstream = Upstream()
        vague_upstream._port = vaguely.port
        server.add_blob(REPOSITORY, hello)
        async with port(tmp_path, redis_url, server, vague_upstream) as place:
            answer = await place.request(method, blob_path(server, hello.digest))
    assert answer.status == 200
    # By the time that it is answered, the blob may be there, and its size known.
    assert answer.headers["Content-Length"] in (None, "5")
    assert answer.body == (b"hello" if method == "GET" else b"")


async def test_redirected_blob(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    store, server = serving(upstream), serving(upstream)
    server.faults.redirect_blobs_to = store.url
    async with port(tmp_path, redis_url, server, store) as place:
        assert (await place.get(blob_path(server))).body == BIG.content
    assert store.fetches(BIG.digest) == 1


# --- tags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["direct", "token"])
async def test_tags_by_pages(upstream: Start, tmp_path: Path, redis_url: str, form: str) -> None:
    server = serving(upstream)
    wanted = sorted([*(f"v{number}" for number in range(7)), "1.0", "latest"])
    server.add(REPOSITORY, TOOL, *wanted)
    async with port(tmp_path, redis_url, server) as place:
        prefix = server.address if form == "direct" else await place.submit(f"{server.address}/{REPOSITORY}:1.0")
        path: str | None = f"/v2/{prefix}/{REPOSITORY}/tags/list?n=4"
        found: list[str] = []
        pages = 0
        while path:
            answer = await place.get(path)
            assert answer.status == 200
            assert answer.json()["name"] == REPOSITORY
            found += answer.json()["tags"]
            pages += 1
            link = answer.headers["Link"]
            path = link.removeprefix("<").removesuffix('>; rel="next"') if link else None
            assert path is None or path.startswith(f"/v2/{prefix}/{REPOSITORY}/tags/list?")
        everything = await place.get(f"/v2/{prefix}/{REPOSITORY}/tags/list")
    assert (found, pages) == (wanted, 3)
    assert everything.json()["tags"] == wanted
    assert "Link" not in everything.headers


@pytest.mark.parametrize(
    ("link", "query"),
    [
        ('</v2/x/tags/list?n=1&last=a%2Fb&next_page=z>; rel="next"', "n=1&last=a%2Fb&next_page=z"),
        ('</v2/x/tags/list?last=<script"\t\xff&n=2>; rel="next"', "last=%3Cscript%22%09%3F&n=2"),
        ('</v2/x/tags/list?>; rel="next"', ""),
    ],
)
async def test_tags_are_json_whatever_upstream_calls_them(
    tmp_path: Path, redis_url: str, link: str, query: str
) -> None:
    media_type = "application/xhtml+xml; x=<script>"
    page = http_answer("200 OK", b'{"tags":[]}', Content_Type=media_type, Link="LINK")
    async with scripted(page.replace(b"LINK", link.encode("latin-1"))) as server:
        address = f"127.0.0.1:{server.port}"
        known = Upstream()
        known._port = server.port
        async with port(tmp_path, redis_url, known) as place:
            found = await place.get(f"/v2/{address}/lib/tool/tags/list")
    assert (found.status, found.body) == (200, b'{"tags":[]}')
    assert found.headers["Content-Type"] == "application/json"
    assert found.headers["X-Content-Type-Options"] == "nosniff"
    assert found.headers["Link"] == (f'</v2/{address}/lib/tool/tags/list?{query}>; rel="next"' if query else None)


@pytest.mark.parametrize("query", ["n=9999999999", "n=1&last=..%2F..%2Fx", "last=latest", "x=%20y&n=2"])
async def test_query_goes_upstream_as_it_is(upstream: Start, tmp_path: Path, redis_url: str, query: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        assert (await place.get(f"/v2/{server.address}/{REPOSITORY}/tags/list?{query}")).status == 200
    asked = urlsplit(server.log[-1].path)
    assert asked.path == f"/v2/{REPOSITORY}/tags/list"
    assert parse_qs(asked.query) == parse_qs(query)


# --- layers of requests ------------------------------------------------------------------------------------------


async def with_layer(place: Port, server: Upstream, location: str, wanted: Any = EXTRA) -> str:
    """The path of a layer that a new token brings along."""
    added = at(location, wanted) if location else inline(wanted)
    prefix = await place.submit(f"{server.address}/{REPOSITORY}:1.0", ContainerConfig(layers=(added,)))
    return f"/v2/{prefix}/{REPOSITORY}/blobs/{added.gzip_digest}"


async def test_inline_layer(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        path = await with_layer(place, server, "")
        head, got = await place.request("HEAD", path), await place.get(path)
        part = await place.get(path, {"Range": "bytes=10-19"})
        beyond = await place.get(path, {"Range": f"bytes={EXTRA.size}-"})
    assert same_headers(head, got)
    assert (got.status, got.body) == (200, EXTRA.content)
    assert (part.status, part.body) == (206, EXTRA.content[10:20])
    assert error_of(beyond)[:2] == (416, "RANGE_INVALID")


async def test_inline_layer_that_expired(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        path = await with_layer(place, server, "")
        await place.tokens._redis.delete(f"wave:layer:{EXTRA.digest}")
        assert error_of(await place.get(path))[:2] == (404, "BLOB_UNKNOWN")


async def test_layer_behind_a_link(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    files, server = upstream(auth=None), serving(upstream)
    files.add_blob("any/folder", EXTRA)
    link = f"{files.url}/v2/any/folder/blobs/{EXTRA.digest}"
    async with port(tmp_path, redis_url, server, files) as place:
        for number in range(2):
            path = await with_layer(place, server, link)
            head, got = await place.request("HEAD", path), await place.get(path)
            assert (got.status, got.body) == (200, EXTRA.content)
            assert head.headers["Content-Length"] == got.headers["Content-Length"]
            await eventually(lambda: not place.worker.is_filling(EXTRA.digest))
            assert got.headers["X-Cache"] == ("MISS", "HIT")[number]
    assert files.fetches(EXTRA.digest) == 1


@pytest.mark.parametrize("wrong", ["content", "size"])
async def test_link_to_something_else(upstream: Start, tmp_path: Path, redis_url: str, wrong: str) -> None:
    other = blob(random_blob(EXTRA.size + (wrong == "size"), seed=43))
    files, server = upstream(faults=Faults(delay_s=0.001, chunk_bytes=10_000)), serving(upstream)
    files.add_blob("any/folder", other)
    async with port(tmp_path, redis_url, server, files) as place:
        path = await with_layer(place, server, f"{files.url}/v2/any/folder/blobs/{other.digest}")
        try:
            answer = await place.get(path)
        except (http.client.IncompleteRead, ConnectionError):
            assert wrong == "content"
        else:
            assert error_of(answer)[0] == 502
        await eventually(lambda: not place.worker.is_filling(EXTRA.digest))
        assert files_in(tmp_path, "blobs", "spool") == []


async def test_link_to_a_private_address(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    secret, server = upstream(), serving(upstream)
    secret.add_blob("any/folder", EXTRA)
    links = [secret.url, f"http://localhost:{secret.address.partition(':')[2]}", "http://169.254.169.254"]
    async with port(tmp_path, redis_url, server) as place:
        for link in links:
            path = await with_layer(place, server, f"{link}/v2/any/folder/blobs/{EXTRA.digest}")
            status, code, message = error_of(await place.get(path))
            assert (status, code) == (403, "DENIED")
            assert "private or loopback address" in message
    assert secret.log == []


async def test_link_that_redirects_to_a_private_address(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    secret, files, server = upstream(), upstream(), serving(upstream)
    for one in (secret, files):
        one.add_blob("any/folder", EXTRA)
    files.faults.redirect_blobs_to = secret.url
    async with port(tmp_path, redis_url, server, files) as place:
        path = await with_layer(place, server, f"{files.url}/v2/any/folder/blobs/{EXTRA.digest}")
        assert error_of(await place.get(path))[:2] == (403, "DENIED")
    assert secret.log == []


@pytest.mark.parametrize(
    ("status", "expected"), [(404, (404, "BLOB_UNKNOWN")), (403, (403, "DENIED")), (500, (503, "UNKNOWN"))]
)
async def test_link_that_fails(
    upstream: Start, tmp_path: Path, redis_url: str, status: int, expected: tuple[int, str]
) -> None:
    files, server = upstream(faults=Faults(status={"/blobs/": status})), serving(upstream)
    async with port(tmp_path, redis_url, server, files) as place:
        path = await with_layer(place, server, f"{files.url}/blobs/x?signature=secret")
        answer = await place.get(path)
    assert error_of(answer)[:2] == expected
    assert b"secret" not in answer.body


async def test_layer_in_another_registry(upstream: Start, tmp_path: Path, redis_url: str) -> None:
    other, server = upstream(), serving(upstream)
    other.add_blob("some/where/else", EXTRA)
    async with port(tmp_path, redis_url, server, other) as place:
        location = f"docker://{other.address}/v2/some/where/else/blobs/{EXTRA.digest}"
        path = await with_layer(place, server, location)
        assert (await place.get(path)).body == EXTRA.content
        missing = await with_layer(place, server, location.replace("else", "nowhere"))
        assert error_of(await place.get(missing))[:2] == (404, "BLOB_UNKNOWN")
    assert other.fetches(EXTRA.digest) == 1


@pytest.mark.parametrize("location", ["ftp://a/b", "file:///etc/passwd", "docker://a/b", "docker://a/v2/b/manifests/c"])
async def test_locations_of_no_kind_that_we_know(
    upstream: Start, tmp_path: Path, redis_url: str, location: str
) -> None:
    server = serving(upstream)
    async with port(tmp_path, redis_url, server) as place:
        path = await with_layer(place, server, location)
        assert error_of(await place.get(path))[:2] == (400, "UNSUPPORTED")


# --- the program -------------------------------------------------------------------------------------------------


def test_two_workers_serve_what_each_other_made(upstream: Start, wave: Callable[..., WaveProxy]) -> None:
    original = index([TOOL, image([layer({"bin/tool": "y"})], platform="linux/arm64")])
    server = serving(upstream)
    server.add("lib/several", original, "1.0")
    program = wave(workers=2, upstreams=[server.address])
    answer = program.submit(
        containerImage=f"{server.address}/lib/several:1.0", containerConfig={"layers": [EXTRA.inline()], "env": ["A=1"]}
    )
    # Each request comes on a connection of its own, so that the kernel hands them to both workers.
    pulled = [program.pull(answer["targetImage"]) for _ in range(6)]
    assert all(one == pulled[0] for one in pulled)
    assert [child.layers[-1] for child in pulled[0].children] == [EXTRA.content] * 2
    for item in original.children[0].blobs:
        assert server.fetches(item.digest) == 1
    assert "Traceback" not in program.stderr


def test_image_named_by_digest_with_changes(upstream: Start, wave: Callable[..., WaveProxy]) -> None:
    server = serving(upstream)
    program = wave(upstreams=[server.address])
    name = f"{server.address}/{REPOSITORY}@{TOOL.digest}"
    plain = program.submit(containerImage=name)
    changed = program.submit(containerImage=name, containerConfig={"env": ["A=1"]})
    assert plain["targetImage"].endswith(f"@{TOOL.digest}")
    assert changed["targetImage"].endswith(f":{TOOL.digest.replace(':', '-')[:19]}")
    assert program.pull(plain["targetImage"]).digest == TOOL.digest
    assert program.pull(changed["targetImage"]).config["config"]["Env"] == ["PATH=/bin", "A=1"]
