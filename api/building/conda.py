"""Conda environment files: written from package names, extended by channels, and read for the names in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from re import compile as compile_pattern

import yaml

from wave_proxy.errors import RequestInvalid

_QUOTES = "'\""
_OPERATORS = compile_pattern(r"[=<>]+")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})  # of YAML


@dataclass(frozen=True, slots=True)
class Package:
    """A package that an environment names; the version is empty when it names none."""

    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.version}" if self.version else self.name


def split_words(entries: Sequence[str]) -> list[str]:
    """The words of all entries, without the quotes around them.

    Source: ``wave.md`` §4.7c, vectors V13.
    """
    return [word for entry in entries for token in entry.split() if (word := trim_quotes(token))]


def trim_quotes(text: str) -> str:
    """``text`` without matching quotes around it, however many; blanks inside of the last ones stay."""
    while True:
        inner = text.strip()
        if len(inner) < 2 or inner[0] not in _QUOTES or inner[0] != inner[-1]:
            return text
        text = inner[1:-1]


def write_environment(entries: Sequence[str], channels: Sequence[str]) -> str:
    """The environment file that installs ``entries``; empty when there are none.

    Raises RequestInvalid. Source: ``wave.md`` §4.7c, vectors V13.
    """
    words = split_words(entries)
    if any(word.startswith("pip::") for word in words):
        raise RequestInvalid("Invalid pip prefix - Likely you want to use 'pip:numpy' instead of 'pip::numpy'")
    dependencies: list[object] = [word for word in words if not word.startswith("pip:")]
    from_pip = [word.removeprefix("pip:") for word in words if word.startswith("pip:")]
    if from_pip:
        dependencies += ["pip"] if "pip" not in dependencies else []
        dependencies.append({"pip": from_pip})
    if not dependencies:
        return ""
    document: dict[str, object] = {"channels": list(channels)} if channels else {}
    return _dump(document | {"dependencies": dependencies})


def add_channels(environment: str, channels: Sequence[str]) -> str:
    """The environment file with ``channels`` at the end of its own ones; as it is when there are none to add.

    Raises RequestInvalid when it is no YAML file with an object. Source: ``wave.md`` §4.7d, vectors V13.
    """
    if not channels:
        return environment
    document = _load(environment)
    if document is None:
        raise RequestInvalid("packages.environment: not a Conda environment file: expected a YAML object")
    known = document.get("channels")
    known = known if isinstance(known, list) else []
    document["channels"] = known + [channel for channel in dict.fromkeys(channels) if channel not in known]
    return _dump(document)


def read_packages(environment: str) -> tuple[Package, ...]:
    """The packages that a name for the image can be made from; none when the file can't be read.

    An environment with a name of its own stands for all that is in it. Source: ``wave.md`` §4.9b, vectors V10.
    """
    document = _load(environment) or {}
    name = document.get("name")
    if isinstance(name, str) and name.strip() not in _NULL:
        return (Package(name.strip()),)
    dependencies = document.get("dependencies")
    items = dependencies if isinstance(dependencies, list) else []
    return tuple(dict.fromkeys(package for item in _flatten(items) if (package := _parse_package(item))))


def _flatten(items: list[object]) -> Iterator[str]:
    for item in items:
        match item:
            case str():
                yield item
            case {"pip": [*names]}:
                yield from (name for name in names if isinstance(name, str))


def _parse_package(text: str) -> Package | None:
    text = text.removeprefix("pip:")
    if text in _NULL or text.startswith(("http://", "https://")):
        return None
    parts = [part.strip() for part in _OPERATORS.split(text.rpartition("::")[2]) if part.strip()]
    return Package(*parts[:2]) if parts else None


# BaseLoader: every value is text, as Conda means it (version 1.10 is not 1.1), and there are no merge keys, which
# multiply. The compiled loaders are ten times as fast, and crash on deep nesting.
def _load(text: str) -> dict[str, object] | None:
    try:
        document = yaml.load(text, yaml.BaseLoader)  # noqa: S506 - makes strings, lists and dictionaries only
    except (yaml.YAMLError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _dump(document: dict[str, object]) -> str:
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=float("inf"))
