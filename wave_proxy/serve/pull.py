"""A pull: the order of the stages, from a route to the reply."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic, time
from urllib.parse import parse_qsl, urlencode

import structlog

from wave_proxy.cache.blobs import StoredBlob
from wave_proxy.cache.fill import FillReader, ReadAlong
from wave_proxy.cache.local import LOCAL
from wave_proxy.cache.manifests import StoredManifest
from wave_proxy.cache.repositories import CacheState, OpenBlob, Repositories
from wave_proxy.errors import ManifestUnknown, RangeInvalid, StateUnavailable
from wave_proxy.image.oci import INDEX_TYPES
from wave_proxy.image.private import owner_of
from wave_proxy.image.request import Layer
from wave_proxy.serve.architectures import Architectures
from wave_proxy.serve.augment import Augmenter
from wave_proxy.serve.hold import Holds
from wave_proxy.serve.layers import Layers
from wave_proxy.serve.lifetimes import Lifetimes
from wave_proxy.serve.messages import API_VERSION, NO_SNIFFING, FileBody, Reply, Request, Terms
from wave_proxy.serve.push import Pusher
from wave_proxy.serve.ranges import parse_range
from wave_proxy.serve.ready import age_s
from wave_proxy.serve.resolve import Resolver, Target, own_target
from wave_proxy.serve.route import Route, parse_route
from wave_proxy.state.quota import Quotas, subject_of
from wave_proxy.state.tokens import TokenStore
from wave_proxy.state.usage import Usage, architecture_of
from wave_proxy.upstream.credentials import AT_THE_PLATFORM

_log = structlog.get_logger()

_IMMUTABLE = ("Cache-Control", "max-age=31536000, immutable")
_NO_AGE = ("Age", "0")  # what a digest names can't get old
_AT_ONCE = "wait=0"  # RFC 7240: of a client that wants to know how things are now
_RECORDED = 100_000
_READY_S = 60.0  # so long a reply may be given again without a look at where it came from
_READY_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class _Found:
    """A manifest to answer with.

    Upstream last told what the tag stands for when it was ``confirmed``, and is asked again after ``until``: both are
    epoch seconds, and None where no tag was asked for.
    """

    manifest: StoredManifest
    state: CacheState
    confirmed: float | None = None
    until: float | None = None

    @property
    def age_s(self) -> int:
        return 0 if self.confirmed is None else age_s(self.confirmed, time())


class Puller:
    """Answers everything under ``/v2/``."""

    def __init__(
        self,
        resolver: Resolver,
        repositories: Repositories,
        augmenter: Augmenter,
        layers: Layers,
        tokens: TokenStore,
        quotas: Quotas,
        usage: Usage,
        holds: Holds,
        pusher: Pusher,
        lifetimes: Lifetimes,
    ) -> None:
        self._resolver = resolver
        self._repositories = repositories
        self._augmenter = augmenter
        self._layers = layers
        self._tokens = tokens
        self._quotas = quotas
        self._usage = usage
        self._holds = holds
        self._pusher = pusher
        self._lifetimes = lifetimes
        self._recorded: OrderedDict[str, None] = OrderedDict()
        self._architectures = Architectures()

    async def answer(self, request: Request) -> Reply:
        """The reply to a request for the registry. Raises WaveError."""
        route = parse_route(request.method, request.target)
        if route.kind == "ping":
            return await self._pusher.ping(request)
        if route.kind in ("upload", "referrers") or request.method not in ("GET", "HEAD"):
            return await self._pusher.answer(request, route)
        if route.registry == LOCAL and owner_of(route.repository):
            await self._pusher.check_account(request)
            reply = await self._read(request, route, await self._resolver.resolve(route))
            reply.terms = None
            return reply
        return await self._read(request, route, await self._resolver.resolve(route))

    async def _read(self, request: Request, route: Route, target: Target) -> Reply:
        if route.kind == "manifest":
            return await self._manifest(request, route, target)
        if route.kind == "tags":
            return await self._tags(route, target)
        if request.method == "HEAD":
            return await self._blob_head(request, target)
        return await self._blob(request, target)

    def _seen_for(self, target: Target) -> Repositories:
        """The repositories as the one sees them who made the request."""
        advice = AT_THE_PLATFORM if target.identity.is_platform else ""
        return self._repositories.as_seen_by(target.registry, target.login, advice)

    # --- manifests ---------------------------------------------------------------------------------------------

    async def _manifest(self, request: Request, route: Route, target: Target) -> Reply:
        changes = self._repositories.changes_of(target.registry, target.repository)
        if route.is_digest:
            found = await self._manifest_by_digest(target)
        else:
            found = await self._held(request, target)
        manifest = found.manifest
        counts = target.request is None or not target.request.uncounted
        if manifest.media_type in INDEX_TYPES:
            self._architectures.learn(manifest)
        is_pull = counts and request.method == "GET" and manifest.media_type not in INDEX_TYPES
        architecture = self._architecture(target, manifest) if is_pull else ""
        if is_pull:
            await self._count(request, target, architecture)
        await self._lifetimes.prolong(target)
        terms = self._terms(found, target, changes, is_pull=is_pull, architecture=architecture)
        headers = [
            ("Content-Type", manifest.media_type),
            ("Docker-Content-Digest", manifest.digest),
            ("ETag", f'"{manifest.digest}"'),
            API_VERSION,
            ("X-Cache", found.state),
            ("Age", str(found.age_s)),
        ]
        return Reply(200, headers, manifest.content, terms=terms)

    async def _held(self, request: Request, target: Target) -> _Found:
        """What a tag stands for once it is built, if it is being built. Raises StillBuilding, ManifestUnknown."""
        image, client = f"{target.name}:{target.reference}", request.header(b"user-agent") or ""
        if request.header(b"prefer") == _AT_ONCE:
            return await self._manifest_by_tag(target)
        if target.request is not None and target.request.build_id:
            await self._holds.wait(image, client)
        try:
            return await self._manifest_by_tag(target)
        except ManifestUnknown:
            # A name that is used without a token, as those of frozen images are; or the image was deleted since.
            if not await self._holds.wait(image, client, afresh=True):
                raise
        return await self._manifest_by_tag(target)

    def _architecture(self, target: Target, manifest: StoredManifest) -> str:
        """That of the one platform that was asked for, empty for several; with none, what the manifest is known for."""
        platforms = target.request.platforms if target.request else ()
        if platforms:
            return architecture_of(platforms[0]) if len(platforms) == 1 else ""
        return self._architectures.find(manifest.digest)

    async def _count(self, request: Request, target: Target, architecture: str) -> None:
        """Let a pull in, and count it. Raises TooManyRequests, StateUnavailable."""
        subject = subject_of("pull", target.email, request.client)
        if not self._quotas.try_admit(subject):
            await self._quotas.admit(subject)
        self._usage.count(target.email, target.config.has_fusion, architecture)

    def _terms(
        self, found: _Found, target: Target, changes: int | None, *, is_pull: bool, architecture: str
    ) -> Terms | None:
        """How long the same answer holds: not beyond the tag's next question, nor the token's end."""
        if len(found.manifest.content) > _READY_BYTES:
            return None
        return Terms(
            until=monotonic() + self._ready_s(target, found.until),
            token=target.token,
            kind="manifest",
            state="stale" if found.state == "STALE" else "hit",
            changes=changes,
            confirmed=found.confirmed if changes is None else None,
            is_pull=is_pull,
            email=target.email,
            fusion=target.config.has_fusion,
            architecture=architecture,
        )

    def _ready_s(self, target: Target, until: float | None = None) -> float:
        """For how long an answer may be given again: not beyond ``until``, the token's end, or what is permitted."""
        permitted = self._seen_for(target).permitted_until(target.registry, target.repository)
        ends = [until, permitted, None if target.request is None else target.request.expires]
        now = time()
        return min([_READY_S, *(end - now for end in ends if end is not None)])

    async def _manifest_by_tag(self, target: Target) -> _Found:
        answer, source = None, target.reference
        if ":" not in source:  # a digest stands there for the tag that replaces it, see resolve
            answer = await self._seen_for(target).find_tag(target.registry, target.repository, target.reference)
            source = answer.digest
        state = self._known(target, source)
        if answer is not None and (answer.stale or answer.fetched):
            state = "STALE" if answer.stale else "MISS"
        if target.config:
            made = await self._augmenter.augment(target, source)
            manifest = made.contents[made.digest]
            self._architectures.put(made.digest, made.architecture)
        else:
            manifest = await self._seen_for(target).fetch_manifest(target.registry, target.repository, source)
        await self._record(target, source, manifest.digest)
        return _Found(manifest, state) if answer is None else _Found(manifest, state, answer.checked, answer.until)

    def _known(self, target: Target, digest: str) -> CacheState:
        return "HIT" if self._seen_for(target).has_manifest(target.registry, target.repository, digest) else "MISS"

    async def _manifest_by_digest(self, target: Target) -> _Found:
        if target.config:
            made = await self._augmenter.find(target, target.reference)
            if made is not None:
                return _Found(made, "HIT")
        state = self._known(target, target.reference)
        try:
            manifest = await self._seen_for(target).fetch_manifest(target.registry, target.repository, target.reference)
        except ManifestUnknown:
            remade = await self._remake(target) if target.config else None
            if remade is None:
                raise
            return _Found(remade, "MISS")
        return _Found(manifest, state)

    async def _remake(self, target: Target) -> StoredManifest | None:
        """Content of an equal request, known by its digest to somebody who never asked this token for its tag."""
        await self._manifest_by_tag(own_target(target))
        return await self._augmenter.find(target, target.reference)

    async def _record(self, target: Target, source: str, served: str) -> None:
        if not target.token or target.token in self._recorded:
            return
        self._recorded[target.token] = None
        if len(self._recorded) > _RECORDED:
            self._recorded.popitem(last=False)
        try:
            await self._tokens.record_pull(target.token, source, served)
        except StateUnavailable as err:
            _log.warning("pull not recorded", error=str(err))

    # --- tags --------------------------------------------------------------------------------------------------

    async def _tags(self, route: Route, target: Target) -> Reply:
        listed = await self._seen_for(target).list_tags(target.registry, target.repository, route.query)
        page, state = listed.page, "STALE" if listed.stale else "MISS"
        headers = [("Content-Type", "application/json"), NO_SNIFFING, API_VERSION, ("X-Cache", state)]
        headers.append(("Age", str(age_s(listed.checked, time()))))
        # Upstream's path is not ours; what follows the question mark is the same question, spelled so that it is safe.
        asked = parse_qsl(page.link.partition("?")[2].partition(">")[0], keep_blank_values=True)
        if asked:
            prefix = f"/v2/wt/{route.token}" if route.token else f"/v2/{route.registry}"
            query = urlencode(asked, errors="replace")
            headers.append(("Link", f'<{prefix}/{route.repository}/tags/list?{query}>; rel="next"'))
        return Reply(200, headers, page.content)

    # --- blobs -------------------------------------------------------------------------------------------------

    async def _blob_head(self, request: Request, target: Target) -> Reply:
        size: int | None
        layer = _requested_layer(target)
        if layer is not None:
            size = layer.gzip_size
        elif (made := await self._find_made_config(target)) is not None:
            size = len(made.content)
        else:
            size = await self._seen_for(target).find_size(target.registry, target.repository, target.reference)
            if size is None:
                return await self._blob(request, target)  # upstream tells its size to nobody who does not fetch it
        return Reply(200, _blob_headers(target.reference, "HIT"), length=size)

    async def _blob(self, request: Request, target: Target) -> Reply:
        changes = self._repositories.changes_of(target.registry, target.repository)
        layer = _requested_layer(target)
        if layer is not None:
            content = await self._layers.open(layer, target)
        else:
            made = await self._find_made_config(target)
            if made is not None:
                content = made.content
            else:
                content = await self._seen_for(target).open_blob(target.registry, target.repository, target.reference)
        if not isinstance(content, bytes):
            content = _read_small(content)
        reply = _send(request, target.reference, content)
        if reply.status == 200 and isinstance(content, bytes) and len(content) <= _READY_BYTES:
            reply.terms = self._blob_terms(request, target, changes)
        return reply

    def _blob_terms(self, request: Request, target: Target, changes: int | None) -> Terms | None:
        if request.header(b"range") is not None:
            return None
        until = monotonic() + self._ready_s(target)
        return Terms(until=until, token=target.token, kind="blob", state="hit", changes=changes)

    async def _find_made_config(self, target: Target) -> StoredManifest | None:
        if not target.config or self._seen_for(target).is_granted(target.registry, target.repository, target.reference):
            return None
        return await self._augmenter.find(target, target.reference)


def _requested_layer(target: Target) -> Layer | None:
    for layer in target.config.layers:
        if layer.gzip_digest == target.reference:
            return layer
    return None


def _read_small(blob: OpenBlob) -> OpenBlob | bytes:
    """The content of a small blob of the store, which is then given back; other blobs as they are."""
    if not isinstance(blob.source, StoredBlob) or blob.source.size > _READY_BYTES:
        return blob
    try:
        content = os.pread(blob.source.fd, blob.source.size, 0)
    finally:
        blob.source.close()
    if len(content) != blob.source.size:
        raise ConnectionAbortedError("the blob's file is shorter than its size")
    return content


def _blob_headers(digest: str, state: CacheState) -> list[tuple[str, str]]:
    return [
        ("Content-Type", "application/octet-stream"),
        ("Docker-Content-Digest", digest),
        ("ETag", f'"{digest}"'),
        ("Accept-Ranges", "bytes"),
        _IMMUTABLE,
        API_VERSION,
        ("X-Cache", state),
        _NO_AGE,
    ]


def _wanted_range(request: Request, digest: str, size: int) -> tuple[int, int] | None:
    condition = request.header(b"if-range")
    if condition is not None and condition.strip('"') != digest:
        return None
    return parse_range(request.header(b"range"), size)


def _send(request: Request, digest: str, content: OpenBlob | bytes) -> Reply:
    """The reply with that content, or the part of it that the client wants. Gives the blob back when that fails."""
    if isinstance(content, bytes):
        span = _wanted_range(request, digest, len(content))
        return _partial(
            Reply(200, _blob_headers(digest, "HIT"), content[slice(*span)] if span else content), span, len(content)
        )
    headers = _blob_headers(digest, content.state)
    if content.stream is not None:
        return Reply(200, headers, content.stream, length=content.size)
    source = content.source
    assert source is not None  # noqa: S101
    if content.size is None:
        assert isinstance(source, FillReader)  # noqa: S101
        return Reply(200, headers, ReadAlong(source))
    try:
        span = _wanted_range(request, digest, content.size)
    except RangeInvalid:
        source.close()
        raise
    start, end = span or (0, content.size)
    if isinstance(source, FillReader):
        source.withhold(end)
    return _partial(Reply(200, headers, FileBody(source, start, end)), span, content.size)


def _partial(reply: Reply, span: tuple[int, int] | None, size: int) -> Reply:
    if span is not None:
        reply.status = 206
        reply.headers.append(("Content-Range", f"bytes {span[0]}-{span[1] - 1}/{size}"))
    return reply
