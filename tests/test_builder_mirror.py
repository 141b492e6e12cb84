"""The copy of an image by itself, from a registry in the place of wave-proxy to one that can misbehave."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.images import Blob, Image, blob, descriptor, digest_of, image, index, layer, random_blob
from bench.upstream import Upstream
from builder.failures import BuildFailed
from builder.lending import Lending
from builder.logbook import LogBook
from builder.mirror import Mirrors
from builder.workspace import Workspaces
from tests.pushing import Target, target
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.oci import OCI_INDEX, OCI_MANIFEST
from wave_proxy.image.size import format_size
from wave_proxy.state.blob_places import BlobPlaces
from wave_proxy.state.redis import connect
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Credentials
from wave_proxy.upstream.egress import Egress, endpoint_for
from wave_proxy.upstream.registry import Registry

ACME = "application/vnd.acme.thing.v1+json"
PATH = "wt/0123456789abcdef0123456789abcdef/lib/tool"


@dataclass
class Scene:
    """A registry that is read as wave-proxy is, and one to push to. ``log`` is what the last mirror said."""

    mirrors: Mirrors
    source: Upstream
    to: Target
    data: Path
    log: list[str] = field(default_factory=list)
    confirmed: int = 0

    async def mirror(self, made: Image, repository: str = "lab/tool", **changes: Any) -> str:
        """Copy an image; returns the digest. Raises BuildFailed. Nothing is left of it."""
        self.source.add(PATH, made, "1")
        place = f"{self.to.address}/{repository}:1"
        spec = BuildSpec("1" * 16, place, "", kind="mirror", source_image=f"{self.source.address}/{PATH}:1", **changes)
        self.log.clear()
        book = LogBook(self._append)
        try:
            record = BuildRecord(f"mr-{'1' * 16}_1", spec, "running", 1.0, attempt=1)
            return await self.mirrors.run(record, book, self._confirm)
        finally:
            book.close()
            await book.run()
            assert not list((self.data / "builds").iterdir())

    async def _append(self, text: bytes) -> None:
        self.log.extend(text.decode().splitlines())

    async def _confirm(self) -> None:
        assert not self.to.log, "nothing is pushed before"
        self.confirmed += 1


@pytest.fixture
def source() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@asynccontextmanager
async def open_scene(source: Upstream, redis_url: str, data: Path, **members: Any) -> AsyncIterator[Scene]:
    async with connect(redis_url) as redis, target(**members) as to:
        known = (source.address, to.address)
        egress = Egress({host: endpoint_for(host, insecure=True, allow_private=True) for host in known})
        registry, tokens = Registry(egress, Credentials({}), attempts=1), TokenStore(redis)
        workspaces = Workspaces(data / "builds", registry, tokens, 1 << 20)
        reader = partial(Registry, egress, Credentials({}), attempts=1)
        try:
            lending, places = Lending(tokens, source.address), BlobPlaces(redis)
            yield Scene(Mirrors(workspaces, registry, lending, places, reader), source, to, data)
        finally:
            await registry.close()
            await egress.close()


@pytest.fixture
async def scene(source: Upstream, redis_url: str, tmp_path: Path) -> AsyncIterator[Scene]:
    async with open_scene(source, redis_url, tmp_path) as opened:
        yield opened


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried again."""
    monkeypatch.setattr("wave_proxy.upstream.patience._ATTEMPTS", 1)


def manifest_of(blobs: list[Blob], media_type: str, **more: dict[str, Any]) -> Image:
    """A manifest that names these blobs as its layers, with members ``more`` for one of them, by digest."""
    layers = [{**descriptor(one), **more.get(one.digest.partition(":")[2], {})} for one in blobs]
    document = {"schemaVersion": 2, "mediaType": media_type, "config": descriptor(blob(b"{}")), "layers": layers}
    content = json.dumps(document).encode()
    return Image(digest_of(content), media_type, content, (blob(b"{}"), *blobs))


async def test_everything_is_as_it_was(scene: Scene) -> None:
    made = index([image([layer({"a": "1"})]), image([layer({"a": "2"})], platform="linux/arm64")])
    assert await scene.mirror(made) == made.digest
    assert scene.confirmed == 1
    assert scene.to.manifests["lab/tool", "1"] == made.manifest
    for child in made.children:
        assert scene.to.manifests["lab/tool", child.digest] == child.manifest
        for one in child.blobs:
            assert scene.to.blobs["lab/tool", one.digest] == one.content
    puts = [one for one in scene.to.log if one.startswith("PUT /v2/lab/tool/manifests/")]
    assert [one.rpartition("/")[2] for one in puts] == [*(child.digest for child in made.children), "1"]
    sent = format_size(sum(len(one.content) for child in made.children for one in child.blobs))
    assert scene.log[-2:] == [
        f">> sent 4 of 4 blobs, {sent} of {sent}",
        f">> mirrored {scene.to.address}/lab/tool:1@{made.digest}",
    ]


async def test_the_digest_that_was_asked_for_is_copied(scene: Scene) -> None:
    old, new = image([layer({"a": "old"})]), image([layer({"a": "new"})])
    scene.source.add(PATH, old)
    assert await scene.mirror(new, source_digest=old.digest) == old.digest
    assert scene.to.manifests["lab/tool", "1"] == old.manifest


async def test_manifests_of_unknown_types_are_copied_too(scene: Scene) -> None:
    thing = manifest_of([blob(b"thing", "application/vnd.acme.data")], ACME)
    entries = [{"mediaType": ACME, "digest": thing.digest, "size": len(thing.manifest)}]
    content = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    made = Image(digest_of(content), OCI_INDEX, content, (), (thing,))
    assert await scene.mirror(made) == made.digest
    assert scene.to.manifests["lab/tool", thing.digest] == thing.manifest
    assert scene.to.blobs["lab/tool", digest_of(b"thing")] == b"thing"


async def test_layers_that_are_elsewhere_are_left_out(scene: Scene) -> None:
    kept, foreign = blob(b"kept"), blob(b"foreign", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
    name = foreign.digest.partition(":")[2]
    made = manifest_of([kept, foreign], OCI_MANIFEST, **{name: {"urls": ["https://foreign.test/layer"]}})
    assert await scene.mirror(made) == made.digest
    assert {digest for _, digest in scene.to.blobs} == {digest_of(b"{}"), kept.digest}
    assert not scene.source.fetches(foreign.digest)
    assert f">> {foreign.digest[:19]} is left out: {foreign.media_type} is not to be copied" in scene.log


async def test_an_upload_that_breaks_off_goes_on(source: Upstream, redis_url: str, tmp_path: Path) -> None:
    size = 2_000_000
    made = image([layer({"data": random_blob(size, 1)})])
    async with open_scene(source, redis_url, tmp_path, breaks=[1_000_000]) as scene:
        assert await scene.mirror(made) == made.digest
        assert scene.to.received < size * 1.2, "not from its beginning"
    assert any(" goes on at byte " in line for line in scene.log)


async def test_blobs_are_taken_from_where_the_last_mirror_put_them(scene: Scene) -> None:
    base, first, second = (layer({"own": name}) for name in ("base", "first", "second"))
    await scene.mirror(image([base, first]), "lab/first")
    received = scene.to.received
    scene.to.log.clear()
    made = image([base, second])
    assert await scene.mirror(made, "lab/second") == made.digest
    assert f">> {base.digest[:19]} is lent by lab/first" in scene.log
    assert scene.to.received == received + second.size + made.blobs[0].size
    assert scene.to.blobs["lab/second", base.digest] == base.content
    assert scene.log[-2].endswith("; 1 did not have to be")


async def test_a_repository_that_is_gone_is_no_obstacle(scene: Scene) -> None:
    made = image([layer({"a": "1"})])
    await scene.mirror(made, "lab/first")
    scene.to.blobs.clear()
    scene.to.log.clear()
    assert await scene.mirror(made, "lab/second") == made.digest


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        pytest.param({"/manifests/": 404}, "source not found: ", id="not found"),
        pytest.param({"/manifests/": 403}, "source denied: ", id="denied"),
        pytest.param({"/manifests/": 429}, "source limits requests (429), try again in 30 s: ", id="429"),
        pytest.param({"/manifests/": 500}, "source can't be read: ", id="broken"),
        pytest.param({"/blobs/": 404}, "source not found: ", id="blob not found"),
        pytest.param({"/blobs/": 429}, "source limits requests (429), try again in 30 s: ", id="blob 429"),
        pytest.param({"/blobs/": 500}, "source can't be read: ", id="blob broken"),
    ],
)
async def test_why_a_source_is_not_read(scene: Scene, faults: dict[str, int], reason: str) -> None:
    scene.source.faults.status, scene.source.faults.retry_after = faults, "30"
    with pytest.raises(BuildFailed) as caught:
        await scene.mirror(image([layer({"a": "1"})]))
    assert caught.value.reason.startswith(reason)
    assert not scene.to.manifests


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(("POST", 403, {}), "target denied: ", id="denied"),
        pytest.param(("POST", 404, {}), "target not found: ", id="not found"),
        pytest.param(
            ("POST", 429, {"Retry-After": "30"}), "target limits requests (429), try again in 30 s: ", id="429"
        ),
        pytest.param(("POST", 429, {}), "target limits requests (429), try again later: ", id="429 without a time"),
        pytest.param(("PUT /manifests/", 500, {}), "target can't be written: ", id="manifest"),
    ],
)
async def test_why_a_target_is_not_written(scene: Scene, answer: tuple[str, int, dict[str, str]], reason: str) -> None:
    scene.to.statuses = [answer] * 4
    with pytest.raises(BuildFailed) as caught:
        await scene.mirror(image([layer({"a": "1"})]))
    assert caught.value.reason.startswith(reason)
    assert not scene.to.manifests


async def test_more_bytes_than_announced_are_not_passed_on(scene: Scene, few: None) -> None:
    scene.source.faults.extra_bytes = 10
    with pytest.raises(BuildFailed, match="source can't be read: "):
        await scene.mirror(image([layer({"a": "1"})]))


async def test_indexes_that_are_too_deep(scene: Scene) -> None:
    made = image([layer({"a": "1"})])
    for _ in range(6):
        entries = [{"mediaType": made.media_type, "digest": made.digest, "size": len(made.manifest)}]
        content = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
        made = Image(digest_of(content), OCI_INDEX, content, (), (made,))
    with pytest.raises(BuildFailed, match="an index of indexes, more than 4 deep"):
        await scene.mirror(made)
