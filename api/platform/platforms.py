"""Seqera Platforms as a source of users and of their logins for registries (``wave.md`` §10)."""

from collections.abc import Iterable
from hashlib import sha256
from time import time
from typing import Any

from api.identities import Claims
from api.platform.remembered import Remembered
from wave_proxy.errors import AccessTokenRefused, PairingMissing, PlatformError
from wave_proxy.image.platform import (
    SERVICE,
    CredentialsEntry,
    PairingRecord,
    PlatformUser,
    TokenPair,
    known_endpoint,
    matches_endpoint,
)
from wave_proxy.image.reference import DOCKER_HUB
from wave_proxy.image.request import Identity
from wave_proxy.state.jwts import TokenPairs
from wave_proxy.state.pairing import Pairings
from wave_proxy.upstream.aws import Ecr, is_ecr
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.platform import PlatformClient
from wave_proxy.upstream.platform_keys import RegistryKeys, decrypt, read_keys

_REGISTRY_LOGIN = "container-reg"

USER_FRESH_S = 86400.0
FRESH_S = 60.0
_FRESH_OF_RUN_S = 86400.0  # a run asks for the same all the time

_HUB_NAMES = frozenset({"", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"})


class Platforms:
    """The Platforms that are paired. ``endpoints`` are those that may be; of ``own`` ones (registries, or
    registries with the beginning of repositories) they know nothing.

    All methods raise PlatformError and StateUnavailable, besides what they name.
    """

    def __init__(
        self,
        endpoints: tuple[str, ...],
        pairings: Pairings,
        client: PlatformClient,
        pairs: TokenPairs,
        remembered: Remembered,
        ecr: Ecr,
        own: Iterable[str] = (),
    ) -> None:
        self._endpoints = endpoints
        self._pairings = pairings
        self._client = client
        self._pairs = pairs
        self._remembered = remembered
        self._ecr = ecr
        self._own = tuple(f"{place}/" for place in own)

    async def identify(self, claims: Claims, bearer: str) -> Identity:
        """The user whose token it is. Raises PairingMissing, AccessTokenRefused.

        ``bearer`` is tried when the Platform refuses the claimed one: clients put a new one there when they have
        refreshed a token, and go on claiming the old one.
        """
        endpoint = known_endpoint(claims.endpoint)
        await self._pairing(endpoint)
        try:
            user = await self._user(endpoint, claims, bearer)
        except PlatformError as err:
            if err.status == 401:
                raise AccessTokenRefused("the Platform does not know this access token") from None
            raise
        if claims.refresh_token:
            pair = TokenPair(claims.access_token, claims.refresh_token)
            await self._pairs.put_if_absent(endpoint, claims.access_token, pair)
        return Identity(
            user.user_id,
            user.email,
            claims.workspace_id,
            claims.access_token,
            endpoint=endpoint,
            workflow_id=claims.workflow_id,
        )

    async def find_login(self, identity: Identity, registry: str, repository: str) -> Login | None:
        """The user's login for a repository; None when he has none.

        Raises Denied when Amazon refuses his keys, UpstreamError for credentials that can't be read.
        """
        if f"{registry}/{repository}/".startswith(self._own):
            return None
        entry = choose(await self._entries(identity), registry, repository)
        name = entry.name if entry else ""
        if not name and is_ecr(registry) and identity.workflow_id:
            name = await self._batch_credentials(identity)
        if not name:
            return None
        keys = await self._keys(identity, name)
        if is_ecr(registry) and keys.username != "AWS":
            return await self._exchange(identity, registry, keys)
        return None if keys.is_aws else Login(keys.username, keys.password)

    async def is_running(self, identity: Identity) -> bool:
        """Whether the run that asked for a container goes on."""
        status = await self._client.workflow_status(
            identity.endpoint, identity.access_token, identity.workflow_id, identity.workspace_id, 0.0
        )
        return status in ("SUBMITTED", "RUNNING")

    async def _pairing(self, endpoint: str) -> PairingRecord:
        record = None
        if matches_endpoint(endpoint, self._endpoints):
            record = await self._pairings.find(SERVICE, endpoint)
        if record is None:
            raise PairingMissing(endpoint)
        return record

    async def _user(self, endpoint: str, claims: Claims, bearer: str) -> PlatformUser:
        token, refresh = claims.access_token, claims.refresh_token

        async def fetch(patience_s: float) -> tuple[Any, float]:
            try:
                user = await self._client.user(endpoint, token, refresh, patience_s)
            except PlatformError as err:
                if err.is_temporary or not bearer or bearer == token:
                    raise
                user = await self._client.user(endpoint, bearer, "", patience_s)
                await self._pairs.replace(endpoint, token, TokenPair(bearer, refresh))
            if user is None:
                raise PlatformError(401, f"Unauthorized access to Tower resource: {endpoint}/user-info")
            return [user.user_id, user.email], USER_FRESH_S

        return PlatformUser(*await self._remembered.get(endpoint, fetch, "user", _hidden(token)))

    async def _entries(self, identity: Identity) -> list[CredentialsEntry]:
        async def fetch(patience_s: float) -> tuple[Any, float]:
            found = await self._client.credentials(*_as(identity), identity.workspace_id, patience_s)
            return [[entry.name, entry.provider, entry.registry] for entry in found], _fresh_s(identity)

        found = await self._remembered.get(identity.endpoint, fetch, "credentials", *_whose(identity))
        return [CredentialsEntry(*entry) for entry in found]

    async def _batch_credentials(self, identity: Identity) -> str:
        async def fetch(patience_s: float) -> tuple[Any, float]:
            found = await self._client.batch_credentials(
                *_as(identity), identity.workflow_id, identity.workspace_id, patience_s
            )
            return found, _FRESH_OF_RUN_S

        asked = ("launch", *_whose(identity))
        return str(await self._remembered.get(identity.endpoint, fetch, *asked))

    async def _keys(self, identity: Identity, name: str) -> RegistryKeys:
        async def fetch(patience_s: float) -> tuple[Any, float]:
            pairing = await self._pairing(identity.endpoint)
            text = await self._client.keys(*_as(identity), name, pairing.pairing_id, identity.workspace_id, patience_s)
            keys = read_keys(decrypt(text, pairing.private_key))
            return [keys.username, keys.password, keys.is_aws], _fresh_s(identity)

        asked = ("keys", name, *_whose(identity))
        return RegistryKeys(*await self._remembered.get(identity.endpoint, fetch, *asked))

    async def _exchange(self, identity: Identity, registry: str, keys: RegistryKeys) -> Login:
        async def fetch(patience_s: float) -> tuple[Any, float]:
            found = await self._ecr.login(registry, keys.username, keys.password, time())
            return [found.login.username, found.login.password], found.lasts_s

        asked = ("ecr", registry, keys.username, _hidden(keys.password))
        return Login(*await self._remembered.get(f"ecr {identity.endpoint}", fetch, *asked))


def choose(entries: Iterable[CredentialsEntry], registry: str, repository: str) -> CredentialsEntry | None:
    """The entry for a repository: the one whose registry and path fit, with the longest path; of equal ones the first.

    An entry without a registry is for Docker Hub. Source: ``wave.md`` §10.5, which takes no notice of paths.
    """
    best, length = None, -1
    for entry in entries:
        host, path = _place(entry.registry)
        fits = host == registry and f"{repository}/".startswith(f"{path}/" if path else "")
        if entry.provider == _REGISTRY_LOGIN and fits and len(path) > length:
            best, length = entry, len(path)
    return best


def _place(text: str) -> tuple[str, str]:
    """Host and path of what a user typed as a registry, which may be an address."""
    host, _, path = text.strip().rpartition("://")[2].partition("/")
    host = host.lower()
    if host in _HUB_NAMES:
        host, path = DOCKER_HUB, path.removeprefix("v1").removeprefix("v2")
    return host, path.strip("/")


def _as(identity: Identity) -> tuple[str, str]:
    return identity.endpoint, identity.access_token


def _whose(identity: Identity) -> tuple[object, ...]:
    return _hidden(identity.access_token), identity.workspace_id, identity.workflow_id


def _fresh_s(identity: Identity) -> float:
    return _FRESH_OF_RUN_S if identity.workflow_id else FRESH_S


def _hidden(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()
