"""For tests of pushes: OCI image layouts, and a small registry to push to that can misbehave on command."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from socket import create_server
from typing import Any

from aiohttp import web

from bench.images import Image
from bench.listening import listening


def write_layout(folder: Path, image: Image) -> Path:
    """The image as an OCI image layout."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    _write(blobs, image)
    entry = {"mediaType": image.media_type, "digest": image.digest, "size": len(image.manifest)}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def _write(blobs: Path, image: Image) -> None:
    for child in image.children:
        _write(blobs, child)
    (blobs / image.digest.partition(":")[2]).write_bytes(image.manifest)
    for blob in image.blobs:
        (blobs / blob.digest.partition(":")[2]).write_bytes(blob.content)


@dataclass
class Target:
    """A registry to push to. Its members may be changed while it runs; ``log`` is method and path of each request."""

    url: str = ""
    bearer: bool = False
    breaks: list[int] = field(default_factory=list)  # uploads that are cut off after so many bytes
    statuses: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)  # "METHOD part of path": used up
    whole: bool = True  # it takes a blob with one PUT
    tells_range: bool = True
    absolute: str = ""  # base URL of Locations
    wrong_digest: bool = False
    log: list[str] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    blobs: dict[tuple[str, str], bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], bytes] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    tokens: dict[str, list[str]] = field(default_factory=dict)
    received: int = 0  # bytes of blobs
    held: asyncio.Event | None = None  # uploads wait for it

    @property
    def address(self) -> str:
        """``127.0.0.1:port``."""
        return self.url.removeprefix("http://")

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request."""
        self.log.append(f"{request.method} {request.path_qs}")
        self.authorizations.append(request.headers.get("Authorization", ""))
        for position, (what, status, headers) in enumerate(self.statuses):
            method, _, part = what.partition(" ")
            if request.method == method and part in request.path:
                del self.statuses[position]
                return web.Response(status=status, headers=headers)
        if request.path == "/token":
            return self._token(request)
        if self.bearer and not self._may(request):
            challenge = f'Bearer realm="{self.url}/token",service="s"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return await self._content(request)

    def _token(self, request: web.BaseRequest) -> web.Response:
        token = token_hex(8)
        self.tokens[token] = request.query.getall("scope")
        return web.json_response({"token": token})

    def _may(self, request: web.BaseRequest) -> bool:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = request.path.removeprefix("/v2/").partition("/blobs/")[0].partition("/manifests/")[0]
        return f"repository:{repository}:pull,push" in self.tokens.get(given, [])

    async def _content(self, request: web.BaseRequest) -> web.StreamResponse:
        name, _, rest = request.path.removeprefix("/v2/").partition("/blobs/")
        if not rest:
            name, _, reference = request.path.removeprefix("/v2/").partition("/manifests/")
            return await self._manifest(request, name, reference)
        if rest == "uploads/":
            return self._begin(request, name)
        if rest.startswith("uploads/"):
            return await self._upload(request, name, rest.removeprefix("uploads/"))
        found = self.blobs.get((name, rest))
        return web.Response(status=404 if found is None else 200)

    async def _manifest(self, request: web.BaseRequest, name: str, reference: str) -> web.Response:
        if request.method == "PUT":
            self.manifests[name, reference] = await request.read()
        content = self.manifests[name, reference]
        digest = f"sha256:{sha256(content + (b' ' if self.wrong_digest else b'')).hexdigest()}"
        return web.Response(status=201, headers={"Docker-Content-Digest": digest})

    def _begin(self, request: web.BaseRequest, name: str) -> web.Response:
        source, digest = request.query.get("from"), request.query.get("mount", "")
        if source and (source, digest) in self.blobs:
            self.blobs[name, digest] = self.blobs[source, digest]
            return web.Response(status=201)
        session = token_hex(8)
        self.uploads[session] = bytearray()
        return web.Response(status=202, headers=self._where(name, session))

    def _where(self, name: str, session: str) -> dict[str, str]:
        return {"Location": f"{self.absolute}/v2/{name}/blobs/uploads/{session}?state=a%2Fb"}

    async def _upload(self, request: web.BaseRequest, name: str, session: str) -> web.StreamResponse:
        held = self.uploads.get(session)
        if held is None or request.query["state"] != "a/b":
            return web.Response(status=404)
        if request.method == "GET":
            told = {"Range": f"0-{max(len(held) - 1, 0)}"} if self.tells_range else {}
            return web.Response(status=204, headers=told)
        if request.method == "PUT" and not self.whole and request.content_length:
            return web.Response(status=405)
        if not await self._receive(request, held):
            return web.Response(status=500)
        if request.method == "PATCH":
            return web.Response(status=202, headers=self._where(name, session))
        digest = request.query["digest"]
        if digest != f"sha256:{sha256(held).hexdigest()}":
            return web.Response(status=400)
        self.blobs[name, digest] = bytes(self.uploads.pop(session))
        return web.Response(status=201, headers={"Docker-Content-Digest": digest})

    async def _receive(self, request: web.BaseRequest, held: bytearray) -> bool:
        """False when the connection was cut."""
        if self.held is not None:
            await self.held.wait()
        left = self.breaks.pop(0) if self.breaks and (request.content_length or 0) > self.breaks[0] else None
        async for chunk in request.content.iter_chunked(1 << 14):
            self.received += len(chunk)
            held += chunk
            if left is not None and (left := left - len(chunk)) <= 0:
                assert request.transport is not None
                request.transport.abort()
                return False
        return True


@asynccontextmanager
async def target(**members: Any) -> AsyncIterator[Target]:
    """A Target that listens on loopback; Locations are relative unless ``absolute`` says otherwise."""
    told = Target(**members)
    listener = create_server(("127.0.0.1", 0))
    told.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with listening(told.handle, listener):
        yield told
