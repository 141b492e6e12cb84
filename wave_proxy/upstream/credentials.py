"""Configured logins for upstream registries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class Login:
    """A user of a registry; the password does not show in ``repr``."""

    username: str
    password: str = field(repr=False)

    @property
    def key(self) -> str:
        """Stands for the login where the login itself must not: 16 hex digits, others for another password."""
        return sha256(f"{self.username}\0{self.password}".encode()).hexdigest()[:16]


class Credentials:
    """The configured logins by registry host, as it stands in image names."""

    def __init__(self, logins: Mapping[str, Login]) -> None:
        self._logins = dict(logins)

    def find(self, registry: str, repository: str = "", email: str = "") -> Login | None:
        """The login of the user with that e-mail address, if there is one, for that repository; None for none."""
        return self._logins.get(registry)
