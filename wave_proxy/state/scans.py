"""What scans have found, kept as long as their records: owner of ``wave:scan:*``.

``wave:scan:<id>`` is a hash: ``counts`` (JSON, by severity), ``found`` (the vulnerabilities that are shown, compressed
JSON) and ``spdx`` (the list of packages, compressed, where there is one).
"""

import asyncio
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import orjson

from wave_proxy.image.scan import Vulnerability
from wave_proxy.state.redis import Redis, answered

MAX_SPDX_BYTES = 8 << 20  # compressed: about 100 MB of text, or 50,000 packages with their files

_PIECE_BYTES, _PACKED_BYTES = 1 << 18, 1 << 16


class ScanReports:
    """Reports of scans that have succeeded."""

    def __init__(self, redis: Redis, retention_s: float = 7 * 86400) -> None:
        self._redis = redis
        self._retention_s = max(int(retention_s), 1)

    async def keep(self, scan_id: str, counts: Mapping[str, int], found: Sequence[Vulnerability], spdx: bytes) -> bool:
        """Keep a report in the place of an earlier one; False when it is without its SPDX document, as that is too
        large. Raises StateUnavailable, as all of these do.
        """
        packed = await asyncio.to_thread(zlib.compress, spdx) if spdx else b""
        fits = len(packed) <= MAX_SPDX_BYTES
        listed = orjson.dumps([[getattr(one, name) for name in Vulnerability.__slots__] for one in found])
        fields: dict[Any, Any] = {"counts": orjson.dumps(dict(counts)), "found": zlib.compress(listed)}
        if packed and fits:
            fields["spdx"] = packed
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(_key(scan_id))
            pipe.hset(_key(scan_id), mapping=fields)
            pipe.expire(_key(scan_id), self._retention_s)
            await pipe.execute()
        return fits

    async def find_counts(self, scan_id: str) -> dict[str, int]:
        """How many vulnerabilities have each severity; empty when there is no report (any more), too."""
        async with answered():
            kept = cast(bytes | None, await self._redis.hget(_key(scan_id), "counts"))
        return cast(dict[str, int], orjson.loads(kept)) if kept else {}

    async def find_vulnerabilities(self, scan_id: str) -> list[Vulnerability]:
        """The vulnerabilities that are shown, in their order; empty when there is no report (any more), too."""
        async with answered():
            kept = cast(bytes | None, await self._redis.hget(_key(scan_id), "found"))
        return [Vulnerability(*members) for members in orjson.loads(zlib.decompress(kept))] if kept else []

    async def find_spdx(self, scan_id: str) -> Iterator[bytes] | None:
        """The SPDX document (JSON) in pieces, as all of it may be large; None when there is none (any more)."""
        async with answered():
            kept = cast(bytes | None, await self._redis.hget(_key(scan_id), "spdx"))
        return _unpacked(kept) if kept else None


def _unpacked(packed: bytes) -> Iterator[bytes]:
    """The content in pieces, none of them large, whatever the packed ones stand for."""
    unpacker = zlib.decompressobj()
    for start in range(0, len(packed), _PACKED_BYTES):
        left, more = packed[start : start + _PACKED_BYTES], True
        while more:
            piece = unpacker.decompress(left, _PIECE_BYTES)
            left, more = unpacker.unconsumed_tail, len(piece) == _PIECE_BYTES
            if piece:
                yield piece


def _key(scan_id: str) -> str:
    return f"wave:scan:{scan_id}"
