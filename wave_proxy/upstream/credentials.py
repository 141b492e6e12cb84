"""Logins for upstream registries: the configured ones, and to whom each of them applies."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from hashlib import sha256


@dataclass(frozen=True, slots=True)
class Login:
    """A user of a registry; the password does not show in ``repr``.

    ``source`` says in messages where it was set. ``key`` stands for the login where the login itself must not: 16 hex
    digits, others for another user or password.
    """

    username: str
    password: str = field(repr=False)
    source: str = field(default="", compare=False)
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        key = sha256(f"{self.username}\0{self.password}".encode()).hexdigest()[:16]
        object.__setattr__(self, "key", key)


class Credentials:
    """Logins by the place that they are for: a registry's host, or a host with the beginning of repositories."""

    def __init__(self, logins: Mapping[str, Login], users: Mapping[str, Iterable[str]] | None = None) -> None:
        """``users`` restricts logins, by place: to e-mail addresses, to a domain's (``*@…``), to every user (``*``)."""
        self._logins = dict(logins)
        self._users = {place: tuple(map(str.lower, patterns)) for place, patterns in (users or {}).items() if patterns}
        self._email = ""
        self._own: Mapping[str, Login] = {}

    def of(self, email: str, own: Iterable[tuple[str, str, str]] = ()) -> "Credentials":
        """What applies to the user with that address: ``own`` logins (registry, user, password), then these."""
        personal = copy(self)
        personal._email = email
        personal._own = {registry: Login(user, password) for registry, user, password in own}
        return personal

    def find(self, registry: str, repository: str = "", email: str = "") -> Login | None:
        """The login for that repository, of the user with that e-mail address if there is one; None for none.

        That of the longest matching place which applies to the user: a restricted one hides none that is shorter.
        """
        own = self._own.get(registry)
        if own is not None:
            return own
        place, user = f"{registry}/{repository}" if repository else registry, (email or self._email).lower()
        while place:
            login = self._logins.get(place)
            if login is not None and self._is_for(place, user):
                return login
            place = place.rpartition("/")[0]
        return None

    def is_restricted(self, registry: str, repository: str) -> bool:
        """Whether some login that fits the repository is for certain users only."""
        place = f"{registry}/{repository}"
        while place:
            if place in self._users and place in self._logins:
                return True
            place = place.rpartition("/")[0]
        return False

    def _is_for(self, place: str, user: str) -> bool:
        patterns = self._users.get(place)
        if patterns is None:
            return True
        return bool(user) and (user in patterns or f"*@{user.rpartition('@')[2]}" in patterns or "*" in patterns)
