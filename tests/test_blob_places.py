"""What is known of where blobs are in other registries, over a real Redis."""

from bench.images import digest_of
from wave_proxy.state.blob_places import BlobPlaces
from wave_proxy.state.redis import connect

DIGESTS = [digest_of(str(number).encode()) for number in range(1200)]


async def test_places_are_found_by_registry_and_digest(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        places = BlobPlaces(redis)
        assert await places.find("quay.io", DIGESTS) == {}
        await places.keep("quay.io", "lab/a", DIGESTS[:1000])
        await places.keep("quay.io", "lab/b", DIGESTS[:1])
        found = await BlobPlaces(redis).find("quay.io", DIGESTS)
        assert found == {DIGESTS[0]: "lab/b", **dict.fromkeys(DIGESTS[1:1000], "lab/a")}
        assert await places.find("ghcr.io", DIGESTS) == {}
        assert await places.find("quay.io", []) == {}


async def test_what_is_known_runs_out(redis_url: str) -> None:
    async with connect(redis_url) as redis:
        await BlobPlaces(redis).keep("quay.io", "lab/a", DIGESTS[:2])
        left = [await redis.ttl(key) for key in await redis.keys("wave:{place}:*")]
        assert len(left) == 2
        assert all(0 < seconds <= 30 * 86400 for seconds in left)
