"""Eviction: the cap, the order, and what is never taken away."""

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import time

import pytest

from bench.images import blob, random_blob
from bench.upstream import Faults, Upstream
from tests.cached import REPOSITORY, files_in, open_files, read_along, worker
from tests.patience import eventually
from wave_proxy.cache.blobs import BlobStore
from wave_proxy.cache.evict import Evictor
from wave_proxy.cache.manifests import ManifestStore, StoredManifest

SIZE = 1000
BLOBS = [blob(random_blob(SIZE, seed=n)) for n in range(20)]
NOW = time()


@pytest.fixture(autouse=True)
def _no_file_stays_open(tmp_path: Path) -> Iterator[None]:
    yield
    assert open_files(tmp_path) == []


def filled(root: Path, count: int = 20) -> BlobStore:
    """A store with that many blobs, the first one unused for longest."""
    store = BlobStore(root)
    for number, item in enumerate(BLOBS[:count]):
        store.put(item.digest, item.content)
        os.utime(store.path(item.digest), (NOW - 1000 + number, NOW - 1000 + number))
    return store


def kept(store: BlobStore) -> list[int]:
    return [number for number, item in enumerate(BLOBS) if store.path(item.digest).exists()]


def test_under_the_cap_nothing_goes(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert Evictor(tmp_path, 20 * SIZE).evict() == 0
    assert kept(store) == list(range(20))


def test_cap_is_kept_with_some_room(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert Evictor(tmp_path, 10 * SIZE).evict() == 11 * SIZE
    assert kept(store) == list(range(11, 20))


def test_what_was_used_last_stays(tmp_path: Path) -> None:
    store = filled(tmp_path)
    for used in (0, 5):
        found = store.find(BLOBS[used].digest)
        assert found is not None
        found.close()
    Evictor(tmp_path, 10 * SIZE).evict()
    assert kept(store) == [0, 5, *range(13, 20)]


def test_blob_that_is_read_stays(tmp_path: Path) -> None:
    store = filled(tmp_path)
    reading = store.find(BLOBS[0].digest)
    assert reading is not None
    os.utime(store.path(BLOBS[0].digest), (1, 1))
    evictor = Evictor(tmp_path, 1)
    assert evictor.evict() == 19 * SIZE
    assert kept(store) == [0]
    assert os.pread(reading.fd, SIZE, 0) == BLOBS[0].content
    reading.close()
    assert evictor.evict() == SIZE
    assert kept(store) == []


def test_manifests_and_spools_count(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    manifests = ManifestStore(tmp_path)
    manifest = StoredManifest(BLOBS[10].content, "text/plain", BLOBS[10].digest)
    manifests.put(manifest)
    spool = tmp_path / "spool" / "x"
    spool.parent.mkdir()
    spool.write_bytes(bytes(5 * SIZE))
    (path,) = (path for path in (tmp_path / "manifests").rglob("*") if path.is_file())
    os.utime(path, (1, 1))
    assert Evictor(tmp_path, 9 * SIZE).evict() >= SIZE
    assert not path.exists()
    assert kept(store) == [0, 1, 2]
    assert spool.exists()


def test_wanted_bytes_are_freed_below_the_cap(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert Evictor(tmp_path, 1 << 40).evict(2 * SIZE + 1) == 3 * SIZE
    assert kept(store) == list(range(3, 20))


@pytest.mark.parametrize(
    ("age_s", "locked", "stays"),
    [(3700, False, False), (3500, False, True), (3700, True, True)],
    ids=["stale", "fresh", "being filled"],
)
def test_stale_spools(tmp_path: Path, age_s: float, locked: bool, stays: bool) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    for name in ("a", "a.size", "orphan.size"):
        (folder / name).write_bytes(b"1\n")
        os.utime(folder / name, (time() - age_s, time() - age_s))
    with (folder / "a").open() as file:
        if locked:
            fcntl.flock(file, fcntl.LOCK_EX)
        evictor = Evictor(tmp_path, 1 << 40)
        evictor.evict()
        evictor.evict()
    left = files_in(tmp_path, "spool")
    assert left == ([] if not stays else ["a", "a.size"] if locked else ["a", "a.size", "orphan.size"])


def test_one_process_evicts_at_a_time(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with (tmp_path / "evict.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert Evictor(tmp_path, 1).evict() == 0
    assert kept(store) == list(range(20))


async def test_nudge_starts_it(tmp_path: Path) -> None:
    store = filled(tmp_path)
    evictor = Evictor(tmp_path, 10 * SIZE)
    running = asyncio.create_task(evictor.run())
    evictor.nudge()
    await eventually(lambda: len(kept(store)) < 10)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_fills_keep_the_cap_and_their_readers(upstream: Callable[..., Upstream], tmp_path: Path) -> None:
    server = upstream(faults=Faults())
    for item in BLOBS:
        server.add_blob(REPOSITORY, item)
    async with worker(tmp_path, server, max_bytes=5 * SIZE) as one:
        running = asyncio.create_task(one.evictor.run())
        first = await one.join(server, BLOBS[0].digest).open()
        for item in BLOBS[1:]:
            assert await one.fetch(server, item.digest) == item.content
            await eventually(lambda digest=item.digest: not one.is_filling(digest))  # type: ignore[misc]
        await eventually(lambda: len(kept(one.blobs)) <= 5)
        assert 0 in kept(one.blobs)
        assert await read_along(first) == BLOBS[0].content
        one.evictor.evict(5 * SIZE)
        assert 0 not in kept(one.blobs)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize(("age_days", "stays"), [(1, True), (31, False)])
def test_grants_and_tags_of_long_ago(tmp_path: Path, age_days: int, stays: bool) -> None:
    paths = [tmp_path / folder / "x" / "y" for folder in ("grants", "tags")]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (0, time() - age_days * 86400))
    Evictor(tmp_path, 1 << 40).evict()
    assert [path.exists() for path in paths] == [stays, stays]


def test_links_in_a_circle_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "loop").symlink_to(tmp_path / "blobs" / "loop")
    assert Evictor(tmp_path, 1).evict() == 0
