"""What this installation alone knows: owner of ``wave:secret``, random bytes that are made once and kept for ever."""

from secrets import token_bytes
from typing import cast

from wave_proxy.state.redis import Redis, answered

_KEY = "wave:secret"
_BYTES = 32


async def obtain_secret(redis: Redis) -> bytes:
    """The secret, the same for all processes. Raises StateUnavailable."""
    async with answered():
        await redis.set(_KEY, token_bytes(_BYTES), nx=True)
        return cast(bytes, await redis.get(_KEY))
