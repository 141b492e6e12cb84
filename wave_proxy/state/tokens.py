"""Tokens and what they stand for: owner of ``wave:token:*``, ``wave:made:*`` and ``wave:layer:*``.

``wave:token:<token>`` is a hash: ``request`` (JSON), and after the first pull ``source_digest`` and ``wave_digest``;
``deleted`` once an operator has ended it. It outlives the token by the retention time, since the service still
describes requests whose token has expired. ``wave:layer:<digest>`` holds an inline layer's gzip bytes, once for all
requests that carry it. ``wave:made:<token>`` maps the digest of each manifest or config that we made for the token to
the digest of the upstream manifest that it was made from, so that any worker can make it again.
Deletions are announced on the channel ``wave:token-deleted``.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from secrets import token_hex
from time import time
from typing import Any, cast

import orjson

from wave_proxy.image.request import (
    ContainerRequest,
    Layer,
    request_from_json,
    request_to_json,
    unpack_inline_layer,
)
from wave_proxy.state.redis import Redis, translated

_CHANNEL = b"wave:token-deleted"
_STORED = "data:"


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A request as it was recorded, whether its token still works or not. Digests are empty before the first pull."""

    token: str
    request: ContainerRequest
    source_digest: str
    wave_digest: str
    deleted: bool

    def is_valid(self, now: float) -> bool:
        """Whether the token may be pulled at ``now`` (epoch seconds)."""
        return not self.deleted and now < self.request.expires


class TokenStore:
    """Container requests by token."""

    def __init__(self, redis: Redis, retention_s: float = 7 * 86400) -> None:
        self._redis = redis
        self._retention_s = retention_s

    async def put(self, request: ContainerRequest) -> str:
        """Record a request; returns its new token of 32 hex digits.

        Inline layers are unpacked, verified and kept apart from the record, where ``find`` shows them as ``data:``.
        Raises RequestInvalid, DigestMismatch, SizeMismatch, StateUnavailable.
        """
        token = token_hex(16)
        layers, contents = await asyncio.to_thread(_take_out, request.config.layers)
        kept = replace(request, config=replace(request.config, layers=layers))
        keep_s = int(request.expires - time() + self._retention_s)
        with translated():
            async with self._redis.pipeline(transaction=True) as pipe:
                for digest, content in contents.items():
                    pipe.set(_layer_key(digest), content, ex=max(keep_s, 1))
                pipe.hset(_key(token), "request", orjson.dumps(request_to_json(kept)))
                pipe.expire(_key(token), max(keep_s, 1))
                await pipe.execute()
        return token

    async def find_record(self, token: str) -> TokenRecord | None:
        """The record of a token, also after it expired or was deleted; None when there is none (any more)."""
        with translated():
            fields = cast(dict[bytes, bytes], await self._redis.hgetall(_key(token)))
        if b"request" not in fields:
            return None
        return TokenRecord(
            token=token,
            request=request_from_json(orjson.loads(fields[b"request"])),
            source_digest=fields.get(b"source_digest", b"").decode(),
            wave_digest=fields.get(b"wave_digest", b"").decode(),
            deleted=b"deleted" in fields,
        )

    async def delete(self, token: str) -> bool:
        """End a token on every worker; False when there was none that worked."""
        record = await self.find_record(token)
        if record is None or not record.is_valid(time()):
            return False
        with translated():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(_key(token), "deleted", "1")
                pipe.delete(_made_key(token))
                pipe.publish(_CHANNEL, token)
                await pipe.execute()
        return True

    async def deletions(self) -> AsyncIterator[str]:
        """Tokens as they are deleted, from now on. Raises StateUnavailable when the connection ends."""
        with translated():
            async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                await channel.subscribe(_CHANNEL)
                async for message in channel.listen():
                    yield message["data"].decode()

    async def find_layer(self, digest: str) -> bytes | None:
        """The gzip bytes of an inline layer, as they were verified; None when no living request has it."""
        with translated():
            return cast(bytes | None, await self._redis.get(_layer_key(digest)))

    async def record_made(self, token: str, made: Mapping[str, str], lifetime_s: float) -> None:
        """Remember from which upstream manifest (value) each digest (key) was made."""
        with translated():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hset(_made_key(token), mapping=dict[Any, Any](made))
                pipe.expire(_made_key(token), max(int(lifetime_s), 1))
                await pipe.execute()

    async def record_pull(self, token: str, source_digest: str, wave_digest: str) -> None:
        """Remember what the request's own reference was resolved to, and what was answered; the first time counts."""
        with translated():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.hsetnx(_key(token), "source_digest", source_digest)
                pipe.hsetnx(_key(token), "wave_digest", wave_digest)
                await pipe.execute()

    async def find_made(self, token: str, digest: str) -> str | None:
        """The upstream manifest's digest that ``digest`` was made from for this token; None when it was not."""
        with translated():
            source = cast(bytes | None, await self._redis.hget(_made_key(token), digest))
        return source.decode() if source else None


def _take_out(layers: tuple[Layer, ...]) -> tuple[tuple[Layer, ...], dict[str, bytes]]:
    kept: list[Layer] = []
    contents: dict[str, bytes] = {}
    for layer in layers:
        if layer.is_inline:
            contents[layer.gzip_digest] = unpack_inline_layer(layer)
            layer = replace(layer, location=_STORED)
        kept.append(layer)
    return tuple(kept), contents


def _key(token: str) -> str:
    return f"wave:token:{token}"


def _made_key(token: str) -> str:
    return f"wave:made:{token}"


def _layer_key(digest: str) -> str:
    return f"wave:layer:{digest}"
