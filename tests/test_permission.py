"""Private content stays private: knowing a digest, or claiming to have it, is not enough to get it from our store."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

from bench.images import Blob, image, layer, random_blob
from bench.upstream import Upstream
from tests.patience import until
from tests.servers import Response, WaveProxy

SECRET = layer({"secret.bin": random_blob(50_000, seed=77)})
PRIVATE = image([SECRET], env=("API_KEY=hunter2",))


@pytest.fixture
def evil(upstream: Callable[..., Upstream]) -> Upstream:
    """A registry whose owner knows digest and size of a private layer, and not its content."""
    registry = upstream()
    registry.add_blob("evil/x", Blob(SECRET.digest, bytes(len(SECRET.content)), SECRET.media_type))
    registry.add("evil/x", image([layer({"a": "b"})]), "v1")
    return registry


@pytest.fixture
def proxy(upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], evil: Upstream) -> WaveProxy:
    """A program through which the private image was pulled by somebody who may."""
    corp = upstream(auth="basic", username="me", password="secret-1")
    corp.add("corp/app", PRIVATE, "v1")
    started = wave(
        upstreams=[evil.address],
        config=f'[registries."{corp.address}"]\ninsecure = true\nallow_private = true\nusername = "me"\n'
        'password = "secret-1"\n',
    )
    started.pull(started.submit(containerImage=f"{corp.address}/corp/app:v1")["targetImage"])
    return started


def holds_nothing_of(answer: Response, content: bytes) -> bool:
    return content[:64] not in answer.body and sha256(answer.body).digest() != sha256(content).digest()


def tried(proxy: WaveProxy, path: str) -> Response | None:
    """The answer, or None when it was cut off, as it must be once the digest is found to be wrong."""
    try:
        return proxy.request("GET", path)
    except (OSError, HTTPException):
        return None


def test_a_registry_that_only_claims_to_have_a_blob_does_not_get_it(proxy: WaveProxy, evil: Upstream) -> None:
    path = f"/v2/{evil.address}/evil/x/blobs/{SECRET.digest}"
    for _ in range(2):
        answer = tried(proxy, path)
        assert answer is None or holds_nothing_of(answer, SECRET.content)
    assert evil.fetches(SECRET.digest) >= 2  # it was asked itself, each time


def test_a_layer_that_only_names_a_private_digest_does_not_get_it(proxy: WaveProxy, evil: Upstream) -> None:
    named = {
        "location": f"{evil.url}/v2/evil/x/blobs/{SECRET.digest}",
        "gzipDigest": SECRET.digest,
        "gzipSize": len(SECRET.content),
        "tarDigest": "sha256:" + "0" * 64,
    }
    target = proxy.submit(containerImage=f"{evil.address}/evil/x:v1", containerConfig={"layers": [named]})[
        "targetImage"
    ]
    repository = target.split("/", 1)[1].rsplit(":", 1)[0]
    answer = tried(proxy, f"/v2/{repository}/blobs/{SECRET.digest}")
    assert answer is None or holds_nothing_of(answer, SECRET.content)


def test_a_slow_registry_holds_up_nobody_who_asks_another(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], evil: Upstream
) -> None:
    popular = layer({"popular.bin": random_blob(50_000, seed=78)})
    evil.add_blob("evil/x", Blob(popular.digest, bytes(len(popular.content)), popular.media_type))
    evil.faults.stall_at = 100
    honest = upstream()
    honest.add("lib/app", image([popular]), "v1")
    proxy = wave(upstreams=[evil.address, honest.address])
    with ThreadPoolExecutor() as pool:
        held = pool.submit(tried, proxy, f"/v2/{evil.address}/evil/x/blobs/{popular.digest}")
        until(lambda: evil.fetches(popular.digest) or held.done())
        pulled = proxy.pull(proxy.submit(containerImage=f"{honest.address}/lib/app:v1")["targetImage"])
        assert pulled.layers == (popular.content,)
        assert not held.done()
        evil.faults.release.set()
        answer = held.result()
    assert answer is None or answer.status != 200


def test_a_lie_about_the_size_frees_nothing(
    upstream: Callable[..., Upstream], wave: Callable[..., WaveProxy], tmp_path: Path
) -> None:
    registry = upstream()
    registry.add("lib/app", PRIVATE, "v1")
    with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", 0)) as liar:
        address = f"127.0.0.1:{liar.getsockname()[1]}"
        proxy = wave(upstreams=[registry.address, address], data=tmp_path / "data")
        proxy.pull(proxy.submit(containerImage=f"{registry.address}/lib/app:v1")["targetImage"])
        spool = tmp_path / "data" / "spool"
        until(lambda: not any(spool.iterdir()))  # what was pulled is stored a moment after the last byte was sent
        stored = set((tmp_path / "data" / "blobs").rglob("*"))
        pool.submit(answer_with_a_lie, liar)
        connection = HTTPConnection(proxy.address)
        connection.request("GET", f"/v2/{address}/evil/huge/blobs/sha256:{'1' * 64}")
        with suppress(OSError, HTTPException):
            assert connection.getresponse().read(1000) == b""
        connection.close()
        assert stored <= set((tmp_path / "data" / "blobs").rglob("*"))
        assert stored
        liar.shutdown(socket.SHUT_RDWR)


def answer_with_a_lie(listener: socket.socket) -> None:
    """Any number of connections: a head that announces an enormous body, a few bytes, and the end."""
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection:
                body = b"" if connection.recv(65536).startswith(b"HEAD") else bytes(100)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000000\r\n\r\n" + body)
