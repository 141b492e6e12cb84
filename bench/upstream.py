"""A small real registry to pull from, which can misbehave on command; runs on a thread of its own."""

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from secrets import token_hex
from socket import create_server
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Literal, Self
from urllib.parse import parse_qs, urlencode

from aiohttp import web

from bench.images import Blob, Image
from bench.listening import listening

_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|tags)/(?P<reference>[^/]+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_JSON = "application/json"
_LIMIT_S = 120.0  # on a machine that is slow and busy too


@dataclass
class Faults:
    """What the registry does wrong; every member may be changed while it runs.

    The faults of a body (truncate, corrupt, extra, stall, slow, no_content_length) hit blobs, or with ``only`` every
    path that contains it. Counts go down as they are used; -1 means for ever.
    """

    only: str = ""
    truncate_at: int | None = None  # the connection ends after so many bytes of a body that announced more...
    truncate_times: int = 1  # ...for so many answers that are longer
    corrupt_last_byte: bool = False
    extra_bytes: int = 0  # bytes after the blob's own, counted in Content-Length
    stall_at: int | None = None  # after so many bytes nothing until `release`; -1: not even the answer's head
    release: Event = field(default_factory=Event)
    status: dict[str, int] = field(default_factory=dict)  # part of a path: the status that it is answered with...
    fail_times: int = -1  # ...for so many requests
    retry_after: str = ""  # header of those answers
    redirect_blobs_to: str = ""  # base URL
    no_range: bool = False  # a Range is answered with 200 and all of it
    wrong_range: bool = False  # a Range is answered with 206 and another start
    chunk_bytes: int = 1 << 18
    delay_s: float = 0.0  # after each chunk
    no_content_length: bool = False
    no_digest_header: bool = False
    no_head: bool = False  # HEAD is answered with 405
    content_type: str | None = None  # of manifests
    html_login: bool = False  # everything is answered with 200 and a page
    bearer_loop: bool = False  # everything is answered with 401
    realm: str | None = None  # URL of the token service in challenges

    def hits(self, path: str) -> bool:
        """Whether the faults of a body apply to that path."""
        return self.only in path if self.only else "/blobs/" in path


@dataclass(frozen=True)
class Request:
    """One request as it was answered; header names as they came, in a mapping that ignores case."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int


@dataclass
class _Repository:
    manifests: dict[str, Image] = field(default_factory=dict)  # by digest
    tags: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, Blob] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reply:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


class Upstream:
    """The read side of the distribution spec, with Range, HEAD, tags by pages, and basic or bearer authentication.

    A context manager. ``stop`` and ``start`` may follow each other: the address stays. With ``auth="bearer"`` and an
    empty ``username`` everybody gets a token, as on Docker Hub.
    """

    def __init__(
        self,
        *,
        auth: Literal["basic", "bearer"] | None = None,
        username: str = "user",
        password: str = "secret",
        host: str = "127.0.0.1",
        faults: Faults | None = None,
    ) -> None:
        self.faults = faults or Faults()
        self._auth = auth
        self.let_in(username, password)
        self._host = host
        self._port = 0
        self._repositories: dict[str, _Repository] = {}
        self._tokens: dict[str, str] = {}  # token: repository
        self._log: list[Request] = []
        self._lock = Lock()
        self._thread: Thread | None = None
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # --- content -------------------------------------------------------------------------------------------------

    def add(self, repository: str, image: Image, *tags: str) -> None:
        """Put an image with all that it names into a repository."""
        place = self._repositories.setdefault(repository, _Repository())
        place.manifests[image.digest] = image
        place.tags.update(dict.fromkeys(tags, image.digest))
        for blob in image.blobs:
            place.blobs[blob.digest] = blob
        for child in image.children:
            self.add(repository, child)

    def add_blob(self, repository: str, blob: Blob) -> None:
        """Put a blob that no manifest names into a repository."""
        self._repositories.setdefault(repository, _Repository()).blobs[blob.digest] = blob

    # --- what happened -------------------------------------------------------------------------------------------

    @property
    def log(self) -> list[Request]:
        """A copy of the requests so far, in the order in which their answers began."""
        with self._lock:
            return list(self._log)

    def clear_log(self) -> None:
        """Forget the requests so far."""
        with self._lock:
            self._log.clear()

    def fetches(self, digest: str) -> int:
        """How many GETs of that blob got content."""
        return sum(
            r.method == "GET" and r.status in (200, 206) and r.path.endswith(f"/blobs/{digest}") for r in self.log
        )

    def let_in(self, username: str, password: str) -> None:
        """Take that login from now on, and no other; bearer tokens that were given go on."""
        self._basic = f"Basic {b64encode(f'{username}:{password}'.encode()).decode()}" if username else ""

    def revoke_tokens(self) -> None:
        """Let all bearer tokens expire."""
        self._tokens.clear()

    # --- running -------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """``host:port``, also after it was stopped."""
        return f"{self._host}:{self._port}"

    @property
    def url(self) -> str:
        """``http://host:port``."""
        return f"http://{self.address}"

    def start(self) -> None:
        """Listen; on the same port as before when it ran before. Raises OSError."""
        started: Future[int] = Future()
        self._thread = Thread(target=lambda: asyncio.run(self._serve(started)), name="upstream", daemon=True)
        self._thread.start()
        self._port = started.result(timeout=_LIMIT_S)

    def stop(self) -> None:
        """Close the port and all connections; stalled answers end short."""
        thread, self._thread = self._thread, None
        if thread and self._loop and self._stopping:
            self._loop.call_soon_threadsafe(self._stopping.set)
            thread.join(timeout=_LIMIT_S)
            assert not thread.is_alive(), "the upstream's thread does not end"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _serve(self, started: "Future[int]") -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            listener = create_server((self._host, self._port))
        except OSError as err:
            started.set_exception(err)
            return
        async with listening(self._handle, listener):
            started.set_result(listener.getsockname()[1])
            await self._stopping.wait()

    # --- answering -----------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except ConnectionError:
            # The answer ends here, short; what is returned never leaves a closed connection.
            if request.transport is not None:
                request.transport.close()
            return web.Response(status=500)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        faulty = self.faults.hits(request.path)
        if faulty and self.faults.stall_at == -1:
            await self._stall(request)
        reply = self._fault(request) or self._challenge(request) or self._find(request)
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        if not (faulty and self.faults.no_content_length) or request.method == "HEAD":
            response.content_length = len(reply.body)
        with self._lock:
            self._log.append(Request(request.method, request.path_qs, request.headers, reply.status))
        await response.prepare(request)
        if request.method != "HEAD":
            await self._send(request, response, reply.body, faulty and reply.status in (200, 206))
        return response

    async def _send(self, request: web.BaseRequest, response: web.StreamResponse, body: bytes, faulty: bool) -> None:
        faults = self.faults
        end = self._take_truncation(len(body)) if faulty else len(body)
        stall_at = faults.stall_at if faulty and faults.stall_at is not None and faults.stall_at >= 0 else len(body)
        view, position = memoryview(body), 0
        while position < end:
            step = min(position + faults.chunk_bytes, end)
            if position <= stall_at < step:
                await response.write(view[position:stall_at])
                await self._stall(request)
                position, stall_at = stall_at, len(body)
                continue
            await response.write(view[position:step])
            position = step
            if faulty and faults.delay_s:
                await asyncio.sleep(faults.delay_s)
        if end < len(body) and request.transport is not None:
            request.transport.close()

    def _take_truncation(self, size: int) -> int:
        faults = self.faults
        if faults.truncate_at is None or faults.truncate_at >= size or faults.truncate_times == 0:
            return size
        if faults.truncate_times > 0:
            faults.truncate_times -= 1
        return faults.truncate_at

    async def _stall(self, request: web.BaseRequest) -> None:
        """Wait for ``release``; raises ConnectionResetError when the client or this server goes first."""
        assert self._stopping is not None
        while not self.faults.release.is_set():
            if self._stopping.is_set() or request.transport is None or request.transport.is_closing():
                raise ConnectionResetError
            await asyncio.sleep(0.005)

    def _fault(self, request: web.BaseRequest) -> _Reply | None:
        faults = self.faults
        status = next((s for part, s in faults.status.items() if part in request.path), None)
        if status is not None and faults.fail_times != 0:
            if faults.fail_times > 0:
                faults.fail_times -= 1
            reply = _error(status, "UNKNOWN", "failing on command")
            return _Reply(status, reply.body, {**reply.headers, **_header("Retry-After", faults.retry_after)})
        if not request.path.startswith("/v2/"):
            return None
        if faults.html_login:
            return _Reply(200, b"<html><body>Please sign in</body></html>", {"Content-Type": "text/html"})
        if faults.no_head and request.method == "HEAD":
            return _error(405, "UNSUPPORTED", "no HEAD here")
        return None

    def _challenge(self, request: web.BaseRequest) -> _Reply | None:
        """A 401 for a request of the API that lacks what it needs."""
        match = _PATH.fullmatch(request.path)
        given = request.headers.get("Authorization", "")
        if not request.path.startswith("/v2/") or (self._auth is None and not self.faults.bearer_loop):
            return None
        if self._auth == "basic":
            if given == self._basic and not self.faults.bearer_loop:
                return None
            challenge = 'Basic realm="upstream"'
        else:
            granted = self._tokens.get(given.removeprefix("Bearer "))
            if granted is not None and granted in ("", match and match["name"]) and not self.faults.bearer_loop:
                return None
            challenge = f'Bearer realm="{self.faults.realm or self.url + "/token"}",service="{self.address}"'
            if match:
                challenge += f',scope="repository:{match["name"]}:pull"'
        reply = _error(401, "UNAUTHORIZED", "authentication required")
        return _Reply(401, reply.body, {**reply.headers, "WWW-Authenticate": challenge})

    def _token(self, request: web.BaseRequest) -> _Reply:
        given = request.headers.get("Authorization", "")
        if given != self._basic:
            return _error(401, "UNAUTHORIZED", "incorrect username or password")
        scope = parse_qs(request.query_string).get("scope", [""])[0]
        token = token_hex(16)
        self._tokens[token] = scope.split(":")[1] if scope else ""
        return _json({"token": token, "access_token": token, "expires_in": 300})

    def _find(self, request: web.BaseRequest) -> _Reply:
        if request.method not in ("GET", "HEAD"):
            return _error(405, "UNSUPPORTED", f"no {request.method} here")
        if request.path == "/token" and self._auth == "bearer":
            return self._token(request)
        if request.path == "/v2/":
            return _json({})
        match = _PATH.fullmatch(request.path)
        repository = match and self._repositories.get(match["name"])
        if match is None or repository is None:
            return _error(404, "NAME_UNKNOWN", "repository name not known to registry")
        match match["kind"]:
            case "manifests":
                return self._manifest(repository, match["reference"])
            case "blobs":
                return self._blob(repository, match["reference"], request)
            case _:
                return _tags(repository, match["name"], request)

    def _manifest(self, repository: _Repository, reference: str) -> _Reply:
        image = repository.manifests.get(repository.tags.get(reference, reference))
        if image is None:
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        media_type = self.faults.content_type if self.faults.content_type is not None else image.media_type
        return _Reply(200, image.manifest, {"Content-Type": media_type, **self._digest(image.digest)})

    def _blob(self, repository: _Repository, digest: str, request: web.BaseRequest) -> _Reply:
        blob, faults = repository.blobs.get(digest), self.faults
        if blob is None:
            return _error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if faults.redirect_blobs_to:
            return _Reply(307, b"", {"Location": faults.redirect_blobs_to + request.path_qs})
        content = blob.content
        if faults.hits(request.path):
            if faults.corrupt_last_byte:
                content = content[:-1] + bytes([content[-1] ^ 1])
            content += bytes(faults.extra_bytes)
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **self._digest(digest)}
        if faults.no_range:
            return _Reply(200, content, headers)
        return _ranged(content, headers, request.headers.get("Range", ""), wrong=faults.wrong_range)

    def _digest(self, digest: str) -> dict[str, str]:
        return {} if self.faults.no_digest_header else {"Docker-Content-Digest": digest}


def _header(name: str, value: str) -> dict[str, str]:
    return {name: value} if value else {}


def _json(document: object) -> _Reply:
    return _Reply(200, json.dumps(document).encode(), {"Content-Type": _JSON})


def _error(status: int, code: str, message: str) -> _Reply:
    body = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode()
    return _Reply(status, body, {"Content-Type": _JSON})


def _ranged(content: bytes, headers: Mapping[str, str], asked: str, *, wrong: bool) -> _Reply:
    """The part of ``content`` that a Range header asks for; all of it when the header is none that we read."""
    match, size = _RANGE.fullmatch(asked), len(content)
    if match is None or not (match[1] or match[2]):
        return _Reply(200, content, headers)
    if match[1]:
        start, end = int(match[1]), min(int(match[2] or size - 1), size - 1)
    else:
        start, end = max(size - int(match[2]), 0), size - 1
    if start >= size or start > end:
        return _Reply(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    if wrong:
        start = start - 1 if start else 1
    return _Reply(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


def _tags(repository: _Repository, name: str, request: web.BaseRequest) -> _Reply:
    query = parse_qs(request.query_string)
    last = query.get("last", [""])[0]
    tags = [tag for tag in sorted(repository.tags) if tag > last]
    page = tags[: int(query["n"][0])] if "n" in query else tags
    reply = _json({"name": name, "tags": page})
    if not page or len(page) == len(tags):
        return reply
    following = urlencode({"last": page[-1], "n": len(page)})
    return _Reply(200, reply.body, {**reply.headers, "Link": f'</v2/{name}/tags/list?{following}>; rel="next"'})
