"""Logins for upstream registries: the configured ones, and to whom each of them applies."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from hashlib import sha256

AT_THE_PLATFORM = "if it exists and is private, add credentials for it to the workspace at the Platform"


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
        self._advice = ""

    def of(self, email: str, own: Iterable[tuple[str, str, str]] = ()) -> "Credentials":
        """What applies to the user with that address: ``own`` logins (registry, user, password), then these."""
        personal = copy(self)
        personal._email = email
        personal._own = {registry: Login(user, password) for registry, user, password in own}
        return personal

    def only(self, registry: str = "", login: Login | None = None, advice: str = "") -> "Credentials":
        """That login for that registry and no other; ``advise`` says ``advice`` where there is none.

        What is for certain users is still known, for ``advise`` to say so.
        """
        narrowed = copy(self)
        narrowed._logins, narrowed._email, narrowed._advice = {}, "", advice
        narrowed._own = {registry: login} if login else {}
        return narrowed

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

    def advise(self, registry: str, repository: str) -> str:
        """What to tell who was refused by that repository, of the settings that decide."""
        login, table = self.find(registry, repository), table_of(registry)
        others = self._find_others(f"{registry}/{repository}", login)
        others = f"the login in {others} is for other users" if others else ""
        if login:
            return f"check username and password in {login.source or table}" + (f"; {others}" if others else "")
        return self._advice or others or f"if it exists and is private, set username and password in {table}"

    def _find_others(self, place: str, login: Login | None) -> str:
        """The table that fits best and is for other users, unless that of ``login`` fits better; empty for none."""
        while place and not (login and login.source == table_of(place)):
            if place in self._users and not self._is_for(place, self._email):
                return table_of(place)
            place = place.rpartition("/")[0]
        return ""

    def _is_for(self, place: str, user: str) -> bool:
        patterns = self._users.get(place)
        if patterns is None:
            return True
        return bool(user) and (user in patterns or f"*@{user.rpartition('@')[2]}" in patterns or "*" in patterns)


def table_of(place: str) -> str:
    """The name of a table in the configuration, as ``Login.source`` has it."""
    return f'[registries."{place}"]'
