"""The blob store: whole files or none, readable for as long as somebody reads."""

import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.images import digest_of, random_blob
from tests.cached import files_in, open_files
from wave_proxy.cache.blobs import BlobStore, StoredBlob, write_whole
from wave_proxy.errors import StorageFull
from wave_proxy.image.oci import digest_of as digest_with

CONTENT = random_blob(10_000, seed=21)
DIGEST = digest_of(CONTENT)


@pytest.fixture(autouse=True)
def _no_file_stays_open(tmp_path: Path) -> Iterator[None]:
    yield
    assert open_files(tmp_path) == []


def content_of(blob: StoredBlob | None) -> bytes:
    assert blob is not None
    try:
        return os.pread(blob.fd, blob.size, 0)
    finally:
        blob.close()


@pytest.mark.parametrize("digest", [DIGEST, digest_with(CONTENT, "sha512")], ids=["sha256", "sha512"])
async def test_put_and_find(tmp_path: Path, digest: str) -> None:
    store = BlobStore(tmp_path)
    assert store.find(digest) is None
    store.put(digest, CONTENT)
    algorithm, hex_digits = digest.split(":")
    assert store.path(digest) == tmp_path / "blobs" / algorithm / hex_digits[:2] / hex_digits
    blob = BlobStore(tmp_path).find(digest)
    assert blob is not None
    assert blob.readable() == blob.size == len(CONTENT)
    await blob.wait(0)
    assert content_of(blob) == CONTENT


def test_put_twice_leaves_one_file(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.put(DIGEST, CONTENT)
    store.put(DIGEST, CONTENT)
    assert files_in(tmp_path, "blobs") == [DIGEST[7:]]


def test_discarded_blob_is_read_to_its_end(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.put(DIGEST, CONTENT)
    blob = store.find(DIGEST)
    store.discard(DIGEST)
    store.discard(DIGEST)
    assert store.find(DIGEST) is None
    assert content_of(blob) == CONTENT


def test_adopted_file_is_moved(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    spool = tmp_path / "spool"
    spool.write_bytes(CONTENT)
    store.adopt(DIGEST, spool)
    assert not spool.exists()
    assert content_of(store.find(DIGEST)) == CONTENT


def test_blob_that_is_being_evicted_is_not_there(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.put(DIGEST, CONTENT)
    with store.path(DIGEST).open() as evicting:
        fcntl.flock(evicting, fcntl.LOCK_EX)
        assert store.find(DIGEST) is None
    assert content_of(store.find(DIGEST)) == CONTENT


def test_readers_lock_a_blob_together(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.put(DIGEST, CONTENT)
    first, second = store.find(DIGEST), store.find(DIGEST)
    with store.path(DIGEST).open() as evicting, pytest.raises(BlockingIOError):
        fcntl.flock(evicting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert content_of(first) == content_of(second) == CONTENT
    with store.path(DIGEST).open() as evicting:
        fcntl.flock(evicting, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_use_is_noted_once_a_minute(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.put(DIGEST, CONTENT)
    path = store.path(DIGEST)
    written = path.stat().st_mtime
    content_of(store.find(DIGEST))
    assert path.stat().st_mtime == written
    os.utime(path, (written - 61, written - 61))
    content_of(store.find(DIGEST))
    assert path.stat().st_mtime >= written


def test_writing_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file"
    write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # the one call that the disk can fail late
    with pytest.raises(StorageFull, match="max_bytes"):
        write_whole(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path, "folder") == ["file"]


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as caught:
        write_whole(tmp_path / "file" / "below", b"x")
    assert not isinstance(caught.value, StorageFull)


def test_files_are_for_their_owner_to_write(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.put(DIGEST, CONTENT)
    assert stat.S_IMODE(store.path(DIGEST).stat().st_mode) & 0o022 == 0


@pytest.mark.parametrize("left", [0, 10, len(CONTENT) - 1])
def test_blob_that_was_cut_short_is_dropped(tmp_path: Path, left: int) -> None:
    store = BlobStore(tmp_path)
    store.put(DIGEST, CONTENT)
    try:
        os.getxattr(store.path(DIGEST), "user.wave.size")
    except OSError:
        pytest.skip("the file system has no extended attributes")
    os.truncate(store.path(DIGEST), left)
    assert store.find(DIGEST) is None
    assert not store.path(DIGEST).exists()
    store.put(DIGEST, CONTENT)
    assert content_of(store.find(DIGEST)) == CONTENT
