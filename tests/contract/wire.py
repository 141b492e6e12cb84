"""Requests as bytes on a socket, so that no library puts a header right, and answers read without mercy."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from socket import create_connection
from types import TracebackType
from typing import Any, Self

from tests.patience import PATIENCE_S

Headers = Sequence[tuple[str, str]]

_STATUS_LINE = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*")
_INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")


class Broken(AssertionError):
    """An answer over which a client would stumble."""


class Number(str):
    """A number of a JSON document, as it was written."""


@dataclass(frozen=True)
class Answer:
    """Status, headers in their order, and body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header that may come once."""
        found = [value for given, value in self.headers if given.lower() == name.lower()]
        if len(found) > 1:
            raise Broken(f"{name} comes {len(found)} times: {self.headers}")
        return found[0] if found else None

    @property
    def text(self) -> str:
        """The body, as clients print it."""
        return self.body.decode()

    def document(self) -> dict[str, Any]:
        """The body, a JSON object, with numbers as they were written."""
        if self.header("Content-Type") != "application/json":
            raise Broken(f"JSON as {self.header('Content-Type')}")
        document = json.loads(self.body, parse_float=Number, parse_int=Number, parse_constant=_refuse)
        if not isinstance(document, dict):
            raise Broken(f"not an object: {self.text}")
        return document


def _refuse(text: str) -> None:
    raise Broken(f"{text} is no JSON")


class Connection:
    """One connection that is kept alive; a context manager."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self._socket = create_connection((host, int(port)), timeout=PATIENCE_S)
        self._left = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, method: str, target: str, headers: Headers, body: bytes = b"") -> Answer:
        """Send exactly this and read the answer. Raises Broken when it has no length or is followed by more."""
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        head, received = self._read_head()
        found = _STATUS_LINE.fullmatch(head[0])
        if not found:
            raise Broken(f"status line {head[0]!r}")
        fields = tuple(_field(line) for line in head[1:])
        answer = Answer(int(found[1]), fields, b"")
        length = answer.header("Content-Length")
        if length is None or not length.isdecimal():
            raise Broken(f"no Content-Length: {fields}")
        size = 0 if method == "HEAD" else int(length)
        while len(received) < size:
            received += self._receive()
        if len(received) > size:
            raise Broken(f"{len(received)} bytes follow where {size} were announced")
        return Answer(answer.status, fields, received)

    def _read_head(self) -> tuple[list[bytes], bytes]:
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        head, _, rest = received.partition(b"\r\n\r\n")
        return head.split(b"\r\n"), rest

    def _receive(self) -> bytes:
        chunk = self._socket.recv(65536)
        if not chunk:
            raise Broken("the connection was closed before the end of the answer")
        return chunk


def _field(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode("ascii").partition(":")
    return name, value.strip()


# --- kinds of values -------------------------------------------------------------------------------------------------


def is_text(value: object) -> bool:
    """A JSON string."""
    return isinstance(value, str) and not isinstance(value, Number)


def is_boolean(value: object) -> bool:
    """``true`` or ``false``."""
    return isinstance(value, bool)


def is_integer(value: object) -> bool:
    """A JSON number without fraction or exponent."""
    return isinstance(value, Number) and re.fullmatch(r"-?\d+", value) is not None


def is_instant(value: object) -> bool:
    """What ``DateTimeFormatter.ISO_INSTANT`` reads on every JDK: UTC, as ``Z``, at most nanoseconds."""
    return is_text(value) and _INSTANT.fullmatch(str(value)) is not None


def is_duration(value: object) -> bool:
    """Seconds, for a client that takes a number without a point for nanoseconds, and knows no exponents."""
    return isinstance(value, Number) and re.fullmatch(r"\d+\.\d{1,9}", value) is not None


def is_texts(value: object) -> bool:
    """An array of strings."""
    return isinstance(value, list) and all(map(is_text, value))


def is_counts(value: object) -> bool:
    """An object of whole numbers."""
    return isinstance(value, dict) and all(map(is_integer, value.values()))
