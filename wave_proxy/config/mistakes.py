"""What is said of a configuration that can't be used: which key or variable, its value, the rule, what was meant."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from wave_proxy.config.model import RegistrySettings, Settings
from wave_proxy.errors import clip

_SECRET_KEYS = ("password", "proxy", "redis_url", "accounts", "secret", "pairing_token")
_TABLES = {key: type(field.default) for key, field in Settings.model_fields.items() if key != "registries"}
_SECTIONS = {key: model for key, model in _TABLES.items() if issubclass(model, BaseModel)}
# Between our own processes, for clients on the same machine, and of the operator's set-up.
_OTHER_VARIABLES = frozenset(
    {
        "WAVE_API_ENDPOINT",
        "WAVE_API_SOCKET",
        "WAVE_CONFIG_FILE",
        "WAVE_ENDPOINT",
        "WAVE_ENTRY_CHAIN",
        "WAVE_METRICS_FOLDER",
        "WAVE_OWN_PORT",
        "WAVE_OWN_URL",
        "WAVE_PART",
        "WAVE_READY_FD",
        "WAVE_SETTINGS_FD",
        "WAVE_STRICT_BUILD",
    }
)
_OPEN_TABLES = ("WAVE_REGISTRIES__", "WAVE_ACCOUNTS__")  # whose keys the operator chooses
_TYPES = {
    "dict_type": "expected a table",
    "model_type": "expected a table",
    "model_attributes_type": "expected a table",
    "tuple_type": "expected a list",
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected a text",
}


def explain(error: Any, variables: Mapping[str, str]) -> str:
    """One of pydantic's errors, in one line; ``variables`` are the environment's that may have brought the value."""
    place = tuple(str(part) for part in error["loc"])
    key = _shown_key(place, variables)
    if error["type"] == "extra_forbidden":
        if key in variables and (said := unknown_variables([key])):
            return said[0]
        return _unquoted_host(place, error["input"]) or f"{key}: no such key{_suggest(place)}"
    value = str(error["input"]) if isinstance(error["input"], Path) else error["input"]
    # A table may hold a password; of a single value, the key tells.
    secret = not isinstance(value, str | int | float) or any(word in ".".join(place) for word in _SECRET_KEYS)
    shown = "" if secret else f" (it is {clip(value, 80)})"
    rule = _TYPES.get(error["type"], error["msg"].removeprefix("Value error, "))
    return f"{key}: {rule}{shown}" if key else f"{rule}{shown}"


def _shown_key(place: Sequence[str], variables: Mapping[str, str]) -> str:
    """What the value at ``place`` is called where it comes from: a variable, if the environment has one for it."""
    names = {name.upper(): name for name in variables}
    for depth in range(len(place), 0, -1):
        if name := names.get(f"WAVE_{'__'.join(place[:depth])}".upper()):
            return ".".join((name, *place[depth:]))
    return ".".join(place)


def explain_file(file: Path, error: ValueError | OSError) -> str:
    """Why a file is no TOML, in one line."""
    hint = ""
    if match := re.match(r"(?:Invalid value|Expected newline).*\(at line (\d+)", str(error)):
        line = file.read_text(errors="replace").splitlines()[int(match[1]) - 1]
        _, _, value = line.partition("=")
        if value.strip() and value.strip()[0] not in "\"'[{":
            hint = ": texts, durations and sizes are written in quotes"
    return f"{file}: {error}{hint}"


def explain_variable(error: ValueError, names: Iterable[str]) -> str:
    """Which variable of the environment does not hold what it should; ``names`` are those that are set."""
    match = re.search(r'field "(\w+)"', str(error))
    prefix = f"WAVE_{match[1].upper()}" if match else ""
    found = [name for name in names if prefix and (name.upper() == prefix or name.upper().startswith(f"{prefix}__"))]
    if not found:
        return f"environment: {error}"
    return f"{' or '.join(sorted(found))}: the value is not valid JSON, in which tables and lists are given"


def unknown_variables(names: Iterable[str]) -> list[str]:
    """What to say of each environment variable that begins as ours do and is none; others may have set it."""
    known = [f"WAVE_{key.upper()}" for key in Settings.model_fields]
    known += [f"WAVE_{key.upper()}__{part.upper()}" for key, model in _SECTIONS.items() for part in model.model_fields]
    return [
        f"{name}: no such setting{_meant([f'WAVE_{near}' for near in _nearest(name[5:].upper(), known)])}"
        for name in sorted(names)
        if name.upper().startswith("WAVE_")
        and name.upper() not in {*known, *_OTHER_VARIABLES}
        and not name.upper().startswith(_OPEN_TABLES)
    ]


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    return get_close_matches(name, [variable.removeprefix("WAVE_") for variable in known], 1)


def _suggest(place: tuple[str, ...]) -> str:
    *table, key = place
    if near := get_close_matches(key, _keys_of(table), 1):
        return _meant(near if table or near[0] not in _SECTIONS else [f"[{near[0]}]"])
    general = [f"{key}, before the first [table]"] if table and key in Settings.model_fields else []
    return _meant(general + [f"[{name}] {key}" for name, model in _SECTIONS.items() if key in model.model_fields])


def _keys_of(table: Sequence[str]) -> list[str]:
    if not table:
        return list(Settings.model_fields)
    model = RegistrySettings if table[0] == "registries" else _SECTIONS.get(table[0])
    return list(model.model_fields) if model else []


def _meant(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _unquoted_host(place: tuple[str, ...], value: Any) -> str:
    """For ``[registries.quay.io]``, which TOML takes for a table in a table; empty for what is something else."""
    if len(place) < 3 or place[0] != "registries" or not isinstance(value, dict):
        return ""
    names = list(place[1:])
    while len(value) == 1 and isinstance(inner := next(iter(value.values())), dict):
        names += value
        value = inner
    host = ".".join(names)
    return f'[registries.{host}]: the host needs quotes: [registries."{host}"]'
