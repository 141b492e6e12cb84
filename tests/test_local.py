"""Local repositories on disk: what they take, what they refuse, and what is left when something goes wrong."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from hashlib import sha512
from pathlib import Path
from time import time
from typing import Any

import pytest

from bench.images import Blob, Image, blob, digest_of, image, index, layer, random_blob
from tests.cached import files_in, open_files
from tests.patience import eventually
from wave_proxy.cache.blobs import BlobStore
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.local import LocalRepositories
from wave_proxy.cache.manifests import StoredManifest
from wave_proxy.cache.uploads import Part, Uploads
from wave_proxy.errors import (
    BlobUnknown,
    BodyTooLarge,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestUnknown,
    NameUnknown,
    Overloaded,
    UploadInvalid,
    UploadOutOfOrder,
    UploadUnknown,
    WaveError,
)
from wave_proxy.image.oci import OCI_INDEX, OCI_MANIFEST

NAME = "team/tool"
TOOL = image([layer({"bin/tool": "x"})], env=["PATH=/bin"])
OTHER = image([layer({"bin/other": "y"})])
BIG = blob(random_blob(1_500_000, seed=91))
AUTHORITY = "localhost:9090"


class Place:
    """One worker's view of a data folder."""

    def __init__(self, root: Path, *, max_bytes: int | None = None, cap: int = 1 << 40) -> None:
        self.root = root
        self.blobs = BlobStore(root)
        self.evictor = Evictor(root, cap)
        self.local = LocalRepositories(root, self.blobs, AUTHORITY)
        self.uploads = Uploads(root, self.local, self.evictor, max_bytes)

    async def add(self, item: Blob, name: str = NAME) -> None:
        await self.uploads.add_whole(name, part(item.content), item.digest)

    async def push(self, pushed: Image, *tags: str, name: str = NAME) -> None:
        for child in pushed.children:
            await self.push(child, name=name)
        for item in pushed.blobs:
            await self.add(item, name)
        for tag in tags or ("",):
            self.local.put_manifest(name, stored(pushed), tag)

    def path(self, digest: str, kind: str = "_blobs", name: str = NAME) -> Path:
        return self.root / "local" / name / kind / digest.replace(":", "-")

    def unfinished(self) -> list[str]:
        return os.listdir(self.root / "local" / "_uploads")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with opened(tmp_path) as found:
        yield found
    assert open_files(tmp_path) == []


@contextmanager
def opened(root: Path, **options: Any) -> Iterator[Place]:
    found = Place(root, **options)
    try:
        yield found
    finally:
        found.uploads.close()


async def pieces(content: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


def part(content: bytes, start: int | None = None, size: int | None = None) -> Part:
    return Part(pieces(content), start, size)


def stored(found: Image) -> StoredManifest:
    return StoredManifest(found.manifest, found.media_type, found.digest)


def made(document: dict[str, Any], media_type: str = OCI_MANIFEST) -> StoredManifest:
    content = json.dumps(document).encode()
    return StoredManifest(content, media_type, digest_of(content))


def read(place: Place, digest: str, name: str = NAME) -> bytes:
    found = place.local.open_blob(name, digest)
    try:
        return os.pread(found.fd, found.size, 0)
    finally:
        found.close()


# --- manifests, tags, referrers --------------------------------------------------------------------------------------


async def test_what_was_pushed_is_there_byte_for_byte(place: Place) -> None:
    both = index([TOOL, OTHER])
    await place.push(both, "v1", "latest")
    assert place.local.get_tag(NAME, "latest") == both.digest
    for manifest in (both, TOOL, OTHER):
        assert place.local.get_manifest(NAME, manifest.digest) == stored(manifest)
    for item in (*TOOL.blobs, *OTHER.blobs):
        assert read(place, item.digest) == item.content
    assert place.unfinished() == []


async def test_blobs_are_the_stores_files(place: Place) -> None:
    place.blobs.put(BIG.digest, BIG.content)
    await place.add(BIG)
    await place.add(TOOL.blobs[0])
    for item in (BIG, TOOL.blobs[0]):
        assert place.path(item.digest).samefile(place.blobs.path(item.digest))
        assert place.path(item.digest).stat().st_nlink == 2


async def test_repositories_know_their_names(place: Place) -> None:
    assert place.local.find_name(AUTHORITY, "local/a/b") == "a/b"
    assert place.local.find_name(AUTHORITY, "localized") is None
    assert place.local.find_name("docker.io", "local/a") is None


async def test_one_repository_does_not_show_anothers_content(place: Place) -> None:
    await place.push(TOOL, "v1")
    for ask in (
        lambda: place.local.get_tag("team", "v1"),
        lambda: place.local.get_manifest("team", TOOL.digest),
        lambda: place.local.open_blob("team", TOOL.blobs[0].digest),
        lambda: place.local.list_tags("team", None, ""),
    ):
        with pytest.raises((ManifestUnknown, BlobUnknown, NameUnknown)):
            ask()


def _layers(*descriptors: dict[str, Any], **more: Any) -> dict[str, Any]:
    config = {"mediaType": "a/b", "digest": TOOL.blobs[0].digest, "size": len(TOOL.blobs[0].content)}
    return {"schemaVersion": 2, "config": config, "layers": list(descriptors), **more}


NOWHERE = f"sha256:{'0' * 64}"
GONE = {"mediaType": "a/layer", "digest": NOWHERE, "size": 5}
KEPT = {"mediaType": "a/layer", "digest": BIG.digest, "size": len(BIG.content)}


@pytest.mark.parametrize(
    ("manifest", "error", "words"),
    [
        (StoredManifest(b"{", OCI_MANIFEST, digest_of(b"{")), ManifestInvalid, "not JSON"),
        (StoredManifest(b"[]", OCI_MANIFEST, digest_of(b"[]")), ManifestInvalid, "not a JSON object"),
        (made(_layers(), "text/html"), ManifestInvalid, "text/html"),
        (made(_layers(mediaType=OCI_INDEX)), ManifestInvalid, "was sent as"),
        (made(_layers(manifests=[])), ManifestInvalid, "both"),
        (made({"schemaVersion": 2, "layers": []}), ManifestInvalid, "config"),
        (made(_layers({**KEPT, "size": 7})), ManifestInvalid, "7"),
        (made(_layers({**KEPT, "digest": "sha256:no"})), ManifestInvalid, "sha256:no"),
        (made(_layers(subject="x")), ManifestInvalid, "subject"),
        (made(_layers(subject={"digest": "../../etc"})), ManifestInvalid, "subject"),
        (made(_layers(GONE)), ManifestBlobUnknown, NOWHERE),
        (made({"manifests": [GONE]}, OCI_INDEX), ManifestBlobUnknown, NOWHERE),
        (made({"layers": [GONE]}, OCI_INDEX), ManifestInvalid, "does not"),
    ],
)
async def test_what_is_no_manifest_is_refused(
    place: Place, manifest: StoredManifest, error: type[WaveError], words: str
) -> None:
    await place.add(TOOL.blobs[0])
    await place.add(BIG)
    with pytest.raises(error, match=words):
        place.local.put_manifest(NAME, manifest, "v1")
    assert place.local.list_tags(NAME, None, "").entries == []
    assert not place.local.has_manifest(NAME, manifest.digest)


async def test_layers_that_are_elsewhere_need_not_be_here(place: Place) -> None:
    await place.add(TOOL.blobs[0])
    foreign = {**GONE, "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"}
    manifest = made(_layers(foreign, {**GONE, "urls": ["https://example.com/x"]}))
    place.local.put_manifest(NAME, manifest, "v1")
    assert place.local.get_tag(NAME, "v1") == manifest.digest


async def test_tags_are_listed_in_order_and_in_pages(place: Place) -> None:
    await place.push(TOOL, "b", "a", "Z", "_x", "c1")
    assert place.local.list_tags(NAME, None, "").entries == ["Z", "_x", "a", "b", "c1"]
    page = place.local.list_tags(NAME, 2, "Z")
    assert (page.entries, page.last) == (["_x", "a"], "a")
    page = place.local.list_tags(NAME, 2, "a")
    assert (page.entries, page.last) == (["b", "c1"], "")
    assert place.local.list_tags(NAME, 0, "").entries == []


async def test_a_manifest_goes_with_its_tags_and_a_tag_alone(place: Place) -> None:
    await place.push(TOOL, "v1", "v2")
    await place.push(OTHER, "other")
    place.local.delete_tag(NAME, "v1")
    assert place.local.has_manifest(NAME, TOOL.digest)
    place.local.delete_manifest(NAME, TOOL.digest)
    assert place.local.list_tags(NAME, None, "").entries == ["other"]
    with pytest.raises(ManifestUnknown):
        place.local.delete_manifest(NAME, TOOL.digest)
    with pytest.raises(ManifestUnknown):
        place.local.delete_tag(NAME, "v2")
    with pytest.raises(ManifestUnknown):
        place.local.delete_tag("no/such", "v1")


async def test_referrers(place: Place) -> None:
    await place.add(TOOL.blobs[0])
    subject = {"mediaType": OCI_MANIFEST, "digest": TOOL.digest, "size": 5}
    of_config = made(_layers(subject=subject))
    signed = made(_layers(subject=subject, artifactType="a/signature", annotations={"by": "me"}))
    for manifest in (of_config, signed):
        assert place.local.put_manifest(NAME, manifest, "") == TOOL.digest

    def listed(artifact_type: str | None = None) -> list[dict[str, Any]]:
        content, last = place.local.list_referrers(NAME, TOOL.digest, artifact_type, "")
        assert last == ""
        found: list[dict[str, Any]] = json.loads(content)["manifests"]
        return found

    (one,) = listed("a/signature")
    assert one["digest"] == signed.digest
    assert (one["size"], one["annotations"]) == (len(signed.content), {"by": "me"})
    assert {entry["artifactType"] for entry in listed()} == {"a/b", "a/signature"}
    place.local.delete_manifest(NAME, signed.digest)
    assert [entry["digest"] for entry in listed()] == [of_config.digest]
    assert listed("a/signature") == []
    assert json.loads(place.local.list_referrers("no/such", TOOL.digest, None, "")[0])["manifests"] == []


async def test_many_referrers_come_in_pages(place: Place) -> None:
    await place.add(TOOL.blobs[0])
    subject = {"mediaType": OCI_MANIFEST, "digest": TOOL.digest, "size": 5}
    made_of = [made(_layers(subject=subject, annotations={"n": str(n) * 1_500_000})) for n in range(5)]
    for manifest in made_of:
        place.local.put_manifest(NAME, manifest, "")
    seen, last = list[str](), ""
    for _ in range(3):
        content, last = place.local.list_referrers(NAME, TOOL.digest, None, last)
        assert len(content) <= (4 << 20) + 200
        seen += [entry["digest"] for entry in json.loads(content)["manifests"]]
    assert last == ""
    assert seen == sorted(manifest.digest for manifest in made_of)


# --- uploads ---------------------------------------------------------------------------------------------------------


async def test_workers_take_turns_with_an_upload(place: Place) -> None:
    with opened(place.root) as other:
        upload = place.uploads.begin(NAME)
        at, workers = 0, [place, other, other, place, other]
        for step, worker in enumerate(workers):
            content = BIG.content[at : at + 300_000]
            at = await worker.uploads.append(NAME, upload, part(content, at, len(content)))
            assert at == min((step + 1) * 300_000, len(BIG.content))
            assert place.uploads.received(NAME, upload) == other.uploads.received(NAME, upload) == at
        await place.uploads.finish(NAME, upload, part(b""), BIG.digest)
    assert read(place, BIG.digest) == BIG.content
    with pytest.raises(UploadUnknown):
        place.uploads.received(NAME, upload)


async def test_parts_that_race_are_taken_once(place: Place) -> None:
    with opened(place.root) as other:
        upload, late = place.uploads.begin(NAME), list[bool]()

        async def send(worker: Place) -> int:
            at = 0
            for start in range(0, len(BIG.content), 250_000):
                content = BIG.content[start : start + 250_000]
                try:
                    await worker.uploads.append(NAME, upload, part(content, start, len(content)))
                    at += 1
                except UploadOutOfOrder as err:
                    late.append(err.received > start)
            return at

        taken = await asyncio.gather(*(send(worker) for worker in (place, other, place, other)))
        assert sum(taken) == 6
        assert late == [True] * 18
        await other.uploads.finish(NAME, upload, part(b""), BIG.digest)
    assert read(place, BIG.digest) == BIG.content


async def test_an_upload_that_is_being_sent_is_waited_for_only_so_long(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wave_proxy.cache.uploads._LOCK_S", 0.1)
    upload, go_on = place.uploads.begin(NAME), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield BIG.content
        await go_on.wait()

    sending = asyncio.create_task(place.uploads.append(NAME, upload, Part(slow())))
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded):
        await place.uploads.append(NAME, upload, part(b"x"))
    go_on.set()
    assert await sending == len(BIG.content)


async def test_what_came_before_a_cut_stays(place: Place) -> None:
    upload = place.uploads.begin(NAME)

    async def cut() -> AsyncIterator[bytes]:
        yield BIG.content[:600_000]
        yield BIG.content[600_000:1_200_000]
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await place.uploads.append(NAME, upload, Part(cut()))
    at = place.uploads.received(NAME, upload)
    assert at == 1_200_000
    await place.uploads.finish(NAME, upload, part(BIG.content[at:], at), BIG.digest)
    assert read(place, BIG.digest) == BIG.content


async def test_a_cancelled_request_lets_go_of_the_file(place: Place) -> None:
    upload = place.uploads.begin(NAME)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1 << 20)
            await asyncio.sleep(0)

    sending = asyncio.create_task(place.uploads.append(NAME, upload, Part(endless())))
    await eventually(lambda: place.uploads.received(NAME, upload))
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    size = place.uploads.received(NAME, upload)
    assert size > 0
    await place.uploads.cancel(NAME, upload)
    assert place.unfinished() == []


@pytest.mark.parametrize("start", [1, 10_000])
async def test_a_part_from_elsewhere_is_refused(place: Place, start: int) -> None:
    upload = place.uploads.begin(NAME)
    await place.uploads.append(NAME, upload, part(b"12345"))
    with pytest.raises(UploadOutOfOrder) as caught:
        await place.uploads.append(NAME, upload, part(b"x", start))
    assert caught.value.received == place.uploads.received(NAME, upload) == 5


@pytest.mark.parametrize("size", [3, 9])
async def test_a_part_of_another_size_than_told_is_taken_back(place: Place, size: int) -> None:
    upload = place.uploads.begin(NAME)
    await place.uploads.append(NAME, upload, part(b"12345"))
    with pytest.raises(UploadInvalid):
        await place.uploads.append(NAME, upload, part(b"678901", 5, size))
    assert place.uploads.received(NAME, upload) == 5
    await place.uploads.finish(NAME, upload, part(b"67", 5), digest_of(b"1234567"))
    assert read(place, digest_of(b"1234567")) == b"1234567"


async def test_wrong_content_is_dropped(place: Place) -> None:
    upload = place.uploads.begin(NAME)
    with pytest.raises(DigestInvalid, match="upload it again"):
        await place.uploads.finish(NAME, upload, part(BIG.content[:-1] + b"?"), BIG.digest)
    with pytest.raises(DigestInvalid):
        await place.uploads.add_whole(NAME, part(b"x"), BIG.digest)
    assert place.unfinished() == []
    assert place.local.find_size(NAME, BIG.digest) is None
    assert files_in(place.root / "blobs") == []


async def test_sha512(place: Place) -> None:
    digest = f"sha512:{sha512(BIG.content).hexdigest()}"
    upload = place.uploads.begin(NAME)
    await place.uploads.append(NAME, upload, part(BIG.content))
    await place.uploads.finish(NAME, upload, part(b""), digest)
    assert read(place, digest) == BIG.content


async def test_an_upload_belongs_to_its_repository(place: Place) -> None:
    upload = place.uploads.begin(NAME)
    for name, other in ((f"{NAME}/x", upload), (NAME, "0" * 32), (NAME, "../../../etc/passwd"), (NAME, "")):
        with pytest.raises(UploadUnknown):
            place.uploads.received(name, other)
        with pytest.raises(UploadUnknown):
            await place.uploads.append(name, other, part(b"x"))


async def test_a_blob_has_a_limit(tmp_path: Path) -> None:
    with opened(tmp_path, max_bytes=1_000_000) as place:
        upload = place.uploads.begin(NAME)
        with pytest.raises(BodyTooLarge, match="max_blob_bytes"):
            await place.uploads.append(NAME, upload, part(BIG.content))
        with pytest.raises(BodyTooLarge):
            await place.uploads.append(NAME, upload, part(b"", place.uploads.received(NAME, upload), 1_000_001))
        assert place.uploads.received(NAME, upload) <= 1_000_000


async def test_no_name_leads_to_a_finished_file(place: Place) -> None:
    """A worker that dies after the blob was shown, before it took the upload away, must leave nothing to add to."""
    upload, seen = place.uploads.begin(NAME), list[list[str]]()
    add = place.local.add_blob

    def add_blob(name: str, digest: str, file: Path) -> None:
        add(name, digest, file)
        seen.append(place.unfinished())
        raise SystemExit

    place.local.add_blob = add_blob  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        await place.uploads.finish(NAME, upload, part(b"done"), digest_of(b"done"))
    assert read(place, digest_of(b"done")) == b"done"
    assert len(seen) == 1
    with pytest.raises(UploadUnknown):
        await place.uploads.append(NAME, upload, part(b" and more"))
    assert read(place, digest_of(b"done")) == b"done"


# --- mounting --------------------------------------------------------------------------------------------------------


async def test_mount(place: Place) -> None:
    await place.add(BIG)
    assert not place.local.mount("new", BIG.digest, "no/such")
    assert not place.local.mount("new", NOWHERE, NAME)
    assert not (place.root / "local" / "new").exists()
    assert place.local.mount("new", BIG.digest, NAME)
    assert place.local.mount("new", BIG.digest, NAME)
    assert place.local.mount("newer", BIG.digest, "")
    assert read(place, BIG.digest, "new") == read(place, BIG.digest, "newer") == BIG.content


async def test_what_only_the_cache_has_is_not_mounted(place: Place) -> None:
    place.blobs.put(BIG.digest, BIG.content)
    assert not place.local.mount("new", BIG.digest, "")
    os.link(place.blobs.path(BIG.digest), place.root / "backup")  # as backups made of links do
    assert not place.local.mount("new", BIG.digest, "")


# --- eviction --------------------------------------------------------------------------------------------------------


def grow_old(*paths: Path, by_s: float = 90_000.0) -> None:
    for path in paths:
        os.utime(path, (time() - by_s, time() - by_s))


async def test_what_repositories_have_is_neither_counted_nor_evicted(tmp_path: Path) -> None:
    with opened(tmp_path, cap=1000) as place:
        await place.add(BIG)
        place.blobs.put(TOOL.blobs[0].digest, TOOL.blobs[0].content)
        assert place.evictor.evict() == 0
        assert place.evictor.stats.store_bytes == len(TOOL.blobs[0].content)
        assert place.evictor.evict(wanted=1) == len(TOOL.blobs[0].content)
        assert read(place, BIG.digest) == BIG.content


@pytest.mark.parametrize("how", ["blob", "folder"])
async def test_what_repositories_had_can_be_evicted(tmp_path: Path, how: str) -> None:
    with opened(tmp_path, cap=1000) as place:
        await place.add(BIG)
        if how == "blob":
            place.local.delete_blob(NAME, BIG.digest)
        else:
            shutil.rmtree(tmp_path / "local" / "team")
        assert place.blobs.path(BIG.digest).exists()
        assert place.evictor.evict() == len(BIG.content)
        assert files_in(tmp_path / "blobs") == []


async def test_uploads_left_behind_go_after_a_day(place: Place) -> None:
    old, young, busy = (place.uploads.begin(NAME) for _ in range(3))
    folder = place.root / "local" / "_uploads"
    grow_old(*(path for path in folder.iterdir() if not path.name.startswith(young)))
    (folder / ".new-x").touch()
    grow_old(folder / ".new-x")
    go_on = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        await go_on.wait()
        yield b"x"

    sending = asyncio.create_task(place.uploads.append(NAME, busy, Part(slow())))
    await asyncio.sleep(0.05)
    place.evictor.evict()
    assert sorted(name[:32] for name in place.unfinished()) == sorted([young, busy])
    with pytest.raises(UploadUnknown):
        place.uploads.received(NAME, old)
    go_on.set()
    await sending


async def test_a_reader_keeps_what_is_deleted(place: Place) -> None:
    await place.add(BIG)
    reading = place.local.open_blob(NAME, BIG.digest)
    place.local.delete_blob(NAME, BIG.digest)
    place.evictor.evict(wanted=1 << 40)
    assert os.pread(reading.fd, reading.size, 0) == BIG.content
    reading.close()
    with pytest.raises(BlobUnknown):
        place.local.delete_blob(NAME, BIG.digest)
