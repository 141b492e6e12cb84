"""Configured logins for upstream registries."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Login:
    """A user of a registry; the password does not show in ``repr``."""

    username: str
    password: str = field(repr=False)


class Credentials:
    """The configured logins by registry host, as it stands in image names."""

    def __init__(self, logins: Mapping[str, Login]) -> None:
        self._logins = dict(logins)

    def find(self, registry: str) -> Login | None:
        """The login for that registry, None when it is read anonymously."""
        return self._logins.get(registry)
