"""Prints docs/configuration.md: every key of the settings, from the code that reads them."""

import json
import sys
from collections.abc import Iterator
from inspect import cleandoc, getdoc
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from wave_proxy.config.model import Duration, Quota, RegistrySettings, Settings, Size
from wave_proxy.config.units import format_duration, format_size

_HEAD = """\
# Configuration

<!-- Written by `make docs` from wave_proxy/config/model.py; edit the descriptions there. -->

Settings come from a TOML file (`wave-proxy serve --config wave.toml`, or its path in `WAVE_CONFIG_FILE`) and from the
environment, which wins over the file; flags of the command line win over both. `wave-proxy config` prints the settings
that result, with secrets hidden, and says which key is wrong, if one is. An unknown key is an error. So is, for
`wave-proxy config`, an environment variable that begins with `WAVE_` and belongs to nothing here; the service says so
in its log and starts. What is changed counts from the next start on: `systemctl restart wave-proxy`.

The environment variable of a key is `WAVE_` and its name in capitals; a table's name and its key are joined by two
underscores: `max_bytes` in `[cache]` is `WAVE_CACHE__MAX_BYTES`. Durations are written `"500ms"`, `"10s"`, `"15m"`,
`"36h"` or `"2d"`; sizes `"512MB"`, `"50GB"` or `"4GiB"`. Numbers without a unit are seconds and bytes. Quotas are
`"<max>/<duration>"`, such as `"100/1h"`, or `"off"`. Texts, and whatever has a unit, need their quotes.

"""

_REGISTRIES = """\
In the environment all registries stand in one variable, as JSON:
`WAVE_REGISTRIES='{"quay.io": {"username": "me", "password_file": "/run/secrets/quay"}}'`.
"""

_DURATION, _SIZE, _QUOTA = (get_args(alias)[1] for alias in (Duration, Size, Quota))


def page() -> str:
    """The whole page."""
    sections = {key: field.default for key, field in Settings.model_fields.items() if _is_section(field.default)}
    general = {key: field for key, field in Settings.model_fields.items() if key not in sections}
    parts = [_HEAD, "## General\n\n", *_table(general, "WAVE_")]
    for key, section in sections.items():
        model = type(section)
        parts += [f"\n## `[{key}]`\n\n{getdoc(model)}\n\n", *_table(model.model_fields, f"WAVE_{key.upper()}__")]
    parts += [f'\n## `[registries."<host>"]`\n\n{cleandoc(RegistrySettings.__doc__ or "")}\n\n', _REGISTRIES, "\n"]
    parts += _table(RegistrySettings.model_fields, "")
    return "".join(parts)


def _is_section(value: object) -> bool:
    return isinstance(value, BaseModel)


def _table(fields: dict[str, FieldInfo], prefix: str) -> Iterator[str]:
    """A row a key; the column of environment variables is left out where ``prefix`` is empty."""
    yield (
        "| key | environment | type | default | |\n|---|---|---|---|---|\n"
        if prefix
        else ("| key | type | default | |\n|---|---|---|---|\n")
    )
    for key, field in fields.items():
        variable = f" `{prefix}{key.upper()}` |" if prefix else ""
        yield f"| `{key}` |{variable} {_type(field)} | {_default(field)} | {field.description} |\n"


def _type(field: FieldInfo) -> str:
    for kind, name in ((_DURATION, "duration"), (_SIZE, "size"), (_QUOTA, "quota")):
        choices = (*field.metadata, *(note for choice in get_args(field.annotation) for note in _notes(choice)))
        if kind in choices:
            return name
    annotation: Any = field.annotation
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) is dict:
        return "table"
    if get_origin(annotation) is tuple:
        return "list of texts"
    names = {str: "text", SecretStr: "text", Path: "path", bool: "true or false", int: "number"}
    return next(names[kind] for kind in (annotation, *get_args(annotation)) if kind in names)


def _notes(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    if value == {}:
        return "none"
    if isinstance(value, tuple):
        return f"`{json.dumps(value)}`"
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, bool | int) and _SIZE not in field.metadata:
        return f"`{str(value).lower()}`"
    return f'`"{_written(value, field)}"`'


def _written(value: Any, field: FieldInfo) -> str:
    """A default as users write it."""
    if _DURATION in field.metadata:
        return format_duration(value)
    return format_size(value) if _SIZE in field.metadata else str(value)


if __name__ == "__main__":
    sys.stdout.write(page())
