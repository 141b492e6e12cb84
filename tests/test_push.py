"""Pushing over the wire: the answers, who may, real clients, and workers that die in the middle of it."""

import json
import os
import signal
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import sha256
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from random import Random
from threading import Thread
from time import sleep
from typing import Any

import pytest

from bench.images import Image, blob, digest_of, image, index, layer, random_blob
from tests.clients.programs import Client, docker_daemon, needs, reason_to_skip_daemon
from tests.patience import PATIENCE_S, until
from tests.servers import Response, WaveProxy, distribution, has_distribution, http_request, pull, push
from wave_proxy.image.oci import OCI_INDEX, OCI_MANIFEST

TOOL = image([layer({"bin/tool": "x"})], env=["PATH=/bin"])
OTHER = image([layer({"bin/other": "y"})])
LARGE = image([layer({"big.bin": random_blob(6 << 20, seed=92)}, compression="none"), layer({"b": "b"})])
BIG = blob(random_blob(3_000_000, seed=93))
NAME = "local/team/tool"
UPLOADS = f"/v2/{NAME}/blobs/uploads/"
PASSWORD = "correct horse"
ACCOUNT = f'[accounts]\nbob = "sha256:{sha256(PASSWORD.encode()).hexdigest()}"\n'
SECRET = "s3cret-of-the-builders-" + "x" * 16
MISSING = f"sha256:{'0' * 64}"


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}


@pytest.fixture(scope="module")
def open_wave(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WaveProxy]:
    """Everybody may push."""
    config = "[local]\nanonymous_push = true\nmax_blob_bytes = '100MB'\n[http]\nmax_body_bytes = 1000000\n"
    with WaveProxy(tmp_path_factory.mktemp("open") / "data", workers=2, config=config) as started:
        yield started


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WaveProxy]:
    """One account, and builders."""
    config = f'{ACCOUNT}[build]\nsecret = "{SECRET}"\n'
    with WaveProxy(tmp_path_factory.mktemp("guarded") / "data", workers=2, config=config) as started:
        yield started


def begin(wave: WaveProxy, path: str = UPLOADS) -> str:
    answer = wave.request("POST", path)
    assert answer.status == 202, answer.body
    location: str = answer.headers["Location"]
    return location


def error(answer: Response) -> tuple[int, str]:
    return answer.status, answer.json()["errors"][0]["code"]


def put(wave: WaveProxy, found: Image, reference: str, name: str = NAME) -> Response:
    headers = {"Content-Type": found.media_type}
    return wave.request("PUT", f"/v2/{name}/manifests/{reference}", body=found.manifest, headers=headers)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_push_and_pull(open_wave: WaveProxy) -> None:
    both = index([TOOL, OTHER])
    push(open_wave.address, "local/whole", both, "v1")
    assert pull(open_wave.address, "local/whole", "v1").manifest == both.manifest
    answer = open_wave.request("HEAD", "/v2/local/whole/manifests/v1")
    assert (answer.headers["Docker-Content-Digest"], answer.headers["Content-Type"]) == (both.digest, both.media_type)
    partial = open_wave.request("GET", f"/v2/local/whole/blobs/{TOOL.blobs[0].digest}", headers={"Range": "bytes=2-5"})
    assert (partial.status, partial.body) == (206, TOOL.blobs[0].content[2:6])


def test_an_upload_step_by_step(open_wave: WaveProxy) -> None:
    answer = open_wave.request("POST", UPLOADS)
    location = answer.headers["Location"]
    assert (answer.status, answer.headers["Range"]) == (202, "0-0")
    assert location.endswith(answer.headers["Docker-Upload-UUID"])
    first = {"Content-Range": "0-999999", "Content-Type": "application/octet-stream"}
    answer = open_wave.request("PATCH", location, body=BIG.content[:1_000_000], headers=first)
    assert (answer.status, answer.headers["Range"], answer.headers["Location"]) == (202, "0-999999", location)
    assert error(open_wave.request("PATCH", location, body=b"x" * 10, headers={"Content-Range": "5-14"})) == (
        416,
        "BLOB_UPLOAD_INVALID",
    )
    for method in ("GET", "HEAD"):
        answer = open_wave.request(method, location)
        assert (answer.status, answer.headers["Range"], answer.body) == (204, "0-999999", b"")
    answer = open_wave.request("PATCH", location, body=BIG.content[1_000_000:2_000_000])
    assert answer.headers["Range"] == "0-1999999"
    rest = {"Content-Range": f"2000000-{len(BIG.content) - 1}"}
    answer = open_wave.request("PUT", f"{location}?digest={BIG.digest}", body=BIG.content[2_000_000:], headers=rest)
    assert (answer.status, answer.headers["Docker-Content-Digest"]) == (201, BIG.digest)
    assert open_wave.request("GET", answer.headers["Location"]).body == BIG.content
    assert error(open_wave.request("GET", location)) == (404, "BLOB_UPLOAD_UNKNOWN")


def test_a_stream_without_a_length(open_wave: WaveProxy) -> None:
    location = begin(open_wave)
    connection = HTTPConnection(open_wave.address, timeout=PATIENCE_S)
    chunks = (BIG.content[at : at + 70_000] for at in range(0, len(BIG.content), 70_000))
    connection.request("PATCH", location, body=chunks, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Range"]) == (202, f"0-{len(BIG.content) - 1}")
    answer.read()
    connection.request("PUT", f"{location}?digest={BIG.digest}")
    assert connection.getresponse().status == 201
    connection.close()


def test_cancel(open_wave: WaveProxy) -> None:
    location = begin(open_wave)
    assert open_wave.request("DELETE", location).status == 204
    assert error(open_wave.request("DELETE", location)) == (404, "BLOB_UPLOAD_UNKNOWN")


def test_mount(open_wave: WaveProxy) -> None:
    push(open_wave.address, "local/source", TOOL, "v1")
    digest = TOOL.blobs[0].digest
    for source in ("&from=local/source", ""):
        answer = open_wave.request("POST", f"/v2/local/mounted{len(source)}/blobs/uploads/?mount={digest}{source}")
        assert (answer.status, answer.headers["Docker-Content-Digest"]) == (201, digest)
        assert open_wave.request("GET", answer.headers["Location"]).body == TOOL.blobs[0].content
    for source in ("local/nothing", "library/source", "source", "local/../source", "local"):
        answer = open_wave.request("POST", f"{UPLOADS}?mount={digest}&from={source}")
        assert (answer.status, answer.headers["Range"]) == (202, "0-0")


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "expected"),
    [
        ("PUT", f"{UPLOADS}{'0' * 32}?digest={MISSING}", b"", {}, (404, "BLOB_UPLOAD_UNKNOWN")),
        ("PUT", f"{UPLOADS}{'0' * 32}", b"", {}, (400, "DIGEST_INVALID")),
        ("PUT", f"{UPLOADS}{'0' * 32}?digest=md5:1", b"", {}, (400, "DIGEST_INVALID")),
        ("PATCH", f"{UPLOADS}nothing", b"x", {}, (404, "BLOB_UPLOAD_UNKNOWN")),
        ("PATCH", f"{UPLOADS}{'0' * 32}", b"x", {"Content-Range": "x"}, (400, "BLOB_UPLOAD_INVALID")),
        ("PATCH", f"{UPLOADS}{'0' * 32}", b"x", {"Content-Range": "0-9"}, (400, "BLOB_UPLOAD_INVALID")),
        ("POST", f"{UPLOADS}?digest={MISSING}", b"x", {}, (400, "DIGEST_INVALID")),
        ("POST", f"{UPLOADS}?mount=x", b"", {}, (400, "DIGEST_INVALID")),
        ("POST", "/v2/local/Team/blobs/uploads/", b"", {}, (400, "NAME_INVALID")),
        ("POST", "/v2/local/_uploads/blobs/uploads/", b"", {}, (400, "NAME_INVALID")),
        ("POST", "/v2/local/../x/blobs/uploads/", b"", {}, (400, "NAME_INVALID")),
        ("POST", "/v2/local/blobs/uploads/", b"", {}, (400, "NAME_INVALID")),
        ("PUT", f"/v2/{NAME}/manifests/v1", b"{}", {"Content-Type": "text/html"}, (400, "MANIFEST_INVALID")),
        ("PUT", f"/v2/{NAME}/manifests/v1", b"{}", {"Content-Type": "no"}, (400, "MANIFEST_INVALID")),
        ("PUT", f"/v2/{NAME}/manifests/v1", b"{", {"Content-Type": OCI_MANIFEST}, (400, "MANIFEST_INVALID")),
        ("PUT", f"/v2/{NAME}/manifests/{MISSING}", b"{}", {"Content-Type": OCI_INDEX}, (400, "DIGEST_INVALID")),
        ("PUT", f"/v2/{NAME}/manifests/-v", b"{}", {"Content-Type": OCI_INDEX}, (400, "NAME_INVALID")),
        ("PUT", f"/v2/{NAME}/manifests/v1", bytes((4 << 20) + 1), {}, (413, "SIZE_INVALID")),
        ("DELETE", f"/v2/{NAME}/manifests/none", None, {}, (404, "MANIFEST_UNKNOWN")),
        ("DELETE", f"/v2/{NAME}/manifests/{MISSING}", None, {}, (404, "MANIFEST_UNKNOWN")),
        ("DELETE", f"/v2/{NAME}/blobs/{MISSING}", None, {}, (404, "BLOB_UNKNOWN")),
        ("GET", f"/v2/{NAME}/blobs/{MISSING}", None, {}, (404, "BLOB_UNKNOWN")),
        ("GET", f"/v2/{NAME}/manifests/none", None, {}, (404, "MANIFEST_UNKNOWN")),
        ("GET", "/v2/local/no/such/tags/list", None, {}, (404, "NAME_UNKNOWN")),
        ("GET", f"/v2/{NAME}/referrers/x", None, {}, (400, "DIGEST_INVALID")),
    ],
)
def test_refusals(
    open_wave: WaveProxy,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    expected: tuple[int, str],
) -> None:
    answer = open_wave.request(method, path, body=body, headers=headers)
    assert error(answer) == expected
    assert answer.headers["WWW-Authenticate"] is None


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", f"/v2/{NAME}/manifests/v1", "GET, HEAD, PUT, DELETE"),
        ("PUT", f"/v2/{NAME}/blobs/{MISSING}", "GET, HEAD, DELETE"),
        ("PUT", UPLOADS, "POST"),
        ("GET", UPLOADS, "POST"),
        ("POST", f"{UPLOADS}{'0' * 32}", "GET, HEAD, PATCH, PUT, DELETE"),
        ("DELETE", f"/v2/{NAME}/tags/list", "GET, HEAD"),
        ("PUT", f"/v2/{NAME}/referrers/{MISSING}", "GET, HEAD"),
        ("POST", "/v2/library/x/blobs/uploads/", "GET, HEAD"),
        ("PUT", "/v2/quay.io/local/x/manifests/v1", "GET, HEAD"),
        ("DELETE", f"/v2/wt/{'0' * 32}/local/x/manifests/v1", "GET, HEAD"),
    ],
)
def test_methods(open_wave: WaveProxy, method: str, path: str, allow: str) -> None:
    answer = open_wave.request(method, path)
    assert error(answer) == (405, "UNSUPPORTED")
    assert answer.headers["Allow"] == allow


def test_limits_of_a_body_are_its_targets(open_wave: WaveProxy) -> None:
    """Of the API 1 MB, of a manifest 4 MiB, of a blob 100 MB."""
    assert open_wave.request("POST", "/v1alpha2/container", body=bytes(2_000_000)).status == 413
    answer = open_wave.request("POST", f"{UPLOADS}?digest={BIG.digest}", body=BIG.content)
    assert answer.status == 201
    location = begin(open_wave)
    connection = HTTPConnection(open_wave.address, timeout=PATIENCE_S)
    connection.putrequest("PATCH", location)
    connection.putheader("Content-Length", "100000001")
    connection.putheader("Content-Range", "0-100000000")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_manifest_that_names_what_is_not_there(open_wave: WaveProxy) -> None:
    answer = put(open_wave, TOOL, "v1", "local/empty")
    assert error(answer) == (404, "MANIFEST_BLOB_UNKNOWN")
    assert TOOL.blobs[0].digest in answer.json()["errors"][0]["message"]


def test_tags_list(open_wave: WaveProxy) -> None:
    push(open_wave.address, "local/tagged", TOOL, "c", "a", "b")
    assert open_wave.request("GET", "/v2/local/tagged/tags/list").json() == {
        "name": "local/tagged",
        "tags": ["a", "b", "c"],
    }
    seen, path = list[str](), "/v2/local/tagged/tags/list?n=2"
    while path:
        answer = open_wave.request("GET", path)
        seen += answer.json()["tags"]
        path = (answer.headers["Link"] or "").partition(">")[0].removeprefix("<")
    assert seen == ["a", "b", "c"]
    assert open_wave.request("GET", "/v2/local/tagged/tags/list?n=-1").status == 400


def test_referrers(open_wave: WaveProxy) -> None:
    push(open_wave.address, "local/signed", TOOL, "v1")
    config = {"mediaType": "a/empty", "digest": TOOL.blobs[0].digest, "size": len(TOOL.blobs[0].content)}
    subject = {"mediaType": OCI_MANIFEST, "digest": TOOL.digest, "size": len(TOOL.manifest)}
    signature = {"schemaVersion": 2, "artifactType": "a/sig", "config": config, "layers": [], "subject": subject}
    body = json.dumps(signature)
    headers = {"Content-Type": OCI_MANIFEST}
    answer = open_wave.request(
        "PUT", f"/v2/local/signed/manifests/{digest_of(body.encode())}", body=body, headers=headers
    )
    assert (answer.status, answer.headers["OCI-Subject"]) == (201, TOOL.digest)
    path = f"/v2/local/signed/referrers/{TOOL.digest}"
    answer = open_wave.request("GET", path)
    assert answer.headers["Content-Type"] == OCI_INDEX
    assert answer.headers["OCI-Filters-Applied"] is None
    assert [entry["digest"] for entry in answer.json()["manifests"]] == [digest_of(body.encode())]
    answer = open_wave.request("GET", f"{path}?artifactType=b/sig")
    assert answer.headers["OCI-Filters-Applied"] == "artifactType"
    assert answer.json()["manifests"] == []
    assert open_wave.request("GET", f"/v2/local/nobody/referrers/{MISSING}").json()["manifests"] == []


# --- who may ---------------------------------------------------------------------------------------------------------


def test_a_login_is_asked_of_who_changes_something_and_of_nobody_else(guarded: WaveProxy) -> None:
    for method, path in (
        ("POST", UPLOADS),
        ("PUT", f"/v2/{NAME}/manifests/v1"),
        ("DELETE", f"/v2/{NAME}/manifests/v1"),
        ("GET", f"{UPLOADS}{'0' * 32}"),
    ):
        for headers in ({}, {"Authorization": "Basic Og=="}, {"Authorization": "Bearer x"}):
            answer = guarded.request(method, path, headers=headers)
            assert error(answer) == (401, "UNAUTHORIZED")
            assert answer.headers["WWW-Authenticate"] == 'Basic realm="wave-proxy"'
    assert error(guarded.request("GET", f"/v2/{NAME}/manifests/v1")) == (404, "MANIFEST_UNKNOWN")


@pytest.mark.parametrize("login", [("bob", PASSWORD), ("_builder", SECRET)])
def test_accounts_and_builders_may(guarded: WaveProxy, login: tuple[str, str]) -> None:
    answer = guarded.request("POST", f"{UPLOADS}?digest={BIG.digest}", body=BIG.content, headers=basic(*login))
    assert answer.status == 201


def test_the_greeting_names_the_login_and_checks_one(guarded: WaveProxy, open_wave: WaveProxy) -> None:
    for headers in ({}, basic("bob", PASSWORD), basic("", "")):
        answer = guarded.request("GET", "/v2/", headers=headers)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (200, 'Basic realm="wave-proxy"')
    assert guarded.request("GET", "/v2/", headers=basic("bob", "wrong")).status == 401
    answer = open_wave.request("GET", "/v2/", headers=basic("bob", "wrong"))
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (200, None)


def test_guessing_ends(wave: Callable[..., WaveProxy]) -> None:
    proxy = wave(config=f'{ACCOUNT}[build]\nsecret = "{SECRET}"\n')
    statuses = [proxy.request("POST", UPLOADS, headers=basic("bob", f"{n}")).status for n in range(25)]
    assert statuses == [401] * 20 + [429] * 5
    answer = proxy.request("POST", UPLOADS, headers=basic("bob", PASSWORD))
    assert answer.status == 429
    assert 0 < int(answer.headers["Retry-After"]) <= 61
    assert proxy.request("POST", UPLOADS, headers=basic("_builder", SECRET)).status == 202
    assert proxy.request("POST", UPLOADS).status == 401


# --- reading as of any other repository ------------------------------------------------------------------------------


def test_all_workers_see_at_once_where_a_tag_stands(open_wave: WaveProxy) -> None:
    name = "local/moving"
    for moved in (TOOL, OTHER):
        push(open_wave.address, name, moved)
    for turn in range(20):
        expected = (TOOL, OTHER)[turn % 2]
        assert put(open_wave, expected, "latest", name).status == 201
        for _ in range(4):  # each on a connection of its own, which either worker may get
            answer = open_wave.request("GET", f"/v2/{name}/manifests/latest")
            assert answer.headers["Docker-Content-Digest"] == expected.digest

    def statuses(path: str) -> set[int]:
        return {open_wave.request("GET", f"/v2/{name}/{path}").status for _ in range(6)}

    for path in (f"manifests/{OTHER.digest}", f"blobs/{OTHER.blobs[0].digest}"):
        assert statuses(path) == {200}
        assert open_wave.request("DELETE", f"/v2/{name}/{path}").status == 202
        assert statuses(path) == {404}
    assert statuses("manifests/latest") == {404}


def test_a_pull_outlives_the_deletion_of_what_it_pulls(open_wave: WaveProxy) -> None:
    name = "local/deleted"
    push(open_wave.address, name, LARGE, "v1")
    big = LARGE.blobs[1]
    connection = HTTPConnection(open_wave.address, timeout=PATIENCE_S)
    connection.request("GET", f"/v2/{name}/blobs/{big.digest}")
    answer = connection.getresponse()
    content = answer.read(1000)
    for path in ("manifests/v1", f"manifests/{LARGE.digest}", *(f"blobs/{item.digest}" for item in LARGE.blobs)):
        assert open_wave.request("DELETE", f"/v2/{name}/{path}").status == 202
    assert content + answer.read() == big.content
    connection.close()


def test_a_token_changes_a_local_image_like_any_other(wave: Callable[..., WaveProxy]) -> None:
    proxy = wave(workers=2, config="[local]\nanonymous_push = true\n")
    push(proxy.address, NAME, TOOL, "v1")
    answer = proxy.submit(
        containerImage=f"localhost:{proxy.port}/{NAME}:v1",
        containerConfig={"env": ["ADDED=yes"], "layers": [layer({"added": "here"}).inline()]},
    )
    pulled = proxy.pull(answer["targetImage"])
    assert pulled.config["config"]["Env"][-1] == "ADDED=yes"
    assert pulled.layers[0] == TOOL.blobs[1].content
    assert len(pulled.layers) == 2
    proxy.request("DELETE", f"/v2/{NAME}/manifests/v1")
    fresh = f"/v2/{answer['targetImage'].partition('/')[2].replace(':v1', '')}/manifests/v1"
    assert {proxy.request("GET", fresh).status for _ in range(4)} == {404}


def test_pulls_of_local_images_count(wave: Callable[..., WaveProxy]) -> None:
    config = '[local]\nanonymous_push = true\n[quota]\npull_anonymous = "3/1h"\nwait = "0s"\n'
    proxy = wave(workers=2, config=config)
    push(proxy.address, NAME, TOOL, "v1")
    statuses = [proxy.request("GET", f"/v2/{NAME}/manifests/v1").status for _ in range(5)]
    assert statuses == [200] * 3 + [429] * 2
    assert proxy.request("HEAD", f"/v2/{NAME}/manifests/v1").status == 200


# --- workers that die, disks that are full, memory -------------------------------------------------------------------


def kill_workers(proxy: WaveProxy) -> None:
    for pid in proxy.workers():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def eventually(ask: Callable[[], Response]) -> Response:
    """The answer of a server whose workers are being started again."""

    def answer() -> Response | None:
        try:
            found = ask()
        except (OSError, HTTPException):
            return None
        return found if found.status != 503 else None

    return until(answer, "the workers do not come back")


def test_an_upload_goes_on_at_another_worker(wave: Callable[..., WaveProxy]) -> None:
    proxy = wave(workers=2, config="[local]\nanonymous_push = true\n")
    location, half = begin(proxy), len(BIG.content) // 2
    connection = HTTPConnection(proxy.address, timeout=PATIENCE_S)
    connection.putrequest("PATCH", location)
    connection.putheader("Content-Length", str(len(BIG.content)))
    connection.endheaders()
    connection.send(BIG.content[:half])
    until(lambda: proxy.request("GET", location).headers["Range"] != "0-0")
    kill_workers(proxy)
    connection.close()
    at = int(eventually(lambda: proxy.request("GET", location)).headers["Range"].partition("-")[2]) + 1
    assert 0 < at <= half
    headers = {"Content-Range": f"{at}-{len(BIG.content) - 1}"}
    sent = eventually(lambda: proxy.request("PATCH", location, body=BIG.content[at:], headers=headers))
    assert sent.status == 202
    assert proxy.request("PUT", f"{location}?digest={BIG.digest}").status == 201
    assert proxy.request("GET", f"/v2/{NAME}/blobs/{BIG.digest}").body == BIG.content


def test_nothing_half_written_is_seen_when_workers_die(wave: Callable[..., WaveProxy], tmp_path: Path) -> None:
    proxy = wave(workers=2, config="[local]\nanonymous_push = true\n", data=tmp_path / "data")
    random = Random(94)
    for turn in range(8):
        name = f"local/killed{turn}"

        def try_to_push(name: str = name) -> None:
            with suppress(OSError, HTTPException, AssertionError):
                push(proxy.address, name, LARGE, "v1")

        pushing = Thread(target=try_to_push)
        pushing.start()
        sleep(random.uniform(0, 0.08))
        kill_workers(proxy)
        pushing.join()
        if eventually(partial(proxy.request, "HEAD", f"/v2/{name}/manifests/v1")).status == 200:
            pull(proxy.address, name, "v1")
        for file in (tmp_path / "data" / "local" / name.removeprefix("local/")).glob("_blobs/*"):
            assert digest_of(file.read_bytes()) == file.name.replace("-", ":")
        eventually(lambda: proxy.request("GET", "/v2/"))
        push(proxy.address, name, LARGE, "v1")
        assert pull(proxy.address, name, "v1").manifest == LARGE.manifest


def test_many_push_the_same_at_once(open_wave: WaveProxy) -> None:
    both = index([LARGE, TOOL, OTHER])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: push(open_wave.address, f"local/crowd{n % 2}", both, "v1", f"v{n}"), range(16)))
    for name in ("local/crowd0", "local/crowd1"):
        assert pull(open_wave.address, name, "v1").manifest == both.manifest
        assert len(open_wave.request("GET", f"/v2/{name}/tags/list").json()["tags"]) >= 8


def test_a_full_disk_keeps_the_upload(wave: Callable[..., WaveProxy], small_disk: Path) -> None:
    proxy = wave(config="[local]\nanonymous_push = true\n", data=small_disk / "data")
    content = random_blob(6 << 20, seed=95)
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        file.write(bytes(free - (3 << 20)))
    location = begin(proxy)
    assert proxy.request("PATCH", location, body=content).status == 507
    at = int(proxy.request("GET", location).headers["Range"].partition("-")[2]) + 1
    assert 0 < at < len(content)
    ballast.unlink()
    rest = {"Content-Range": f"{at}-{len(content) - 1}"}
    assert proxy.request("PATCH", location, body=content[at:], headers=rest).status == 202
    assert proxy.request("PUT", f"{location}?digest={digest_of(content)}").status == 201
    assert proxy.request("GET", f"/v2/{NAME}/blobs/{digest_of(content)}").body == content


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"can't mount a small file system here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_large_blob_does_not_take_memory(wave: Callable[..., WaveProxy]) -> None:
    proxy = wave(config="[local]\nanonymous_push = true\n")
    (worker,) = proxy.workers()

    def peak() -> int:
        lines = Path(f"/proc/{worker}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    before, content = peak(), random_blob(160 << 20, seed=96)
    digest = digest_of(content)
    answer = http_request(proxy.address, "POST", f"{UPLOADS}?digest={digest}", body=content)
    assert answer.status == 201
    assert peak() - before < 48 << 20


# --- real clients ----------------------------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """An OCI layout with one image, `v1`."""
    folder = tmp_path / "layout"
    (folder / "blobs" / "sha256").mkdir(parents=True)
    for content in (TOOL.manifest, *(item.content for item in TOOL.blobs)):
        (folder / "blobs" / digest_of(content).replace(":", "/")).write_bytes(content)
    entry: dict[str, Any] = {"mediaType": TOOL.media_type, "digest": TOOL.digest, "size": len(TOOL.manifest)}
    entry["annotations"] = {"org.opencontainers.image.ref.name": "v1"}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


@needs("skopeo", "Debian package skopeo")
def test_skopeo_pushes_copies_lists_and_deletes(guarded: WaveProxy, layout: Path) -> None:
    skopeo, place = Client("skopeo", "--insecure-policy"), f"docker://{guarded.address}/local"
    copy = ("copy", "--src-tls-verify=false", "--dest-tls-verify=false")
    login = ("--dest-creds", f"bob:{PASSWORD}")
    skopeo(*copy, *login, f"oci:{layout}:v1", f"{place}/sk/one:v1")
    skopeo(*copy, *login, f"{place}/sk/one:v1", f"{place}/sk/two:v2")
    assert pull(guarded.address, "local/sk/two", "v2").manifest == TOOL.manifest
    refused = skopeo.attempt(*copy, f"oci:{layout}:v1", f"{place}/sk/one:v3")
    assert refused.returncode != 0
    assert "takes a login" in refused.stderr
    assert "[local] anonymous_push" in refused.stderr
    assert json.loads(skopeo("list-tags", "--tls-verify=false", f"{place}/sk/one"))["Tags"] == ["v1"]
    skopeo("delete", "--tls-verify=false", "--creds", f"bob:{PASSWORD}", f"{place}/sk/one:v1")
    assert json.loads(skopeo("list-tags", "--tls-verify=false", f"{place}/sk/one"))["Tags"] == []


@needs("podman", "Debian package podman")
def test_podman_logs_in(guarded: WaveProxy) -> None:
    podman = Client("podman")
    arguments = ("login", "--tls-verify=false", "-u", "bob", guarded.address)
    assert "Succeeded" in podman(*arguments, "-p", PASSWORD)
    assert "invalid username/password" in podman.attempt(*arguments, "-p", "wrong").stderr


@needs("crane", "go install github.com/google/go-containerregistry/cmd/crane@v0.20.3")
def test_crane(open_wave: WaveProxy, guarded: WaveProxy, layout: Path, tmp_path: Path) -> None:
    crane, place = Client("crane"), f"{open_wave.address}/local"
    crane("push", layout, f"{place}/cr/one:v1")
    crane("copy", f"{place}/cr/one:v1", f"{place}/cr/two:v1")
    assert pull(open_wave.address, "local/cr/two", "v1").manifest == TOOL.manifest
    crane("tag", f"{place}/cr/two:v1", "v2")
    assert crane("ls", f"{place}/cr/two").split() == ["v1", "v2"]
    crane("delete", f"{place}/cr/two:v2")
    assert crane("ls", f"{place}/cr/two").split() == ["v1"]
    assert "UNAUTHORIZED" in crane.attempt("push", layout, f"{guarded.address}/local/cr:v1").stderr
    auth = b64encode(f"bob:{PASSWORD}".encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {guarded.address: {"auth": auth}}}))
    logins = {"DOCKER_CONFIG": str(tmp_path), "REGISTRY_AUTH_FILE": str(tmp_path / "config.json")}
    with_login = Client("crane", env=logins)
    with_login("push", layout, f"{guarded.address}/local/cr:v1")
    assert pull(guarded.address, "local/cr", "v1").manifest == TOOL.manifest


DOCKER = reason_to_skip_daemon("dockerd", "docker", "Debian packages docker.io, and docker-cli where it exists")


@pytest.mark.skipif(bool(DOCKER), reason=DOCKER)
def test_docker_pushes_where_everybody_may(open_wave: WaveProxy, tmp_path: Path) -> None:
    name = f"{open_wave.address}/local/docker:v1"
    (tmp_path / "files.tar").write_bytes(layer({"a": "b"}, compression="none").content)
    with docker_daemon() as docker:
        docker("import", tmp_path / "files.tar", name)
        docker("push", name)
    pulled = pull(open_wave.address, "local/docker", "v1")
    assert len(pulled.layers) == 1


@pytest.mark.skipif(not has_distribution(), reason="docker-registry is not installed (Debian package)")
@needs("skopeo", "Debian package skopeo")
def test_an_image_that_was_copied_through_other_registries_is_the_same(
    open_wave: WaveProxy, tmp_path: Path, layout: Path
) -> None:
    skopeo, copy = Client("skopeo", "--insecure-policy"), ("copy", "--src-tls-verify=false", "--dest-tls-verify=false")
    with distribution(tmp_path) as other:
        skopeo(*copy, f"oci:{layout}:v1", f"docker://{open_wave.address}/local/there:v1")
        skopeo(*copy, f"docker://{open_wave.address}/local/there:v1", f"docker://{other}/there:v1")
        skopeo(*copy, f"docker://{other}/there:v1", f"docker://{open_wave.address}/local/back:v1")
    assert pull(open_wave.address, "local/back", "v1").manifest == TOOL.manifest
