"""The client for upstream registries, against a real registry that misbehaves on command."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from time import time
from typing import Any

import pytest

from bench.images import Image, blob, image, index, layer, random_blob
from bench.upstream import Faults, Upstream
from tests.outgoing import LOGIN, answer, connections_in_use, egress_to, registry_at, scripted
from wave_proxy._fast.digest import Verifier
from wave_proxy.errors import (
    AddressRefused,
    BlobUnknown,
    ContentMismatch,
    Denied,
    DigestInvalid,
    ManifestUnknown,
    NameUnknown,
    TooManyRequests,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
)
from wave_proxy.image.oci import DOCKER_MANIFEST, DOCKER_SCHEMA1_SIGNED, OCI_INDEX, OCI_MANIFEST, digest_of
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.registry import ManifestHead, Registry
from wave_proxy.upstream.transfer import BlobStream

Start = Callable[..., Upstream]

TOOL = image([layer({"bin/tool": "#!/bin/sh\n"})])
BIG = blob(random_blob(300_000, seed=3))
OTHER_DIGEST = digest_of(b"other")


def serving(upstream: Start, *, auth: str | None = None, **faults: Any) -> Upstream:
    server = upstream(auth=auth, faults=Faults(**faults))
    server.add("lib/tool", TOOL, "1.0", "latest")
    server.add_blob("lib/tool", BIG)
    return server


async def body_of(stream: BlobStream) -> bytes:
    return b"".join([chunk async for chunk in stream.chunks])


def asked(server: Upstream, part: str = "") -> list[tuple[str, int]]:
    return [(request.method, request.status) for request in server.log if part in request.path]


# --- manifests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["1.0", TOOL.digest])
async def test_manifest(upstream: Start, reference: str) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        head = await registry.head_manifest(server.address, "lib/tool", reference)
        manifest = await registry.fetch_manifest(server.address, "lib/tool", reference)
    assert head == ManifestHead(TOOL.digest, OCI_MANIFEST, len(TOOL.manifest))
    assert (manifest.content, manifest.media_type, manifest.digest) == (TOOL.manifest, OCI_MANIFEST, TOOL.digest)
    assert asked(server) == [("HEAD", 200), ("GET", 200)]
    assert OCI_INDEX in server.log[0].headers["Accept"]


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ({"no_head": True}, [("HEAD", 405), ("GET", 200)]),
        ({"no_digest_header": True}, [("HEAD", 200), ("GET", 200)]),
        ({"content_type": "application/json"}, [("HEAD", 200), ("GET", 200)]),
    ],
)
async def test_head_falls_back_to_get(upstream: Start, faults: dict[str, Any], requests: list[object]) -> None:
    server = serving(upstream, **faults)
    async with registry_at(server) as registry:
        head = await registry.head_manifest(server.address, "lib/tool", "1.0")
    assert head == ManifestHead(TOOL.digest, OCI_MANIFEST, len(TOOL.manifest))
    assert asked(server) == requests


@pytest.mark.parametrize("auth", [None, "bearer"])
async def test_a_mirror_in_a_project_is_asked_by_its_own_names(upstream: Start, auth: str | None) -> None:
    """The token is for that name, too; and what is said of it has the name that was asked for."""
    server = upstream(auth=auth)
    server.add("project/hub/lib/tool", TOOL, "1.0")
    async with registry_at(server, login=LOGIN, prefix="project/hub") as registry:
        manifest = await registry.fetch_manifest(server.address, "lib/tool", "1.0")
        page = await registry.fetch_tags(server.address, "lib/tool", "")
        layer_digest = TOOL.blobs[-1].digest
        async with registry.open_blob(server.address, "lib/tool", layer_digest) as stream:
            assert digest_of(await body_of(stream)) == layer_digest
        before = time()
        assert registry.login_seen(server.address, "lib/tool") <= before or auth is None
        with pytest.raises(ManifestUnknown, match=f"^image '{server.address}/lib/tool:none' not found$"):
            await registry.fetch_manifest(server.address, "lib/tool", "none")
    assert manifest.content == TOOL.manifest
    assert b'"1.0"' in page.content
    assert all("/project/hub/lib/tool/" in request.path for request in server.log if "token" not in request.path)


@pytest.mark.parametrize(
    ("sent", "media_type"),
    [
        (f"{OCI_MANIFEST}; charset=utf-8", OCI_MANIFEST),
        ("Application/Vnd.Docker.Distribution.Manifest.v2+json", DOCKER_MANIFEST),
        ("text/plain; charset=utf-8", OCI_MANIFEST),
        ("application/octet-stream", OCI_MANIFEST),
        ("application/vnd.example+json", "application/vnd.example+json"),
        ("application/\u00ff", OCI_MANIFEST),
        ("application", OCI_MANIFEST),
        ("application/a b", OCI_MANIFEST),
        ('application/"x"', OCI_MANIFEST),
    ],
)
async def test_media_types(upstream: Start, sent: str, media_type: str) -> None:
    server = serving(upstream, content_type=sent)
    async with registry_at(server) as registry:
        assert (await registry.fetch_manifest(server.address, "lib/tool", "1.0")).media_type == media_type


async def test_index_without_a_media_type_anywhere(upstream: Start) -> None:
    server = upstream(faults=Faults(content_type="application/json"))
    content = index([TOOL]).manifest.replace(b'"mediaType":"application/vnd.oci.image.index.v1+json",', b"")
    server.add("lib/tool", Image(digest_of(content), "", content), "1.0")
    async with registry_at(server) as registry:
        assert (await registry.fetch_manifest(server.address, "lib/tool", "1.0")).media_type == OCI_INDEX


async def test_manifest_that_does_not_exist(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        for fetch in (registry.head_manifest, registry.fetch_manifest):
            with pytest.raises(ManifestUnknown, match=f"^image '{server.address}/lib/tool:none' not found$"):
                await fetch(server.address, "lib/tool", "none")
            with pytest.raises(ManifestUnknown, match=f"/lib/tool@{OTHER_DIGEST}' not found"):
                await fetch(server.address, "lib/tool", OTHER_DIGEST)
            with pytest.raises(DigestInvalid):
                await fetch(server.address, "lib/tool", "sha256:abc")
    assert len(server.log) == 4


@pytest.mark.parametrize("reference", ["1.0", OTHER_DIGEST])
async def test_manifest_with_another_digest(upstream: Start, reference: str) -> None:
    server = upstream()
    server.add("lib/tool", replace(TOOL, digest=OTHER_DIGEST), "1.0")
    async with registry_at(server) as registry:
        with pytest.raises(ContentMismatch, match=f"{TOOL.digest}, and {OTHER_DIGEST} was announced"):
            await registry.fetch_manifest(server.address, "lib/tool", reference)
    assert len(server.log) == 1


async def test_signed_manifest_has_a_digest_of_its_own(upstream: Start) -> None:
    server = upstream(faults=Faults(content_type=DOCKER_SCHEMA1_SIGNED))
    server.add("lib/tool", replace(TOOL, digest=OTHER_DIGEST), "1.0")
    async with registry_at(server) as registry:
        manifest = await registry.fetch_manifest(server.address, "lib/tool", "1.0")
    assert (manifest.media_type, manifest.digest) == (DOCKER_SCHEMA1_SIGNED, TOOL.digest)


@pytest.mark.parametrize("reference", ["1.0", TOOL.digest])
async def test_login_page(upstream: Start, reference: str) -> None:
    server = serving(upstream, html_login=True)
    async with registry_at(server) as registry:
        for ask in (registry.head_manifest, registry.fetch_manifest):
            with pytest.raises(UpstreamError, match="a web page: a login"):
                await ask(server.address, "lib/tool", reference)
        with pytest.raises(UpstreamError, match="a web page: a login"):
            await registry.fetch_tags(server.address, "lib/tool", "")


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b'"text"', b'{"a":'])
async def test_manifest_that_is_no_json_object(upstream: Start, content: bytes) -> None:
    server = upstream()
    server.add("lib/tool", Image(digest_of(content), OCI_MANIFEST, content), "1.0")
    async with registry_at(server) as registry:
        with pytest.raises(UpstreamError, match=r"not .*JSON"):
            await registry.fetch_manifest(server.address, "lib/tool", "1.0")


async def test_manifest_over_the_limit(upstream: Start) -> None:
    server = upstream()
    for tag, size in (("fits", 4 << 20), ("over", (4 << 20) + 1)):
        content = b'{"a":"' + b"x" * (size - 8) + b'"}'
        server.add("lib/tool", Image(digest_of(content), OCI_MANIFEST, content), tag)
    async with registry_at(server) as registry:
        assert len((await registry.fetch_manifest(server.address, "lib/tool", "fits")).content) == 4 << 20
        with pytest.raises(UpstreamError, match="more than the 4194304 bytes"):
            await registry.fetch_manifest(server.address, "lib/tool", "over")


# --- authentication ----------------------------------------------------------------------------------------------


async def test_basic(upstream: Start) -> None:
    server = serving(upstream, auth="basic")
    async with registry_at(server, login=LOGIN) as registry:
        await registry.fetch_manifest(server.address, "lib/tool", "1.0")
        assert await registry.head_blob(server.address, "lib/tool", BIG.digest) == BIG.size
    assert asked(server) == [("GET", 401), ("GET", 200), ("HEAD", 200)]


async def test_bearer_token_is_kept(upstream: Start) -> None:
    server = serving(upstream, auth="bearer")
    async with registry_at(server, login=LOGIN) as registry:
        for _ in range(3):
            await registry.fetch_manifest(server.address, "lib/tool", "1.0")
    assert asked(server, "/v2/") == [("GET", 401), ("GET", 200), ("GET", 200), ("GET", 200)]
    assert asked(server, "/token") == [("GET", 200)]


async def test_bearer_for_everybody(upstream: Start) -> None:
    server = upstream(auth="bearer", username="")
    server.add("lib/tool", TOOL, "1.0")
    async with registry_at(server) as registry:
        assert (await registry.head_manifest(server.address, "lib/tool", "1.0")).digest == TOOL.digest


async def test_bearer_token_that_expired_is_replaced_once_for_all(upstream: Start) -> None:
    server = serving(upstream, auth="bearer")
    async with registry_at(server, login=LOGIN) as registry:
        await registry.head_blob(server.address, "lib/tool", BIG.digest)
        server.revoke_tokens()
        server.clear_log()
        await asyncio.gather(*(registry.head_blob(server.address, "lib/tool", BIG.digest) for _ in range(20)))
    assert asked(server, "/token") == [("GET", 200)]
    assert asked(server, "/v2/").count(("HEAD", 200)) == 20


async def test_refusals_do_not_loop(upstream: Start) -> None:
    server = serving(upstream, auth="bearer", bearer_loop=True)
    async with registry_at(server, login=LOGIN, attempts=4) as registry:
        for _ in range(2):
            server.clear_log()
            with pytest.raises(
                Denied, match=rf"'lib/tool'.*authentication required.*\[registries.\"{server.address}\"\]"
            ):
                await registry.fetch_manifest(server.address, "lib/tool", "1.0")
            assert asked(server, "/v2/") == [("GET", 401), ("GET", 401)]
            assert asked(server, "/token") == [("GET", 200)]


@pytest.mark.parametrize(
    ("auth", "login", "hint", "requests"),
    [
        ("basic", None, "if it exists and is private, set username and password in", 1),
        ("basic", Login("user", "wrong"), "check username and password in", 2),
        ("bearer", None, "if it exists and is private, set username and password in", 2),
        ("bearer", Login("user", "wrong"), "check username and password in", 2),
    ],
)
async def test_denied(upstream: Start, auth: str, login: Login | None, hint: str, requests: int) -> None:
    server = serving(upstream, auth=auth)
    async with registry_at(server, login=login, attempts=4) as registry:
        with pytest.raises(Denied, match=rf'{hint} \[registries\."{server.address}"\]'):
            await registry.fetch_manifest(server.address, "lib/tool", "1.0")
    assert len(server.log) == requests
    assert "secret" not in repr(login)


async def test_forbidden(upstream: Start) -> None:
    server = serving(upstream, status={"/manifests/": 403, "/blobs/": 403})
    async with registry_at(server) as registry:
        with pytest.raises(Denied, match="HTTP 403, 'failing on command'"):
            await registry.head_manifest(server.address, "lib/tool", "1.0")
        with pytest.raises(Denied, match="set username"):
            async with registry.open_blob(server.address, "lib/tool", BIG.digest):
                pass


async def test_challenge_that_cannot_be_met() -> None:
    async with scripted(answer("401 Unauthorized", WWW_Authenticate="Negotiate")) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress:
            with pytest.raises(Denied, match="HTTP 401"):
                await Registry(egress, Credentials({address: LOGIN})).fetch_manifest(address, "lib/tool", "1.0")
    assert len(server.heads) == 1


@pytest.mark.parametrize(
    "realm",
    ["http://169.254.169.254/token", "http://127.0.0.1:1/token", "file:///etc/passwd", "http://no.invalid/token"],
)
async def test_challenge_that_never_worked_is_not_remembered(realm: str) -> None:
    replies = [
        answer("401 Unauthorized", WWW_Authenticate=f'Bearer realm="{realm}"'),
        answer(body=TOOL.manifest, Content_Type=OCI_MANIFEST),
    ]

    async def reply(_: str) -> bytes:
        return replies.pop(0)

    async with scripted(reply) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address, "127.0.0.1:1") as egress:
            registry = Registry(egress, Credentials({}), attempts=1)
            with pytest.raises(WaveError):
                await registry.fetch_manifest(address, "lib/tool", "1.0")
            assert (await registry.fetch_manifest(address, "lib/tool", "1.0")).digest == TOOL.digest


async def test_token_service_that_moved() -> None:
    current = "old"

    async def reply(head: str) -> bytes:
        place = head.split()[1].partition("?")[0]
        if place in ("/old", "/new"):
            return answer(body=b'{"token":"%s"}' % current.encode()) if place == f"/{current}" else answer("503 Gone")
        if f"Bearer {current}" in head:
            return answer(body=TOOL.manifest, Content_Type=OCI_MANIFEST)
        return answer("401 Unauthorized", WWW_Authenticate=f'Bearer realm="http://127.0.0.1:{server.port}/{current}"')

    async with scripted(reply) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress:
            registry = Registry(egress, Credentials({}), attempts=1)
            await registry.fetch_manifest(address, "lib/tool", "1.0")
            current = "new"
            server.heads.clear()
            for _ in range(2):
                assert (await registry.fetch_manifest(address, "lib/other", "1.0")).digest == TOOL.digest
    asked_for = [head.split()[1].partition("?")[0] for head in server.heads]
    manifest = "/v2/lib/other/manifests/1.0"
    assert asked_for == ["/old", manifest, "/new", manifest, manifest]


async def test_token_service_that_refuses_is_asked_once_a_request() -> None:
    refused = {"no": False}

    async def reply(head: str) -> bytes:
        if head.startswith("GET /token"):
            return answer("403 Forbidden") if refused["no"] else answer(body=b'{"token":"t"}')
        if "Bearer t" in head:
            return answer(body=TOOL.manifest, Content_Type=OCI_MANIFEST)
        return answer("401 Unauthorized", WWW_Authenticate=f'Bearer realm="http://127.0.0.1:{server.port}/token"')

    async with scripted(reply) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress:
            registry = Registry(egress, Credentials({}), attempts=1)
            await registry.fetch_manifest(address, "lib/tool", "1.0")
            refused["no"] = True
            server.heads.clear()
            with pytest.raises(Denied, match="refuses a token"):
                await registry.fetch_manifest(address, "lib/other", "1.0")
    assert [head.split()[1].partition("?")[0] for head in server.heads] == ["/token", "/v2/lib/other/manifests/1.0"]


async def test_challenge_of_bytes_that_are_no_text() -> None:
    async def reply(head: str) -> bytes:
        if head.startswith("GET /token"):
            return answer(body=b'{"token":"t"}')
        if "Bearer t" in head:
            return answer(body=TOOL.manifest, Content_Type=OCI_MANIFEST)
        realm = f'Bearer realm="http://127.0.0.1:{server.port}/token",service="SERVICE"'
        return answer("401 Unauthorized", WWW_Authenticate=realm).replace(b"SERVICE", b"\xff")

    async with scripted(reply) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress:
            registry = Registry(egress, Credentials({}), attempts=1)
            assert (await registry.fetch_manifest(address, "lib/tool", "1.0")).digest == TOOL.digest
    assert "service=%EF%BF%BD&" in server.heads[1]


async def test_foreign_realm_does_not_get_the_password(upstream: Start) -> None:
    async with scripted(answer(body=b'{"token":"stolen"}')) as thief:
        realm = f"localhost:{thief.port}"
        server = serving(upstream, auth="bearer", realm=f"http://{realm}/token")
        async with egress_to(server.address, realm) as egress:
            registry = Registry(egress, Credentials({server.address: LOGIN}))
            with pytest.raises(Denied):
                await registry.fetch_manifest(server.address, "lib/tool", "1.0")
    assert thief.heads
    assert not any("Authorization" in head for head in thief.heads)


async def test_token_stays_with_the_registry(upstream: Start) -> None:
    storage = serving(upstream)
    server = serving(upstream, auth="bearer", redirect_blobs_to=storage.url)
    async with registry_at(server, storage, login=LOGIN) as registry:
        opening = registry.open_blob(server.address, "lib/tool", BIG.digest)
        async with opening as stream:
            assert await body_of(stream) == BIG.content
    assert asked(storage) == [("GET", 200)]
    assert "Authorization" not in storage.log[0].headers


async def test_storage_that_wants_a_login_gets_none(upstream: Start) -> None:
    storage = serving(upstream, auth="basic")
    server = serving(upstream, redirect_blobs_to=storage.url)
    async with registry_at(server, storage, login=LOGIN) as registry:
        with pytest.raises(Denied, match=f"{storage.address}, where registry '{server.address}' sends us"):
            async with registry.open_blob(server.address, "lib/tool", BIG.digest):
                pass
    assert asked(storage) == [("GET", 401)]


# --- retries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_temporary_failure(upstream: Start, status: int) -> None:
    server = serving(upstream, status={"/manifests/": status}, fail_times=1)
    async with registry_at(server) as registry:
        assert (await registry.fetch_manifest(server.address, "lib/tool", "1.0")).digest == TOOL.digest
    assert asked(server) == [("GET", status), ("GET", 200)]


async def test_lasting_failure(upstream: Start) -> None:
    server = serving(upstream, status={"/v2/": 503})
    async with registry_at(server, attempts=3) as registry:
        with pytest.raises(UpstreamUnavailable, match="HTTP 503, 'failing on command'"):
            await registry.fetch_manifest(server.address, "lib/tool", "1.0")
    assert asked(server) == [("GET", 503)] * 3


async def test_limited_for_a_moment(upstream: Start) -> None:
    server = serving(upstream, status={"/manifests/": 429}, fail_times=1, retry_after="0")
    async with registry_at(server) as registry:
        await registry.head_manifest(server.address, "lib/tool", "1.0")
    assert asked(server) == [("HEAD", 429), ("HEAD", 200)]


@pytest.mark.parametrize(("retry_after", "expected"), [("30", 30), ("36000", 60), ("soon", None), ("", None)])
async def test_limited_for_long(upstream: Start, retry_after: str, expected: int | None) -> None:
    server = serving(upstream, status={"/manifests/": 429}, retry_after=retry_after)
    async with registry_at(server, attempts=4) as registry:
        with pytest.raises(TooManyRequests) as caught:
            await registry.fetch_manifest(server.address, "lib/tool", "1.0")
    assert caught.value.retry_after_s == expected
    assert len(server.log) == 1


@pytest.mark.parametrize("status", [400, 418])
async def test_nonsense(upstream: Start, status: int) -> None:
    server = serving(upstream, status={"/manifests/": status})
    async with registry_at(server, attempts=4) as registry:
        with pytest.raises(UpstreamError, match=f"HTTP {status}") as caught:
            await registry.fetch_manifest(server.address, "lib/tool", "1.0")
    assert type(caught.value) is UpstreamError
    assert len(server.log) == 1


async def test_upstream_that_comes_back(upstream: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wave_proxy.upstream.registry._FIRST_PAUSE_S", 1.0)  # so that it is back before it is given up
    server = serving(upstream)
    async with registry_at(server, attempts=4) as registry:
        await registry.head_manifest(server.address, "lib/tool", "1.0")
        await asyncio.to_thread(server.stop)
        waiting = asyncio.create_task(registry.head_manifest(server.address, "lib/tool", "1.0"))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await asyncio.to_thread(server.start)
        assert (await waiting).digest == TOOL.digest


async def test_manifest_that_breaks_off_is_fetched_again(upstream: Start) -> None:
    server = serving(upstream, only="/manifests/", truncate_at=20)
    async with registry_at(server) as registry:
        assert (await registry.fetch_manifest(server.address, "lib/tool", "1.0")).content == TOOL.manifest
    assert len(server.log) == 2


# --- blobs -------------------------------------------------------------------------------------------------------


async def test_blob(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        async with registry.open_blob(server.address, "lib/tool", BIG.digest, size=BIG.size) as stream:
            assert (stream.size, stream.start) == (BIG.size, 0)
            assert await body_of(stream) == BIG.content
        assert await registry.head_blob(server.address, "lib/tool", BIG.digest) == BIG.size
    assert "Range" not in server.log[0].headers


async def test_blob_of_unknown_size(upstream: Start) -> None:
    server = serving(upstream, no_content_length=True)
    async with registry_at(server) as registry:
        opening = registry.open_blob(server.address, "lib/tool", BIG.digest)
        async with opening as stream:
            assert stream.size is None
            assert await body_of(stream) == BIG.content


async def test_blob_that_does_not_exist(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        with pytest.raises(BlobUnknown, match=f"{server.address}/lib/tool@{OTHER_DIGEST}' not found"):
            await registry.head_blob(server.address, "lib/tool", OTHER_DIGEST)
        with pytest.raises(BlobUnknown):
            async with registry.open_blob(server.address, "lib/tool", OTHER_DIGEST):
                pass


async def test_blob_size_without_head(upstream: Start) -> None:
    server = serving(upstream, no_head=True)
    async with registry_at(server) as registry:
        assert await registry.head_blob(server.address, "lib/tool", BIG.digest) == BIG.size
    assert asked(server) == [("HEAD", 405), ("GET", 200)]


async def test_blob_that_breaks_off_is_resumed(upstream: Start) -> None:
    server = serving(upstream, truncate_at=100_000, chunk_bytes=10_000)
    content = bytearray()
    async with registry_at(server) as registry:
        with pytest.raises(UpstreamUnavailable, match="breaks off"):
            async with registry.open_blob(server.address, "lib/tool", BIG.digest, size=BIG.size) as stream:
                async for chunk in stream.chunks:
                    content += chunk
        start = len(content)
        assert 0 < start < BIG.size
        async with registry.open_blob(server.address, "lib/tool", BIG.digest, start=start, size=BIG.size) as stream:
            assert (stream.size, stream.start) == (BIG.size, start)
            async for chunk in stream.chunks:
                content += chunk
    assert content == BIG.content
    assert server.log[-1].headers["Range"] == f"bytes={start}-{BIG.size - 1}"
    assert server.log[-1].status == 206


async def test_resume_without_a_known_size(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        opening = registry.open_blob(server.address, "lib/tool", BIG.digest, start=5)
        async with opening as stream:
            assert (stream.size, stream.start) == (BIG.size, 5)
            assert await body_of(stream) == BIG.content[5:]
    assert server.log[-1].headers["Range"] == "bytes=5-"


async def test_range_that_is_ignored(upstream: Start) -> None:
    server = serving(upstream, no_range=True)
    async with registry_at(server) as registry:
        opening = registry.open_blob(server.address, "lib/tool", BIG.digest, start=5, size=BIG.size)
        async with opening as stream:
            assert (stream.size, stream.start) == (BIG.size, 0)
            assert await body_of(stream) == BIG.content


@pytest.mark.parametrize("size", [BIG.size, None])
async def test_range_that_starts_elsewhere(upstream: Start, size: int | None) -> None:
    server = serving(upstream, wrong_range=True)
    async with registry_at(server) as registry:
        with pytest.raises(UpstreamError, match="sent 'bytes 4-"):
            async with registry.open_blob(server.address, "lib/tool", BIG.digest, start=5, size=size):
                pass


@pytest.mark.parametrize(
    ("content_range", "start", "size", "accepted"),
    [
        ("bytes 5-9/10", 5, 10, True),
        ("bytes 5-9/*", 5, 10, True),
        ("bytes 5-9/*", 5, None, True),
        ("bytes 5-9/11", 5, 10, False),
        ("bytes 0-9/10", 0, 10, False),
        ("bytes 6-9/10", 5, 10, False),
        ("5-9/10", 5, 10, False),
        ("", 5, 10, False),
    ],
)
async def test_partial_answers(content_range: str, start: int, size: int | None, accepted: bool) -> None:
    part = answer("206 Partial Content", b"56789", Content_Range=content_range)
    async with scripted(part) as server:
        address = f"127.0.0.1:{server.port}"
        async with egress_to(address) as egress:
            opening = Registry(egress, Credentials({})).open_blob(address, "a", BIG.digest, start=start, size=size)
            if accepted:
                async with opening as stream:
                    assert [chunk async for chunk in stream.chunks] == [b"56789"]
            else:
                with pytest.raises(UpstreamError):
                    await opening.__aenter__()


async def test_range_behind_the_end(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        with pytest.raises(UpstreamError, match="HTTP 416"):
            async with registry.open_blob(server.address, "lib/tool", BIG.digest, start=BIG.size, size=BIG.size + 9):
                pass


async def test_blob_shorter_than_announced(upstream: Start) -> None:
    server = serving(upstream, no_content_length=True)
    async with registry_at(server) as registry:
        with pytest.raises(UpstreamUnavailable, match=f"ended after {BIG.size} of {BIG.size + 1} bytes"):
            async with registry.open_blob(server.address, "lib/tool", BIG.digest, size=BIG.size + 1) as stream:
                async for _ in stream.chunks:
                    pass


@pytest.mark.parametrize("faults", [{"extra_bytes": 1}, {"corrupt_last_byte": True}])
async def test_wrong_bytes_are_the_verifiers_business(upstream: Start, faults: dict[str, Any]) -> None:
    server = serving(upstream, **faults)
    verifier = Verifier(BIG.digest, BIG.size)
    async with registry_at(server) as registry:
        with pytest.raises(ContentMismatch):
            async with registry.open_blob(server.address, "lib/tool", BIG.digest, size=BIG.size) as stream:
                async for chunk in stream.chunks:
                    verifier.update(chunk)
                verifier.finish()


async def test_blob_that_stalls(upstream: Start) -> None:
    server = serving(upstream, stall_at=1000)
    content = b""
    async with registry_at(server, idle_timeout_s=0.1) as registry:
        with pytest.raises(UpstreamTimeout, match="sent nothing"):
            async with registry.open_blob(server.address, "lib/tool", BIG.digest) as stream:
                async for chunk in stream.chunks:
                    content += chunk
    assert content == BIG.content[:1000]


async def test_reader_that_leaves(upstream: Start) -> None:
    server = serving(upstream, stall_at=1000)
    async with egress_to(server.address) as egress:
        registry = Registry(egress, Credentials({}))
        async with registry.open_blob(server.address, "lib/tool", BIG.digest) as stream:
            async for _ in stream.chunks:
                break
            assert connections_in_use(egress) == 1
        assert connections_in_use(egress) == 0


async def test_reader_that_is_cancelled(upstream: Start) -> None:
    server = serving(upstream, stall_at=1000)
    begun = asyncio.Event()

    async def read(registry: Registry) -> None:
        async with registry.open_blob(server.address, "lib/tool", BIG.digest) as stream:
            async for _ in stream.chunks:
                begun.set()

    async with registry_at(server) as registry:
        reader = asyncio.create_task(read(registry))
        await begun.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader


# --- layers by address -------------------------------------------------------------------------------------------


async def test_url(upstream: Start) -> None:
    server = serving(upstream, auth="basic")
    page = serving(upstream)
    path = f"/v2/lib/tool/blobs/{BIG.digest}"
    async with registry_at(server, page, login=LOGIN) as registry:
        async with registry.open_url(f"{page.url}{path}", start=5, size=BIG.size) as stream:
            assert (stream.size, stream.start) == (BIG.size, 5)
            assert await body_of(stream) == BIG.content[5:]
        with pytest.raises(Denied, match="without credentials"):
            await registry.open_url(f"{server.url}{path}?sig=hidden").__aenter__()
        with pytest.raises(BlobUnknown, match=f"^{page.url}/nothing not found$"):
            await registry.open_url(f"{page.url}/nothing?sig=hidden").__aenter__()
    assert asked(server) == [("GET", 401)]


async def test_url_at_a_private_address(upstream: Start) -> None:
    server = serving(upstream)
    port = server.address.partition(":")[2]
    async with registry_at() as registry:
        for host in ("127.0.0.1", "localhost", "[::1]"):
            with pytest.raises(AddressRefused):
                await registry.open_url(f"http://{host}:{port}/v2/").__aenter__()
        with pytest.raises(UpstreamError, match="not an http"):
            registry.open_url("file:///etc/passwd")
    assert server.log == []


# --- tags --------------------------------------------------------------------------------------------------------


async def test_tags_by_pages(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        whole = await registry.fetch_tags(server.address, "lib/tool", "")
        first = await registry.fetch_tags(server.address, "lib/tool", "n=1")
        second = await registry.fetch_tags(server.address, "lib/tool", "n=1&last=1.0")
    assert (whole.content, whole.link) == (b'{"name": "lib/tool", "tags": ["1.0", "latest"]}', "")
    assert first.content == b'{"name": "lib/tool", "tags": ["1.0"]}'
    assert first.link == '</v2/lib/tool/tags/list?last=1.0&n=1>; rel="next"'
    assert second.content == b'{"name": "lib/tool", "tags": ["latest"]}'
    assert second.link == ""


async def test_tags_of_a_repository_that_does_not_exist(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        with pytest.raises(NameUnknown, match=f"^repository '{server.address}/lib/none' not found$"):
            await registry.fetch_tags(server.address, "lib/none", "")


async def test_query_of_a_client_stays_a_query(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server) as registry:
        await registry.fetch_tags(server.address, "lib/tool", "last=a b#c%2Fd\r\nX: y")
    assert server.log[0].path == "/v2/lib/tool/tags/list?last=a%20b%23c%2Fd%0D%0AX:%20y"
