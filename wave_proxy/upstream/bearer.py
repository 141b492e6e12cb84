"""Authentication at registries: what a challenge asks for, and the bearer tokens that answer it."""

import asyncio
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from re import compile as compile_pattern
from time import monotonic, time

from yarl import URL

from wave_proxy.errors import TokenRefused, UpstreamError, clip
from wave_proxy.image.oci import read_json_object
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import Egress, Endpoint, authority_of, origin_of, parse_url

_MAX_ANSWER_BYTES = 256 << 10
_MAX_TOKENS = 4096

# distribution's token specification: what holds when expires_in is left out.
_DEFAULT_LIFETIME_S = 60
_MAX_LIFETIME_S = 3600
# A token is not used to its end: the request that carries it takes time as well.
_USED_SHARE = 0.8

# `name=value`, `name="quoted"`, or a scheme, which is a word without `=`.
_ITEM = compile_pattern(r'[\s,]*(?:([^\s,="]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*))|([^\s,="]+)(?=[\s,]|$))')
_ESCAPED = compile_pattern(r"\\(.)")
_TOKEN = compile_pattern(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Challenge:
    """How a registry wants to be asked: ``scheme`` is ``basic`` or ``bearer``; the rest is for bearer only."""

    scheme: str
    realm: str = ""
    service: str = ""


def choose_challenge(headers: Iterable[str]) -> Challenge | None:
    """Bearer before Basic out of the WWW-Authenticate headers of one answer; None when there is neither.

    A Bearer without a realm is none. Source: RFC 9110 §11.6.1; ``wave.md`` V31.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for header in headers:
        # Bytes that are no UTF-8 came as surrogates, which no URL can hold.
        found.extend(_parse(header.encode(errors="surrogateescape").decode(errors="replace")))
    for scheme, values in found:
        if scheme == "bearer" and values.get("realm"):
            return Challenge(scheme, values["realm"], values.get("service", ""))
    return Challenge("basic") if any(scheme == "basic" for scheme, _ in found) else None


def _parse(header: str) -> list[tuple[str, dict[str, str]]]:
    found: list[tuple[str, dict[str, str]]] = []
    position = 0
    while match := _ITEM.match(header, position):
        position = match.end()
        name, quoted, plain, scheme = match.groups()
        if scheme:
            found.append((scheme.lower(), {}))
        elif found:
            found[-1][1].setdefault(name.lower(), plain if quoted is None else _ESCAPED.sub(r"\1", quoted))
    return found


def basic_authorization(login: Login) -> str:
    """The Authorization header of a user with a password."""
    return f"Basic {b64encode(f'{login.username}:{login.password}'.encode()).decode()}"


@dataclass(frozen=True, slots=True)
class Scope:
    """What a token is for: those actions in a repository, and to read from ``mount``, another one, if it is named."""

    repository: str
    actions: str = "pull"
    mount: str = ""

    def __str__(self) -> str:
        return f"repository:{self.repository}:{self.actions}"


@dataclass(frozen=True, slots=True)
class _Key:
    realm: str
    service: str
    scope: Scope
    login: Login | None


@dataclass(frozen=True, slots=True)
class _Kept:
    text: str
    expires: float  # monotonic
    asked: float  # epoch seconds


def _key(challenge: Challenge, scope: Scope, login: Login | None) -> _Key:
    return _Key(challenge.realm, challenge.service, scope, login)


class BearerTokens:
    """Bearer tokens, kept until they expire; callers that need the same one share one fetch."""

    def __init__(self, egress: Egress) -> None:
        self._egress = egress
        self._tokens: dict[_Key, _Kept] = {}
        self._fetches: dict[_Key, asyncio.Task[str]] = {}

    async def get(
        self, challenge: Challenge, scope: Scope, login: Login | None, endpoint: Endpoint, *, stale: str = ""
    ) -> str:
        """A token for that scope; never ``stale``, the one that was refused just now.

        The fetch belongs to this object, so that a caller who gives up takes nothing from the others.
        Raises TokenRefused, AddressRefused, TooManyRequests, UpstreamError and its children.
        """
        key = _key(challenge, scope, login)
        kept = self._tokens.get(key)
        if kept is not None and kept.text != stale and monotonic() < kept.expires:
            return kept.text
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = self._fetches[key] = asyncio.create_task(self._fetch(key, login, endpoint))
            fetch.add_done_callback(lambda _: self._fetches.pop(key))
        return await asyncio.shield(fetch)

    def forget(self, challenge: Challenge, scope: Scope, login: Login | None) -> None:
        """Give that token to nobody again: the registry refuses it."""
        self._tokens.pop(_key(challenge, scope, login), None)

    def issued(self, challenge: Challenge, scope: Scope, login: Login | None) -> float | None:
        """When the token at hand was asked for (epoch seconds), with that login; None when there is none."""
        kept = self._tokens.get(_key(challenge, scope, login))
        return None if kept is None else kept.asked

    async def _fetch(self, key: _Key, login: Login | None, endpoint: Endpoint) -> str:
        realm, asked = parse_url(key.realm), time()
        scopes = [str(key.scope), *([str(Scope(key.scope.mount))] if key.scope.mount else [])]
        url = realm.update_query({**({"service": key.service} if key.service else {}), "scope": scopes})
        headers = {"Authorization": basic_authorization(login)} if login and may_know(realm, endpoint) else {}
        response = await self._egress.follow("GET", str(url), headers=headers, endpoint=endpoint)
        what = f"a token for {endpoint.registry}/{key.scope.repository}"
        if response.status in (401, 403):
            said = await self._egress.explain(response)
            raise TokenRefused(f"{authority_of(realm)} refuses {what} ({said})")
        if response.status != 200:
            raise await self._egress.failure(response, what)
        token, lifetime_s = _read_token(await self._egress.read(response, _MAX_ANSWER_BYTES, what), what)
        if len(self._tokens) >= _MAX_TOKENS:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[key] = _Kept(token, monotonic() + lifetime_s * _USED_SHARE, asked)
        return token

    async def close(self) -> None:
        """End the fetches that still run."""
        fetches = list(self._fetches.values())
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)


def may_know(realm: URL, endpoint: Endpoint) -> bool:
    """Whether a token service may have the registry's password: over TLS, or on the registry's own host."""
    # http on the registry's host is no worse than the registry, but only when that has no TLS either.
    home = origin_of(URL(endpoint.url))
    scheme, host, _ = origin_of(realm)
    return scheme == "https" or (home[0] == "http" and home[1] == host)


def _read_token(content: bytes, what: str) -> tuple[str, float]:
    """Token and lifetime in seconds. Source: distribution's token specification, ``wave.md`` §2.4.4."""
    document = read_json_object(content, what)
    token = document.get("token") or document.get("access_token")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise UpstreamError(f"the answer with {what} has neither token nor access_token: {clip(sorted(document))}")
    lifetime_s = document.get("expires_in")
    if not isinstance(lifetime_s, int | float) or lifetime_s <= 0:
        lifetime_s = _DEFAULT_LIFETIME_S
    return token, min(lifetime_s, _MAX_LIFETIME_S)
