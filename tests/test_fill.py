"""One fetch a blob and machine, whatever upstream, the readers and the other processes do."""

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.images import Blob, blob, random_blob
from bench.upstream import Faults, Upstream
from tests.cached import (
    ORIGIN,
    REPOSITORY,
    Worker,
    files_in,
    open_files,
    read_along,
    read_blob,
    read_into,
    worker,
)
from tests.patience import eventually, patience
from wave_proxy.cache import lead as lead_module
from wave_proxy.cache.fill import Fill
from wave_proxy.cache.lead import FillStats
from wave_proxy.cache.spool import spool_name
from wave_proxy.errors import (
    BlobUnknown,
    ContentMismatch,
    DigestMismatch,
    SizeMismatch,
    StorageFull,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
)
from wave_proxy.image.oci import digest_of

Start = Callable[..., Upstream]

SIZE = 900_000
HALF = 450_000
BLOB = blob(random_blob(SIZE, seed=11))
CHUNK = 1 << 16


@pytest.fixture(autouse=True)
def _no_file_stays_open(tmp_path: Path) -> Iterator[None]:
    yield
    assert open_files(tmp_path) == []


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lead_module, "_BACKOFF_S", 0.005)


def serving(upstream: Start, content: Blob = BLOB, **faults: Any) -> Upstream:
    if faults.get("stall_at", -1) > 0:
        faults["delay_s"] = 0.005  # so that it comes in pieces, of which all but the last can be read
    server = upstream(faults=Faults(chunk_bytes=CHUNK, **faults))
    server.add_blob(REPOSITORY, content)
    return server


def ranges(server: Upstream) -> list[str]:
    """The Range header of each GET, empty where there was none."""
    return [request.headers.get("Range", "") for request in server.log if request.method == "GET"]


def assert_stored(root: Path, content: Blob = BLOB) -> None:
    path = root / "blobs" / "sha256" / content.digest[7:9] / content.digest[7:]
    assert path.read_bytes() == content.content
    assert files_in(root, "spool") == []


def assert_nothing_stays(root: Path) -> None:
    assert files_in(root, "spool", "blobs") == []


async def ended(*workers: Worker, digest: str = BLOB.digest) -> None:
    """Return when none of the workers fills that blob any more."""
    await eventually(lambda: not any(who.is_filling(digest) for who in workers))


async def has_begun(fill: Fill) -> None:
    """Return when a part of the blob can be read; upstream is to stall in its middle."""
    await eventually(lambda: fill.readable() > 0)


async def fetch_along(server: Upstream, one: Worker, two: Worker) -> list[bytes]:
    """What each gets when ``one`` leads and ``two`` follows; upstream stalls in the middle until both have begun."""
    fetches: list[asyncio.Task[bytes]] = []
    for each in (one, two):
        fetches.append(asyncio.create_task(each.fetch(server, BLOB.digest)))
        await asyncio.sleep(0)
        await has_begun(each.join(server, BLOB.digest))
    server.faults.release.set()
    return list(await asyncio.gather(*fetches))


# --- readers -----------------------------------------------------------------------------------------------------


async def test_one_fetch_for_a_hundred_readers(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, delay_s=0.001)
    async with worker(tmp_path, server) as one:
        contents = await asyncio.gather(*(one.fetch(server, BLOB.digest) for _ in range(100)))
        assert set(contents) == {BLOB.content}
        await ended(one)
    assert server.fetches(BLOB.digest) == 1
    assert_stored(tmp_path)


async def test_reader_that_joins_late_gets_all(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, stall_at=HALF)
    async with worker(tmp_path, server) as one:
        early = asyncio.create_task(one.fetch(server, BLOB.digest))
        await asyncio.sleep(0)
        fill = one.join(server, BLOB.digest)
        await has_begun(fill)
        late = await fill.open()
        assert fill.size == SIZE
        assert os.pread(late.fd, fill.readable(), 0) == BLOB.content[: fill.readable()]
        server.faults.release.set()
        assert await read_along(late) == await early == BLOB.content
    assert server.fetches(BLOB.digest) == 1


async def test_no_reader_is_needed(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, stall_at=HALF)
    async with worker(tmp_path, server) as one:
        clients = [asyncio.create_task(one.fetch(server, BLOB.digest)) for _ in range(3)]
        await asyncio.sleep(0)
        await has_begun(one.join(server, BLOB.digest))
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        server.faults.release.set()
        await ended(one)
        assert_stored(tmp_path)
    assert server.fetches(BLOB.digest) == 1


async def test_client_that_began_it_may_go(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, stall_at=HALF)
    async with worker(tmp_path, server) as one:
        first = asyncio.create_task(one.fetch(server, BLOB.digest))
        await asyncio.sleep(0)
        second = asyncio.create_task(one.fetch(server, BLOB.digest))
        await has_begun(one.join(server, BLOB.digest))
        first.cancel()
        server.faults.release.set()
        assert await second == BLOB.content
    assert server.fetches(BLOB.digest) == 1


async def test_reader_that_takes_nothing_slows_nobody(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream)
    async with worker(tmp_path, server) as one:
        slow = await one.join(server, BLOB.digest).open()
        assert await one.fetch(server, BLOB.digest) == BLOB.content
        await ended(one)
        assert await read_along(slow) == BLOB.content


@pytest.mark.parametrize("content", [b"", b"x"], ids=["empty", "one byte"])
async def test_small_blobs(upstream: Start, tmp_path: Path, content: bytes) -> None:
    small = blob(content)
    server = serving(upstream, small)
    async with worker(tmp_path, server) as one:
        assert await one.fetch(server, small.digest) == content
        await ended(one, digest=small.digest)
        assert await one.fetch(server, small.digest) == content
    assert server.fetches(small.digest) == 1
    assert_stored(tmp_path, small)


async def test_sha512(upstream: Start, tmp_path: Path) -> None:
    content = Blob(digest_of(BLOB.content, "sha512"), BLOB.content, "")
    server = serving(upstream, content)
    async with worker(tmp_path, server) as one:
        assert await one.fetch(server, content.digest) == BLOB.content
        await ended(one, digest=content.digest)
    assert files_in(tmp_path, "blobs") == [content.digest[7:]]


# --- upstream's faults -------------------------------------------------------------------------------------------


async def test_broken_transfer_is_resumed(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, truncate_at=500_000, truncate_times=1)
    async with worker(tmp_path, server) as one:
        assert await one.fetch(server, BLOB.digest) == BLOB.content
        await ended(one)
    first, second = ranges(server)
    assert first == ""
    start, _, end = second.removeprefix("bytes=").partition("-")
    assert 0 < int(start) <= 500_000
    assert int(end) == SIZE - 1
    assert_stored(tmp_path)


async def test_many_breaks_are_resumed_while_there_is_progress(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, truncate_at=100_000, truncate_times=-1)
    async with worker(tmp_path, server) as one:
        assert await one.fetch(server, BLOB.digest) == BLOB.content
    assert server.fetches(BLOB.digest) >= SIZE // 100_000


async def test_upstream_without_ranges_starts_again(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, truncate_at=500_000, truncate_times=1, no_range=True)
    async with worker(tmp_path, server) as one:
        contents = await asyncio.gather(*(one.fetch(server, BLOB.digest) for _ in range(5)))
        assert set(contents) == {BLOB.content}
        await ended(one)
    assert server.fetches(BLOB.digest) == 2
    assert_stored(tmp_path)


async def test_breaks_without_progress_end_it(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, truncate_at=300_000, truncate_times=-1, no_range=True)
    async with worker(tmp_path, server) as one:
        content = bytearray()
        with pytest.raises(UpstreamUnavailable):
            await read_into(content, await one.join(server, BLOB.digest).open())
        assert BLOB.content.startswith(content)
        assert len(content) < SIZE
        server.faults.truncate_at = None
        assert await one.fetch(server, BLOB.digest) == BLOB.content


@pytest.mark.parametrize(("piece", "is_enough"), [(10, False), (5000, True)])
async def test_an_upstream_that_trickles_is_given_up(
    upstream: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, is_enough: bool
) -> None:
    monkeypatch.setattr(lead_module, "_LEAST_IN_S", 1.0)
    monkeypatch.setattr(lead_module, "_LEAST_BYTES", 1000)
    content = blob(random_blob(60_000, seed=12))
    server = upstream(faults=Faults(chunk_bytes=piece, delay_s=0.2))
    server.add_blob(REPOSITORY, content)
    async with worker(tmp_path, server) as one:
        if is_enough:
            assert await one.fetch(server, content.digest) == content.content
        else:
            with pytest.raises(UpstreamTimeout, match=r"upstream gave [0-9]+ bytes of"):
                await one.fetch(server, content.digest)
        await ended(one, digest=content.digest)
    assert ranges(server) == [""]


async def test_wrong_range_ends_it_and_the_next_pull_is_fine(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, truncate_at=500_000, truncate_times=1, wrong_range=True)
    async with worker(tmp_path, server) as one:
        with pytest.raises(UpstreamError, match="asked for byte"):
            await one.fetch(server, BLOB.digest)
        # It would be the same answer again for what a resumed fetch asks for.
        assert await one.fetch(server, BLOB.digest) == BLOB.content
        await ended(one)
    assert_stored(tmp_path)


@pytest.mark.parametrize(
    "faults",
    [
        {"corrupt_last_byte": True},
        {"extra_bytes": 1},
        {"extra_bytes": 200_000},
        {"extra_bytes": 1, "no_content_length": True},
    ],
    ids=["last byte", "one more", "many more", "one more, unannounced"],
)
@pytest.mark.parametrize("readers", [1, 20])
async def test_wrong_content_reaches_nobody_whole(
    upstream: Start, tmp_path: Path, faults: dict[str, Any], readers: int
) -> None:
    server = serving(upstream, **faults, delay_s=0.001)
    contents = [bytearray() for _ in range(readers)]

    async def read(one: Worker, content: bytearray) -> None:
        with pytest.raises(ContentMismatch):
            await read_into(content, await one.join(server, BLOB.digest).open())

    async with worker(tmp_path, server) as one:
        await asyncio.gather(*(read(one, content) for content in contents))
        await ended(one)
        assert_nothing_stays(tmp_path)
        for content in contents:
            assert len(content) < SIZE + server.faults.extra_bytes  # less than what was announced
            assert (BLOB.content + bytes(server.faults.extra_bytes)).startswith(content)
        server.faults.corrupt_last_byte, server.faults.extra_bytes = False, 0
        assert await one.fetch(server, BLOB.digest) == BLOB.content
        await ended(one)
    assert_stored(tmp_path)


async def test_nothing_of_a_small_wrong_blob_is_read(upstream: Start, tmp_path: Path) -> None:
    small = blob(b"0123456789")
    server = serving(upstream, small, corrupt_last_byte=True)
    content = bytearray()
    async with worker(tmp_path, server) as one:
        with pytest.raises(DigestMismatch):
            await read_into(content, await one.join(server, small.digest).open())
        assert content == b""
        await ended(one, digest=small.digest)
    assert_nothing_stays(tmp_path)


async def test_size_that_a_manifest_promised_is_kept(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream)
    async with worker(tmp_path, server) as one:
        with pytest.raises(SizeMismatch, match=f"{SIZE - 1} bytes, and now {SIZE}"):
            await one.join(server, BLOB.digest, SIZE - 1).open()
        assert await read_along(await one.join(server, BLOB.digest, SIZE).open()) == BLOB.content


@pytest.mark.parametrize("stall_at", [600_000, -1], ids=["in the body", "before the head"])
async def test_stalled_upstream(upstream: Start, tmp_path: Path, stall_at: int) -> None:
    server = serving(upstream, stall_at=stall_at)
    async with worker(tmp_path, server, idle_timeout_s=1.0, response_timeout_s=1.0) as one:
        if stall_at == -1:
            with pytest.raises(UpstreamTimeout):
                await one.fetch(server, BLOB.digest)
            assert_nothing_stays_but_an_empty_spool(tmp_path)
        else:
            assert await one.fetch(server, BLOB.digest) == BLOB.content
            await ended(one)
            assert [part.partition("-")[2] for part in ranges(server)] == ["", f"{SIZE - 1}"]
            assert_stored(tmp_path)


def assert_nothing_stays_but_an_empty_spool(root: Path) -> None:
    assert files_in(root, "blobs") == []
    assert sum(path.stat().st_size for path in (root / "spool").iterdir()) == 0


@pytest.mark.parametrize("truncate_at", [None, 500_000], ids=["whole", "resumed"])
async def test_unknown_size(upstream: Start, tmp_path: Path, truncate_at: int | None) -> None:
    server = serving(upstream, no_content_length=True, truncate_at=truncate_at)
    async with worker(tmp_path, server) as one:
        fill = one.join(server, BLOB.digest)
        reader = await fill.open()
        sizes = [fill.size]
        assert await read_along(reader) == BLOB.content
        assert [*sizes, fill.size] == [None, SIZE]
        await ended(one)
    assert_stored(tmp_path)


async def test_missing_blob_is_missing_for_all_and_not_for_ever(upstream: Start, tmp_path: Path) -> None:
    server = upstream()
    server.add_blob(REPOSITORY, blob(b"another"))
    async with worker(tmp_path, server) as one:
        ends = await asyncio.gather(*(one.fetch(server, BLOB.digest) for _ in range(5)), return_exceptions=True)
        assert [type(end) for end in ends] == [BlobUnknown] * 5
        server.add_blob(REPOSITORY, BLOB)
        assert await one.fetch(server, BLOB.digest) == BLOB.content


# --- what is counted ---------------------------------------------------------------------------------------------


async def test_fills_are_counted(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, truncate_at=500_000, truncate_times=1, delay_s=0.001)
    async with worker(tmp_path, server) as one:
        await asyncio.gather(*(one.fetch(server, BLOB.digest) for _ in range(5)))
        await ended(one)
        assert one.fills.stats == FillStats(begun=1, followers=4, bytes=SIZE, resumed=1)
        assert await one.fetch(server, BLOB.digest) == BLOB.content
        await ended(one)
        assert one.fills.stats.begun == 1


async def test_failed_fills_are_counted(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, corrupt_last_byte=True)
    missing = blob(b"nowhere")
    async with worker(tmp_path, server) as one:
        with pytest.raises(DigestMismatch):
            await one.fetch(server, BLOB.digest)
        with pytest.raises(BlobUnknown):
            await one.fetch(server, missing.digest)
        await ended(one)
        assert one.fills.stats == FillStats(begun=2, bytes=SIZE, failed=2, mismatched=1)


async def test_who_follows_another_process_begins_nothing(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, stall_at=HALF)
    async with worker(tmp_path, server) as one, worker(tmp_path, server) as two:
        assert await fetch_along(server, one, two) == [BLOB.content] * 2
        assert (two.fills.stats.begun, two.fills.stats.bytes) == (0, 0)


# --- what was left behind ----------------------------------------------------------------------------------------


def leave(root: Path, content: bytes, size: str) -> None:
    """A spool as a process leaves it that was killed."""
    folder = root / "spool"
    folder.mkdir(parents=True)
    name = spool_name(ORIGIN, BLOB.digest)
    (folder / name).write_bytes(content)
    if size:
        (folder / f"{name}.size").write_text(size)


@pytest.mark.parametrize(
    ("content", "size", "asked"),
    [
        (BLOB.content[:HALF], f"{SIZE}\n", [f"bytes={HALF}-{SIZE - 1}"]),
        (BLOB.content[:HALF], "-\n", [f"bytes={HALF}-"]),
        (BLOB.content, f"{SIZE}\n", []),
        (b"", f"{SIZE}\n", [""]),
        (BLOB.content[:HALF], "", [""]),
        (BLOB.content[:HALF], f"{SIZE}", [""]),
        (b"x" * SIZE, "", [""]),
    ],
    ids=[
        "half",
        "half of unknown size",
        "all",
        "nothing",
        "no size file",
        "size being written",
        "garbage without size",
    ],
)
async def test_spool_of_a_dead_process_is_used(
    upstream: Start, tmp_path: Path, content: bytes, size: str, asked: list[str]
) -> None:
    leave(tmp_path, content, size)
    server = serving(upstream)
    async with worker(tmp_path, server) as one:
        assert await one.fetch(server, BLOB.digest) == BLOB.content
        await ended(one)
    assert ranges(server) == asked
    assert_stored(tmp_path)


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (bytes(HALF), f"{SIZE}\n"),
        (bytes(SIZE), f"{SIZE}\n"),
        (BLOB.content + b"x", f"{SIZE}\n"),
        (BLOB.content + b"x", "-\n"),
        (BLOB.content, "-\n"),
        (BLOB.content[:HALF], f"{SIZE - 1}\n"),
        (BLOB.content[:HALF], f"{SIZE + 1}\n"),
    ],
    ids=[
        "lost bytes",
        "all bytes lost",
        "too long",
        "too long, unknown",
        "whole, unknown",
        "less than is",
        "more than is",
    ],
)
async def test_damaged_spool_fails_at_most_one_pull(upstream: Start, tmp_path: Path, content: bytes, size: str) -> None:
    leave(tmp_path, content, size)
    server = serving(upstream)
    async with worker(tmp_path, server) as one:
        try:
            first = await one.fetch(server, BLOB.digest)
        except WaveError:
            first = b""
        assert first in (b"", BLOB.content)
        await ended(one)
        assert await one.fetch(server, BLOB.digest) == BLOB.content
        await ended(one)
    assert_stored(tmp_path)


# --- two processes -----------------------------------------------------------------------------------------------
# A lock belongs to an open file: two Fills in one process are to each other what two processes are.


async def test_two_processes_share_a_fetch(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, stall_at=HALF)
    async with worker(tmp_path, server) as one, worker(tmp_path, server) as two:
        leading = asyncio.create_task(one.fetch(server, BLOB.digest))
        await asyncio.sleep(0)
        await has_begun(one.join(server, BLOB.digest))
        fill = two.join(server, BLOB.digest)
        reader = await fill.open()
        assert fill.size == SIZE
        await has_begun(fill)
        server.faults.release.set()
        assert await read_along(reader) == await leading == BLOB.content
        await ended(one, two)
    assert server.fetches(BLOB.digest) == 1
    assert_stored(tmp_path)


async def test_many_readers_of_many_processes(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, delay_s=0.002)
    async with worker(tmp_path, server) as one, worker(tmp_path, server) as two, worker(tmp_path, server) as three:
        contents = await asyncio.gather(
            *(who.fetch(server, BLOB.digest) for _ in range(20) for who in (one, two, three))
        )
    assert set(contents) == {BLOB.content}
    assert server.fetches(BLOB.digest) == 1


async def test_processes_that_come_at_any_moment_fetch_once(upstream: Start, tmp_path: Path) -> None:
    contents = [blob(random_blob(100_000, seed=n)) for n in range(40)]
    server = upstream()
    for content in contents:
        server.add_blob(REPOSITORY, content)

    async def come(who: Worker, content: Blob, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        assert await who.fetch(server, content.digest) == content.content

    async with worker(tmp_path, server) as one, worker(tmp_path, server) as two:
        for number, content in enumerate(contents):
            await asyncio.gather(come(one, content, 0), come(two, content, number / 5000))
    assert [server.fetches(content.digest) for content in contents] == [1] * 40


async def test_follower_of_unknown_size(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, stall_at=HALF, no_content_length=True)
    async with worker(tmp_path, server) as one, worker(tmp_path, server) as two:
        assert await fetch_along(server, one, two) == [BLOB.content] * 2
    assert server.fetches(BLOB.digest) == 1


@pytest.mark.parametrize("held", [False, True], ids=["alone", "while a slow client reads"])
async def test_follower_goes_on_when_the_leader_dies(upstream: Start, tmp_path: Path, held: bool) -> None:
    server = serving(upstream, stall_at=HALF)
    async with worker(tmp_path, server) as two:
        async with worker(tmp_path, server) as one:
            fill = one.join(server, BLOB.digest)
            slow = await fill.open()
            await has_begun(fill)
            following = asyncio.create_task(two.fetch(server, BLOB.digest))
            await asyncio.sleep(0)
            await has_begun(two.join(server, BLOB.digest))
            if not held:
                slow.close()
        server.faults.stall_at = None
        assert await following == BLOB.content
        await ended(two)
        if held:
            with pytest.raises(UpstreamUnavailable):
                await read_along(slow)
    start = int(ranges(server)[1].removeprefix("bytes=").partition("-")[0])
    assert 0 < start <= HALF
    assert_stored(tmp_path)


async def test_failed_fetch_is_not_kept_waiting_by_a_slow_client(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, truncate_at=300_000, truncate_times=-1, no_range=True)
    async with worker(tmp_path, server) as one, worker(tmp_path, server) as two:
        fill = one.join(server, BLOB.digest)
        slow = await fill.open()
        await ended(one)
        server.faults.truncate_at = None
        async with patience():
            assert await two.fetch(server, BLOB.digest) == BLOB.content
            assert await one.fetch(server, BLOB.digest) == BLOB.content
        with pytest.raises(UpstreamUnavailable):
            await read_along(slow)


async def test_wrong_content_reaches_no_follower_whole(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, stall_at=HALF, corrupt_last_byte=True)
    content = bytearray()
    async with worker(tmp_path, server) as one, worker(tmp_path, server) as two:
        leading = asyncio.create_task(one.fetch(server, BLOB.digest))
        await asyncio.sleep(0)
        await has_begun(one.join(server, BLOB.digest))
        fill = two.join(server, BLOB.digest)
        reader = await fill.open()
        await has_begun(fill)
        server.faults.release.set()
        with pytest.raises(ContentMismatch):
            await read_into(content, reader)
        with pytest.raises(ContentMismatch):
            await leading
        await ended(two)
        assert_nothing_stays(tmp_path)
    assert len(content) < SIZE
    assert BLOB.content.startswith(content)


# --- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A data folder with two megabytes of room."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system takes root and leave to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


LARGE = blob(random_blob(3 << 20, seed=12))


async def test_blob_that_finds_no_room_is_passed_through(upstream: Start, small_disk: Path) -> None:
    server = serving(upstream, LARGE)
    async with worker(small_disk, server) as one:
        for _ in range(2):
            opened = await one.repositories.open_blob(server.address, REPOSITORY, LARGE.digest)
            assert (opened.size, opened.state, opened.source) == (len(LARGE.content), "MISS", None)
            assert await read_blob(opened) == LARGE.content
        await ended(one, digest=LARGE.digest)
        assert_nothing_stays(small_disk)


async def test_stream_past_a_full_disk_is_verified(upstream: Start, small_disk: Path) -> None:
    server = serving(upstream, LARGE, corrupt_last_byte=True)
    async with worker(small_disk, server) as one:
        opened = await one.repositories.open_blob(server.address, REPOSITORY, LARGE.digest)
        assert opened.stream is not None
        seen = bytearray()
        with pytest.raises(DigestMismatch):
            async for chunk in opened.stream:
                seen += chunk
        await opened.stream.aclose()
        assert len(seen) < len(LARGE.content)


async def test_stream_past_a_full_disk_may_be_left(upstream: Start, small_disk: Path) -> None:
    server = serving(upstream, LARGE, stall_at=HALF)
    async with worker(small_disk, server) as one:
        opened = await one.repositories.open_blob(server.address, REPOSITORY, LARGE.digest)
        assert opened.stream is not None
        async for chunk in opened.stream:
            assert chunk
            break
        await opened.stream.aclose()  # the worker's end checks that the connection is given back


async def test_what_is_not_used_makes_room(upstream: Start, small_disk: Path) -> None:
    server = serving(upstream)
    old = [blob(random_blob(600_000, seed=n)) for n in range(3)]
    async with worker(small_disk, server) as one:
        for number, content in enumerate(old):
            one.blobs.put(content.digest, content.content)
            os.utime(one.blobs.path(content.digest), (number, number))
        assert await one.fetch(server, BLOB.digest) == BLOB.content
        await ended(one)
        assert one.blobs.path(BLOB.digest).exists()
        assert not one.blobs.path(old[0].digest).exists()


async def test_disk_that_fills_up_midway_cuts_readers_and_leaves_nothing(upstream: Start, small_disk: Path) -> None:
    server = serving(upstream, LARGE, no_content_length=True)
    content = bytearray()
    async with worker(small_disk, server) as one:
        with pytest.raises(StorageFull):
            await read_into(content, await one.join(server, LARGE.digest).open())
        await ended(one, digest=LARGE.digest)
        assert_nothing_stays(small_disk)
    assert LARGE.content.startswith(content)
    assert len(content) < len(LARGE.content)


async def test_other_processes_pass_a_full_disk_by_too(upstream: Start, small_disk: Path) -> None:
    server = serving(upstream, LARGE, stall_at=-1)
    async with worker(small_disk, server) as one, worker(small_disk, server) as two:
        opening = [
            asyncio.create_task(who.repositories.open_content(ORIGIN, LARGE.digest, who.opener(server, LARGE.digest)))
            for who in (one, two)
        ]
        await eventually(lambda: one.is_filling(LARGE.digest) and two.is_filling(LARGE.digest))
        await asyncio.sleep(0.02)  # the second now follows the first
        server.faults.stall_at = None
        server.faults.release.set()
        for task in opening:
            assert await read_blob(await task) == LARGE.content
