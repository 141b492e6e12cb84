"""Whether a registry takes a login, asked as the registry itself wants to be (``wave.md`` §1.11 and §2.4.6)."""

import asyncio
import socket
from collections.abc import Mapping
from time import time

from yarl import URL

from wave_proxy.errors import Offline, RequestInvalid, UpstreamError, WaveError
from wave_proxy.upstream.aws import Ecr, is_ecr
from wave_proxy.upstream.bearer import basic_authorization, choose_challenge, may_know
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import Egress, Endpoint, authority_of, endpoint_for, is_public, origin_of, parse_url

_LIMIT_S = 20.0
_LOCALHOST = frozenset({"localhost", "localhost.localdomain", "0.0.0.0", "::1", "0:0:0:0:0:0:0:1"})


class LoginChecks:
    """Tries logins that other people bring, at registries that they name."""

    def __init__(
        self, egress: Egress, endpoints: Mapping[str, Endpoint], ecr: Ecr, *, limit_s: float = _LIMIT_S
    ) -> None:
        """``endpoints`` are those of the operator's tables, the only ones that may be at private addresses.

        ``ecr`` has no keys of this server: who asks may be anybody, and must not use them.
        """
        self._egress = egress
        self._ecr = ecr
        self._endpoints = endpoints
        self._limit_s = limit_s

    async def check(self, registry: str, login: Login) -> bool:
        """Whether the registry, a host or a URL, takes that login; False also when it can't be reached in time.

        One that lets in everybody takes none. To an Amazon registry, the login is an access key and its secret.
        Raises RequestInvalid for a registry at an address of our own network, or that can't be resolved, and for a
        role; Offline.
        """
        try:
            async with asyncio.timeout(self._limit_s):
                return await self._try(await self._place(registry.strip().lower()), login)
        except (Offline, RequestInvalid):
            raise
        except (TimeoutError, WaveError):
            return False

    async def _place(self, registry: str) -> Endpoint:
        """Where that registry is reached. Raises RequestInvalid."""
        scheme, url = _read(registry)
        authority = authority_of(url)
        configured = self._endpoints.get(authority)
        if configured is not None and (configured.allow_private or configured.proxy):
            return configured
        _refuse_localhost(url.raw_host or "")
        endpoint = configured or (
            Endpoint(authority, f"http://{authority}") if scheme == "http" else self._egress.endpoint(authority)
        )
        await _refuse_private(URL(endpoint.url), url.raw_host or "")
        return endpoint

    async def _try(self, endpoint: Endpoint, login: Login) -> bool:
        greeting = f"{endpoint.url}/v2/"
        response = await self._egress.follow("GET", greeting, endpoint=endpoint)
        response.release()
        challenge = choose_challenge(response.headers.getall("WWW-Authenticate", []))
        if challenge is None or response.status not in (200, 401):
            return False
        url = parse_url(greeting)
        if challenge.scheme == "bearer":
            realm = parse_url(challenge.realm)
            url = realm.update_query({"service": challenge.service}) if challenge.service else realm
            if not may_know(realm, endpoint):
                return False
        headers = {"Authorization": basic_authorization(await self._exchanged(endpoint.registry, login))}
        response = await self._egress.follow("GET", str(url), headers=headers, endpoint=endpoint)
        response.release()
        # Elsewhere, what was asked did not carry the login.
        return response.status == 200 and origin_of(response.url) == origin_of(url)

    async def _exchanged(self, registry: str, login: Login) -> Login:
        """What is shown to the registry for a login: to Amazon's, what Amazon gives for an access key."""
        if not is_ecr(registry) or login.username == "AWS":
            return login
        if login.username.startswith("arn:"):
            raise RequestInvalid("userName: an access key can be tried, and a role can't")
        return (await self._ecr.login(registry, login.username, login.password, time())).login


def _read(registry: str) -> tuple[str, URL]:
    """Scheme, if there is one, and address of a registry: of its host or its URL. Raises RequestInvalid."""
    _refuse_localhost(registry)
    scheme, separator, rest = registry.rpartition("://")
    try:
        if scheme not in ("", "http", "https"):
            raise UpstreamError(scheme)
        url = parse_url(f"{scheme or 'https'}://{rest if separator else registry}")
        endpoint_for(authority_of(url))
    except (UpstreamError, ValueError):
        raise RequestInvalid("Invalid registry hostname") from None
    return scheme, url


def _refuse_localhost(host: str) -> None:
    if host in _LOCALHOST:
        raise RequestInvalid(f"Access to localhost is not allowed: {host}")


async def _refuse_private(url: URL, named: str) -> None:
    """Raises RequestInvalid unless the host has a public address; the connection itself goes to such ones alone."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(url.raw_host, url.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise RequestInvalid(f"Unable to resolve host: {named}") from None
    if not any(is_public(str(info[4][0])) for info in found):
        raise RequestInvalid("Invalid registry hostname")
