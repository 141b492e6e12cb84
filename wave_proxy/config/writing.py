"""The settings as a TOML file."""

import re
from typing import Any

from pydantic_core import to_json

from wave_proxy.config.model import OF_LOGINS, Settings


def to_toml(settings: Settings) -> str:
    """The settings as a TOML file that gives the same ones again, except that secrets are hidden."""
    document = settings.model_dump(mode="json", exclude_none=True)
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in document.items() if key not in tables]
    registries = tables.pop("registries", {})
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items())]
    for host, table in registries.items():
        lines += ["", f"[registries.{_toml_value(host)}]"]
        wanted = OF_LOGINS if "/" in host else table
        given = {key: value for key, value in table.items() if key in wanted and (key != "users" or value)}
        lines += [f"{key} = {_toml_value(value)}" for key, value in given.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    return to_json(value).decode()  # JSON's strings, numbers and booleans are TOML's


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)
