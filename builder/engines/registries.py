"""What tools are told of registries: where base images are pulled from, and the logins of a build."""

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping

from wave_proxy.upstream.credentials import Login


def registries_conf(locations: Mapping[str, str], insecure: Iterable[str] = ()) -> str:
    """A ``registries.conf`` (version 2): each repository is pulled from its location, over plain http on loopback.

    ``insecure`` are repositories that are reached over plain http by their own names. A short name is Docker Hub's.
    """
    lines = ['unqualified-search-registries = ["docker.io"]', 'short-name-mode = "disabled"']
    for repository, location in locations.items():
        lines += ["", "[[registry]]", f"prefix = {_quoted(repository)}", f"location = {_quoted(location)}"]
        lines += ["insecure = true"] if _is_plain(location) else []
    for repository in insecure:
        lines += ["", "[[registry]]", f"prefix = {_quoted(repository)}", f"location = {_quoted(repository)}"]
        lines += ["insecure = true"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text)  # JSON's strings are TOML's


def _is_plain(location: str) -> bool:
    return location.startswith(("127.", "localhost:", "localhost/", "[::1]"))


def gated_auth(text: str, host: str, logins: Mapping[str, Login]) -> str:
    """A Docker ``config.json`` without the login of ``host``, and with ``logins``; empty when it has none."""
    auths = {name: login for name, login in json.loads(text).get("auths", {}).items() if name != host}
    for name, login in logins.items():
        auths[name] = {"auth": b64encode(f"{login.username}:{login.password}".encode()).decode()}
    return json.dumps({"auths": auths}) if auths else ""


def translate_auth(text: str, names: Mapping[str, str]) -> str:
    """A Docker ``config.json`` in which a host that has another name in ``names`` is known by both."""
    document = json.loads(text)
    auths = document.get("auths", {})
    auths |= {names[host]: login for host, login in auths.items() if host in names}
    return json.dumps(document | {"auths": auths})
