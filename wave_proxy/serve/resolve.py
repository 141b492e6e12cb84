"""Token → container request → what to pull upstream."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, replace
from time import time

import structlog

from wave_proxy.cache.flight import Flights
from wave_proxy.cache.local import LOCAL
from wave_proxy.errors import Denied, NameUnknown, StateUnavailable
from wave_proxy.image.reference import DOCKER_HUB, Reference, parse_reference
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity
from wave_proxy.serve.access import NOBODY, Access
from wave_proxy.serve.ready import ReadyReplies
from wave_proxy.serve.route import Route, ended_token, unknown_token
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Login

_log = structlog.get_logger()

_MEMORY_BYTES = 64 << 20
_KNOWN_BYTES = 1000  # of objects around what a request itself says, measured
_RECONNECT_S = 1.0
_DIGEST_TAG_LENGTH = len("sha256-") + 12


@dataclass(frozen=True, slots=True)
class Target:
    """What a route means upstream, and the login to read it with. ``request`` is None for the direct form."""

    registry: str
    repository: str
    reference: str
    token: str = ""
    request: ContainerRequest | None = None
    login: Login | None = None

    @property
    def name(self) -> str:
        """``registry/repository``: what permissions are about."""
        return f"{self.registry}/{self.repository}"

    @property
    def config(self) -> ContainerConfig:
        """What to change in the image; empty for the direct form."""
        return self.request.config if self.request else ContainerConfig()

    @property
    def identity(self) -> Identity:
        """Who made the request; nobody for the direct form."""
        return self.request.identity if self.request else NOBODY

    @property
    def email(self) -> str:
        """Of the user who made the request; empty when nobody knows."""
        return self.identity.email


@dataclass(frozen=True, slots=True)
class _Known:
    request: ContainerRequest
    image: Reference
    size: int


class Resolver:
    """Requests by token; in memory for as long as they live, since they never change, or until others are used more."""

    def __init__(
        self, tokens: TokenStore, ready: ReadyReplies, access: Access, authority: str = "", *, anonymous: bool = True
    ) -> None:
        """What ``ready`` keeps for a token is dropped with it; ``authority`` is our own host and port, to others.

        Unless ``anonymous``, upstream's images are pulled by token only.
        """
        self._access = access
        self._anonymous = anonymous
        self._authority = authority
        self._tokens = tokens
        self._ready = ready
        self._memory: OrderedDict[str, _Known] = OrderedDict()
        self._bytes = 0
        self._deletions = 0
        self._looking_up: Flights[str, _Known | None] = Flights()

    async def resolve(self, route: Route) -> Target:
        """What ``route`` is about. Raises NameUnknown, Denied, StateUnavailable, and as ``Access.find_login``."""
        if route.registry == LOCAL:
            return Target(self._authority, f"{LOCAL}/{route.repository}", route.reference)
        if not route.token:
            official = route.registry == DOCKER_HUB and "/" not in route.repository
            repository = f"library/{route.repository}" if official else route.repository
            is_local = route.registry == self._authority and repository.startswith(f"{LOCAL}/")
            if not self._anonymous and not is_local:
                raise Denied(
                    f"{route.registry}/{repository} is not pulled by its own name here: request the container with an "
                    "access token (towerAccessToken, or an Authorization header), and pull the name in the answer"
                )
            login = await self._access.find_login(route.registry, repository)
            return Target(route.registry, repository, route.reference, login=login)
        known = await self._find(route)
        image, request = _meant(known.image, self._authority), known.request
        if request.is_durable:
            raise NameUnknown(f"This container is not pulled by its token, but by its own name: {request.image}")
        # What is named as everybody pulls it is read as everybody may: nobody has looked whether it is private.
        who = request.identity if image is known.image else NOBODY
        login = await self._access.find_login(image.registry, image.repository, who, route.token)
        return Target(image.registry, image.repository, _reference(route, image), route.token, request, login)

    async def _find(self, route: Route) -> _Known:
        known = self._memory.get(route.token)
        if known is None or time() >= known.request.expires:  # it may live longer now than when it was looked up
            known = await self._looking_up.run(route.token, lambda: self._look_up(route.token))
        else:
            self._memory.move_to_end(route.token)
        if known is None or known.image.repository != route.repository:
            raise unknown_token(route.token)
        if time() >= known.request.expires:
            raise ended_token(route.token, known.request.expires)
        return known

    async def _look_up(self, token: str) -> _Known | None:
        """The request of a token, whether its time is over or not; None when there is none, or it was deleted."""
        deletions = self._deletions
        record = await self._tokens.find_record(token)
        if record is None or record.deleted:
            return None
        if self._deletions != deletions:
            return await self._look_up(token)  # it may have been this one
        image, size = parse_reference(record.request.image), record.size + _KNOWN_BYTES
        known = _Known(record.request, image, size)
        if record.is_valid(time()):
            self._remember(token, known)
        return known

    def _remember(self, token: str, known: _Known) -> None:
        self._forget(token)
        self._memory[token] = known
        self._bytes += known.size
        while self._bytes > _MEMORY_BYTES and len(self._memory) > 1:
            self._forget(next(iter(self._memory)))

    def _forget(self, token: str) -> None:
        known = self._memory.pop(token, None)
        if known is not None:
            self._bytes -= known.size

    async def close(self) -> None:
        """End what is being looked up."""
        await self._looking_up.close()

    async def follow_deletions(self) -> None:
        """Forget tokens as they are deleted, on whichever machine, until cancelled."""
        while True:
            try:
                async for token in self._tokens.deletions():
                    self._deletions += 1
                    if token:
                        self._forget(token)
                        self._ready.forget(token)
                    else:  # what was announced before is lost: look every token up again
                        self._memory.clear()
                        self._bytes = 0
                        self._ready.clear()
            except StateUnavailable as err:
                _log.warning("no word of deleted tokens", error=str(err))
            await asyncio.sleep(_RECONNECT_S)


def _meant(image: Reference, authority: str) -> Reference:
    """The image by its own name, when it is named as one that is pulled straight through this server."""
    if image.registry != authority or image.repository.startswith((f"{LOCAL}/", "wt/")):
        return image
    return parse_reference(image.name_and_reference)


def _reference(route: Route, image: Reference) -> str:
    """The reference to ask upstream for: ``sha256-<12 hex>`` stands for the digest that the request was made with."""
    tag = image.reference.replace(":", "-")[:_DIGEST_TAG_LENGTH]
    return image.reference if image.is_digest and route.reference == tag else route.reference


def own_target(target: Target) -> Target:
    """The target of the image that the request itself names, whatever this route asked for."""
    assert target.request is not None  # noqa: S101
    return replace(target, reference=parse_reference(target.request.image).reference)
