"""The world's registries, each as the one who asks may read it."""

from wave_proxy.image.reference import Reference
from wave_proxy.image.request import Identity
from wave_proxy.upstream.registry import Registry


class Registries:
    """Gives the client for an image, with the login that applies to who asks."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def open(self, identity: Identity, image: Reference) -> Registry:
        """The client to read (or write) ``image``'s repository as ``identity`` may."""
        return self._registry
