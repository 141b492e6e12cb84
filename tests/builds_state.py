"""Builds for tests of their state: made, claimed, and looked at in Redis."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.state.builds import BuildLimits, BuildStore, Claim
from wave_proxy.state.redis import Redis, connect

STREAM = "wave:{builds}:ready"
DIGEST = f"sha256:{'a' * 64}"
ONE_SLOT = BuildLimits(1)
FOUR_SLOTS = BuildLimits(4)


def spec(number: int = 0, owner: str = "10.0.0.1", **changes: Any) -> BuildSpec:
    made = BuildSpec(f"{number:016x}", f"registry.test/built:{number}", "FROM busybox\n", ip_address=owner)
    return replace(made, **changes)


async def admit() -> None:
    """As a quota without a limit."""


@asynccontextmanager
async def store(url: str, limits: BuildLimits = FOUR_SLOTS, **options: Any) -> AsyncIterator[BuildStore]:
    """What one process has."""
    async with connect(url) as redis:
        yield BuildStore(redis, limits, **options)


async def submitted(builds: BuildStore, number: int = 0, owner: str = "10.0.0.1") -> str:
    """The id of a new build."""
    record, is_new = await builds.submit(spec(number, owner), admit)
    assert is_new
    return record.build_id


async def claimed(builds: BuildStore, builder: str = "builder") -> Claim:
    """What is to be had at once."""
    claim = await builds.claim(builder, 0.0)
    assert claim is not None
    return claim


async def known(builds: BuildStore, build_id: str) -> BuildRecord:
    record = await builds.find(build_id)
    assert record is not None
    return record


async def leases(redis: Redis) -> list[tuple[bytes, bytes]]:
    """The stream's entries that somebody has claimed, and who."""
    if not await redis.exists(STREAM):
        return []
    pending = cast(list[dict[str, bytes]], await redis.xpending_range(STREAM, "builders", "-", "+", 1000))
    return [(lease["message_id"], lease["consumer"]) for lease in pending]


async def run_out(url: str) -> None:
    """All leases run out, as if nobody had renewed them for a minute."""
    async with connect(url) as redis:
        for entry, consumer in await leases(redis):
            await redis.xclaim(STREAM, "builders", consumer, 0, [entry], idle=60_000, justid=True)


async def keys(redis: Redis) -> dict[str, int]:
    """The keys without their prefix, and the seconds that they have left."""
    names = cast(list[bytes], await redis.keys("*"))
    assert all(name.startswith(b"wave:{builds}:") for name in names)
    return {name.decode().removeprefix("wave:{builds}:"): await redis.ttl(name) for name in names}


async def content(redis: Redis) -> bytes:
    """The bytes of everything that is kept."""
    return b"".join([await redis.dump(name) or b"" for name in await redis.keys("*")])


async def consumers(url: str) -> list[str]:
    async with connect(url) as redis:
        return sorted(found["name"].decode() for found in await redis.xinfo_consumers(STREAM, "builders"))


async def scripts_run(url: str) -> int:
    async with connect(url) as redis:
        stats = await redis.info("commandstats")
    return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))
