"""Content is shared between repositories, permission is not."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from bench.images import Blob, blob, image, index, layer, random_blob
from bench.upstream import Faults, Upstream
from tests.cached import read_blob, worker
from tests.patience import eventually
from wave_proxy.cache import grants as grants_module
from wave_proxy.cache.grants import Grants
from wave_proxy.cache.repositories import MAX_CONFIG_BYTES
from wave_proxy.errors import BlobUnknown, Denied, ManifestUnknown, UpstreamError, UpstreamUnavailable

Start = Callable[..., Upstream]

SECRET = layer({"etc/secret": random_blob(1000, seed=31)})
PRIVATE = image([SECRET])
PUBLIC = image([layer({"bin/public": "x"})])
DIGESTS = [f"sha256:{digit * 64}" for digit in "abcd"]


@pytest.fixture
def server(upstream: Start) -> Upstream:
    """A registry with a private and a public repository."""
    started = upstream()
    started.add("private/app", PRIVATE, "1")
    started.add("public/app", PUBLIC, "1")
    return started


def asked(server: Upstream) -> int:
    return len(server.log)


# --- what was seen where -----------------------------------------------------------------------------------------


def test_grants_are_per_repository(tmp_path: Path) -> None:
    one, other = Grants(tmp_path), Grants(tmp_path)
    assert not one.has("quay.io/a", DIGESTS[0])
    assert not other.has("quay.io/a", DIGESTS[0])
    one.add("quay.io/a", DIGESTS[:2])
    for who in (one, other, Grants(tmp_path)):
        assert [who.has("quay.io/a", digest) for digest in DIGESTS] == [True, True, False, False]
        for repository in ("quay.io/b", "quay.io/a/b", "quay.io", "docker.io/a", ""):
            assert not who.has(repository, DIGESTS[0])


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants_module, "_MEMORY", 3)
    grants = Grants(tmp_path)
    grants.add("a/b", DIGESTS)
    assert len(grants._known) <= 3
    assert all(grants.has("a/b", digest) for digest in DIGESTS)


def test_full_disk_grants_to_this_worker_alone(tmp_path: Path) -> None:
    grants = Grants(tmp_path)
    (tmp_path / "grants").rmdir()
    (tmp_path / "grants").write_bytes(b"")  # nothing can be made in there
    grants.add("a/b", DIGESTS)
    assert grants.has("a/b", DIGESTS[0])


# --- through repositories ----------------------------------------------------------------------------------------


async def test_cached_blob_is_not_read_through_another_repository(server: Upstream, tmp_path: Path) -> None:
    async with worker(tmp_path, server) as one:
        repositories = one.repositories
        await read_blob(await repositories.open_blob(server.address, "private/app", SECRET.digest))
        await eventually(lambda: not one.is_filling(SECRET.digest))
        for repository in ("public/app", "private/ap", "private/app/x", "nowhere"):
            with pytest.raises(BlobUnknown):
                await repositories.open_blob(server.address, repository, SECRET.digest)
            with pytest.raises(BlobUnknown):
                await repositories.find_size(server.address, repository, SECRET.digest)
        again = await repositories.open_blob(server.address, "private/app", SECRET.digest)
        assert again.state == "HIT"
        assert await read_blob(again) == SECRET.content
    assert server.fetches(SECRET.digest) == 1


async def test_blob_under_way_is_not_read_through_another_repository(upstream: Start, tmp_path: Path) -> None:
    large = blob(random_blob(300_000, seed=32))
    server = upstream(faults=Faults(stall_at=200_000))
    server.add_blob("private/app", large)
    server.add("public/app", PUBLIC)
    async with worker(tmp_path, server) as one:
        opened = await one.repositories.open_blob(server.address, "private/app", large.digest)
        with pytest.raises(BlobUnknown):
            await one.repositories.open_blob(server.address, "public/app", large.digest)
        server.faults.release.set()
        assert await read_blob(opened) == large.content


async def test_cached_manifest_is_not_read_through_another_repository(server: Upstream, tmp_path: Path) -> None:
    async with worker(tmp_path, server) as one:
        fetch = one.repositories.fetch_manifest
        assert (await fetch(server.address, "private/app", PRIVATE.digest)).content == PRIVATE.manifest
        with pytest.raises(ManifestUnknown):
            await fetch(server.address, "public/app", PRIVATE.digest)
        before = asked(server)
        assert (await fetch(server.address, "private/app", PRIVATE.digest)).content == PRIVATE.manifest
        assert asked(server) == before


async def test_other_registries_are_asked_themselves(upstream: Start, tmp_path: Path) -> None:
    one_registry, other_registry = upstream(), upstream(auth="basic")
    for registry in (one_registry, other_registry):
        registry.add("private/app", PRIVATE, "1")
    async with worker(tmp_path, one_registry, other_registry) as one:
        await one.repositories.fetch_manifest(one_registry.address, "private/app", PRIVATE.digest)
        await read_blob(await one.repositories.open_blob(one_registry.address, "private/app", SECRET.digest))
        await eventually(lambda: not one.is_filling(SECRET.digest))
        with pytest.raises(Denied):
            await one.repositories.fetch_manifest(other_registry.address, "private/app", PRIVATE.digest)
        with pytest.raises(Denied):
            await one.repositories.open_blob(other_registry.address, "private/app", SECRET.digest)


async def test_shared_content_is_fetched_once(server: Upstream, tmp_path: Path) -> None:
    server.add("public/app", PRIVATE)
    async with worker(tmp_path, server) as one:
        for repository in ("private/app", "public/app"):
            opened = await one.repositories.open_blob(server.address, repository, SECRET.digest)
            assert await read_blob(opened) == SECRET.content
            await eventually(lambda: not one.is_filling(SECRET.digest))
    assert server.fetches(SECRET.digest) == 1


async def test_grants_outlive_the_worker_and_upstream(server: Upstream, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(worker(tmp_path, server)) for _ in range(2)]
        await one.repositories.fetch_manifest(server.address, "private/app", PRIVATE.digest)
        await read_blob(await one.repositories.open_blob(server.address, "private/app", SECRET.digest))
        await eventually(lambda: not one.is_filling(SECRET.digest))
        server.stop()
        manifest = await other.repositories.fetch_manifest(server.address, "private/app", PRIVATE.digest)
        assert manifest.content == PRIVATE.manifest
        assert await other.repositories.find_size(server.address, "private/app", SECRET.digest) == len(SECRET.content)
        opened = await other.repositories.open_blob(server.address, "private/app", SECRET.digest)
        assert await read_blob(opened) == SECRET.content
        with pytest.raises(UpstreamUnavailable):
            await other.repositories.open_blob(server.address, "public/app", SECRET.digest)


@pytest.mark.parametrize("cached", [False, True])
async def test_naming_a_digest_is_not_having_it(upstream: Start, tmp_path: Path, cached: bool) -> None:
    honest, liar = upstream(), upstream()
    honest.add("private/app", PRIVATE, "1")
    forged = image([SECRET], env=["FORGED=1"])
    liar.add("evil/app", PUBLIC)
    place = liar._repositories["evil/app"]
    place.manifests[forged.digest] = forged
    place.tags["1"] = forged.digest
    pointing = index([PRIVATE])
    place.manifests[pointing.digest] = pointing
    async with worker(tmp_path, honest, liar) as one:
        if cached:
            await one.repositories.fetch_manifest(honest.address, "private/app", PRIVATE.digest)
            await read_blob(await one.repositories.open_blob(honest.address, "private/app", SECRET.digest))
            await eventually(lambda: not one.is_filling(SECRET.digest))
        await one.repositories.fetch_manifest(liar.address, "evil/app", forged.digest)
        await one.repositories.fetch_manifest(liar.address, "evil/app", pointing.digest)
        with pytest.raises(BlobUnknown):
            await one.repositories.open_blob(liar.address, "evil/app", SECRET.digest)
        with pytest.raises(ManifestUnknown):
            await one.repositories.fetch_manifest(liar.address, "evil/app", PRIVATE.digest)


async def test_claiming_a_blob_gives_no_manifest(upstream: Start, tmp_path: Path) -> None:
    honest, liar = upstream(), upstream()
    honest.add("private/app", PRIVATE, "1")
    liar.add_blob("evil/app", Blob(PRIVATE.digest, bytes(len(PRIVATE.manifest)), "application/json"))
    async with worker(tmp_path, honest, liar) as one:
        await one.repositories.fetch_manifest(honest.address, "private/app", PRIVATE.digest)
        assert await one.repositories.find_size(liar.address, "evil/app", PRIVATE.digest) == len(PRIVATE.manifest)
        with pytest.raises(ManifestUnknown):
            await one.repositories.fetch_manifest(liar.address, "evil/app", PRIVATE.digest)


async def test_a_config_that_is_larger_than_its_manifest_says(server: Upstream, tmp_path: Path) -> None:
    huge = blob(random_blob(MAX_CONFIG_BYTES + 1, seed=33))
    server.add_blob("public/app", huge)
    async with worker(tmp_path, server) as one:
        for _ in ("cold", "warm"):
            with pytest.raises(UpstreamError):
                await one.repositories.read_config(server.address, "public/app", huge.digest, 10)
            await eventually(lambda: not one.is_filling(huge.digest))
