"""Whose permission a pull uses: the login of whoever asked for the container, for what it reads."""

from wave_proxy.cache.local import LOCAL
from wave_proxy.errors import Denied
from wave_proxy.image.private import owner_of
from wave_proxy.image.request import Identity
from wave_proxy.serve.platform_logins import PlatformLogins
from wave_proxy.upstream.credentials import Credentials, Login

NOBODY = Identity()


class Access:
    """Decides with which login a repository is read."""

    def __init__(self, credentials: Credentials, platform: PlatformLogins, authority: str = "") -> None:
        """``authority`` is our own host and port, as others know it."""
        self._credentials = credentials
        self._platform = platform
        self._authority = authority

    async def find_login(
        self, registry: str, repository: str, identity: Identity = NOBODY, token: str = ""
    ) -> Login | None:
        """The login that applies to who asked for the container of that token; None to read without one.

        Raises Denied for a local repository that is another user's, and where the Platform refuses;
        UpstreamUnavailable when it does not answer, and never has for this.
        """
        if registry == self._authority and repository.startswith(f"{LOCAL}/"):
            owner = owner_of(repository.removeprefix(f"{LOCAL}/"))
            if owner and owner != identity.key:
                raise Denied(f"{repository} holds private images of another user")
            return None
        if identity.is_platform:
            login = await self._platform.find(identity, token, registry, repository)
            if login is not None:
                return login
        return self._credentials.find(registry, repository, identity.local_email)
