"""A blob in parts over several connections, and what a registry is spared."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.images import Blob, blob, random_blob
from bench.upstream import Faults, Upstream
from tests.cached import REPOSITORY, files_in, read_into, worker
from tests.outgoing import connections_in_use, registry_at
from tests.patience import eventually
from wave_proxy.errors import ContentMismatch, UpstreamUnavailable
from wave_proxy.upstream import transfer
from wave_proxy.upstream.limits import Limit, Limits
from wave_proxy.upstream.registry import Registry

Start = Callable[..., Upstream]

PART = 100_000
SIZE = 950_001
BLOB = blob(random_blob(SIZE, seed=21))
PARTS = [f"bytes={start}-{min(start + PART, SIZE) - 1}" for start in range(0, SIZE, PART)]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", PART)
    monkeypatch.setattr("wave_proxy.cache.lead._BACKOFF_S", 0.005)


def serving(upstream: Start, content: Blob = BLOB, **faults: Any) -> Upstream:
    server = upstream(faults=Faults(chunk_bytes=1 << 14, **faults))
    server.add_blob(REPOSITORY, content)
    return server


def ranges(server: Upstream) -> list[str]:
    """The Range header of each GET, empty where there was none."""
    return [request.headers.get("Range", "") for request in server.log if request.method == "GET"]


def bytes_asked(server: Upstream) -> int:
    bounds = (text.removeprefix("bytes=").split("-") for text in ranges(server))
    return sum(min(int(last), SIZE - 1) - int(first) + 1 for first, last in bounds)


async def read(registry: Registry, server: Upstream, content: Blob = BLOB, start: int = 0) -> bytes:
    size = len(content.content) if start else None
    async with registry.open_blob(server.address, REPOSITORY, content.digest, start=start, size=size) as stream:
        assert stream.size == len(content.content)
        return bytes(stream.start) + b"".join([chunk async for chunk in stream.chunks])


# --- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [2, 4, 16])
async def test_parts_come_out_in_order_and_each_once(upstream: Start, parallel: int) -> None:
    server = serving(upstream, delay_s=0.001)
    async with registry_at(server, parallel=parallel) as registry:
        assert await read(registry, server) == BLOB.content
    assert sorted(ranges(server)) == sorted(PARTS)


async def test_so_many_parts_come_at_the_same_time_and_no_more(upstream: Start) -> None:
    server = serving(upstream, stall_at=50_000)
    async with registry_at(server, parallel=3) as registry:
        reading = asyncio.create_task(read(registry, server))
        await eventually(lambda: len(ranges(server)) == 3)
        await asyncio.sleep(0.05)  # for a fourth
        assert sorted(ranges(server)) == sorted(PARTS[:3])
        server.faults.release.set()
        assert await reading == BLOB.content


async def test_nobody_who_reads_slowly_makes_more_than_so_many_parts_come(upstream: Start) -> None:
    server = serving(upstream)
    async with (
        registry_at(server, parallel=3) as registry,
        registry.open_blob(server.address, REPOSITORY, BLOB.digest) as stream,
    ):
        async for _ in stream.chunks:
            break
        await asyncio.sleep(0.05)
        assert len(ranges(server)) <= 3


@pytest.mark.parametrize("start", [1, PART, SIZE - 1])
async def test_rest_of_a_blob_in_parts(upstream: Start, start: int) -> None:
    server = serving(upstream)
    async with registry_at(server, parallel=3) as registry:
        assert await read(registry, server, start=start) == bytes(start) + BLOB.content[start:]
    assert bytes_asked(server) == SIZE - start


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1])
async def test_small_blobs(upstream: Start, size: int) -> None:
    small = blob(BLOB.content[:size])
    server = serving(upstream, small)
    async with registry_at(server, parallel=3) as registry:
        assert await read(registry, server, small) == small.content


async def test_part_that_breaks_off_is_gone_on_with(upstream: Start) -> None:
    server = serving(upstream, truncate_at=70_000, truncate_times=3, delay_s=0.002)
    async with registry_at(server, parallel=3) as registry:
        assert await read(registry, server) == BLOB.content
    again = [text for text in ranges(server) if text not in PARTS]
    assert len(again) == 3
    assert all(int(text.split("-")[1]) % PART in (PART - 1, SIZE % PART - 1) for text in again)


async def test_registry_that_ignores_ranges_is_read_whole(upstream: Start) -> None:
    server = serving(upstream, no_range=True)
    async with registry_at(server, parallel=3) as registry:
        assert await read(registry, server) == BLOB.content
    assert server.fetches(BLOB.digest) == 1


async def test_registry_that_gives_wrong_parts_is_asked_for_the_whole(upstream: Start) -> None:
    server = serving(upstream, wrong_range=True)
    async with registry_at(server, parallel=3) as registry:
        for _ in range(2):
            assert await read(registry, server) == BLOB.content
    assert ranges(server) == [PARTS[0], "", ""]


@pytest.mark.parametrize("status", [400, 416, 501])
async def test_registry_that_refuses_parts_is_asked_for_the_whole(upstream: Start, status: int) -> None:
    server = serving(upstream, status={"/blobs/": status}, fail_times=1)
    async with registry_at(server, parallel=3) as registry:
        assert await read(registry, server) == BLOB.content
    assert ranges(server) == [PARTS[0], ""]


async def test_fill_goes_on_where_a_registry_stops_giving_parts(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, delay_s=0.001)
    async with worker(tmp_path, server, parallel=2) as one:
        reader = await one.join(server, BLOB.digest).open()
        server.faults.no_range = True
        content = bytearray()
        await read_into(content, reader)
        assert content == BLOB.content
    assert ranges(server)[-1].endswith(f"-{SIZE - 1}")  # what a registry without ranges answers from 0 on


async def test_part_that_fails_ends_it_in_its_turn(upstream: Start) -> None:
    server = serving(upstream, delay_s=0.001)
    content = bytearray()
    async with registry_at(server, parallel=2, attempts=1) as registry:
        with pytest.raises(UpstreamUnavailable):
            async with registry.open_blob(server.address, REPOSITORY, BLOB.digest) as stream:
                server.faults.status["/blobs/"] = 503
                async for chunk in stream.chunks:
                    content += chunk
    assert BLOB.content.startswith(content)
    assert PART <= len(content) < SIZE


async def test_fill_in_parts_is_verified(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, corrupt_last_byte=True)
    content = bytearray()
    async with worker(tmp_path, server, parallel=4) as one:
        with pytest.raises(ContentMismatch):
            await read_into(content, await one.join(server, BLOB.digest).open())
        await eventually(lambda: not one.is_filling(BLOB.digest))
        assert files_in(tmp_path, "spool", "blobs") == []
        assert len(content) < SIZE
        server.faults.corrupt_last_byte = False
        server.clear_log()
        assert await one.fetch(server, BLOB.digest) == BLOB.content
    assert bytes_asked(server) == SIZE


async def test_other_processes_read_along_in_parts(upstream: Start, tmp_path: Path) -> None:
    server = serving(upstream, delay_s=0.001)
    async with worker(tmp_path, server, parallel=4) as one, worker(tmp_path, server, parallel=4) as two:
        contents = await asyncio.gather(*(who.fetch(server, BLOB.digest) for who in (one, two) for _ in range(5)))
    assert set(contents) == {BLOB.content}
    assert bytes_asked(server) == SIZE


async def test_left_in_the_middle_nothing_stays(upstream: Start) -> None:
    server = serving(upstream, stall_at=50_000)
    before = asyncio.all_tasks()
    async with registry_at(server, parallel=4) as registry:
        reading = asyncio.create_task(read(registry, server))
        await eventually(lambda: len(ranges(server)) == 4)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert connections_in_use(registry._egress) == 0
        assert asyncio.all_tasks() == before


# --- limits ------------------------------------------------------------------------------------------------------


def limited(server: Upstream, connections: int | None = None, bytes_per_second: int | None = None) -> Limits:
    return Limits({server.address: Limit(connections, bytes_per_second)})


@pytest.mark.parametrize("own", [True, False], ids=["of its own", "by default"])
async def test_no_more_than_so_many_connections(upstream: Start, own: bool) -> None:
    server = serving(upstream, stall_at=50_000)
    limits = limited(server, 2) if own else Limits(default=Limit(2))
    async with registry_at(server, limits=limits) as registry:
        reading = [asyncio.create_task(read(registry, server)) for _ in range(6)]
        await eventually(lambda: len(ranges(server)) == 2)
        await asyncio.sleep(0.05)
        assert len(ranges(server)) == connections_in_use(registry._egress) == 2
        server.faults.release.set()
        assert set(await asyncio.gather(*reading)) == {BLOB.content}


async def test_connections_are_given_in_the_order_of_asking(upstream: Start) -> None:
    blobs = [blob(random_blob(1000, seed=n)) for n in range(8)]
    server = upstream()
    for content in blobs:
        server.add_blob(REPOSITORY, content)
    async with registry_at(server, limits=limited(server, 1)) as registry:
        await asyncio.gather(*(read(registry, server, content) for content in blobs))
    assert [request.path.rpartition("/")[2] for request in server.log] == [content.digest for content in blobs]


async def test_who_gives_up_waiting_takes_no_connection_with_him(upstream: Start) -> None:
    server = serving(upstream, stall_at=50_000)
    async with registry_at(server, limits=limited(server, 1)) as registry:
        first, second, third = (asyncio.create_task(read(registry, server)) for _ in range(3))
        await eventually(lambda: len(ranges(server)) == 1)
        second.cancel()
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        server.faults.release.set()
        assert await third == BLOB.content
        for _ in range(3):  # released once: still one at a time
            assert await read(registry, server) == BLOB.content
        server.faults.release.clear()
        last = [asyncio.create_task(read(registry, server)) for _ in range(2)]
        asked = len(ranges(server))
        await eventually(lambda: len(ranges(server)) > asked)
        assert connections_in_use(registry._egress) == 1
        server.faults.release.set()
        await asyncio.gather(*last)


async def test_parts_share_a_single_connection(upstream: Start) -> None:
    server = serving(upstream)
    async with registry_at(server, limits=limited(server, 1), parallel=4) as registry:
        assert await asyncio.gather(*(read(registry, server) for _ in range(3))) == [BLOB.content] * 3


async def test_heads_and_blobs_wait_for_each_other(upstream: Start) -> None:
    server = serving(upstream, stall_at=50_000)
    async with registry_at(server, limits=limited(server, 1)) as registry:
        reading = asyncio.create_task(read(registry, server))
        await eventually(lambda: len(ranges(server)) == 1)
        asking = asyncio.create_task(registry.head_blob(server.address, REPOSITORY, BLOB.digest))
        await asyncio.sleep(0.05)
        assert [request.method for request in server.log] == ["GET"]
        server.faults.release.set()
        assert (await asking, await reading) == (SIZE, BLOB.content)


async def test_no_head_falls_back_to_get_within_one_connection(upstream: Start) -> None:
    server = serving(upstream, no_head=True)
    async with registry_at(server, limits=limited(server, 1)) as registry:
        assert await registry.head_blob(server.address, REPOSITORY, BLOB.digest) == SIZE


@pytest.mark.parametrize("parallel", [1, 3])
async def test_blobs_share_a_rate(upstream: Start, parallel: int) -> None:
    server = serving(upstream)
    rate = 10 * SIZE
    async with registry_at(server, limits=limited(server, None, rate), parallel=parallel) as registry:
        loop = asyncio.get_running_loop()
        began = loop.time()
        contents = await asyncio.gather(*(read(registry, server) for _ in range(3)))
        duration_s = loop.time() - began
    assert contents == [BLOB.content] * 3
    assert duration_s >= (3 * SIZE - rate // 10) / rate  # all but the first step has to be waited for


@pytest.mark.parametrize(
    ("limit", "workers", "part"),
    [
        (Limit(8, 1000), 4, Limit(2, 250)),
        (Limit(7, 7), 4, Limit(1, 1)),
        (Limit(2, 3), 4, Limit(1, 1)),
        (Limit(), 4, Limit()),
        (Limit(8, None), 1, Limit(8, None)),
    ],
)
def test_part_of_a_worker(limit: Limit, workers: int, part: Limit) -> None:
    assert limit.share(workers) == part
