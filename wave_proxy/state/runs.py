"""Tokens that live as long as the run that asked for them: owner of ``wave:runs``.

``wave:runs`` is a sorted set of tokens, by when their run is to be asked for again (epoch seconds).
"""

from typing import Any, cast

from wave_proxy.state.redis import Redis, answered

_KEY = "wave:runs"

# KEYS: the set. ARGV: now, how many at most, and when they are due again. Whoever gets one has until then.
_CLAIM = """
local tokens = redis.call('zrangebyscore', KEYS[1], '-inf', ARGV[1], 'limit', 0, ARGV[2])
for _, token in ipairs(tokens) do redis.call('zadd', KEYS[1], ARGV[3], token) end
return tokens
"""


class RunTokens:
    """The tokens to look after. All methods raise StateUnavailable."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def put(self, token: str, due: float) -> None:
        """Look after a token, from ``due`` on."""
        async with answered():
            await self._redis.zadd(_KEY, {token: due})

    async def claim(self, now: float, count: int, again: float) -> list[str]:
        """Up to so many tokens that are due at ``now``; nobody else gets them before ``again``."""
        async with answered():
            found: Any = await self._redis.eval(_CLAIM, 1, _KEY, repr(now), str(count), repr(again))
        return [token.decode() for token in cast(list[bytes], found)]

    async def remove(self, *tokens: str) -> None:
        """Look after these no more."""
        if tokens:
            async with answered():
                await self._redis.zrem(_KEY, *tokens)
