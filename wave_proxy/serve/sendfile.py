"""Files into sockets with ``sendfile``: fair shares, and one callback and one timer for a whole answer."""

import asyncio
import os
import socket

from wave_proxy.serve.messages import FileBody

SHARE_BYTES = 1 << 21  # what one client is handed before the next; at 1 MiB a gigabyte takes 1.4 times the CPU

_SHORT = "the blob's file is shorter than its size"


async def send_file(
    loop: asyncio.AbstractEventLoop, peer: socket.socket, head: bytes, body: FileBody, *, write_timeout_s: float
) -> None:
    """Send a head with the body behind it; returns when the kernel has taken the last byte.

    ``peer`` is what a transport calls its socket: it must be open now and not block, and the transport must hold back
    nothing of its own. Raises TimeoutError when the client takes nothing for ``write_timeout_s``, ConnectionError when
    it left or when the file is shorter than promised, and what the source raises.
    """
    sender = _Sender(loop, head, body, write_timeout_s)
    sock = _socket_of(peer, peer.fileno())
    try:
        going = sender.push(sock)
    finally:
        sock.detach()  # only borrowed: most answers are through by now
    if not sender.finished:
        # The duplicate outlives the transport, and lets us wait for room: the loop owns the original's readiness.
        with _socket_of(peer, os.dup(peer.fileno())) as sock:
            await sender.send_on(sock, going)


def _socket_of(peer: socket.socket, fd: int) -> socket.socket:
    return socket.socket(peer.family, peer.type, peer.proto, fileno=fd)  # all told: no system call asks for them


class _Sender:
    """One answer on its way: pushed by the loop when there is room, until the source has nothing ready."""

    __slots__ = ("_body", "_done", "_head", "_loop", "_more", "_moved_at", "_offset", "_timeout_s", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, head: bytes, body: FileBody, timeout_s: float) -> None:
        self._loop = loop
        self._head = head
        self._body = body
        self._offset = body.start
        # The head waits for the file's first bytes, to leave in one segment with them, when there are any.
        self._more = socket.MSG_MORE if min(body.source.readable(), body.end) > body.start else 0
        self._timeout_s = timeout_s
        self._moved_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._done: asyncio.Future[None] | None = None

    @property
    def finished(self) -> bool:
        """The kernel has it all."""
        return self._offset >= self._body.end and not self._head

    def push(self, sock: socket.socket) -> bool:
        """Hand over one share at most; whether more could go as soon as there is room. Raises OSError."""
        try:
            while self._head:
                self._head = self._head[sock.send(self._head, self._more) :]
            source = self._body.source
            ready = min(source.readable(), self._body.end) - self._offset
            if ready <= 0:
                return False
            sent = os.sendfile(sock.fileno(), source.fd, self._offset, min(ready, SHARE_BYTES))
        except BlockingIOError:
            return True
        if not sent:
            raise ConnectionAbortedError(_SHORT)
        self._offset += sent
        self._moved_at = self._loop.time()
        return sent < ready

    async def send_on(self, sock: socket.socket, going: bool) -> None:
        """Send the rest; ``going`` is what ``push`` said. Raises OSError, TimeoutError, and what the source raises."""
        try:
            while not self.finished:
                if going:
                    await self._push_all_ready(sock)
                if not self.finished:
                    await self._wait_for_source()
                    going = self.push(sock)
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def _push_all_ready(self, sock: socket.socket) -> None:
        self._done = self._loop.create_future()
        self._moved_at = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._timeout_s, self._look)
        self._loop.add_writer(sock, self._on_room, sock)
        try:
            await self._done
        finally:
            self._loop.remove_writer(sock)

    async def _wait_for_source(self) -> None:
        await self._body.source.wait(self._offset)
        if self._body.source.readable() <= self._offset:
            raise ConnectionAbortedError(_SHORT)

    def _on_room(self, sock: socket.socket) -> None:
        if self._done is None or self._done.done():
            return  # who waits for it has yet to run
        try:
            if not self.push(sock):
                self._done.set_result(None)
        except Exception as err:
            self._done.set_exception(err)

    def _look(self) -> None:
        # A push only notes when it was; this looks at the note about once a period, so that none sets a timer.
        left = self._timeout_s
        if self._done is not None and not self._done.done():
            left += self._moved_at - self._loop.time()
            if left <= 0:
                self._done.set_exception(TimeoutError(f"the client took nothing for {self._timeout_s:g} s"))
                return
        self._timer = self._loop.call_later(left, self._look)
