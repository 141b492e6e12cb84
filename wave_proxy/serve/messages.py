"""What crosses the border between HTTP and the handler: a request with its body, and the reply to it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from time import time
from typing import Protocol as Interface

from wave_proxy.errors import BodyTooLarge

BUFFER_BYTES = 1 << 17  # of a request's body, before its connection is not read any more

API_VERSION = ("Docker-Distribution-Api-Version", "registry/2.0")
NO_SNIFFING = ("X-Content-Type-Options", "nosniff")

_REASONS = {status.value: status.phrase for status in HTTPStatus}


class Pausable(Interface):
    """What a body needs of its connection."""

    def pause_reading(self) -> None:
        """Take no more from the client."""

    def resume_reading(self) -> None:
        """Go on taking."""

    def write(self, content: bytes) -> None:
        """Send something ahead of the answer."""


class Source(Interface):
    """A file that may still grow: a blob in the store, or its spool while it is filled."""

    fd: int

    def readable(self) -> int:
        """Bytes from the start of the file that may be sent now."""

    async def wait(self, offset: int) -> None:
        """Return when more than ``offset`` bytes are readable. Raises WaveError when that won't happen."""

    def close(self) -> None:
        """Give the file back. Called once."""


@dataclass(slots=True)
class FileBody:
    """Bytes ``start`` to ``end`` (exclusive) of a source."""

    source: Source
    start: int
    end: int


class Stream(Interface):
    """Bytes that come from elsewhere while they are sent."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The bytes, piece by piece. Raises WaveError to cut the answer off."""

    async def aclose(self) -> None:
        """Give up what the stream holds, read to its end or not. Called once."""


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a reply may be given again to whoever asks for the same.

    ``until`` is an instant of the monotonic clock; ``token`` is empty for the direct form; ``kind`` and ``state`` are
    what it counts as. ``changes`` is what local repositories said of their changes, None for an image that is in none:
    the terms end when they say something else. ``confirmed`` (epoch seconds) is what its Age counts from, None when
    that stays as it is. With ``is_pull`` each time is a pull of that user, or of the client's address when there is no
    ``email``, and for that ``architecture``, as far as it is known. ``ended_by`` are names of jobs, which end the
    terms when they change, and of tokens.
    """

    until: float
    token: str
    kind: str
    state: str
    changes: int | None = None
    confirmed: float | None = None
    is_pull: bool = False
    email: str = ""
    fusion: bool = False
    architecture: str = ""
    ended_by: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The token and all else that ends the terms."""
        return (self.token, *self.ended_by) if self.token else self.ended_by


@dataclass(slots=True)
class Reply:
    """An answer. ``length`` is that of the body when it is a stream of known length or is not sent (HEAD).

    Without ``terms`` it is for this request only. ``reason`` is for the log: an error's code, and its text.
    """

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | FileBody | Stream = b""
    length: int | None = None
    close: bool = False
    terms: Terms | None = None
    reason: str = ""

    def content_length(self) -> int | None:
        """Length of the body in bytes; None when only its end will tell."""
        if self.length is not None:
            return self.length
        match self.body:
            case bytes():
                return len(self.body)
            case FileBody():
                return self.body.end - self.body.start
        return None


class Body:
    """A request's body as it arrives; reading it is what lets more of it arrive."""

    def __init__(self, connection: Pausable, limit: int, timeout_s: float, expects_continue: bool) -> None:
        self._connection = connection
        self._limit = limit
        self._timeout_s = timeout_s
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._waiter: asyncio.Future[None] | None = None
        self._expects_continue = expects_continue
        self.error: Exception | None = None
        self.received = 0
        self.complete = False

    def feed(self, chunk: bytes) -> None:
        self.received += len(chunk)
        if self.received > self._limit:
            self.fail(BodyTooLarge(f"the request's body is over the limit of {self._limit} bytes"))
            return
        self._chunks.append(chunk)
        self._buffered += len(chunk)
        if self._buffered > BUFFER_BYTES:
            self._connection.pause_reading()
        self._wake()

    def end(self) -> None:
        self.complete = True
        self._wake()

    def fail(self, error: Exception) -> None:
        self.error = self.error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes. Raises BodyTooLarge, ConnectionResetError when the client left, TimeoutError."""
        if self._expects_continue and not self.received and self.error is None:
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            while self._chunks and self.error is None:
                chunk = self._chunks.popleft()
                self._buffered -= len(chunk)
                yield chunk
            if self.error is not None:
                raise self.error
            if self.complete:
                return
            self._connection.resume_reading()
            self._waiter = asyncio.get_running_loop().create_future()
            if not self._chunks and not self.complete and self.error is None:
                async with asyncio.timeout(self._timeout_s):
                    await self._waiter


@dataclass(slots=True)
class Request:
    """A request as it was sent. Header names are lower case; ``client`` is the address of who sent it.

    ``rest`` is there when the client wants to go on with WebSocket frames: what it sends once a reply with status 101
    has let it.
    """

    method: str
    target: str
    headers: list[tuple[bytes, bytes]]
    body: Body
    client: str
    keep_alive: bool
    http_1_0: bool
    malformed: str = ""
    rest: Body | None = None

    def header(self, name: bytes) -> str | None:
        """The value of a header, its lines joined by commas; None when it is absent."""
        values = [value for key, value in self.headers if key == name]
        return b", ".join(values).decode("latin-1") if values else None


def format_head(reply: Reply, length: int | None, *, chunked: bool, close: bool, http_1_0: bool) -> bytes:
    """The reply's head as it goes over the wire. Raises ValueError for a control character in a header."""
    lines = [f"HTTP/1.1 {reply.status} {_REASONS.get(reply.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in reply.headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    elif chunked:
        lines.append("Transfer-Encoding: chunked")
    if close:
        lines.append("Connection: close")
    elif http_1_0:
        lines.append("Connection: keep-alive")
    lines.append(f"Date: {formatdate(int(time()), usegmt=True)}")
    head = "\r\n".join(lines)
    # A header that upstream or a user had a hand in must not end the head early.
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
        raise ValueError("control character in a reply's header")
    return head.encode("latin-1", "replace") + b"\r\n\r\n"
