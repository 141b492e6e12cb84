"""What is kept of scans, in a real Redis."""

from random import Random

import pytest

from tests.patience import PATIENCE_S
from wave_proxy.image.scan import Vulnerability
from wave_proxy.state import scans
from wave_proxy.state.redis import connect
from wave_proxy.state.scans import ScanReports

SCAN_ID = f"sc-{1:016x}_1"
FOUND = [Vulnerability("CVE-1", "HIGH", "t", "p", "1", "2", "u"), Vulnerability("CVE-2", "UNKNOWN")]
SPDX = b'{"spdxVersion": "SPDX-2.3"}' + b" " * 10_000


async def test_a_report_is_kept_whole_and_for_its_time(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        reports = ScanReports(redis, 600)
        assert await reports.keep(SCAN_ID, {"HIGH": 7}, FOUND, SPDX)
        assert await reports.find_counts(SCAN_ID) == {"HIGH": 7}
        assert await reports.find_vulnerabilities(SCAN_ID) == FOUND
        assert b"".join(await reports.find_spdx(SCAN_ID) or ()) == SPDX
        assert await redis.keys("*") == [f"wave:scan:{SCAN_ID}".encode()]
        assert 600 - PATIENCE_S < await redis.ttl(f"wave:scan:{SCAN_ID}") <= 600
        assert (await redis.memory_usage(f"wave:scan:{SCAN_ID}") or 0) in range(1, 2000)  # it is compressed


async def test_a_later_report_takes_the_place_of_all_of_the_earlier_one(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        reports = ScanReports(redis)
        await reports.keep(SCAN_ID, {"HIGH": 1}, FOUND, SPDX)
        await reports.keep(SCAN_ID, {}, [], b"")
        assert await reports.find_counts(SCAN_ID) == {}
        assert await reports.find_vulnerabilities(SCAN_ID) == []
        assert await reports.find_spdx(SCAN_ID) is None


async def test_a_document_that_is_too_large_is_left_out(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "MAX_SPDX_BYTES", 1000)
    async with connect(redis_url) as redis:
        reports = ScanReports(redis)
        assert not await reports.keep(SCAN_ID, {"HIGH": 1}, FOUND, Random(1).randbytes(2000))
        assert await reports.find_spdx(SCAN_ID) is None
        assert await reports.find_vulnerabilities(SCAN_ID) == FOUND


@pytest.mark.parametrize("content", [bytes(3_000_000), Random(2).randbytes(900_000), b"x", SPDX * 100])
async def test_a_document_comes_in_pieces(redis_url: str, content: bytes) -> None:
    async with connect(redis_url) as redis:
        reports = ScanReports(redis)
        assert await reports.keep(SCAN_ID, {}, [], content)
        pieces = list(await reports.find_spdx(SCAN_ID) or ())
        assert b"".join(pieces) == content
        assert max(map(len, pieces)) <= 1 << 18


async def test_there_is_none(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        reports = ScanReports(redis)
        assert await reports.find_counts(SCAN_ID) == {}
        assert await reports.find_vulnerabilities(SCAN_ID) == []
        assert await reports.find_spdx(SCAN_ID) is None
