"""The front door of a registry on loopback: notes what is sent to it, and holds requests until a test lets them go."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from socket import SO_RCVBUF, SOL_SOCKET, socket
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from bench.listening import listening
from tests.patience import PATIENCE_S

_UPLOAD = re.compile(r"/v2/(.+)/blobs/uploads/")
_MANIFEST = re.compile(r"/v2/(.+)/manifests/(.+)")
_STEP = 1 << 14
_DROPPED = frozenset({"transfer-encoding", "connection", "content-length"})


@dataclass(frozen=True)
class Sent:
    """One request that carried something and was answered; ``digest`` is the blob's, or the manifest's reference."""

    kind: str  # blob or manifest
    repository: str
    digest: str
    size: int
    status: int


@dataclass
class Hold:
    """Stops a request behind its first bytes."""

    kind: str
    repository: str
    reached: Event = field(default_factory=Event)
    release: Event = field(default_factory=Event)


class Watched:
    """A context manager; ``address`` is the door's, ``behind`` the registry's (both ``host:port``)."""

    def __init__(self, behind: str = "") -> None:
        self.behind = behind
        self.address = ""
        self._sent: list[Sent] = []
        self._asked: list[tuple[str, str, str]] = []
        self._holds: list[Hold] = []
        self._refusals: list[tuple[str, int, dict[str, str]]] = []
        self._lock = Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        self._thread: Thread | None = None

    @property
    def sent(self) -> list[Sent]:
        """What came so far, in the order in which it ended."""
        with self._lock:
            return list(self._sent)

    @property
    def asked(self) -> list[tuple[str, str, str]]:
        """Method, path and Authorization of every request."""
        with self._lock:
            return list(self._asked)

    def blobs(self, repository: str) -> dict[str, list[int]]:
        """The sizes of what was sent of each blob and stored, by digest."""
        found: dict[str, list[int]] = {}
        for one in self.sent:
            if one.kind == "blob" and one.repository == repository and one.status == 201:
                found.setdefault(one.digest, []).append(one.size)
        return found

    def hold(self, kind: str, repository: str) -> Hold:
        """Stop the next request of that kind to a repository."""
        held = Hold(kind, repository)
        with self._lock:
            self._holds.append(held)
        return held

    def refuse(self, what: str, status: int, headers: dict[str, str] | None = None) -> None:
        """Answer the next request whose ``METHOD path`` contains that with a status."""
        with self._lock:
            self._refusals.append((what, status, headers or {}))

    def forget_refusals(self) -> None:
        """Refuse nothing any more."""
        with self._lock:
            self._refusals.clear()

    def __enter__(self) -> Self:
        started: Future[int] = Future()
        self._thread = Thread(target=lambda: asyncio.run(self._serve(started)), name="watched")
        self._thread.start()
        self.address = f"127.0.0.1:{started.result(PATIENCE_S)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for held in self._holds:
            held.release.set()
        assert self._loop is not None
        assert self._ended is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    async def _serve(self, started: "Future[int]") -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        listener = socket()
        listener.setsockopt(SOL_SOCKET, SO_RCVBUF, _STEP)  # what is held back here the client still has
        listener.bind(("127.0.0.1", 0))
        timeout = ClientTimeout(total=None)
        async with (
            ClientSession(timeout=timeout, auto_decompress=False, connector=TCPConnector(limit=0)) as session,
            listening(self._handle, listener),
        ):
            self._session = session
            started.set_result(listener.getsockname()[1])
            await self._ended.wait()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except (ClientError, OSError):  # one of the two sides was killed
            raise asyncio.CancelledError from None

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        with self._lock:
            self._asked.append((request.method, request.path, request.headers.get("Authorization", "")))
            for position, (what, status, headers) in enumerate(self._refusals):
                if what in f"{request.method} {request.path}":
                    del self._refusals[position]
                    return web.Response(status=status, headers=headers)
        upload, manifest = _UPLOAD.match(request.path), _MANIFEST.fullmatch(request.path)
        if request.method in ("PUT", "PATCH") and (upload or manifest):
            return await self._carry(request, upload, manifest)
        return await self._pass_on(request)

    async def _carry(
        self, request: web.BaseRequest, upload: "re.Match[str] | None", manifest: "re.Match[str] | None"
    ) -> web.StreamResponse:
        kind = "manifest" if manifest else "blob"
        match = manifest or upload
        assert match is not None
        digest = manifest[2] if manifest else request.query.get("digest", "")
        held, size = self._take(kind, match[1]), [0]

        def note(status: int) -> None:
            with self._lock:
                self._sent.append(Sent(kind, match[1], digest, size[0], status))

        return await self._pass_on(request, self._counted(request, held, size), note)

    def _take(self, kind: str, repository: str) -> Hold | None:
        with self._lock:
            for held in self._holds:
                if (held.kind, held.repository) == (kind, repository) and not held.reached.is_set():
                    held.reached.set()
                    return held
        return None

    async def _counted(self, request: web.BaseRequest, held: Hold | None, size: list[int]) -> AsyncIterator[bytes]:
        async for chunk in request.content.iter_chunked(_STEP):
            size[0] += len(chunk)
            half = len(chunk) // 2
            yield chunk[:half]
            if held is not None:
                await asyncio.to_thread(held.release.wait)
            yield chunk[half:]

    async def _pass_on(
        self,
        request: web.BaseRequest,
        body: AsyncIterator[bytes] | None = None,
        note: Callable[[int], None] = lambda _: None,
    ) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _DROPPED}
        if body is not None and request.content_length is not None:
            headers["Content-Length"] = str(request.content_length)
        url = f"http://{self.behind}{request.path_qs}"
        async with self._session.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            note(answer.status)
            told = {name: value for name, value in answer.headers.items() if name.lower() not in _DROPPED}
            response = web.StreamResponse(status=answer.status, headers=told)
            response.content_length = answer.content_length
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response
