"""The client for upstream registries: manifests, blobs and tags, with authentication and retries."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from time import monotonic, time
from typing import TypeVar
from urllib.parse import quote

from aiohttp import ClientResponse
from yarl import URL

from wave_proxy.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    DigestMismatch,
    HostUnknown,
    ManifestUnknown,
    NameUnknown,
    Offline,
    TokenRefused,
    TooManyRequests,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
    WaveError,
)
from wave_proxy.image.oci import (
    ACCEPT_MANIFESTS,
    DOCKER_SCHEMA1,
    DOCKER_SCHEMA1_SIGNED,
    MAX_MANIFEST_BYTES,
    digest_of,
    is_media_type,
    matches,
    parse_digest,
    read_json_object,
    sniff_media_type,
)
from wave_proxy.image.reference import DOCKER_HUB
from wave_proxy.upstream.aws import Ecr, EcrLogins
from wave_proxy.upstream.bearer import BearerTokens, Challenge, Scope, basic_authorization, choose_challenge
from wave_proxy.upstream.breaker import Breakers
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.egress import Body, Egress, Endpoint, authority_of, origin_of, parse_url, retry_after_s
from wave_proxy.upstream.limits import Limits
from wave_proxy.upstream.stats import UpstreamStats
from wave_proxy.upstream.transfer import BlobStream, Transfers, Wanted

T = TypeVar("T")

MAX_TAGS_BYTES = 16 << 20

_MAX_CHALLENGES = 1024
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 5.0
_RETRY_WITHIN_S = 15.0  # clients give up after 30 s without an answer

_OK = frozenset({200})
# 403 is what object stores say to a HEAD with a link that was signed for GET.
_HEAD_OR_REFUSED = frozenset({200, 400, 403, 405, 501})

_NOUNS: dict[type[WaveError], str] = {ManifestUnknown: "image", BlobUnknown: "blob"}

# Types that say nothing about a manifest; text/html never is one.
_GENERIC = frozenset({"", "text/plain", "text/html", "application/json", "application/octet-stream"})
# Their digest is that of the document without its signatures.
_SIGNED_TYPES = frozenset({DOCKER_SCHEMA1, DOCKER_SCHEMA1_SIGNED})


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """What a manifest is, without its content; ``size`` in bytes."""

    digest: str
    media_type: str
    size: int


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest or index as it came; ``digest`` is that of ``content``, the media type has no parameters."""

    content: bytes
    media_type: str
    digest: str


@dataclass(frozen=True, slots=True)
class TagsPage:
    """One page of a tags list, as it came; ``link`` is upstream's Link header, empty when there is none."""

    content: bytes
    link: str


@dataclass(frozen=True, slots=True)
class _Subject:
    """What a request is about: a path in a repository, its name in messages, and the error when it isn't there.

    ``mount`` is the repository that a push takes a blob from; ``body`` what is sent. ``location`` replaces the path.
    """

    endpoint: Endpoint
    repository: str
    path: str
    name: str
    missing: type[WaveError]
    is_push: bool = False
    mount: str = ""
    body: Body | None = None
    location: str = ""

    @property
    def url(self) -> str:
        return self.location or f"{self.endpoint.url}/v2/{quote(self.endpoint.name_of(self.repository))}/{self.path}"

    @property
    def scope(self) -> Scope:
        named = self.endpoint.name_of
        return Scope(named(self.repository), "pull,push" if self.is_push else "pull", named(self.mount))


@dataclass(frozen=True, slots=True)
class PushRequest:
    """One request of a push. ``target`` is a path in the repository, or the URL that an earlier answer led to.

    ``what`` names it in messages. ``mount`` is the repository of the same registry that a blob is to be taken from; the
    target's query then gets its name.
    """

    method: str
    registry: str
    repository: str
    target: str
    what: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    mount: str = ""


_AT_ONCE = {"Prefer": "wait=0"}  # RFC 7240, 4.3


class Registry:
    """Reads from all upstream registries. Failures that look temporary are tried ``attempts`` times in all.

    A registry that is not well is left alone for a while, see ``breaker``: requests then fail at once.
    Every method raises Denied (or AddressRefused), TooManyRequests, UpstreamError, UpstreamUnavailable and
    UpstreamTimeout, besides what it names itself.
    """

    def __init__(
        self,
        egress: Egress,
        credentials: Credentials,
        *,
        attempts: int = 4,
        limits: Limits | None = None,
        parallel: int = 1,
        ecr: Ecr | None = None,
    ) -> None:
        self._egress = egress
        self._ecr = EcrLogins(ecr or Ecr(egress))
        self._credentials = credentials
        self._attempts = attempts
        self._bearers = BearerTokens(egress)
        self._challenges: dict[str, Challenge] = {}  # by endpoint URL: the next request need not ask first
        self.stats = UpstreamStats(named=egress.configured | {DOCKER_HUB})
        self._breakers = Breakers(spared=egress.own)  # it answers for many registries
        self._limits = limits or Limits()
        self._transfers = Transfers(egress, self._retried, self._slot, self._limits, parallel)

    async def close(self) -> None:
        """End what still runs in the background. The egress is the caller's."""
        await self._bearers.close()
        await self._ecr.close()

    def acting_as(self, credentials: Credentials) -> "Registry":
        """The same client with other logins; connections, tokens, limits and what is known of registries are shared."""
        other = copy(self)
        other._credentials = credentials
        return other

    def acting_with(self, registry: str, login: Login | None, advice: str = "") -> "Registry":
        """The same client with that login for that registry, and no other; ``advice`` is for who has none."""
        return self.acting_as(self._credentials.only(registry, login, advice))

    def acting_for(self, email: str, own: Iterable[tuple[str, str, str]] = ()) -> "Registry":
        """The same client with the logins of that user: his ``own`` (registry, user, password), then these."""
        return self.acting_as(self._credentials.of(email, own))

    def login_seen(self, registry: str, repository: str) -> float:
        """When the registry has last seen the login for that repository (epoch seconds).

        A bearer token stands for the login as it was when the token was given.
        """
        challenge, scope, login = self._token_of(registry, repository)
        asked = None if challenge is None else self._bearers.issued(challenge, scope, login)
        return time() if asked is None else asked

    def forget_token(self, registry: str, repository: str, before: float) -> None:
        """Have the next request for that repository bring the login, unless it has since ``before`` (epoch seconds)."""
        challenge, scope, login = self._token_of(registry, repository)
        if challenge is not None and (self._bearers.issued(challenge, scope, login) or before) < before:
            self._bearers.forget(challenge, scope, login)

    def _token_of(self, registry: str, repository: str) -> tuple[Challenge | None, Scope, Login | None]:
        endpoint = self._egress.endpoint(registry)
        challenge, scope = self._challenges.get(endpoint.url), Scope(endpoint.name_of(repository))
        return challenge, scope, self._credentials.find(registry, repository)

    # --- what callers ask for ------------------------------------------------------------------------------------

    async def head_manifest(
        self, registry: str, repository: str, reference: str, *, at_once: bool = False
    ) -> ManifestHead:
        """Digest, media type and size of a manifest; costs a GET where upstream's HEAD does not tell them.

        ``at_once`` asks a registry that could wait for an image, as our own does for builds, not to.
        Raises ManifestUnknown, DigestInvalid.
        """
        subject = self._manifest(registry, repository, reference)
        response = await self._head(subject, {"Accept": ACCEPT_MANIFESTS} | (_AT_ONCE if at_once else {}))
        head = _read_head(response, reference)
        if head is None:
            manifest = await self.fetch_manifest(registry, repository, reference)
            head = ManifestHead(manifest.digest, manifest.media_type, len(manifest.content))
        return head

    async def fetch_manifest(self, registry: str, repository: str, reference: str) -> FetchedManifest:
        """A manifest of at most MAX_MANIFEST_BYTES, checked against the digest in ``reference`` or upstream's header.

        Raises ManifestUnknown, DigestInvalid, DigestMismatch.
        """
        subject = self._manifest(registry, repository, reference)
        async with self._slot(registry, subject.name):
            return await self._retried(registry, subject.name, lambda: self._read_manifest(subject, reference))

    async def head_blob(self, registry: str, repository: str, digest: str) -> int | None:
        """Size of a blob in bytes, None when upstream does not tell. Raises BlobUnknown."""
        response = await self._head(self._blob(registry, repository, digest), {})
        if response.status == 200:
            return response.content_length
        async with self.open_blob(registry, repository, digest) as stream:
            return stream.size

    def open_blob(
        self, registry: str, repository: str, digest: str, *, start: int = 0, size: int | None = None
    ) -> AbstractAsyncContextManager[BlobStream]:
        """A blob's bytes from ``start`` on, or from 0 where upstream ignores Range; unchecked.

        ``size`` is the whole blob's, when it is known. Raises BlobUnknown on entry. The chunks raise
        UpstreamUnavailable when they end too early and UpstreamTimeout when they stall: both can be resumed. More
        bytes than announced are handed on.
        """
        subject = self._blob(registry, repository, digest)
        return self._transfers.open(Wanted(registry, subject.name, partial(self._ask, "GET", subject), start, size))

    def open_url(self, url: str, *, start: int = 0, size: int | None = None) -> AbstractAsyncContextManager[BlobStream]:
        """The same for an http(s) address that a user gave; never with credentials. Raises BlobUnknown on entry."""
        place = str(parse_url(url).origin())
        return self._transfers.open(Wanted(place, _shown(url), partial(self._ask_url, url), start, size))

    async def fetch_tags(self, registry: str, repository: str, query: str) -> TagsPage:
        """One page of the tags list; ``query`` is the client's query string, without ``?``. Raises NameUnknown."""
        path = f"tags/list?{quote(query, safe='%=&+,:;/@~')}" if query else "tags/list"
        name = f"{registry}/{repository}"
        subject = _Subject(self._egress.endpoint(registry), repository, path, name, NameUnknown)
        about = f"tags of {name}"
        async with self._slot(registry, about):
            return await self._retried(registry, about, lambda: self._read_tags(subject))

    async def push(self, request: PushRequest, wanted: frozenset[int]) -> ClientResponse:
        """The answer to one request of a push, if its status is wanted; the caller releases it. It is not repeated.

        The login goes to the registry's own address alone. Raises NameUnknown for 404.
        """
        endpoint = self._egress.endpoint(request.registry)
        is_url = "://" in request.target
        source = f"&from={quote(endpoint.name_of(request.mount), safe='/')}" if request.mount else ""
        subject = _Subject(
            endpoint,
            request.repository,
            f"{request.target}{source}",
            request.what,
            NameUnknown,
            is_push=True,
            mount=request.mount,
            body=request.body,
            location=request.target if is_url else "",
        )
        async with self._limits.slot(request.registry):
            return await self._ask(request.method, subject, dict(request.headers), wanted)

    def upload_location(self, response: ClientResponse, registry: str) -> str:
        """The absolute URL of the upload that an answer speaks of. Raises UpstreamError without one."""
        location = response.headers.get("Location")
        return str(self._egress.next_hop(response.url, location, self._egress.endpoint(registry)))

    # --- reading answers -----------------------------------------------------------------------------------------

    def _manifest(self, registry: str, repository: str, reference: str) -> _Subject:
        if ":" in reference:
            parse_digest(reference)
        name = f"{registry}/{repository}{'@' if ':' in reference else ':'}{reference}"
        path = f"manifests/{quote(reference, safe=':')}"
        return _Subject(self._egress.endpoint(registry), repository, path, name, ManifestUnknown)

    def _blob(self, registry: str, repository: str, digest: str) -> _Subject:
        name = f"{registry}/{repository}@{digest}"
        path = f"blobs/{quote(digest, safe=':')}"
        return _Subject(self._egress.endpoint(registry), repository, path, name, BlobUnknown)

    async def _read_manifest(self, subject: _Subject, reference: str) -> FetchedManifest:
        response = await self._ask("GET", subject, {"Accept": ACCEPT_MANIFESTS}, _OK)
        media_type = _media_type(response)
        told = response.headers.get("Docker-Content-Digest", "")
        content = await self._egress.read(response, MAX_MANIFEST_BYTES, f"manifest {subject.name}")
        _refuse_page(media_type, subject)
        if media_type in _GENERIC:
            media_type = sniff_media_type(content)
        if ":" in reference:
            expected = reference
        else:
            expected = told if _is_digest(told) and media_type not in _SIGNED_TYPES else digest_of(content)
        if not matches(content, expected):
            raise DigestMismatch(f"manifest {subject.name} came as {digest_of(content)}, and {expected} was announced")
        read_json_object(content, f"manifest {subject.name}")
        return FetchedManifest(content, media_type, expected)

    async def _read_tags(self, subject: _Subject) -> TagsPage:
        response = await self._ask("GET", subject, {"Accept": "application/json"}, _OK)
        link = response.headers.get("Link", "")
        content = await self._egress.read(response, MAX_TAGS_BYTES, f"tags of {subject.name}")
        _refuse_page(_media_type(response), subject)
        read_json_object(content, f"tags of {subject.name}")
        return TagsPage(content, link)

    # --- asking --------------------------------------------------------------------------------------------------

    async def _head(self, subject: _Subject, headers: dict[str, str]) -> ClientResponse:
        """The answer to a HEAD, given back."""
        ask = partial(self._ask, "HEAD", subject, headers, _HEAD_OR_REFUSED)
        async with self._slot(subject.endpoint.registry, subject.name):
            response = await self._retried(subject.endpoint.registry, subject.name, ask)
            response.release()
        return response

    def _slot(self, place: str, about: str) -> AbstractAsyncContextManager[object]:
        """A connection of ``place``; nobody waits for one while that is left alone."""
        self._breakers.check(place, about, monotonic())
        return self._limits.slot(place)

    async def _retried(self, place: str, about: str, operation: Callable[[], Awaitable[T]]) -> T:
        """What ``operation`` brings, tried again where that may help; fails at once while ``place`` is left alone."""
        began, attempt = monotonic(), 1
        while True:
            trial = self._breakers.admit(place, about, monotonic())
            try:
                result = await operation()
            except BaseException as err:
                no_more = trial or attempt >= self._attempts or monotonic() - began > _RETRY_WITHIN_S
                pause_s = None if no_more or self._breakers.is_open(place) else _pause_s(err, attempt)
                if pause_s is None:
                    self._settle(place, about, err, trial)
                    raise
            else:
                self._settle(place, about, None, trial)
                return result
            self.stats.retried(place.rpartition("/")[2])
            await asyncio.sleep(pause_s)
            attempt += 1

    def _settle(self, place: str, about: str, err: BaseException | None, trial: bool) -> None:
        spread = random.uniform(1.0, 1.25)  # noqa: S311 - spreads retries, hides nothing
        self._breakers.settle(place, about, err, monotonic(), trial=trial, spread=spread)

    async def _ask(
        self, method: str, subject: _Subject, headers: dict[str, str], wanted: frozenset[int]
    ) -> ClientResponse:
        """An answer with one of the wanted statuses, which the caller closes."""
        response = await self._authorized(method, subject, headers)
        if response.status in wanted:
            return response
        if response.status in (401, 403):
            raise self._denied(response, subject, await self._egress.explain(response))
        if subject.is_push:
            raise await self._refusal(response, subject)
        if response.status == 404:
            response.release()
            raise subject.missing(f"{_NOUNS.get(subject.missing, 'repository')} {subject.name!r} not found")
        raise await self._egress.failure(response, subject.name)

    async def _refusal(self, response: ClientResponse, subject: _Subject) -> WaveError:
        """The error for what a registry does not take; ``retry_after_s`` is what its header asks for."""
        if response.status == 404:
            said = await self._egress.explain(response)
            return NameUnknown(
                f"registry {subject.endpoint.registry!r} does not take {subject.name} ({said}); "
                "where it wants repositories to be created first, create that one"
            )
        wait_s = retry_after_s(response.headers.get("Retry-After", ""), time())
        error = await self._egress.failure(response, subject.name, "take")
        error.retry_after_s = wait_s
        return error

    async def _ask_url(self, url: str, headers: dict[str, str], wanted: frozenset[int]) -> ClientResponse:
        response = await self._follow("GET", url, headers, authority_of(parse_url(url)))
        if response.status in wanted:
            return response
        if response.status in (404, 410):
            response.release()
            raise BlobUnknown(f"{_shown(url)} not found")
        if response.status in (401, 403):
            raise Denied(f"{_shown(url)} can't be read without credentials ({await self._egress.explain(response)})")
        raise await self._egress.failure(response, _shown(url))

    async def _authorized(self, method: str, subject: _Subject, headers: dict[str, str]) -> ClientResponse:
        """The answer to a request with what the registry asks for; a fresh token is tried once.

        What it asked for is remembered once that has worked, and forgotten when there is no token for it any more.
        """
        place = subject.endpoint.url
        known, used, failure = self._challenges.get(place), "", None
        try:
            used = await self._authorization(subject, known)
        except (Denied, HostUnknown, UpstreamError) as err:
            self._challenges.pop(place, None)
            failure = err
        response = await self._send(method, subject, headers, used)
        if response.status != 401 or origin_of(response.url) != origin_of(URL(place)):
            return response
        challenge = choose_challenge(response.headers.getall("WWW-Authenticate", []))
        said = await self._egress.explain(response)
        if failure is not None and challenge == known:
            raise failure
        fresh = await self._authorization(subject, challenge, stale=used)
        if challenge is None or fresh in ("", used):
            raise self._denied(response, subject, said)
        response = await self._send(method, subject, headers, fresh)
        if response.status == 401:
            login = await self._login(subject)
            self._bearers.forget(challenge, subject.scope, login)
        else:
            self._remember(place, challenge)
        return response

    async def _send(
        self, method: str, subject: _Subject, headers: dict[str, str], authorization: str
    ) -> ClientResponse:
        is_home = origin_of(parse_url(subject.url)) == origin_of(URL(subject.endpoint.url))
        sent = {**headers, "Authorization": authorization} if authorization and is_home else headers
        return await self._follow(method, subject.url, sent, subject.endpoint.registry, subject.endpoint, subject.body)

    async def _follow(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        registry: str,
        endpoint: Endpoint | None = None,
        body: Body | None = None,
    ) -> ClientResponse:
        self.stats.sent(registry)
        try:
            response = await self._egress.follow(method, url, headers=headers, endpoint=endpoint, body=body)
        except WaveError:
            self.stats.failed(registry)
            raise
        self.stats.answered(registry, response.status, response.headers)
        return response

    async def _authorization(self, subject: _Subject, challenge: Challenge | None, stale: str = "") -> str:
        if challenge is None:
            return ""
        login = await self._login(subject)
        if challenge.scheme == "basic":
            return basic_authorization(login) if login else ""
        try:
            token = await self._bearers.get(
                challenge, subject.scope, login, subject.endpoint, stale=stale.removeprefix("Bearer ")
            )
        except TokenRefused as err:
            raise Denied(f"{err}; {self._advice(subject)}") from None
        return f"Bearer {token}"

    async def _login(self, subject: _Subject) -> Login | None:
        registry = subject.endpoint.registry
        return await self._ecr.exchanged(registry, self._credentials.find(registry, subject.repository))

    def _remember(self, place: str, challenge: Challenge) -> None:
        if place not in self._challenges and len(self._challenges) >= _MAX_CHALLENGES:
            del self._challenges[next(iter(self._challenges))]
        self._challenges[place] = challenge

    def _denied(self, response: ClientResponse, subject: _Subject, said: str) -> Denied:
        registry = subject.endpoint.registry
        if origin_of(response.url) != origin_of(URL(subject.endpoint.url)):
            host = authority_of(response.url)
            return Denied(f"{host}, where registry {registry!r} sends us for {subject.name}, denies access ({said})")
        advice = self._advice(subject)
        if subject.is_push:
            return Denied(
                f"registry {registry!r} does not let us push to repository {subject.repository!r} ({said}); {advice}"
            )
        return Denied(f"registry {registry!r} denies access to repository {subject.repository!r} ({said}); {advice}")

    def _advice(self, subject: _Subject) -> str:
        advice = self._credentials.advise(subject.endpoint.registry, subject.repository)
        return advice.removeprefix("if it exists and is private, ") if subject.is_push else advice


def _pause_s(err: BaseException, attempt: int) -> float | None:
    """How long to wait before the next attempt; None when there must not be one."""
    if not isinstance(err, UpstreamUnavailable | UpstreamTimeout | TooManyRequests) or isinstance(err, Offline):
        return None
    if isinstance(err, TooManyRequests):
        wait_s = err.retry_after_s
        return wait_s if wait_s is not None and wait_s <= _MAX_PAUSE_S else None
    pause_s: float = min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _MAX_PAUSE_S)
    return pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries, hides nothing


def _media_type(response: ClientResponse) -> str:
    """Without parameters and in lower case; empty when it is missing or none that could be sent on."""
    media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    return media_type if is_media_type(media_type) else ""


def _refuse_page(media_type: str, subject: _Subject) -> None:
    if media_type == "text/html":
        raise UpstreamError(
            f"{subject.endpoint.url} answers for {subject.name} with a web page: a login or block page on the way?"
        )


def _is_digest(text: str) -> bool:
    try:
        parse_digest(text)
    except DigestInvalid:
        return False
    return True


def _read_head(response: ClientResponse, reference: str) -> ManifestHead | None:
    """What the headers tell of a manifest, None when something is missing."""
    media_type, size = _media_type(response), response.content_length
    digest = reference if ":" in reference else response.headers.get("Docker-Content-Digest", "")
    if response.status != 200 or media_type in _GENERIC or size is None or not _is_digest(digest):
        return None
    return ManifestHead(digest, media_type, size)


def _shown(url: str) -> str:
    """A URL for messages: no query, which may be a signature."""
    return str(parse_url(url).with_query(None).with_fragment(None))
