"""What is known of builds, for all who only look: records, logs, and the end of a build."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import orjson

from wave_proxy.image.build import BuildRecord, BuildSpec, Phase, spec_from_json, spec_to_json, split_build_id
from wave_proxy.image.request import Layer
from wave_proxy.state.build_scripts import ALL, CHANGES, COUNT, KEYS_PREFIX, STREAM
from wave_proxy.state.build_watch import Watches
from wave_proxy.state.redis import Redis, answered, translated

Value = str | int | float | bytes

_PIECE_BYTES, _PACKED_BYTES = 1 << 18, 1 << 16
_ROUND_S = 4.0  # less than the client's own limit on an answer
_STORED = "data:"  # stands for the bytes of an inline layer, which are kept until the build is done


class BuildRecords:
    """Builds of all processes, as they stand."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._scripts = {text: redis.register_script(text) for text in ALL}
        self._watches = Watches(self._look)

    async def find(self, build_id: str) -> BuildRecord | None:
        """The record with that whole id (``bd-<16 hex>_<n>``); None when there is none (any more).

        Its spec is without secrets and the bytes of inline layers. Raises StateUnavailable, as all of these do.
        """
        if split_build_id(build_id) is None:
            return None
        async with answered():
            fields = cast(dict[bytes, bytes], await self._redis.hgetall(key("build", build_id)))
        return record_of(build_id, fields) if fields else None

    async def newest(self, series: str) -> BuildRecord | None:
        """The last build of a series (``bd-<16 hex>``); None when there is none (any more)."""
        async with answered():
            number = cast(bytes | None, await self._redis.get(key("count", series)))
        return await self.find(f"{series}_{number.decode()}") if number else None

    async def find_by_target(self, slot: str) -> BuildRecord | None:
        """The last job of a slot, such as the build of an image; None when there is none (any more)."""
        async with answered():
            build_id = cast(bytes | None, await self._redis.get(key("target", slot)))
        return await self.find(build_id.decode()) if build_id else None

    async def queue_length(self) -> tuple[int, int]:
        """How many builds wait for a builder, and how many have one."""
        waiting, running = await self._run(COUNT)
        return waiting, running

    async def wait_done(self, build_id: str, timeout_s: float) -> BuildRecord | None:
        """The record when the build is done, or as it stands after ``timeout_s``; None when there is none (any more).

        Waiting is cheap, and goes on while Redis restarts.
        """
        async with self._watches.watch(build_id) as progress:
            try:
                async with asyncio.timeout(timeout_s):
                    await progress.wait_for_end()
            except TimeoutError:
                return await self.find(build_id)
            return await progress.record(lambda: self.find(build_id))

    async def changes(self) -> AsyncGenerator[str, None]:
        """Ids of builds as they begin and as they end; an empty text each time that listening begins, be it anew.

        What has changed before that may have gone unheard. Raises StateUnavailable when Redis stays away.
        """
        with translated():
            async with self._redis.pubsub() as channel:
                await channel.subscribe(CHANGES)
                while True:
                    # In rounds: a quiet channel is no timeout, and between two the client checks its connection.
                    message = await channel.get_message(timeout=_ROUND_S)
                    if message is not None:
                        yield "" if message["type"] == "subscribe" else message["data"].decode()

    async def read_log(self, build_id: str) -> bytes | None:
        """The log, as far as there is one; None when there is none, or none any more."""
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            pipe.get(key("log", build_id))
            pipe.get(key("kept", build_id))
            live, kept = cast(list[bytes | None], await pipe.execute())
        return live if kept is None else await asyncio.to_thread(zlib.decompress, kept)

    async def has_log(self, build_id: str) -> bool:
        """Whether there is a log."""
        async with answered():
            return bool(await self._redis.exists(key("log", build_id), key("kept", build_id)))

    async def read_pieces(self, build_id: str, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """The log from byte ``offset`` on, as far as there is one: in pieces, since a slow reader holds what it got."""
        while piece := (await self._read_piece(build_id, offset))[0]:
            offset += len(piece)
            yield piece
        async for piece in self._read_kept(build_id, offset):
            yield piece

    async def read_end(self, build_id: str, most: int) -> tuple[bytes, int]:
        """The last ``most`` bytes of the log, as far as there is one, and how many there are before them."""
        end, before = bytearray(), 0
        async for piece in self.read_pieces(build_id):
            end += piece
            surplus = max(len(end) - most, 0)
            del end[:surplus]
            before += surplus
        return bytes(end), before

    async def read_lock(self, build_id: str) -> bytes | None:
        """The Conda lock of a finished build; None when there is none, or none any more."""
        async with answered():
            kept = cast(bytes | None, await self._redis.get(key("lock", build_id)))
        return None if kept is None else await asyncio.to_thread(zlib.decompress, kept)

    async def follow_log(self, build_id: str, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """The log from byte ``offset`` on as it grows, until the build is done; nothing when there is no such build."""
        async with self._watches.watch(build_id) as progress:
            while True:
                piece, goes_on = await self._read_piece(build_id, offset)
                if piece:
                    offset += len(piece)
                    yield piece
                elif goes_on:
                    await progress.wait_for(offset)
                else:
                    break
        async for piece in self._read_kept(build_id, offset):
            yield piece

    async def _run(self, script: str, *arguments: Value) -> Any:
        async with answered():
            return await self._scripts[script]([STREAM], arguments)

    async def _read_piece(self, build_id: str, offset: int) -> tuple[bytes, bool]:
        """What a growing log has from ``offset`` on, and whether it is one."""
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            pipe.getrange(key("log", build_id), offset, offset + _PIECE_BYTES - 1)
            pipe.hget(key("build", build_id), "phase")
            piece, phase = cast(tuple[bytes, bytes | None], await pipe.execute())
        return piece, phase not in (None, b"done")

    async def _read_kept(self, build_id: str, offset: int) -> AsyncGenerator[bytes, None]:
        """What a finished build's log has from ``offset`` on, unpacked in pieces."""
        unpacker, at = zlib.decompressobj(), 0
        while packed := await self._read_packed(build_id, at):
            at += len(packed)
            size = _PIECE_BYTES
            while size == _PIECE_BYTES:
                piece = await asyncio.to_thread(unpacker.decompress, packed, _PIECE_BYTES)
                packed, size = unpacker.unconsumed_tail, len(piece)
                if wanted := piece[offset:]:
                    yield wanted
                offset = max(offset - size, 0)

    async def _read_packed(self, build_id: str, start: int) -> bytes:
        async with answered():
            found = await self._redis.getrange(key("kept", build_id), start, start + _PACKED_BYTES - 1)
        return cast(bytes, found)

    async def _look(self, build_ids: Iterable[str]) -> list[tuple[int, bool]]:
        """For each build how long its log is while it grows, and whether it is done or forgotten."""
        async with answered(), self._redis.pipeline(transaction=True) as pipe:
            for build_id in build_ids:
                pipe.strlen(key("log", build_id))
                pipe.hget(key("build", build_id), "phase")
            found = await pipe.execute()
        return [(size, phase in (None, b"done")) for size, phase in zip(found[::2], found[1::2], strict=True)]


def key(kind: str, name: str) -> str:
    """The key of one thing that is kept."""
    return f"{KEYS_PREFIX}{kind}:{name}"


def record_of(build_id: str, fields: Mapping[bytes, bytes], spec: bytes = b"") -> BuildRecord:
    """The record that a hash holds; ``spec`` is the one that is built, where it is at hand."""
    text = {name.decode(): value for name, value in fields.items()}
    return BuildRecord(
        build_id=build_id,
        spec=spec_from_json(orjson.loads(spec or text["spec"])),
        phase=cast(Phase, text["phase"].decode()),
        created=float(text["created"]),
        started=float(text.get("started", 0)),
        finished=float(text.get("finished", 0)),
        exit_status=int(text["exit_status"]) if "exit_status" in text else None,
        digest=text.get("digest", b"").decode(),
        reason=text.get("reason", b"").decode(),
        attempt=int(text.get("attempt", 0)),
    )


def pack_spec(spec: BuildSpec) -> tuple[bytes, bytes]:
    """A spec as it is looked up, for as long as the record is kept, and as it is built: with secrets and content."""
    shown = replace(
        spec,
        context=_without_content(spec.context) if spec.context else None,
        layers=tuple(_without_content(layer) for layer in spec.layers),
        identity=replace(spec.identity, access_token="", refresh_token=""),
        logins=(),
    )
    return orjson.dumps(spec_to_json(shown)), orjson.dumps(spec_to_json(spec))


def _without_content(layer: Layer) -> Layer:
    return replace(layer, location=_STORED) if layer.is_inline else layer
