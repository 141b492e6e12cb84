"""Local repositories over HTTP: what the distribution spec has beside pulling (its "Push", "Content Discovery" and
"Content Management"), in front of ``cache/local.py`` and ``cache/uploads.py``.
"""

import asyncio
import re
import sys
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

import structlog

from wave_proxy.cache.local import LOCAL, LocalRepositories
from wave_proxy.cache.manifests import StoredManifest
from wave_proxy.cache.uploads import Part, Uploads
from wave_proxy.errors import (
    BodyTooLarge,
    DigestInvalid,
    ManifestInvalid,
    UploadInvalid,
    clip,
)
from wave_proxy.image.oci import (
    MAX_MANIFEST_BYTES,
    OCI_INDEX,
    digest_of,
    is_media_type,
    matches,
    parse_digest,
    sniff_media_type,
)
from wave_proxy.image.private import owner_of
from wave_proxy.image.reference import is_repository
from wave_proxy.serve.login import ANONYMOUS, CHALLENGE, Logins
from wave_proxy.serve.messages import API_VERSION, Reply, Request
from wave_proxy.serve.route import Route, is_registry_path, kind_of

_log = structlog.get_logger()

_CONTENT_RANGE = re.compile(r"(?:bytes[ =])?(\d{1,18})-(\d{1,18})(?:/(?:\d{1,18}|\*))?")
_UNTOLD = frozenset({"", "application/json", "application/octet-stream", "text/plain"})


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """How large a request's body may be, by method and target."""

    otherwise: int

    def __call__(self, method: str, target: str) -> int:
        """The limit in bytes: none for a blob's parts, each of which is checked when it arrives."""
        if method in ("GET", "HEAD") or not is_registry_path(target):
            return self.otherwise
        return sys.maxsize if kind_of(target) == "upload" else MAX_MANIFEST_BYTES


class Pusher:
    """Answers what is not a pull under ``/v2/local/``, and ``/v2/`` itself, which tells clients of the login."""

    def __init__(self, local: LocalRepositories, uploads: Uploads, logins: Logins) -> None:
        self._local = local
        self._uploads = uploads
        self._logins = logins

    async def ping(self, request: Request) -> Reply:
        """The reply to a request for ``/v2/``. Raises Unauthorized for a wrong login, TooManyRequests.

        It is 200 without a login as well, and then names it: a client that reads this sends its login, if it has one.
        """
        await self._logins.check_given(request)
        headers = [API_VERSION, ("Content-Type", "application/json")]
        return Reply(200, [*headers, CHALLENGE] if self._logins.asks else headers, b"{}")

    async def check_account(self, request: Request) -> None:
        """Let pass who has a login: he may read all local repositories. Raises Unauthorized, TooManyRequests."""
        await self._logins.check_account(request)

    async def answer(self, request: Request, route: Route) -> Reply:
        """The reply to a request of a local route. Raises WaveError."""
        if route.kind == "referrers":
            if owner_of(route.repository):
                await self.check_account(request)
            return await asyncio.to_thread(self._list_referrers, route)
        user = await self._logins.check(request)
        if owner_of(route.repository) and user == ANONYMOUS:
            await self.check_account(request)
        if route.kind == "upload":
            return await self._upload(request, route, may_read_all=user != ANONYMOUS)
        reply = await self._change(request, route)
        name = f"{LOCAL}/{route.repository}"
        _log.info("repository changed", method=request.method, name=name, reference=route.reference, user=user)
        return reply

    # --- uploads -----------------------------------------------------------------------------------------------------

    async def _upload(self, request: Request, route: Route, *, may_read_all: bool) -> Reply:
        name, upload_id = route.repository, route.reference
        match request.method:
            case "POST":
                return await self._begin(request, route, may_read_all=may_read_all)
            case "PATCH":
                received = await self._uploads.append(name, upload_id, _part(request))
                return _standing(202, name, upload_id, received)
            case "PUT":
                digest = _digest_asked(_query(route).get("digest"))
                await self._uploads.finish(name, upload_id, _part(request), digest)
                return _created(f"/v2/{LOCAL}/{name}/blobs/{digest}", digest)
            case "DELETE":
                await self._uploads.cancel(name, upload_id)
                return Reply(204, [API_VERSION])
        return _standing(204, name, upload_id, self._uploads.received(name, upload_id))

    async def _begin(self, request: Request, route: Route, *, may_read_all: bool) -> Reply:
        name, query = route.repository, _query(route)
        if "mount" in query:
            digest = parse_digest(query["mount"])
            source = query.get("from", "").removeprefix(f"{LOCAL}/")
            is_ours = "from" not in query or (source != query["from"] and is_repository(source))
            is_ours = is_ours and (may_read_all or not owner_of(source))
            if is_ours and await asyncio.to_thread(self._local.mount, name, digest, source):
                return _created(f"/v2/{LOCAL}/{name}/blobs/{digest}", digest)
        elif "digest" in query:
            digest = _digest_asked(query["digest"])
            await self._uploads.add_whole(name, _part(request), digest)
            return _created(f"/v2/{LOCAL}/{name}/blobs/{digest}", digest)
        return _standing(202, name, self._uploads.begin(name), 0)

    # --- manifests, tags, blobs --------------------------------------------------------------------------------------

    async def _change(self, request: Request, route: Route) -> Reply:
        name, reference = route.repository, route.reference
        if request.method == "PUT":
            return await self._put_manifest(request, route)
        if route.kind == "blob":
            await asyncio.to_thread(self._local.delete_blob, name, reference)
        elif route.is_digest:
            await asyncio.to_thread(self._local.delete_manifest, name, reference)
        else:
            await asyncio.to_thread(self._local.delete_tag, name, reference)
        return Reply(202, [API_VERSION])

    async def _put_manifest(self, request: Request, route: Route) -> Reply:
        content = b"".join([chunk async for chunk in request.body.chunks()])
        if len(content) > MAX_MANIFEST_BYTES:
            raise BodyTooLarge(f"a manifest has at most {MAX_MANIFEST_BYTES} bytes")
        if route.is_digest and not matches(content, route.reference):
            raise DigestInvalid(f"the manifest has the digest {digest_of(content)}, and not {route.reference}")
        digest = route.reference if route.is_digest else digest_of(content)
        manifest = StoredManifest(content, _media_type(request, content), digest)
        tag = "" if route.is_digest else route.reference
        subject = await asyncio.to_thread(self._local.put_manifest, route.repository, manifest, tag)
        reply = _created(f"/v2/{LOCAL}/{route.repository}/manifests/{digest}", digest)
        if subject:
            reply.headers.append(("OCI-Subject", subject))
        return reply

    def _list_referrers(self, route: Route) -> Reply:
        query = _query(route)
        wanted = query.get("artifactType")
        content, last = self._local.list_referrers(route.repository, route.reference, wanted, query.get("last", ""))
        headers = [("Content-Type", OCI_INDEX), API_VERSION]
        if wanted is not None:
            headers.append(("OCI-Filters-Applied", "artifactType"))
        if last:
            path = f"/v2/{LOCAL}/{route.repository}/referrers/{route.reference}"
            more = urlencode({**({} if wanted is None else {"artifactType": wanted}), "last": last})
            headers.append(("Link", f'<{path}?{more}>; rel="next"'))
        return Reply(200, headers, content)


def _query(route: Route) -> dict[str, str]:
    return dict(parse_qsl(route.query, keep_blank_values=True))


def _digest_asked(text: str | None) -> str:
    if text is None:
        raise DigestInvalid("?digest=sha256:<64 lower-case hex digits> is missing: it says what the upload is to be")
    return parse_digest(text)


def _part(request: Request) -> Part:
    """The part of a blob that a request brings. Raises UploadInvalid when it contradicts itself."""
    text = request.header(b"content-range")
    if text is None:
        return Part(request.body.chunks())
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None or int(match[2]) < int(match[1]):
        raise UploadInvalid(f"Content-Range {clip(text)} is not <first byte>-<last byte>")
    size = int(match[2]) - int(match[1]) + 1
    length = request.header(b"content-length")
    if length is not None and int(length) != size:
        raise UploadInvalid(f"Content-Range {text} is {size} bytes, and Content-Length {length}")
    return Part(request.body.chunks(), int(match[1]), size)


def _media_type(request: Request, content: bytes) -> str:
    text = (request.header(b"content-type") or "").partition(";")[0].strip()
    media_type = sniff_media_type(content) if text in _UNTOLD else text
    if not is_media_type(media_type):
        raise ManifestInvalid(f"Content-Type {clip(media_type)} is no media type")
    return media_type


def _created(location: str, digest: str) -> Reply:
    return Reply(201, [API_VERSION, ("Location", location), ("Docker-Content-Digest", digest)])


def _standing(status: int, name: str, upload_id: str, received: int) -> Reply:
    location = f"/v2/{LOCAL}/{name}/blobs/uploads/{upload_id}"
    headers = [API_VERSION, ("Location", location), received_range(received), ("Docker-Upload-UUID", upload_id)]
    return Reply(status, headers)


def received_range(received: int) -> tuple[str, str]:
    """The header that says how much of an upload is there; of an empty one as well ``0-0``, as registries do."""
    return "Range", f"0-{max(received - 1, 0)}"
