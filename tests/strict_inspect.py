"""Reads answers of inspection as the ``wave`` command line does: names that it knows, types without mercy.

Source: ``clients.md`` §1.7. More than that parser: a name that nobody reads is an error too, as it is a misspelt one.
"""

from datetime import datetime
from re import compile as compile_pattern
from typing import Any

_INSTANT = compile_pattern(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")

# A shape is a type, a list of one (an array of it), a dict with the key "*" (a map), or an object's members.
_DESCRIPTOR = {"mediaType": str, "digest": str, "size": int, "annotations": {"*": str}}
_SETTINGS = {
    **dict.fromkeys(("hostName", "domainName", "user", "image", "workingDir"), str),
    **dict.fromkeys(("attachStdin", "attachStdout", "attachStderr", "tty"), bool),
    "env": [str],
    "cmd": [str],
    "entrypoint": [str],
    "labels": {"*": str},
}
_CONFIG = {
    **dict.fromkeys(("architecture", "container"), str),
    "config": _SETTINGS,
    "created": datetime,
    "rootfs": {"type": str, "diff_ids": [str]},
}
_MANIFEST = {
    "schemaVersion": int,
    "mediaType": str,
    "config": _DESCRIPTOR,
    "layers": [_DESCRIPTOR],
    "annotations": {"*": str},
    "artifactType": str,
}
_PLATFORM = {
    **dict.fromkeys(("architecture", "os", "variant", "os.version"), str),
    "os.features": [str],
}
_CONTAINER = {
    **dict.fromkeys(("registry", "hostName", "imageName", "reference", "digest"), str),
    "config": _CONFIG,
    "manifest": _MANIFEST,
    "v1": bool,
    "v2": bool,
    "oci": bool,
}
_INDEX = {
    "schemaVersion": int,
    "mediaType": str,
    "digest": str,
    "manifests": [{**_DESCRIPTOR, "platform": _PLATFORM}],
}


def parse_inspection(answer: Any) -> dict[str, Any]:
    """What is inside ``container`` or ``index``, whichever there is. Raises AssertionError naming the first flaw."""
    assert isinstance(answer, dict), "no object"
    assert len(answer) == 1, f"members {sorted(answer)}"
    (kind,) = answer
    assert kind in ("container", "index"), kind
    _check(answer[kind], _CONTAINER if kind == "container" else _INDEX, kind)
    found: dict[str, Any] = answer[kind]
    return found


def _check(value: Any, shape: Any, path: str) -> None:
    match shape:
        case [item]:
            assert isinstance(value, list), f"{path} is no array: {value!r}"
            assert value, f"{path} is empty, and empty members are left out"
            for number, element in enumerate(value):
                _check(element, item, f"{path}[{number}]")
        case dict():
            assert isinstance(value, dict), f"{path} is no object: {value!r}"
            for name, member in value.items():
                assert name in shape or "*" in shape, f"{path}.{name} is no member that the client knows"
                assert member != "" or "*" in shape, f"{path}.{name} is empty, and empty members are left out"
                _check(member, shape.get(name, shape.get("*")), f"{path}.{name}")
        case _ if shape is datetime:
            assert isinstance(value, str), f"{path} is no text: {value!r}"
            assert _INSTANT.fullmatch(value), f"{path} is no instant: {value!r}"
        case _:
            assert type(value) is shape, f"{path} is no {shape.__name__}: {value!r}"
