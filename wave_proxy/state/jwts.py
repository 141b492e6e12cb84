"""Tokens of Platform users that expire, as they were last refreshed: owner of ``wave:jwt:*`` and ``wave:jwts``.

``wave:jwt:<md5 of endpoint and token>`` is a hash by the token that the user first had: ``endpoint``, ``token``,
``access``, ``refresh``, ``created`` (epoch seconds). The sorted set ``wave:jwts`` has the names of those that are
refreshed in the background, by when that is due. ``wave:jwt:lock:<md5>`` is held by who refreshes one.
"""

import asyncio
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any, cast

from wave_proxy.image.platform import TokenPair, session_key
from wave_proxy.state.redis import Redis, answered

KEPT_S = 30 * 86400
REFRESHED_FOR_S = 36 * 3600.0
INTERVAL_S = 3600.0

_LOCK_S = 30  # of one who died with it
_LOOK_S = 0.1
_DUE = "wave:jwts"

# KEYS: a pair's key, the set. ARGV: for how many seconds it is kept, the pair's name, when it is due, and the fields.
# A pair that is there may have been refreshed: it stays.
_PUT_IF_ABSENT = """
if redis.call('exists', KEYS[1]) == 0 then
    redis.call('hset', KEYS[1], unpack(ARGV, 4))
    redis.call('expire', KEYS[1], ARGV[1])
    redis.call('zadd', KEYS[2], ARGV[3], ARGV[2])
end
"""

# KEYS: the set. ARGV: now, how many at most, and when they are due again. Whoever gets one has until then.
_CLAIM = """
local names = redis.call('zrangebyscore', KEYS[1], '-inf', ARGV[1], 'limit', 0, ARGV[2])
for _, name in ipairs(names) do redis.call('zadd', KEYS[1], ARGV[3], name) end
return names
"""


@dataclass(frozen=True, slots=True)
class KeptPair:
    """A pair of tokens, and whose it is."""

    endpoint: str
    token: str = field(repr=False)
    pair: TokenPair
    created: float


class TokenPairs:
    """Pairs by endpoint and first token. All methods raise StateUnavailable."""

    def __init__(self, redis: Redis, *, interval_s: float = INTERVAL_S) -> None:
        self._redis = redis
        self._interval_s = interval_s

    async def find(self, endpoint: str, token: str) -> TokenPair | None:
        """The pair; None when none is kept."""
        kept = await self._find(session_key(endpoint, token))
        return kept.pair if kept else None

    async def put_if_absent(self, endpoint: str, token: str, pair: TokenPair) -> None:
        """Keep a pair for 30 days, and have it refreshed, unless there is one."""
        name, now = session_key(endpoint, token), time()
        fields = {"endpoint": endpoint, "token": token, "access": pair.access, "refresh": pair.refresh}
        members = [part for item in (fields | {"created": repr(now)}).items() for part in item]
        async with answered():
            await self._redis.eval(
                _PUT_IF_ABSENT, 2, _key(name), _DUE, str(KEPT_S), name, repr(now + self._interval_s), *members
            )

    async def replace(self, endpoint: str, token: str, pair: TokenPair) -> None:
        """Keep a pair instead of the one that is kept, if there is one."""
        await self.put_if_absent(endpoint, token, pair)
        key = _key(session_key(endpoint, token))
        async with answered():
            await self._redis.hset(key, mapping={"access": pair.access, "refresh": pair.refresh})

    async def claim_due(self, now: float, count: int) -> list[KeptPair]:
        """Up to so many that are due, which nobody else gets for the next while. What is older than 36 h is let go."""
        async with answered():
            due: Any = await self._redis.eval(_CLAIM, 1, _DUE, repr(now), str(count), repr(now + self._interval_s))
        found = []
        for name in cast(list[bytes], due):
            kept = await self._find(name.decode())
            if kept is None or now > kept.created + REFRESHED_FOR_S or not kept.pair.refresh:
                async with answered():
                    await self._redis.zrem(_DUE, name)
            else:
                found.append(kept)
        return found

    async def lock(self, endpoint: str, token: str, wait_s: float) -> bool:
        """Be the only one who refreshes that pair; False when another one does and has not ended in time."""
        key, ends = _lock_key(endpoint, token), monotonic() + wait_s
        while True:
            async with answered():
                if await self._redis.set(key, "1", nx=True, ex=_LOCK_S):
                    return True
            if monotonic() > ends:
                return False
            await asyncio.sleep(_LOOK_S)

    async def unlock(self, endpoint: str, token: str) -> None:
        """Let others."""
        async with answered():
            await self._redis.delete(_lock_key(endpoint, token))

    async def _find(self, name: str) -> KeptPair | None:
        async with answered():
            fields = cast(dict[bytes, bytes], await self._redis.hgetall(_key(name)))
        if b"created" not in fields:
            return None
        told = {key.decode(): value.decode() for key, value in fields.items()}
        pair = TokenPair(told["access"], told["refresh"])
        return KeptPair(told["endpoint"], told["token"], pair, float(told["created"]))


def _key(name: str) -> str:
    return f"wave:jwt:{name}"


def _lock_key(endpoint: str, token: str) -> str:
    return f"wave:jwt:lock:{session_key(endpoint, token)}"
