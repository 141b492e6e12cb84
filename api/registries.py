"""The world's registries, each as the one who asks may read it."""

from typing import Protocol

from wave_proxy.errors import Denied
from wave_proxy.image.private import owner_of
from wave_proxy.image.reference import Reference
from wave_proxy.image.request import Identity
from wave_proxy.upstream.credentials import AT_THE_PLATFORM, Credentials, Login
from wave_proxy.upstream.registry import Registry


class PlatformLogins(Protocol):
    """Logins that users have at a Platform."""

    async def find_login(self, identity: Identity, registry: str, repository: str) -> Login | None:
        """The user's login for a repository; None when he has none. Raises what a Platform makes of it."""


class Registries:
    """Gives the client for an image, with the login that applies to who asks."""

    def __init__(
        self,
        registry: Registry,
        credentials: Credentials | None = None,
        local: str = "",
        platforms: PlatformLogins | None = None,
    ) -> None:
        """``local`` is what the names of our own repositories begin with; ``registry`` needs no logins."""
        self._registry = registry
        self._credentials = credentials or Credentials({})
        self._local = f"{local}/"
        self._platforms = platforms

    async def open(self, identity: Identity, image: Reference) -> Registry:
        """The client to read (or write) ``image``'s repository as ``identity`` may. Raises Denied."""
        self._check_local(identity, image)
        login = await self.find_login(identity, image.registry, image.repository)
        advice = AT_THE_PLATFORM if identity.is_platform else ""
        return self._registry.acting_as(self._credentials.only(image.registry, login, advice))

    async def find_login(self, identity: Identity, registry: str, repository: str) -> Login | None:
        """The login that applies to that user for a repository; None where it is read without one.

        Raises PlatformError.
        """
        own = await self._find_own(identity, registry, repository)
        return own or self._credentials.find(registry, repository, identity.local_email)

    async def logins_for(self, identity: Identity, *images: Reference) -> tuple[tuple[str, str, str], ...]:
        """What ``BuildSpec.logins`` holds: the logins that the user brings for these images. Raises PlatformError."""
        found = {image.registry: await self._find_own(identity, image.registry, image.repository) for image in images}
        return tuple((host, login.username, login.password) for host, login in found.items() if login)

    async def _find_own(self, identity: Identity, registry: str, repository: str) -> Login | None:
        if self._platforms is None or not identity.is_platform:
            return None
        return await self._platforms.find_login(identity, registry, repository)

    async def is_guarded(self, identity: Identity, image: Reference) -> bool:
        """Whether that user, or anybody else, reads ``image`` as not everybody may. Raises Denied, PlatformError."""
        if self._check_local(identity, image) or self._credentials.is_restricted(image.registry, image.repository):
            return True
        login = await self.find_login(identity, image.registry, image.repository)
        return not self.is_everybodys(login, image.registry, image.repository)

    def is_everybodys(self, login: Login | None, registry: str, repository: str) -> bool:
        """Whether anybody would read that repository as one does with that login."""
        return login == self._credentials.find(registry, repository)

    def _check_local(self, identity: Identity, image: Reference) -> bool:
        """Whether the image is in a local repository of that user's own. Raises Denied for one of another user."""
        name = f"{image.registry}/{image.repository}"
        owner = owner_of(name.removeprefix(self._local)) if name.startswith(self._local) else ""
        if owner and owner != identity.key:
            raise Denied(f"{name} holds private images of another user")
        return bool(owner)
