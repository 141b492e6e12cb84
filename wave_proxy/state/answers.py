"""What Platforms have answered, for as long as it may be used: owner of ``wave:answer:*``.

``wave:answer:<hash>`` is JSON: until when the answer is fresh (epoch seconds), and the answer. It is kept for longer
than that, for the time in which a Platform can't be asked. It may hold a login.
"""

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, cast

import orjson

from wave_proxy.state.redis import Redis, answered


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer, as JSON values; ``fresh_until`` is epoch seconds."""

    fresh_until: float
    value: Any = field(repr=False)


class Answers:
    """Answers by what was asked. All methods raise StateUnavailable."""

    def __init__(self, redis: Redis, kept_s: float) -> None:
        self._redis = redis
        self._kept_s = kept_s

    async def find(self, *asked: object) -> KeptAnswer | None:
        """The answer to what was asked; None when there is none."""
        async with answered():
            content = cast(bytes | None, await self._redis.get(_key(asked)))
        return KeptAnswer(*orjson.loads(content)) if content else None

    async def keep(self, value: Any, fresh_until: float, *asked: object) -> None:
        """Keep an answer."""
        async with answered():
            await self._redis.set(_key(asked), orjson.dumps([fresh_until, value]), ex=max(int(self._kept_s), 1))

    async def drop(self, *asked: object) -> None:
        """Forget an answer that is known to be wrong."""
        async with answered():
            await self._redis.delete(_key(asked))


def _key(asked: tuple[object, ...]) -> str:
    return f"wave:answer:{sha256(orjson.dumps(asked)).hexdigest()[:32]}"
