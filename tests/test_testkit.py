"""The test kit itself: images are what they say, the upstream misbehaves exactly as told."""

import gc
import gzip
import io
import json
import tarfile
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from socket import AF_UNIX, create_connection, socket
from threading import Thread, Timer
from time import sleep

import pytest
import zstandard

from bench.images import (
    Image,
    Layer,
    blob,
    busybox_image,
    digest_of,
    has_busybox,
    image,
    index,
    layer,
    random_blob,
)
from bench.upstream import Faults, Upstream
from tests.patience import PATIENCE_S, until
from tests.servers import (
    Response,
    WaveProxy,
    distribution,
    has_distribution,
    http_request,
    pull,
    push,
    redis_server,
    split_image,
)
from wave_proxy.image.oci import DOCKER_INDEX, DOCKER_LAYER, DOCKER_MANIFEST, OCI_INDEX, OCI_LAYER, OCI_MANIFEST

Start = Callable[..., Upstream]

LAYER = layer({"opt/hello": "hello", "data/": "", "data/numbers": random_blob(5000, 1)}, links={"hi": "opt/hello"})
IMAGE = image([LAYER], entrypoint=["/opt/hello"], env=["A=1"])
PATH = f"/v2/lib/hello/blobs/{LAYER.digest}"


def get(server: Upstream, path: str, method: str = "GET", timeout_s: float = PATIENCE_S, **headers: str) -> Response:
    return http_request(server.address, method, path, headers=headers, timeout_s=timeout_s)


@pytest.fixture
def hello(upstream: Start) -> Upstream:
    server = upstream()
    server.add("lib/hello", IMAGE, "latest")
    return server


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_layer_is_a_tar_with_the_digests_it_names(compression: str) -> None:
    made: Layer = layer({"bin/run": "#!/bin/sh", "etc/": ""}, links={"bin/sh": "run"}, compression=compression)  # type: ignore[arg-type]
    match compression:
        case "gzip":
            tar = gzip.decompress(made.content)
        case "zstd":
            tar = zstandard.decompress(made.content)
        case _:
            tar = made.content
    assert made.digest == digest_of(made.content)
    assert made.diff_id == digest_of(tar)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert {m.name: (m.type, m.mode, m.linkname, m.size) for m in archive} == {
            "bin/run": (tarfile.REGTYPE, 0o755, "", 9),
            "etc": (tarfile.DIRTYPE, 0o755, "", 0),
            "bin/sh": (tarfile.SYMTYPE, 0o644, "run", 0),
        }


def test_inline_layer_carries_the_gzip() -> None:
    assert b64decode(LAYER.inline()["location"].removeprefix("data:")) == LAYER.content
    assert zlib.decompress(b64decode(LAYER.inline("gzip")["location"].removeprefix("gzip:"))) == LAYER.content
    assert LAYER.inline() | {"location": ""} == {"location": "", **LAYER.described()}
    assert LAYER.described() == {"gzipDigest": LAYER.digest, "gzipSize": len(LAYER.content), "tarDigest": LAYER.diff_id}


@pytest.mark.parametrize(
    ("family", "manifest_type", "layer_type"),
    [("oci", OCI_MANIFEST, OCI_LAYER), ("docker", DOCKER_MANIFEST, DOCKER_LAYER)],
)
def test_image_is_consistent(family: str, manifest_type: str, layer_type: str) -> None:
    made = image([LAYER], family=family, platform="linux/arm/v7", cmd=["x"], working_dir="/w", env=["A=1"])  # type: ignore[arg-type]
    document = json.loads(made.manifest)
    assert made.digest == digest_of(made.manifest)
    assert made.media_type == document["mediaType"] == manifest_type
    assert document["config"]["digest"] == digest_of(made.blobs[0].content)
    assert document["layers"] == [{"mediaType": layer_type, "digest": LAYER.digest, "size": LAYER.size}]
    assert made.config["config"] == {"Env": ["A=1"], "Cmd": ["x"], "WorkingDir": "/w"}
    assert (made.config["os"], made.config["architecture"], made.config["variant"]) == ("linux", "arm", "v7")
    assert made.config["rootfs"]["diff_ids"] == [LAYER.diff_id]
    assert len(made.config["history"]) == 1


def test_image_may_leave_out_what_is_optional() -> None:
    made = image([LAYER], history=False, media_type_in_body=False)
    assert "mediaType" not in json.loads(made.manifest)
    assert "history" not in made.config


@pytest.mark.parametrize(("family", "media_type"), [("oci", OCI_INDEX), ("docker", DOCKER_INDEX)])
def test_index_names_its_children(family: str, media_type: str) -> None:
    children = [image([LAYER], platform=platform) for platform in ("linux/amd64", "linux/arm/v7")]
    made = index(children, family=family)  # type: ignore[arg-type]
    document = json.loads(made.manifest)
    assert (made.media_type, document["mediaType"], made.digest) == (media_type, media_type, digest_of(made.manifest))
    assert [entry["digest"] for entry in document["manifests"]] == [child.digest for child in children]
    assert [entry["size"] for entry in document["manifests"]] == [len(child.manifest) for child in children]
    assert document["manifests"][1]["platform"] == {"architecture": "arm", "os": "linux", "variant": "v7"}


def test_same_arguments_same_bytes() -> None:
    assert image([layer({"a": "b"})]).digest == image([layer({"a": "b"})]).digest
    assert random_blob(3_000_000, 7) == random_blob(3_000_000, 7)
    assert random_blob(1000, 7) != random_blob(1000, 8)


def test_random_blob_does_not_compress() -> None:
    content = random_blob(2_500_000, 1)
    assert len(content) == 2_500_000
    assert len(zlib.compress(content)) > 2_490_000


@pytest.mark.skipif(not has_busybox(), reason="needs /bin/busybox (Debian package busybox-static)")
def test_busybox_image_has_a_shell() -> None:
    made = busybox_image()
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(made.layers[0].content))) as archive:
        assert archive.getmember("bin/sh").linkname == "busybox"
        assert archive.getmember("bin/busybox").mode & 0o111


# --- upstream: what a registry does ------------------------------------------------------------------------------


def test_serves_an_image_by_tag_and_digest(hello: Upstream) -> None:
    by_tag, by_digest = pull(hello.address, "lib/hello", "latest"), pull(hello.address, "lib/hello", IMAGE.digest)
    assert by_tag == by_digest
    assert (by_tag.manifest, by_tag.config, by_tag.layers) == (IMAGE.manifest, IMAGE.config, (LAYER.content,))
    assert hello.fetches(LAYER.digest) == 2


def test_serves_an_index_with_its_children(upstream: Start) -> None:
    server, made = upstream(), index([IMAGE, image([LAYER], platform="linux/arm64")])
    server.add("a/b", made, "1")
    assert [child.digest for child in pull(server.address, "a/b", "1").children] == [c.digest for c in made.children]


def test_head_says_what_get_would(hello: Upstream) -> None:
    for path in ("/v2/lib/hello/manifests/latest", PATH):
        head, whole = get(hello, path, "HEAD"), get(hello, path)
        assert (head.status, head.body) == (200, b"")
        for name in ("Content-Length", "Content-Type", "Docker-Content-Digest"):
            assert head.headers[name] == whole.headers[name]
        assert head.headers["Docker-Content-Digest"] == digest_of(whole.body)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v2/no/such/manifests/latest", "NAME_UNKNOWN"),
        ("/v2/lib/hello/manifests/old", "MANIFEST_UNKNOWN"),
        (f"/v2/lib/hello/blobs/sha256:{'0' * 64}", "BLOB_UNKNOWN"),
    ],
)
def test_unknown_names_are_404(hello: Upstream, path: str, code: str) -> None:
    answer = get(hello, path)
    assert (answer.status, answer.json()["errors"][0]["code"]) == (404, code)


@pytest.mark.parametrize(
    ("asked", "status", "expected", "content_range"),
    [
        ("bytes=0-9", 206, slice(0, 10), "bytes 0-9/{}"),
        ("bytes=100-", 206, slice(100, None), "bytes 100-{last}/{}"),
        ("bytes=-7", 206, slice(-7, None), "bytes {minus7}-{last}/{}"),
        ("bytes=5-999999", 206, slice(5, None), "bytes 5-{last}/{}"),
        ("bytes=999999-", 416, slice(0), "bytes */{}"),
        ("bytes=9-3", 416, slice(0), "bytes */{}"),
        ("bytes=-0", 416, slice(0), "bytes */{}"),
        ("bytes=0-1,4-5", 200, slice(None), None),
        ("bytes=-", 200, slice(None), None),
    ],
)
def test_range(hello: Upstream, asked: str, status: int, expected: slice, content_range: str | None) -> None:
    size = LAYER.size
    answer = get(hello, PATH, Range=asked)
    assert (answer.status, answer.body) == (status, LAYER.content[expected])
    wanted = content_range and content_range.format(size, last=size - 1, minus7=size - 7)
    assert answer.headers["Content-Range"] == wanted


def test_tags_come_in_pages(upstream: Start) -> None:
    server = upstream()
    server.add("a/b", IMAGE, "3", "1", "2", "latest")
    seen, path = [], "/v2/a/b/tags/list?n=3"
    while path:
        answer = get(server, path)
        seen.append(answer.json()["tags"])
        path = answer.headers.get("Link", "").partition(">")[0].removeprefix("<")
    assert seen == [["1", "2", "3"], ["latest"]]
    assert get(server, "/v2/a/b/tags/list").json() == {"name": "a/b", "tags": ["1", "2", "3", "latest"]}


def test_log_tells_what_was_asked(hello: Upstream) -> None:
    get(hello, PATH + "?x=1", Range="bytes=0-1", Authorization="Basic abc")
    (entry,) = hello.log
    assert (entry.method, entry.path, entry.status) == ("GET", PATH + "?x=1", 206)
    assert entry.headers["authorization"] == "Basic abc"
    hello.clear_log()
    assert hello.log == []


def test_starts_again_on_the_same_port(hello: Upstream) -> None:
    address = hello.address
    hello.stop()
    with pytest.raises(ConnectionRefusedError):
        get(hello, "/v2/")
    hello.start()
    assert (hello.address, get(hello, PATH).status) == (address, 200)


# --- upstream: authentication ------------------------------------------------------------------------------------


def basic(username: str, password: str) -> str:
    return f"Basic {b64encode(f'{username}:{password}'.encode()).decode()}"


def test_basic_authentication(upstream: Start) -> None:
    server = upstream(auth="basic", username="me", password="pw")
    refused = get(server, "/v2/")
    assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, 'Basic realm="upstream"')
    assert get(server, "/v2/", Authorization=basic("me", "no")).status == 401
    assert get(server, "/v2/", Authorization=basic("me", "pw")).status == 200


def test_bearer_token_is_for_one_repository(upstream: Start) -> None:
    server = upstream(auth="bearer")
    server.add("lib/hello", IMAGE, "latest")
    server.add("lib/other", IMAGE, "latest")
    challenge = get(server, PATH).headers["WWW-Authenticate"]
    assert challenge == (
        f'Bearer realm="{server.url}/token",service="{server.address}",scope="repository:lib/hello:pull"'
    )
    path = f"/token?service={server.address}&scope=repository:lib/hello:pull"
    assert get(server, path).status == 401
    token = get(server, path, Authorization=basic("user", "secret")).json()["token"]
    assert get(server, PATH, Authorization=f"Bearer {token}").body == LAYER.content
    assert get(server, PATH.replace("hello", "other"), Authorization=f"Bearer {token}").status == 401
    server.revoke_tokens()
    assert get(server, PATH, Authorization=f"Bearer {token}").status == 401


def test_bearer_without_user_gives_everybody_a_token(upstream: Start) -> None:
    server = upstream(auth="bearer", username="")
    server.add("lib/hello", IMAGE, "latest")
    token = get(server, "/token?scope=repository:lib/hello:pull").json()["token"]
    assert get(server, PATH, Authorization=f"Bearer {token}").status == 200


def test_bearer_loop_and_foreign_realm(upstream: Start) -> None:
    server = upstream(auth="bearer", username="", faults=Faults(bearer_loop=True, realm="http://elsewhere/token"))
    token = get(server, "/token").json()["token"]
    answer = get(server, "/v2/", Authorization=f"Bearer {token}")
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="http://elsewhere/token",service=')


# --- upstream: faults --------------------------------------------------------------------------------------------


def test_truncates_as_often_as_told(hello: Upstream) -> None:
    hello.faults.truncate_at, hello.faults.truncate_times = 1000, 2
    for _ in range(2):
        with pytest.raises(IncompleteRead) as caught:
            get(hello, PATH)
        assert caught.value.partial == LAYER.content[:1000]
    assert get(hello, PATH).body == LAYER.content


def test_corrupts_only_the_last_byte(hello: Upstream) -> None:
    hello.faults.corrupt_last_byte = True
    body = get(hello, PATH).body
    assert body[:-1] == LAYER.content[:-1]
    assert body[-1] != LAYER.content[-1]
    assert get(hello, PATH, Range="bytes=-1").body == body[-1:]


def test_sends_more_than_there_is(hello: Upstream) -> None:
    hello.faults.extra_bytes = 5
    answer = get(hello, PATH)
    assert answer.body == LAYER.content + bytes(5)
    assert int(answer.headers["Content-Length"]) == LAYER.size + 5


def test_faults_of_a_body_hit_what_only_names(hello: Upstream) -> None:
    hello.faults.corrupt_last_byte, hello.faults.only = True, LAYER.digest
    assert get(hello, f"/v2/lib/hello/blobs/{IMAGE.blobs[0].digest}").body == IMAGE.blobs[0].content
    assert get(hello, PATH).body != LAYER.content


@pytest.mark.parametrize("stall_at", [0, 1000])
def test_stalls_in_the_body_until_released(hello: Upstream, stall_at: int) -> None:
    hello.faults.stall_at = stall_at
    with pytest.raises(TimeoutError):
        get(hello, PATH, timeout_s=0.1)
    timer = Timer(0.1, hello.faults.release.set)
    timer.start()
    assert get(hello, PATH).body == LAYER.content
    assert hello.faults.release.is_set()
    timer.join()


def test_stalls_before_the_head(hello: Upstream) -> None:
    hello.faults.stall_at, hello.faults.only = -1, "/v2/"
    with pytest.raises(TimeoutError):
        get(hello, "/v2/", timeout_s=0.1)
    assert hello.log == []


def test_stop_ends_stalled_answers(upstream: Start) -> None:
    server = upstream(faults=Faults(stall_at=10))
    server.add("lib/hello", IMAGE)

    def stop() -> None:
        until(lambda: server.log)
        sleep(0.1)  # it sends the beginning
        server.stop()

    stopping = Thread(target=stop)
    stopping.start()
    with pytest.raises(IncompleteRead) as caught:
        get(server, PATH)
    stopping.join()
    assert caught.value.partial == LAYER.content[:10]


def test_stop_leaves_no_connection_of_a_client_that_does_not_read(upstream: Start) -> None:
    server, big = upstream(), blob(bytes(64 << 20))
    server.add_blob("lib/hello", big)
    with create_connection((server.address.split(":")[0], int(server.address.split(":")[1]))) as client:
        client.sendall(f"GET /v2/lib/hello/blobs/{big.digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(1) == b"H"
        server.stop()
        gc.collect()  # tells of a transport that was not closed, and a warning is an error
        assert sum(iter(lambda: len(client.recv(1 << 20)), 0)) < big.size


def test_fails_for_so_many_requests(hello: Upstream) -> None:
    hello.faults.status, hello.faults.fail_times = {"/manifests/": 429}, 2
    hello.faults.retry_after = "3"
    answers = [get(hello, "/v2/lib/hello/manifests/latest") for _ in range(3)]
    assert [answer.status for answer in answers] == [429, 429, 200]
    assert [answer.headers["Retry-After"] for answer in answers] == ["3", "3", None]
    assert get(hello, PATH).status == 200


def test_fails_for_ever_by_default(hello: Upstream) -> None:
    hello.faults.status = {"/": 503}
    assert [get(hello, "/v2/").status for _ in range(3)] == [503, 503, 503]


def test_redirects_blobs_to_another_host(hello: Upstream, upstream: Start) -> None:
    store = upstream()
    store.add_blob("lib/hello", LAYER)
    hello.faults.redirect_blobs_to = store.url
    answer = get(hello, PATH)
    assert (answer.status, answer.headers["Location"]) == (307, store.url + PATH)
    assert get(store, PATH).body == LAYER.content
    assert (hello.fetches(LAYER.digest), store.fetches(LAYER.digest)) == (0, 1)


def test_range_faults(hello: Upstream) -> None:
    hello.faults.no_range = True
    answer = get(hello, PATH, Range="bytes=10-19")
    assert (answer.status, answer.body) == (200, LAYER.content)
    hello.faults.no_range, hello.faults.wrong_range = False, True
    answer = get(hello, PATH, Range="bytes=10-19")
    assert (answer.status, answer.body) == (206, LAYER.content[9:20])
    assert answer.headers["Content-Range"] == f"bytes 9-19/{LAYER.size}"


def test_header_faults(hello: Upstream) -> None:
    hello.faults.no_digest_header = hello.faults.no_content_length = hello.faults.no_head = True
    hello.faults.content_type = "text/plain"
    answer = get(hello, PATH)
    assert (answer.body, answer.headers["Content-Length"]) == (LAYER.content, None)
    assert answer.headers["Docker-Content-Digest"] is None
    assert get(hello, PATH, "HEAD").status == 405
    assert get(hello, "/v2/lib/hello/manifests/latest").headers["Content-Type"] == "text/plain"


def test_html_login(hello: Upstream) -> None:
    hello.faults.html_login = True
    answer = get(hello, "/v2/lib/hello/manifests/latest")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html")


def test_slow_body_is_whole(hello: Upstream) -> None:
    hello.faults.chunk_bytes, hello.faults.delay_s = 1000, 0.001
    assert get(hello, PATH).body == LAYER.content


# --- servers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("localhost:9090/wt/abc/library/ubuntu:24.04", ("wt/abc/library/ubuntu", "24.04")),
        ("localhost:9090/wt/abc/library/ubuntu", ("wt/abc/library/ubuntu", "latest")),
        ("h/a/b@sha256:12", ("a/b", "sha256:12")),
        ("h/a/b:1@sha256:12", ("a/b", "sha256:12")),
    ],
)
def test_split_image(name: str, expected: tuple[str, str]) -> None:
    assert split_image(name) == expected


def test_pull_refuses_wrong_content(hello: Upstream) -> None:
    hello.faults.corrupt_last_byte, hello.faults.only = True, LAYER.digest
    with pytest.raises(AssertionError, match="has another digest"):
        pull(hello.address, "lib/hello", "latest")
    hello.faults.corrupt_last_byte, hello.faults.extra_bytes = False, 1
    with pytest.raises(AssertionError, match=f"not {LAYER.size}"):
        pull(hello.address, "lib/hello", "latest")


def test_wave_proxy_serves_an_image(hello: Upstream, wave: Callable[..., WaveProxy]) -> None:
    proxy = wave(upstreams=[hello.address], workers=2)
    pulled = proxy.pull(proxy.submit(containerImage=f"{hello.address}/lib/hello:latest")["targetImage"])
    assert (pulled.manifest, pulled.layers) == (IMAGE.manifest, (LAYER.content,))
    assert len(proxy.workers()) == 2
    assert {proxy.pid, proxy.api_pid(), proxy.redis_pid(), *proxy.workers()} <= set(proxy.processes())


def test_wave_proxy_ends_whole_and_starts_again(tmp_path: Path) -> None:
    proxy = WaveProxy(tmp_path / "data")
    ends: list[tuple[Callable[[], object], int | None]] = [(proxy.kill, None), (proxy.stop, 0)]
    for end, code in ends:
        proxy.start()
        assert proxy.request("GET", "/v2/").status == 200
        assert len(proxy.processes()) >= 4
        assert end() == code
        assert proxy.processes() == {}
        with pytest.raises(ConnectionRefusedError):
            proxy.request("GET", "/v2/")
    with pytest.raises(AssertionError, match="not started"):
        proxy.stop()


def test_wave_proxy_that_does_not_start_says_why(tmp_path: Path) -> None:
    proxy = WaveProxy(tmp_path / "data", config="no_such_setting = 1")
    with pytest.raises(AssertionError, match=r"(?s)did not become ready.*no_such_setting"):
        proxy.start()


def test_redis_server_answers(tmp_path: Path, redis_url: str) -> None:
    assert redis_url.startswith("unix:///")
    with redis_server(tmp_path) as other, socket(AF_UNIX) as connection:
        assert other != redis_url
        connection.connect(other.removeprefix("unix://"))
        connection.sendall(b"DBSIZE\r\n")
        assert connection.recv(16) == b":0\r\n"
    assert not Path(other.removeprefix("unix://")).exists()


@pytest.mark.skipif(not has_distribution(), reason="needs docker-registry (Debian package docker-registry)")
def test_push_to_distribution_and_pull_back(tmp_path: Path) -> None:
    made: Image = index([IMAGE, image([layer({"x": "y"})], platform="linux/arm64")])
    with distribution(tmp_path) as address:
        push(address, "lib/hello", made, "latest", "1")
        assert pull(address, "lib/hello", "1").manifest == made.manifest


def test_blob_has_its_digest() -> None:
    assert blob(b"").digest == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
