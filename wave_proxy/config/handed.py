"""The settings as child processes get them: what validates them stays with the parent, since it takes 10 MB a process.

What is handed down has the members of ``Settings``, is as frozen, and is used in its place.
"""

import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from wave_proxy.config.model import Settings


class ConfigInvalid(Exception):
    """The configuration can't be used; the text names every wrong key, its value and the rule, in one line."""


class Secret:
    """A text that does not show in ``repr``; in place of pydantic's."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        """The text."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return "Secret('**********')" if self._value else "Secret('')"


class Handed:
    """A table of the settings."""

    def __init__(self, members: dict[str, Any]) -> None:
        vars(self).update(members)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"the settings are frozen: {name} can't be set")

    # What the tables of ``model`` say beside their members is here, and theirs lead here.

    def read_password(self) -> str:
        """Of a registry."""
        return read_password(self)

    @property
    def headers(self) -> dict[str, str]:
        """Of the security headers."""
        return headers_of(self)

    @property
    def public_url(self) -> str:
        """Of all settings; the following ones as well."""
        return public_url(self)

    @property
    def authority(self) -> str:
        return urlsplit(public_url(self)).netloc

    @property
    def own_url(self) -> str:
        return own_url(self)


def read_password(table: Any) -> str:
    """The password of a registry's table, from its file if there is one. Raises OSError."""
    if table.password_file is not None:
        return cast(Path, table.password_file).read_text().strip()
    return cast(str, table.password.get_secret_value())


def headers_of(table: Any) -> dict[str, str]:
    """The security headers that are sent, by their names."""
    values = {name.replace("_", "-").title(): value for name, value in vars(table).items()}
    return {name: value for name, value in values.items() if name != "Enabled" and value} if table.enabled else {}


def public_url(settings: Any) -> str:
    """What image names begin with, scheme included."""
    scheme = "https" if settings.tls_cert else "http"
    return settings.server_url or f"{scheme}://localhost:{settings.port}"


def own_url(settings: Any) -> str:
    """Where our own parts reach the port: what the supervisor says, when it runs them side by side."""
    return os.environ.get("WAVE_OWN_URL") or public_url(settings)


def hand_down(settings: "Settings") -> int:
    """A file descriptor of memory with the settings, secrets and all, for child processes: see ``receive``."""
    fd = os.memfd_create("wave-proxy settings")
    os.write(fd, pickle.dumps(_plain(settings)))
    return fd


def receive() -> "Settings":
    """What the supervisor handed down, if it did (``WAVE_SETTINGS_FD``); else ``load`` by ``WAVE_CONFIG_FILE``.

    Raises ConfigInvalid.
    """
    if handed_down := os.environ.pop("WAVE_SETTINGS_FD", ""):
        fd = int(handed_down)
        content = os.pread(fd, os.fstat(fd).st_size, 0)  # others read it at the same time, and share its position
        os.close(fd)
        settings: Settings = pickle.loads(content)  # noqa: S301 - our own, never on a disk
        return settings
    from wave_proxy.config.loading import load

    config_file = os.environ.get("WAVE_CONFIG_FILE")
    return load(Path(config_file) if config_file else None, {})


def _plain(value: Any) -> Any:
    if hasattr(type(value), "model_fields"):
        return Handed({name: _plain(getattr(value, name)) for name in type(value).model_fields})
    if hasattr(value, "get_secret_value"):
        return Secret(value.get_secret_value())
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value
