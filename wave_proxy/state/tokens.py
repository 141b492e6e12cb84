"""Tokens and what they stand for: owner of ``wave:token:*``, ``wave:user:*``, ``wave:made:*`` and ``wave:layer:*``.

``wave:token:<token>`` is a hash: ``request`` (JSON), and after the first pull ``source_digest`` and ``wave_digest``;
``expires`` (epoch seconds) once its end has been moved, ``deleted`` once an operator has ended it. It outlives the
token by the retention time, since the service still describes requests whose token has expired. ``wave:user:<token>``
is JSON: what shows a Platform who its user is, and his e-mail address. It lives as long as the token can be pulled, so
that no secret is kept for longer. ``wave:layer:<digest>`` holds an inline layer's gzip bytes, once for all requests
that carry it, and as long as one of them can be pulled.
``wave:made:<token>`` maps the digest of each manifest or config that we made for the token to the digest of the
upstream manifest that it was made from, so that any worker can make it again.
Deletions are announced on the channel ``wave:token-deleted``.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, replace
from secrets import token_hex
from time import time
from typing import Any, cast

import orjson

from wave_proxy.errors import ContentMismatch, RequestInvalid
from wave_proxy.image.request import (
    MAX_TAR_BYTES,
    MAX_TARS_BYTES,
    ContainerRequest,
    Layer,
    request_from_json,
    request_to_json,
    unpack_inline_layer,
)
from wave_proxy.state.redis import Redis, answered, translated

_CHANNEL = b"wave:token-deleted"
_STORED = "data:"

MAX_RECORD_BYTES = 1 << 20
MAX_INLINE_BYTES = 64 << 20  # all inline layers of a request together, as gzip

_USER_S = 60  # longer than the token, as the clocks of machines differ
_LAYER_S = 3600  # longer than the tokens that need it, as the clocks of machines differ
_OF_USER = ("email", "access_token", "refresh_token")
_ROUND_S = 4.0  # less than the client's own limit on an answer

# KEYS: a layer's key. ARGV: its bytes, and for how many seconds they are wanted. Another request may want them longer.
_KEEP_LAYER = """
if redis.call('ttl', KEYS[1]) < tonumber(ARGV[2]) then
    redis.call('set', KEYS[1], ARGV[1], 'ex', ARGV[2])
end
"""

# KEYS: a token's key. ARGV: the digests upstream and as answered. A record that has run out must not come back.
_RECORD_PULL = """
if redis.call('exists', KEYS[1]) == 1 then
    redis.call('hsetnx', KEYS[1], 'source_digest', ARGV[1])
    redis.call('hsetnx', KEYS[1], 'wave_digest', ARGV[2])
end
"""


# KEYS: a token's key. ARGV: its end as it was read, the new one, now (epoch seconds), and how long to keep the record.
# Moves the end of a token that still works, only ever on; gives its end, nothing when it does not work.
_EXTEND = """
if redis.call('hexists', KEYS[1], 'request') == 0 or redis.call('hexists', KEYS[1], 'deleted') == 1 then
    return false
end
local ends = redis.call('hget', KEYS[1], 'expires') or ARGV[1]
if tonumber(ends) <= tonumber(ARGV[3]) then
    return false
end
if tonumber(ends) < tonumber(ARGV[2]) then
    ends = ARGV[2]
    redis.call('hset', KEYS[1], 'expires', ends)
    redis.call('expire', KEYS[1], ARGV[4])
end
return ends
"""

# KEYS: what goes with a token. ARGV: for how many seconds it is wanted.
_KEEP = """
if redis.call('ttl', KEYS[1]) < tonumber(ARGV[1]) then
    redis.call('expire', KEYS[1], ARGV[1])
end
"""


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A request as it was recorded, whether its token still works or not; ``request.expires`` is its end as of now.

    Digests are empty before the first pull. A user of a Platform has neither access token nor e-mail address once the
    token has ended, and where nothing is pulled by it.
    """

    token: str
    request: ContainerRequest
    source_digest: str
    wave_digest: str
    deleted: bool
    size: int = 0  # bytes of the record

    def is_valid(self, now: float) -> bool:
        """Whether the token may be pulled at ``now`` (epoch seconds)."""
        return not self.deleted and now < self.request.expires


class TokenStore:
    """Container requests by token."""

    def __init__(self, redis: Redis, retention_s: float = 7 * 86400, max_lifetime_s: float = 7 * 86400) -> None:
        self._redis = redis
        self._retention_s = retention_s
        self._max_lifetime_s = max_lifetime_s

    async def put(self, request: ContainerRequest) -> str:
        """Record a request; returns its new token of 32 hex digits.

        Inline layers are unpacked, verified and kept apart from the record, where ``find`` shows them as ``data:``.
        Raises RequestInvalid, DigestMismatch or SizeMismatch with the place of the first layer that is wrong,
        RequestInvalid also for a record over 1 MiB; StateUnavailable.
        """
        token = token_hex(16)
        layers, contents = await asyncio.to_thread(_take_out, request.config.layers)
        record, user = _packed(replace(request, config=replace(request.config, layers=layers)))
        size = len(record) + len(user)
        if size > MAX_RECORD_BYTES:
            raise RequestInvalid(
                f"the request has {size} bytes without its inline layers, and may have {MAX_RECORD_BYTES} bytes"
            )
        left_s = int(request.expires - time())
        keep_s = int(left_s + self._retention_s)
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            for digest, content in contents.items():
                pipe.eval(_KEEP_LAYER, 1, _layer_key(digest), content, max(left_s + _LAYER_S, 1))
            pipe.hset(_key(token), "request", record)
            pipe.expire(_key(token), max(keep_s, 1))
            if user:
                pipe.set(_user_key(token), user, ex=max(left_s + _USER_S, 1))
            await pipe.execute()
        return token

    async def lend(self, request: ContainerRequest, lent_s: float) -> str:
        """A token of our own for what was recorded before, or has no inline layers; its pulls do not count.

        Raises StateUnavailable.
        """
        token, now = token_hex(16), time()
        record, user = _packed(replace(request, uncounted=True, created=now, expires=now + lent_s))
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_key(token), "request", record)
            pipe.expire(_key(token), int(lent_s) + 1)
            if user:
                pipe.set(_user_key(token), user, ex=int(lent_s) + 1)
            await pipe.execute()
        return token

    async def take_out(
        self, layers: tuple[Layer, ...], names: Mapping[int, str] | None = None
    ) -> tuple[tuple[Layer, ...], Mapping[str, bytes]]:
        """These layers as a record may hold them, and the gzip bytes of the inline ones by digest, for ``keep``.

        ``names`` are the fields of those that are not the request's layers, by their position. Raises as ``put``, but
        for StateUnavailable.
        """
        return await asyncio.to_thread(_take_out, layers, names)

    async def keep(self, contents: Mapping[str, bytes], keep_s: float) -> None:
        """Keep inline layers for ``find_layer``. Raises StateUnavailable."""
        if contents:
            async with answered(), self._redis.pipeline(transaction=True) as pipe:
                for digest, content in contents.items():
                    pipe.eval(_KEEP_LAYER, 1, _layer_key(digest), content, max(int(keep_s), 1))
                await pipe.execute()

    async def find_record(self, token: str) -> TokenRecord | None:
        """The record of a token, also after it expired or was deleted; None when there is none (any more)."""
        async with answered(), self._redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(_key(token))
            pipe.get(_user_key(token))
            fields, user = cast(tuple[dict[bytes, bytes], bytes | None], await pipe.execute())
        if b"request" not in fields:
            return None
        request = request_from_json(orjson.loads(fields[b"request"]))
        if user:
            request = replace(request, identity=replace(request.identity, **orjson.loads(user)))
        if b"expires" in fields:
            request = replace(request, expires=float(fields[b"expires"]))
        return TokenRecord(
            token=token,
            request=request,
            source_digest=fields.get(b"source_digest", b"").decode(),
            wave_digest=fields.get(b"wave_digest", b"").decode(),
            deleted=b"deleted" in fields,
            size=len(fields[b"request"]) + len(user or b""),
        )

    async def find_shown(self, token: str) -> TokenRecord | None:
        """As ``find_record``, for whoever asks: a token that we have lent to ourselves is nobody's to read."""
        record = await self.find_record(token)
        return None if record is None or record.request.uncounted else record

    async def extend(self, token: str, until: float) -> float:
        """Let a token that works live until then (epoch seconds), or as long as tokens may; never less than it does.

        Returns its end, 0.0 when it does not work. Other workers find out once it ends by what they know.
        """
        record, now = await self.find_record(token), time()
        if record is None or not record.is_valid(now):
            return 0.0
        request = record.request
        ends = max(min(until, request.created + self._max_lifetime_s), request.expires)
        if ends == request.expires:
            return ends
        keep_s = int(ends - now + self._retention_s)
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            for layer in request.config.layers:
                if layer.is_inline:
                    pipe.eval(_KEEP, 1, _layer_key(layer.gzip_digest), int(ends - now) + _LAYER_S)
            pipe.eval(_KEEP, 1, _user_key(token), int(ends - now) + _USER_S)
            pipe.eval(_KEEP, 1, _made_key(token), max(int(ends - now), 1))
            pipe.eval(_EXTEND, 1, _key(token), repr(request.expires), repr(ends), repr(now), keep_s)
            answers = await pipe.execute()
        return float(answers[-1]) if answers[-1] is not None else 0.0

    async def delete(self, token: str) -> bool:
        """End a token on every worker; False when there was none that worked."""
        record = await self.find_record(token)
        if record is None or not record.is_valid(time()):
            return False
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_key(token), "deleted", "1")
            pipe.delete(_user_key(token), _made_key(token))
            pipe.publish(_CHANNEL, token)
            await pipe.execute()
        return True

    async def take_back(self, token: str) -> None:
        """End a lent token on every worker, and leave nothing of it. Raises StateUnavailable."""
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(_key(token), _user_key(token), _made_key(token))
            pipe.publish(_CHANNEL, token)
            await pipe.execute()

    async def deletions(self) -> AsyncIterator[str]:
        """Tokens as they are deleted; an empty text each time that listening begins, be it anew after a break.

        What was deleted before that may have gone unheard. Raises StateUnavailable when Redis stays away.
        """
        with translated():
            async with self._redis.pubsub() as channel:
                await channel.subscribe(_CHANNEL)
                while True:
                    # In rounds: a quiet channel is no timeout, and between two rounds the client checks its connection.
                    message = await channel.get_message(timeout=_ROUND_S)
                    if message is not None:
                        yield "" if message["type"] == "subscribe" else message["data"].decode()

    async def cost(self, request: ContainerRequest) -> int:
        """How many bytes a request will take here: its record, and those of its layers that are not here yet."""
        layers = tuple(replace(each, location=_STORED) if each.is_inline else each for each in request.config.layers)
        record, user = _packed(replace(request, config=replace(request.config, layers=layers)))
        return len(record) + len(user) + await self.missing_bytes(request.config.layers)

    async def missing_bytes(self, layers: Iterable[Layer]) -> int:
        """How many bytes of these layers, of those which a request carries, are not here yet."""
        sizes = {layer.gzip_digest: layer.gzip_size for layer in layers if layer.is_inline}
        if not sizes:
            return 0
        async with answered(), self._redis.pipeline(transaction=False) as pipe:
            for digest in sizes:
                pipe.exists(_layer_key(digest))
            known = await pipe.execute()
        return sum(size for size, is_known in zip(sizes.values(), known, strict=True) if not is_known)

    async def find_layer(self, digest: str) -> bytes | None:
        """The gzip bytes of an inline layer, as they were verified; None when no living request has it."""
        async with answered():
            return cast(bytes | None, await self._redis.get(_layer_key(digest)))

    async def record_made(self, token: str, made: Mapping[str, str], lifetime_s: float) -> None:
        """Remember from which upstream manifest (value) each digest (key) was made."""
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_made_key(token), mapping=dict[Any, Any](made))
            pipe.expire(_made_key(token), max(int(lifetime_s), 1))
            await pipe.execute()

    async def record_pull(self, token: str, source_digest: str, wave_digest: str) -> None:
        """Remember what the request's own reference was resolved to, and what was answered; the first time counts."""
        async with answered():
            await self._redis.eval(_RECORD_PULL, 1, _key(token), source_digest, wave_digest)

    async def find_made(self, token: str, digest: str) -> str | None:
        """The upstream manifest's digest that ``digest`` was made from for this token; None when it was not."""
        async with answered():
            source = cast(bytes | None, await self._redis.hget(_made_key(token), digest))
        return source.decode() if source else None


def _take_out(
    layers: tuple[Layer, ...], names: Mapping[int, str] | None = None
) -> tuple[tuple[Layer, ...], dict[str, bytes]]:
    """The layers as they are recorded, and the gzip bytes of the inline ones by digest."""
    kept: list[Layer] = []
    contents: dict[str, bytes] = {}
    left, stored = MAX_TARS_BYTES, 0
    for position, layer in enumerate(layers):
        if layer.is_inline:
            try:
                content, cost = unpack_inline_layer(layer, min(left, MAX_TAR_BYTES))
                stored += len(content)
                if stored > MAX_INLINE_BYTES:
                    raise RequestInvalid(f"all inline layers together may have {MAX_INLINE_BYTES} bytes at most")
            except (ContentMismatch, RequestInvalid) as err:
                name = (names or {}).get(position) or f"containerConfig.layers[{position}]"
                raise type(err)(f"{name}: {err}") from None
            left -= cost
            contents[layer.gzip_digest] = content
            layer = replace(layer, location=_STORED)
        kept.append(layer)
    return tuple(kept), contents


def _packed(request: ContainerRequest) -> tuple[bytes, bytes]:
    """A request as it is kept for long, and what of its user only pulls by its token need; empty where nothing is."""
    identity = request.identity
    if not identity.is_platform:
        return orjson.dumps(request_to_json(request)), b""
    user = {name: getattr(identity, name) for name in _OF_USER}
    kept = replace(request, identity=replace(identity, email="", access_token="", refresh_token=""))
    return orjson.dumps(request_to_json(kept)), b"" if request.is_durable else orjson.dumps(user)


def _key(token: str) -> str:
    return f"wave:token:{token}"


def _user_key(token: str) -> str:
    return f"wave:user:{token}"


def _made_key(token: str) -> str:
    return f"wave:made:{token}"


def _layer_key(digest: str) -> str:
    return f"wave:layer:{digest}"
