"""Servers on loopback that hold a build until a test lets it go on: a web page, and the front door of a registry."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, create_connection, socket
from socketserver import BaseRequestHandler, TCPServer, ThreadingTCPServer
from threading import Event, Lock, Thread

_WRITE = re.compile(rb"(?:POST|PUT|PATCH) /v2/(\S+?)/(blobs|manifests)/")
_CHUNK = 1 << 16


class Doors:
    """Doors by name: those that were never closed stand open, and at the end all do."""

    def __init__(self) -> None:
        self.address = ""  # host:port
        self._doors: dict[str, tuple[Event, Event]] = {}
        self._lock = Lock()
        self._all_open = False

    def close(self, name: str) -> None:
        """From now on who comes to that door waits there."""
        with self._lock:
            self._doors.setdefault(name, (Event(), Event()))

    def pass_through(self, name: str) -> None:
        """Return when that door is open."""
        with self._lock:
            door = None if self._all_open else self._doors.get(name)
        if door is not None:
            reached, opened = door
            reached.set()
            opened.wait()

    def is_reached(self, name: str) -> bool:
        """Whether somebody has come to a door that was closed."""
        return self._doors[name][0].is_set()

    def open(self, name: str) -> None:
        """Let through who waits there, and who comes."""
        self._doors[name][1].set()

    def open_all(self) -> None:
        """The same for every door."""
        with self._lock:
            self._all_open = True
        for name in list(self._doors):
            self.open(name)


@contextmanager
def page() -> Iterator[Doors]:
    """A web server whose page ``/<name>`` comes when that door is open."""
    doors = Doors()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            doors.pass_through(self.path.strip("/"))
            try:
                self.send_response(200)
                self.send_header("Content-Length", "5")
                self.end_headers()
                self.wfile.write(b"open\n")
            except OSError:
                return  # who has waited was killed

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        yield from _run(server, doors)


@contextmanager
def front_door(registry: str) -> Iterator[Doors]:
    """Another address of a registry (``host:port``), with doors for those who write.

    A door is named ``<repository> blobs`` or ``<repository> manifests``.
    """
    doors = Doors()

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            host, _, port = registry.partition(":")
            with create_connection((host, int(port))) as behind:
                back = Thread(target=_copy, args=(behind, self.request), daemon=True)
                back.start()
                _copy(self.request, behind, doors)
                back.join()

    with _Server(("127.0.0.1", 0), Handler) as server:
        yield from _run(server, doors)


class _Server(ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


def _run(server: TCPServer, doors: Doors) -> Iterator[Doors]:
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    doors.address = f"127.0.0.1:{server.server_address[1]}"
    try:
        yield doors
    finally:
        doors.open_all()
        server.shutdown()
        thread.join()


def _copy(source: socket, sink: socket, doors: Doors | None = None) -> None:
    """All that comes, to its end; requests that write wait at their door."""
    try:
        while content := source.recv(_CHUNK):
            # Clients send one request after the answer to the other, so that each begins with a piece.
            match = _WRITE.match(content) if doors else None
            if doors and match:
                doors.pass_through(f"{match[1].decode()} {match[2].decode()}")
            sink.sendall(content)
    except OSError:
        pass  # either side was killed
    for end in (source, sink):
        try:
            end.shutdown(SHUT_RDWR)
        except OSError:
            continue
