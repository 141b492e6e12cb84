"""Images as their registries have them, and as they are stored here while those do not answer."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from api.images.inspection import explained
from api.images.own_images import OwnImages
from api.registries import Registries
from wave_proxy.errors import HostUnknown, TooManyRequests, UpstreamError, WaveError
from wave_proxy.image.reference import Reference
from wave_proxy.image.request import Identity
from wave_proxy.upstream.registry import Registry

T = TypeVar("T")
Ask = Callable[[Registry, Reference], Awaitable[T]]
"""Reads an image with that client, by the name that it has there."""

_UNANSWERED = (UpstreamError, HostUnknown, TooManyRequests)
_PATIENCE_S = 5.0  # what is stored is there within a second or so


class ImageReader:
    """Reads images as pulls will: a registry that is away keeps nobody from what is stored."""

    def __init__(self, registries: Registries, own_images: OwnImages) -> None:
        self._registries = registries
        self._own_images = own_images

    async def read(self, identity: Identity, image: Reference, ask: Ask[T]) -> T:
        """What ``ask`` makes of an image as ``identity`` may read it; while its registry can't say, of what is stored.

        That a registry takes long is no answer where the image is stored; else it is waited for. Stored images are read
        through our own port, under another name, which knows what this identity may have.
        Raises RequestInvalid, UpstreamUnavailable, and what else the registry's client raises.
        """
        with explained(image):
            registry = await self._registries.open(identity, image)
            if self._own_images.has(image):
                return await ask(registry, image)
            reason: WaveError | None = None
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    return await ask(registry, image)
            except _UNANSWERED as err:
                reason = err
            except TimeoutError:
                pass
            with suppress(WaveError, TimeoutError):
                return await self._read_stored(identity, image, ask)
            if reason is not None:
                raise reason
            return await ask(registry, image)

    async def _read_stored(self, identity: Identity, image: Reference, ask: Ask[T]) -> T:
        """Raises WaveError and TimeoutError when it is not here either."""
        async with asyncio.timeout(_PATIENCE_S), self._own_images.lend(image, identity) as place:
            return await ask(await self._registries.open(identity, place), place)
