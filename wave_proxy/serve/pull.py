"""A pull: the order of the stages, from a route to the reply."""

from collections import OrderedDict
from urllib.parse import parse_qsl, urlencode

import structlog

from wave_proxy.cache.fill import FillReader, ReadAlong
from wave_proxy.cache.manifests import StoredManifest
from wave_proxy.cache.repositories import CacheState, OpenBlob, Repositories
from wave_proxy.errors import ManifestUnknown, RangeInvalid, StateUnavailable
from wave_proxy.image.request import Layer
from wave_proxy.serve.augment import Augmenter
from wave_proxy.serve.layers import Layers
from wave_proxy.serve.messages import FileBody, Reply, Request
from wave_proxy.serve.ranges import parse_range
from wave_proxy.serve.resolve import Resolver, Target, own_target
from wave_proxy.serve.route import Route, parse_route
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.registry import Registry

_log = structlog.get_logger()

API_VERSION = ("Docker-Distribution-Api-Version", "registry/2.0")
NO_SNIFFING = ("X-Content-Type-Options", "nosniff")
_IMMUTABLE = ("Cache-Control", "max-age=31536000, immutable")
_RECORDED = 100_000


class Puller:
    """Answers everything under ``/v2/``."""

    def __init__(
        self,
        resolver: Resolver,
        repositories: Repositories,
        augmenter: Augmenter,
        layers: Layers,
        registry: Registry,
        tokens: TokenStore,
    ) -> None:
        self._resolver = resolver
        self._repositories = repositories
        self._augmenter = augmenter
        self._layers = layers
        self._registry = registry
        self._tokens = tokens
        self._recorded: OrderedDict[str, None] = OrderedDict()

    async def answer(self, request: Request) -> Reply:
        """The reply to a request for the registry. Raises WaveError."""
        route = parse_route(request.method, request.target)
        if route.kind == "ping":
            return Reply(200, [API_VERSION, ("Content-Type", "application/json")], b"{}")
        target = await self._resolver.resolve(route)
        if route.kind == "manifest":
            return await self._manifest(route, target)
        if route.kind == "tags":
            return await self._tags(route, target)
        if request.method == "HEAD":
            return await self._blob_head(request, target)
        return await self._blob(request, target)

    # --- manifests ---------------------------------------------------------------------------------------------

    async def _manifest(self, route: Route, target: Target) -> Reply:
        find = self._manifest_by_digest if route.is_digest else self._manifest_by_tag
        manifest, state = await find(target)
        headers = [
            ("Content-Type", manifest.media_type),
            ("Docker-Content-Digest", manifest.digest),
            ("ETag", f'"{manifest.digest}"'),
            API_VERSION,
            ("X-Cache", state),
        ]
        return Reply(200, headers, manifest.content)

    async def _manifest_by_tag(self, target: Target) -> tuple[StoredManifest, CacheState]:
        source, stale = target.reference, False
        if ":" not in source:  # a digest stands there for the tag that replaces it, see resolve
            answer = await self._repositories.find_tag(target.registry, target.repository, target.reference)
            source, stale = answer.digest, answer.stale
        state: CacheState = "STALE" if stale else self._known(target, source)
        if target.config:
            made = await self._augmenter.augment(target, source)
            manifest = made.contents[made.digest]
        else:
            manifest = await self._repositories.fetch_manifest(target.registry, target.repository, source)
        await self._record(target, source, manifest.digest)
        return manifest, state

    def _known(self, target: Target, digest: str) -> CacheState:
        return "HIT" if self._repositories.has_manifest(target.registry, target.repository, digest) else "MISS"

    async def _manifest_by_digest(self, target: Target) -> tuple[StoredManifest, CacheState]:
        if target.config:
            made = await self._augmenter.find(target, target.reference)
            if made is not None:
                return made, "HIT"
        state = self._known(target, target.reference)
        try:
            return await self._repositories.fetch_manifest(target.registry, target.repository, target.reference), state
        except ManifestUnknown:
            found = await self._remake(target) if target.config else None
            if found is None:
                raise
            return found, "MISS"

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
        page = await self._registry.fetch_tags(target.registry, target.repository, route.query)
        headers = [("Content-Type", "application/json"), NO_SNIFFING, API_VERSION]
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
            size = await self._repositories.find_size(target.registry, target.repository, target.reference)
            if size is None:
                return await self._blob(request, target)  # upstream tells its size to nobody who does not fetch it
        return Reply(200, _blob_headers(target.reference, "HIT"), length=size)

    async def _blob(self, request: Request, target: Target) -> Reply:
        layer = _requested_layer(target)
        if layer is not None:
            return _send(request, target.reference, await self._layers.open(layer))
        made = await self._find_made_config(target)
        if made is not None:
            return _send(request, target.reference, made.content)
        blob = await self._repositories.open_blob(target.registry, target.repository, target.reference)
        return _send(request, target.reference, blob)

    async def _find_made_config(self, target: Target) -> StoredManifest | None:
        if not target.config or self._repositories.is_granted(target.registry, target.repository, target.reference):
            return None
        return await self._augmenter.find(target, target.reference)


def _requested_layer(target: Target) -> Layer | None:
    for layer in target.config.layers:
        if layer.gzip_digest == target.reference:
            return layer
    return None


def _blob_headers(digest: str, state: CacheState) -> list[tuple[str, str]]:
    return [
        ("Content-Type", "application/octet-stream"),
        ("Docker-Content-Digest", digest),
        ("ETag", f'"{digest}"'),
        ("Accept-Ranges", "bytes"),
        _IMMUTABLE,
        API_VERSION,
        ("X-Cache", state),
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
