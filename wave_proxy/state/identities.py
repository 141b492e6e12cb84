"""Users without a Platform: the access tokens that an operator issues. Owner of ``wave:{identity}:*``.

``wave:{identity}:tokens`` is a hash of a token's id to what it was issued with (JSON), ``wave:{identity}:revoked`` of
id to when that was, ``wave:{identity}:used`` of id to about when it was last used (epoch seconds). Of a token's secret
half only the SHA-256 is kept: it has 160 random bits, so nobody finds it from there. Processes remember nothing but
when they last wrote down a use, so what is revoked is refused everywhere from the next request on.
"""

from base64 import b32encode
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from hmac import compare_digest
from re import compile as compile_pattern
from secrets import token_bytes
from time import time
from typing import Any, Literal, cast

import orjson

from wave_proxy.errors import AccessTokenRefused, RequestInvalid, StateUnavailable, clip
from wave_proxy.state.redis import Redis, answered

_PREFIX = "wpt-"
_TOKEN = compile_pattern(r"wpt-([a-z2-7]{8})-([a-z2-7]{32})")
_EMAIL = compile_pattern(r"[^@\s]+@[^@\s]+")
_MAX_EMAIL = 254
_MAX_NOTE = 200

_USE_WRITTEN_S = 60.0  # a use is written down when the last that was is older
_KEPT_S = 90 * 86400.0  # how long a token is listed after its end

_TOKENS = "wave:{identity}:tokens"
_REVOKED = "wave:{identity}:revoked"
_USED = "wave:{identity}:used"

State = Literal["valid", "expired", "revoked"]


@dataclass(frozen=True, slots=True)
class AccessToken:
    """An access token as it stands, without its secret. Times are epoch seconds, 0 for never."""

    id: str
    email: str
    note: str
    created: float
    expires: float
    last_used: float
    revoked: float
    digest: str = field(repr=False)

    @property
    def user_id(self) -> int:
        """The user's number: the same for all tokens of an e-mail address, on every server. It has 48 bits."""
        return int.from_bytes(sha256(f"wave-proxy user {self.email}".encode()).digest()[:6])

    def state(self, now: float) -> State:
        """What has become of it."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires and now >= self.expires else "valid"

    @property
    def ended(self) -> float:
        """Since when it is not valid any more, or will not be; 0 for never."""
        return min((end for end in (self.revoked, self.expires) if end), default=0.0)


def is_ours(token: str) -> bool:
    """Whether a text looks like an access token that an operator issued, good or not."""
    return token.startswith(_PREFIX)


class AccessTokens:
    """The access tokens that were issued."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._written: dict[str, float] = {}  # id to when its use was last written down

    async def create(self, email: str, *, expires: float = 0.0, note: str = "") -> tuple[str, AccessToken]:
        """A new token for the user with that e-mail address: its text, which is kept nowhere, and what is known of it.

        Raises RequestInvalid, StateUnavailable. Forgets tokens that ended long ago.
        """
        email, now = email.strip().lower(), time()
        if not _EMAIL.fullmatch(email) or len(email) > _MAX_EMAIL or not email.isprintable():
            raise RequestInvalid(f"user: {clip(email)} is no e-mail address such as ada@example.org")
        if len(note) > _MAX_NOTE or not note.isprintable():
            raise RequestInvalid(f"note: expected one line of at most {_MAX_NOTE} characters, got {clip(note)}")
        if expires and expires <= now:
            raise RequestInvalid(f"expires: {_shown(expires)} is over")
        secret = _random(20)
        token = AccessToken(_random(5), email, note, now, expires, 0.0, 0.0, _digest_of(secret))
        await self._forget(old.id for old in await self.read_all() if old.ended and old.ended < now - _KEPT_S)
        record = {"email": email, "note": note, "created": now, "expires": expires, "digest": token.digest}
        async with answered():
            await self._redis.hset(_TOKENS, token.id, orjson.dumps(record))
        return f"{_PREFIX}{token.id}-{secret}", token

    async def check(self, text: str) -> AccessToken:
        """The token that ``text`` is. Raises AccessTokenRefused when it is none, expired or revoked; StateUnavailable.

        Who does not have the whole token learns nothing of it.
        """
        match = _TOKEN.fullmatch(text)
        token = await self._find(match[1]) if match else None
        if match is None or token is None or not compare_digest(token.digest, _digest_of(match[2])):
            raise AccessTokenRefused("this access token does not exist")
        now = time()
        if (state := token.state(now)) != "valid":
            raise AccessTokenRefused(f"this access token is {state} since {_shown(token.ended)}")
        await self._write_use(token.id, now)
        return token

    async def read_all(self) -> list[AccessToken]:
        """All tokens, by user and time. Raises StateUnavailable."""
        async with answered(), self._redis.pipeline(transaction=False) as pipe:
            for key in (_TOKENS, _REVOKED, _USED):
                pipe.hgetall(key)
            records, revoked, used = cast(list[dict[bytes, bytes]], await pipe.execute())
        tokens = [_read(key.decode(), record, revoked.get(key), used.get(key)) for key, record in records.items()]
        return sorted(tokens, key=lambda token: (token.email, token.created))

    async def revoke(self, tokens: Iterable[AccessToken]) -> None:
        """End these tokens. Raises StateUnavailable."""
        now = time()
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            for token in tokens:
                pipe.hsetnx(_REVOKED, token.id, str(now))
            await pipe.execute()

    # --- records -----------------------------------------------------------------------------------------------------

    async def _find(self, token_id: str) -> AccessToken | None:
        async with answered(), self._redis.pipeline(transaction=False) as pipe:
            pipe.hget(_TOKENS, token_id)
            pipe.hget(_REVOKED, token_id)
            record, revoked = cast(list[bytes | None], await pipe.execute())
        return _read(token_id, record, revoked, None) if record else None

    async def _write_use(self, token_id: str, now: float) -> None:
        if now - self._written.get(token_id, 0.0) < _USE_WRITTEN_S:
            return
        self._written[token_id] = now
        with suppress(StateUnavailable):  # nobody is refused for that
            async with answered():
                await self._redis.hset(_USED, token_id, str(int(now)))

    async def _forget(self, ids: Iterable[str]) -> None:
        old = list(ids)
        if old:
            async with answered(), self._redis.pipeline(transaction=True) as pipe:
                for key in (_TOKENS, _REVOKED, _USED):
                    pipe.hdel(key, *old)
                await pipe.execute()


def _read(token_id: str, record: bytes, revoked: bytes | None, used: bytes | None) -> AccessToken:
    known: dict[str, Any] = orjson.loads(record)
    return AccessToken(
        id=token_id,
        email=known["email"],
        note=known["note"],
        created=known["created"],
        expires=known["expires"],
        last_used=float(used or 0),
        revoked=float(revoked or 0),
        digest=known["digest"],
    )


def _random(size: int) -> str:
    """``size`` random bytes, a multiple of 5, in the digits of a token."""
    return b32encode(token_bytes(size)).decode().lower()


def _digest_of(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _shown(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
