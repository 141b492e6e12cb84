"""Pushes: to a real registry, and to one that breaks off, refuses, redirects and asks for tokens."""

import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from bench.images import image, index, layer, random_blob
from tests.outgoing import LOGIN, egress_to
from tests.pushing import Target, target, write_layout
from tests.servers import WaveProxy, distribution, has_distribution, pull
from wave_proxy.errors import ContentMismatch, Denied, NameUnknown, TooManyRequests, UpstreamError, UpstreamUnavailable
from wave_proxy.image.oci import Descriptor
from wave_proxy.image.reference import Reference
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.layout import read_layout
from wave_proxy.upstream.publish import publish, push
from wave_proxy.upstream.registry import Registry

SECRET = "of-the-builders-" * 2
IMAGE = image([layer({"a": random_blob(300_000, 1)}), layer({"b": "text"})])

needs_distribution = pytest.mark.skipif(not has_distribution(), reason="docker-registry is not installed")


@asynccontextmanager
async def client_of(*addresses: str, login: bool = False) -> AsyncIterator[Registry]:
    async with egress_to(*addresses) as egress:
        registry = Registry(egress, Credentials(dict.fromkeys(addresses, LOGIN) if login else {}))
        try:
            yield registry
        finally:
            await registry.close()


async def publish_to(to: Target, layout: Path, tag: str = "1", *, login: bool = False) -> list[str]:
    """Push to that registry; returns what was told on the way."""
    told: list[str] = []
    async with client_of(to.address, login=login) as registry:
        reference = Reference(to.address, "lib/tool", tag)
        assert await publish(registry, layout, reference, on_progress=told.append) == read_layout(layout).digest
    return told


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "layout", IMAGE)


@needs_distribution
async def test_image_is_pushed_once(tmp_path: Path, layout: Path) -> None:
    told: list[str] = []
    with distribution(tmp_path) as address:
        async with client_of(address) as registry:
            reference = Reference(address, "a/b", "1")
            assert await publish(registry, layout, reference, on_progress=told.append) == IMAGE.digest
            assert sum("is being sent" in line for line in told) == 3
            told.clear()
            again = Reference(address, "a/b", "2")
            assert await publish(registry, layout, again, on_progress=told.append) == IMAGE.digest
            assert [line.partition(") ")[2] for line in told] == ["is there already"] * 3
        assert pull(address, "a/b", "2").manifest == IMAGE.manifest


@needs_distribution
async def test_index_is_pushed_with_its_images(tmp_path: Path) -> None:
    both = index([IMAGE, image([layer({"c": "arm"})], platform="linux/arm64")])
    write_layout(tmp_path / "both", both)
    with distribution(tmp_path) as address:
        async with client_of(address) as registry:
            reference = Reference(address, "a/b", "1")
            assert await publish(registry, tmp_path / "both", reference, on_progress=print) == both.digest
        assert len(pull(address, "a/b", "1").children) == 2


@needs_distribution
async def test_blob_is_mounted_out_of_another_repository(tmp_path: Path, layout: Path) -> None:
    content = read_layout(layout)
    told: list[str] = []

    def never(*_: object) -> AsyncIterator[bytes]:
        raise AssertionError("the blob is sent")

    with distribution(tmp_path) as address:
        async with client_of(address) as registry:
            await publish(registry, layout, Reference(address, "from/here", "1"), on_progress=print)
            there = {blob.digest: "from/here" for blob in content.blobs}
            to = Reference(address, "to/there", "1")
            await push(registry, content, never, to, on_progress=told.append, mount_from=there)
        assert pull(address, "to/there", "1").manifest == IMAGE.manifest
    assert sum("is lent by from/here" in line for line in told) == 3


async def test_token_is_for_pulling_and_pushing_and_for_the_mount(layout: Path) -> None:
    content = read_layout(layout)
    async with target(bearer=True) as to, client_of(to.address, login=True) as registry:
        there = {content.blobs[0].digest: "other/place"}

        def from_disk(blob: Descriptor, start: int) -> AsyncIterator[bytes]:
            return _bytes_of(content.blobs.index(blob), start)

        await push(
            registry, content, from_disk, Reference(to.address, "lib/tool", "1"), on_progress=print, mount_from=there
        )
        asked = [parse_qs(urlsplit(line.split()[1]).query)["scope"] for line in to.log if "/token" in line]
        assert to.manifests["lib/tool", "1"] == IMAGE.manifest
    assert sorted(asked) == [
        ["repository:lib/tool:pull,push"],
        ["repository:lib/tool:pull,push", "repository:other/place:pull"],
    ]


async def test_into_a_project_all_is_named_as_it_is_there(layout: Path) -> None:
    """The repository that a blob is taken from as well."""
    content = read_layout(layout)
    async with target(bearer=True) as to, egress_to(to.address, prefix="project") as egress:
        registry = Registry(egress, Credentials({to.address: LOGIN}))
        there = {content.blobs[0].digest: "other/place"}

        def from_disk(blob: Descriptor, start: int) -> AsyncIterator[bytes]:
            return _bytes_of(content.blobs.index(blob), start)

        await push(
            registry, content, from_disk, Reference(to.address, "lib/tool", "1"), on_progress=print, mount_from=there
        )
        await registry.close()
    queries = [parse_qs(urlsplit(line.split()[1]).query) for line in to.log]
    assert to.manifests["project/lib/tool", "1"] == IMAGE.manifest
    assert [query["from"] for query in queries if "from" in query][:1] == [["project/other/place"]]
    assert sorted(query["scope"] for query in queries if "scope" in query) == [
        ["repository:project/lib/tool:pull,push"],
        ["repository:project/lib/tool:pull,push", "repository:project/other/place:pull"],
    ]


async def _bytes_of(number: int, start: int) -> AsyncIterator[bytes]:
    yield IMAGE.blobs[number].content[start:]


async def test_own_local_repository_takes_it_from_the_builder(layout: Path, wave: Callable[..., WaveProxy]) -> None:
    proxy = wave(config=f'[build]\nsecret = "{SECRET}"\nengine = "none"')
    reference = Reference(proxy.address, "local/tool", "1")
    for password, error in (("wrong", Denied), (SECRET, None)):
        async with egress_to(proxy.address) as egress:
            registry = Registry(egress, Credentials({proxy.address: Login("_builder", password)}))
            with pytest.raises(error, match="does not let us push to") if error else nullcontext():
                assert await publish(registry, layout, reference, on_progress=print) == IMAGE.digest
            await registry.close()
    assert pull(proxy.address, "local/tool", "1").manifest == IMAGE.manifest


async def test_broken_upload_goes_on_where_the_registry_says(layout: Path) -> None:
    async with target(breaks=[150_000, 50_000]) as to:
        told = await publish_to(to, layout)
        assert to.manifests["lib/tool", "1"] == IMAGE.manifest
    size = sum(blob.size for blob in IMAGE.blobs)
    assert size <= to.received < size + 200_000
    assert any("goes on at byte" in line for line in told)
    assert any(line.startswith("PATCH") for line in to.log)


async def test_broken_upload_begins_anew_where_the_registry_says_nothing(layout: Path) -> None:
    async with target(breaks=[150_000], tells_range=False) as to:
        await publish_to(to, layout)
        assert to.manifests["lib/tool", "1"] == IMAGE.manifest
    assert not any(line.startswith("PATCH") for line in to.log)


async def test_registry_that_takes_no_whole_blob_gets_it_by_patch(layout: Path) -> None:
    async with target(whole=False) as to:
        await publish_to(to, layout)
        assert {digest for _, digest in to.blobs} == {blob.digest for blob in IMAGE.blobs}
    assert sum(line.startswith("PATCH") for line in to.log) == 3


async def test_login_stays_with_the_registry(layout: Path) -> None:
    async with target() as elsewhere, target(bearer=True) as to:
        elsewhere.uploads["s"] = bytearray()
        to.absolute = elsewhere.url
        with pytest.raises(NameUnknown):  # the other host knows of no such upload
            async with client_of(to.address, elsewhere.address, login=True) as registry:
                await publish(registry, layout, Reference(to.address, "lib/tool", "1"), on_progress=print)
        assert elsewhere.log
        assert set(elsewhere.authorizations) == {""}
        to.absolute = to.url
        await publish_to(to, layout, login=True)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_passes_is_tried_again(layout: Path, status: int) -> None:
    wait = {"Retry-After": "1"} if status == 429 else {}
    faults = [("POST uploads", status, wait), ("PUT manifests", status, wait), ("HEAD sha256", status, {})]
    async with target(statuses=faults) as to:
        told = await publish_to(to, layout)
        assert to.manifests["lib/tool", "1"] == IMAGE.manifest
    assert sum("trying again" in line for line in told) == 3


async def test_what_does_not_pass_ends_it(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wave_proxy.upstream.patience._FIRST_PAUSE_S", 0.001)
    async with target(statuses=[("PUT manifests", 500, {})] * 6) as to:
        with pytest.raises(UpstreamUnavailable, match="fails to take the manifest of"):
            await publish_to(to, layout)
        assert sum(line.startswith("PUT /v2/lib/tool/manifests") for line in to.log) == 6


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (("POST uploads", 403, {}), Denied, r"does not let us push to repository 'lib/tool' \(HTTP 403\)"),
        (("POST uploads", 401, {}), Denied, r"set username and password in \[registries"),
        (("POST uploads", 404, {}), NameUnknown, "create that one"),
        (("PUT manifests", 404, {}), NameUnknown, "does not take the manifest"),
        (("PUT manifests", 413, {}), UpstreamError, "does not take the manifest"),
        (("HEAD sha256", 401, {}), Denied, "does not let us push"),
    ],
)
async def test_refusal_is_said_in_words(
    layout: Path, fault: tuple[str, int, dict[str, str]], error: type[Exception], message: str
) -> None:
    async with target(statuses=[fault]) as to:
        with pytest.raises(error, match=message):
            await publish_to(to, layout)
        assert ("lib/tool", "1") not in to.manifests


async def test_other_digest_than_sent_is_an_error(layout: Path) -> None:
    async with target(wrong_digest=True) as to:
        with pytest.raises(UpstreamError, match="says that it stored sha256:"):
            await publish_to(to, layout)


@needs_distribution
async def test_large_blob_needs_little_memory(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "large", image([layer({"a": random_blob(48 << 20, 1)}, compression="none")]))
    with distribution(tmp_path) as address:
        async with client_of(address) as registry:
            tracemalloc.start()
            try:
                await publish(registry, folder, Reference(address, "lib/tool", "1"), on_progress=print)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
    assert peak < 12 << 20


async def test_digest_of_another_image_is_refused(layout: Path) -> None:
    async with target() as to, client_of(to.address) as registry:
        with pytest.raises(ContentMismatch):
            await publish(registry, layout, Reference(to.address, "a", f"sha256:{'0' * 64}"), on_progress=print)


async def test_limit_longer_than_patience_is_told(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wave_proxy.upstream.patience._ATTEMPTS", 1)
    async with target(statuses=[("POST uploads", 429, {"Retry-After": "60"})]) as to:
        with pytest.raises(TooManyRequests) as caught:
            await publish_to(to, layout)
    assert caught.value.retry_after_s == 60
