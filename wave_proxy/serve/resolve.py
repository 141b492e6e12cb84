"""Token → container request → what to pull upstream."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, replace
from time import time

import structlog

from wave_proxy.cache.flight import Flights
from wave_proxy.cache.local import LOCAL
from wave_proxy.errors import NameUnknown, StateUnavailable
from wave_proxy.image.reference import DOCKER_HUB, Reference, parse_reference
from wave_proxy.image.request import ContainerConfig, ContainerRequest
from wave_proxy.serve.ready import ReadyReplies
from wave_proxy.serve.route import Route, unknown_token
from wave_proxy.state.tokens import TokenStore

_log = structlog.get_logger()

_MEMORY_BYTES = 64 << 20
_KNOWN_BYTES = 1000  # of objects around what a request itself says, measured
_RECONNECT_S = 1.0
_DIGEST_TAG_LENGTH = len("sha256-") + 12


@dataclass(frozen=True, slots=True)
class Target:
    """What a route means upstream. ``request`` is None for the direct form."""

    registry: str
    repository: str
    reference: str
    token: str = ""
    request: ContainerRequest | None = None

    @property
    def name(self) -> str:
        """``registry/repository``: what permissions are about."""
        return f"{self.registry}/{self.repository}"

    @property
    def config(self) -> ContainerConfig:
        """What to change in the image; empty for the direct form."""
        return self.request.config if self.request else ContainerConfig()

    @property
    def email(self) -> str:
        """Of the user who made the request; empty when nobody knows."""
        return self.request.identity.email if self.request else ""


@dataclass(frozen=True, slots=True)
class _Known:
    request: ContainerRequest
    image: Reference
    size: int


class Resolver:
    """Requests by token; in memory for as long as they live, since they never change, or until others are used more."""

    def __init__(self, tokens: TokenStore, ready: ReadyReplies, authority: str = "") -> None:
        """What ``ready`` keeps for a token is dropped with it; ``authority`` is our own host and port, to others."""
        self._authority = authority
        self._tokens = tokens
        self._ready = ready
        self._memory: OrderedDict[str, _Known] = OrderedDict()
        self._bytes = 0
        self._deletions = 0
        self._looking_up: Flights[str, _Known | None] = Flights()

    async def resolve(self, route: Route) -> Target:
        """What ``route`` is about. Raises NameUnknown, StateUnavailable."""
        if route.registry == LOCAL:
            return Target(self._authority, f"{LOCAL}/{route.repository}", route.reference)
        if not route.token:
            official = route.registry == DOCKER_HUB and "/" not in route.repository
            repository = f"library/{route.repository}" if official else route.repository
            return Target(route.registry, repository, route.reference)
        known = self._memory.get(route.token)
        if known is not None:
            self._memory.move_to_end(route.token)
        else:
            known = await self._looking_up.run(route.token, lambda: self._look_up(route.token))
        if known is None or time() >= known.request.expires or known.image.repository != route.repository:
            raise unknown_token(route.token)
        image = known.image
        if known.request.is_durable:
            raise NameUnknown(f"This container is not pulled by its token, but by its own name: {known.request.image}")
        return Target(image.registry, image.repository, _reference(route, image), route.token, known.request)

    async def _look_up(self, token: str) -> _Known | None:
        deletions = self._deletions
        record = await self._tokens.find_record(token)
        if record is None or not record.is_valid(time()):
            return None
        if self._deletions != deletions:
            return await self._look_up(token)  # it may have been this one
        image, size = parse_reference(record.request.image), record.size + _KNOWN_BYTES
        known = self._memory[token] = _Known(record.request, image, size)
        self._bytes += known.size
        while self._bytes > _MEMORY_BYTES and len(self._memory) > 1:
            self._forget(next(iter(self._memory)))
        return known

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
                        self._ready.forget_token(token)
                    else:  # what was announced before is lost: look every token up again
                        self._memory.clear()
                        self._bytes = 0
                        self._ready.clear()
            except StateUnavailable as err:
                _log.warning("no word of deleted tokens", error=str(err))
            await asyncio.sleep(_RECONNECT_S)


def _reference(route: Route, image: Reference) -> str:
    """The reference to ask upstream for: ``sha256-<12 hex>`` stands for the digest that the request was made with."""
    tag = image.reference.replace(":", "-")[:_DIGEST_TAG_LENGTH]
    return image.reference if image.is_digest and route.reference == tag else route.reference


def own_target(target: Target) -> Target:
    """The target of the image that the request itself names, whatever this route asked for."""
    assert target.request is not None  # noqa: S101
    return replace(target, reference=parse_reference(target.request.image).reference)
