"""The world's registries, each as the one who asks may read it."""

from wave_proxy.errors import Denied
from wave_proxy.image.private import owner_of
from wave_proxy.image.reference import Reference
from wave_proxy.image.request import Identity
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.registry import Registry


class Registries:
    """Gives the client for an image, with the login that applies to who asks."""

    def __init__(self, registry: Registry, credentials: Credentials | None = None, local: str = "") -> None:
        """``local`` is what the names of our own repositories begin with; ``registry`` needs no logins."""
        self._registry = registry
        self._credentials = credentials or Credentials({})
        self._local = f"{local}/"

    async def open(self, identity: Identity, image: Reference) -> Registry:
        """The client to read (or write) ``image``'s repository as ``identity`` may. Raises Denied."""
        self._check_local(identity, image)
        login = await self.find_login(identity, image.registry, image.repository)
        return self._registry.acting_as(Credentials({image.registry: login} if login else {}))

    async def find_login(self, identity: Identity, registry: str, repository: str) -> Login | None:
        """The login that applies to that user for a repository; None where it is read without one."""
        return self._credentials.find(registry, repository, identity.local_email)

    def is_everybodys(self, login: Login | None, registry: str, repository: str) -> bool:
        """Whether anybody would read that repository as one does with that login."""
        return login == self._credentials.find(registry, repository)

    def _check_local(self, identity: Identity, image: Reference) -> None:
        name = f"{image.registry}/{image.repository}"
        if name.startswith(self._local):
            owner = owner_of(name.removeprefix(self._local))
            if owner and owner != identity.key:
                raise Denied(f"{name} holds private images of another user")
