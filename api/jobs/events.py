"""A log as server-sent events: whole lines, each batch named by the offset that it can be resumed from."""

from collections.abc import AsyncGenerator, Mapping
from re import compile as compile_pattern
from typing import Any

import orjson

HEARTBEAT = b": still building\n\n"
_MAX_LINE_BYTES = 1 << 16  # a longer line is sent in parts

_EVENT_ID = compile_pattern(r"([0-9]{1,15})(-end)?")
# All that ends a line of an event. Source: HTML standard §9.2.5.
_LINE_END = compile_pattern(r"\r\n|\r|\n")


async def log_events(pieces: AsyncGenerator[bytes], offset: int) -> AsyncGenerator[bytes]:
    """Events ``log`` with the pieces' lines; an empty piece is a comment, which keeps the connection alive.

    The event's id is the offset of the byte behind its last; the first piece begins at ``offset``.
    """
    waiting = b""
    async for piece in pieces:
        waiting += piece
        whole = waiting.rfind(b"\n") + 1 or (_whole_chars(waiting) if len(waiting) > _MAX_LINE_BYTES else 0)
        if whole:
            offset += whole
            yield _event("log", str(offset), waiting[:whole].decode(errors="replace"))
            waiting = waiting[whole:]
        elif not piece:
            yield HEARTBEAT
    if waiting:
        yield _event("log", str(offset + len(waiting)), waiting.decode(errors="replace"))


def _whole_chars(text: bytes) -> int:
    """How many bytes there are but for a character of UTF-8 whose end is yet to come."""
    for back in range(1, min(4, len(text) + 1)):
        byte = text[-back]
        if byte >= 0xC0:  # a character begins here, of two bytes, three or four
            return len(text) - (back if back < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0)
        if byte < 0x80:
            break
    return len(text)


def end_event(document: Mapping[str, Any]) -> bytes:
    """The last event, ``end``, with a JSON document."""
    return _event("end", "0-end", orjson.dumps(document).decode())


def resume_offset(event_id: str) -> int | None:
    """The offset at which a client goes on whose last event had this id: 0 for no such id, None after the end."""
    match = _EVENT_ID.fullmatch(event_id)
    if match is None:
        return 0
    return None if match[2] else int(match[1])


def _event(name: str, event_id: str, text: str) -> bytes:
    lines = _LINE_END.split(text.removesuffix("\n").removesuffix("\r"))
    data = "".join(f"data: {line}\n" for line in lines)
    return f"event: {name}\nid: {event_id}\n{data}\n".encode()
