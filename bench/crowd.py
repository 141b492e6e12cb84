"""Many connections that want little: most are kept open, some read a big blob slowly. Cheap for whoever holds them."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection as Pipe
from re import search
from socket import MSG_PEEK, SO_LINGER, SO_RCVBUF, SOL_SOCKET, create_connection, socket
from struct import pack
from types import TracebackType
from typing import Self

from bench.children import child, raise_file_limit

_TICK_S = 0.01
_READS_A_SECOND = 1.0  # of one slow reader
_READ_BYTES = 4096
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Presence:
    """What became of a crowd: how many of its connections were still open at its end, and bytes of blobs."""

    open: int
    received: int


class _Members:
    """The connections of a crowd."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._idle: list[socket] = []
        self._slow: list[socket] = []
        self._turns: Iterator[socket] = iter(())
        self._received = 0

    def join(self, idle_path: str, idle: int, slow_path: str, slow: int) -> None:
        """Connect. Each of those that stay idle has had one good answer. Raises OSError, AssertionError."""
        for _ in range(slow):
            self._slow.append(self._ask(slow_path, receive_bytes=_READ_BYTES))
        for _ in range(idle):
            connection = self._ask(idle_path)
            self._idle.append(connection)
            _read_answer(connection)
        for connection in self._idle + self._slow:
            connection.setblocking(False)
        self._turns = cycle(self._slow)

    def _ask(self, path: str, receive_bytes: int = 0) -> socket:
        host, _, port = self._address.rpartition(":")
        connection = create_connection((host, int(port)), _TIMEOUT_S)
        if receive_bytes:  # the window shrinks to it as the first bytes come
            connection.setsockopt(SOL_SOCKET, SO_RCVBUF, receive_bytes)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {self._address}\r\n\r\n".encode())
        return connection

    def tick(self) -> None:
        """Let those read whose turn it is."""
        for connection in islice(self._turns, round(len(self._slow) * _READS_A_SECOND * _TICK_S)):
            with suppress(OSError):  # nothing there, or closed: leave() counts those
                self._received += len(connection.recv(_READ_BYTES))

    def leave(self) -> Presence:
        """Hang up."""
        everybody = self._idle + self._slow
        presence = Presence(sum(map(_is_open, everybody)), self._received)
        for connection in everybody:
            connection.setsockopt(SOL_SOCKET, SO_LINGER, pack("ii", 1, 0))  # no TIME_WAIT: the next crowd needs ports
            connection.close()
        self._idle, self._slow, self._turns, self._received = [], [], iter(()), 0
        return presence


def _read_answer(connection: socket) -> None:
    answer = b""
    while (head := answer.find(b"\r\n\r\n")) < 0:
        answer += _receive(connection, answer)
    length = search(rb"(?i)\r\ncontent-length: *(\d+)", answer[: head + 2])
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:300]
    assert length is not None, answer[:300]
    while len(answer) < head + 4 + int(length[1]):
        answer += _receive(connection, answer)


def _receive(connection: socket, before: bytes) -> bytes:
    part = connection.recv(65536)
    assert part, f"the connection ended after {len(before)} bytes"
    return part


def _is_open(connection: socket) -> bool:
    try:
        return connection.recv(1, MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _run(pipe: Pipe, address: str) -> None:
    raise_file_limit()
    members = _Members(address)
    pipe.send(None)
    with suppress(EOFError, BrokenPipeError):
        while True:
            if not pipe.poll(_TICK_S):
                members.tick()
                continue
            wish = pipe.recv()
            try:
                if wish:
                    members.join(*wish)
                pipe.send(None if wish else members.leave())
            except (AssertionError, OSError) as err:
                pipe.send(f"{type(err).__name__}: {err}")


class Crowd:
    """Connections to one server, in a process of their own. A context manager; they end with it."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._pipe = self._stack.enter_context(child(_run, self._address))
        self._pipe.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def join(self, idle_path: str, idle: int, slow_path: str, slow: int) -> None:
        """Connect: some ask once and stay, others read a blob at 4 KB a second. Raises RuntimeError."""
        self._wish((idle_path, idle, slow_path, slow))

    def leave(self) -> Presence:
        """Hang up. Raises RuntimeError."""
        presence = self._wish(None)
        assert presence is not None, "the crowd says nothing of itself"
        return presence

    def _wish(self, wish: tuple[str, int, str, int] | None) -> Presence | None:
        self._pipe.send(wish)
        try:
            answer: Presence | str | None = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the process of the crowd ended") from None
        if isinstance(answer, str):
            raise RuntimeError(f"the crowd can't connect: {answer}")
        return answer
