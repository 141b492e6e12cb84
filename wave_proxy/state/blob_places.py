"""In which repositories of other registries our own mirrors have put blobs: owner of ``wave:{place}:*``.

``wave:{place}:<registry>:<digest>`` is the repository that was last seen to have that blob. It runs out, as others
delete repositories. The braces keep all these keys on one node of a cluster.
"""

from collections.abc import Sequence
from typing import cast

from wave_proxy.state.redis import Redis, answered

_KEPT_S = 30 * 86400
_AT_ONCE = 500


class BlobPlaces:
    """What is known of all registries."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def find(self, registry: str, digests: Sequence[str]) -> dict[str, str]:
        """The repositories that may have these blobs, by digest, as far as some are known. Raises StateUnavailable."""
        found: dict[str, str] = {}
        for start in range(0, len(digests), _AT_ONCE):
            some = digests[start : start + _AT_ONCE]
            async with answered():
                values = cast(list[bytes | None], await self._redis.mget([_key(registry, digest) for digest in some]))
            found |= {digest: value.decode() for digest, value in zip(some, values, strict=True) if value}
        return found

    async def keep(self, registry: str, repository: str, digests: Sequence[str]) -> None:
        """That repository has these blobs. Raises StateUnavailable."""
        for start in range(0, len(digests), _AT_ONCE):
            async with answered(), self._redis.pipeline(transaction=False) as pipe:
                for digest in digests[start : start + _AT_ONCE]:
                    pipe.set(_key(registry, digest), repository, ex=_KEPT_S)
                await pipe.execute()


def _key(registry: str, digest: str) -> str:
    return f"wave:{{place}}:{registry}:{digest}"
