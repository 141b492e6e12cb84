"""Paths under ``/v2/``: method and target become one frozen Route, or an error. Nothing else parses paths."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import unquote

from wave_proxy.cache.local import LOCAL
from wave_proxy.errors import MethodNotAllowed, NameInvalid, NameUnknown, clip
from wave_proxy.image.oci import parse_digest
from wave_proxy.image.reference import DOCKER_HUB, is_registry, is_repository, is_tag

Kind = Literal["ping", "manifest", "blob", "tags", "upload", "referrers"]

_TOKEN = re.compile(r"[0-9a-f]{32}")
_KINDS: dict[str, Kind] = {"manifests": "manifest", "blobs": "blob"}
_LOCAL_KINDS: dict[str, Kind] = {**_KINDS, "referrers": "referrers"}
_READING = ("GET", "HEAD")
_UPLOADS = "/blobs/uploads"
_LOCAL_METHODS: dict[Kind, tuple[str, ...]] = {
    "manifest": (*_READING, "PUT", "DELETE"),
    "blob": (*_READING, "DELETE"),
    "upload": (*_READING, "PATCH", "PUT", "DELETE"),
}


@dataclass(frozen=True, slots=True)
class Route:
    """What a request is for.

    ``token`` is empty for the direct form, ``registry`` for the token form, where the token decides. For our own local
    repositories it is ``local``, which no registry is called. ``reference`` is a tag or a digest; for blobs and
    referrers always a digest, for an upload its id, empty when it is to begin. ``query`` is what followed the question
    mark, as it was sent.
    """

    kind: Kind
    token: str = ""
    registry: str = ""
    repository: str = ""
    reference: str = ""
    query: str = ""

    @property
    def is_digest(self) -> bool:
        """Whether the reference is a digest."""
        return ":" in self.reference


def unknown_token(token: str) -> NameUnknown:
    """The one answer for a token that is malformed, unknown, deleted, or for another repository."""
    return NameUnknown(
        f"Unknown Wave container for token '{token[:32]}': it was never issued, has expired or was ended, or is for "
        "another image"
    )


def ended_token(token: str, ended: float) -> NameUnknown:
    """The answer for a token whose time is over, since ``ended`` (epoch seconds)."""
    when = datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return NameUnknown(
        f"The Wave container for token '{token}' has expired: it ended on {when}. Request the container again, and "
        "pull it by the name in that answer"
    )


def is_registry_path(target: str) -> bool:
    """Whether a request target belongs to the registry; everything else is the api's."""
    return target.startswith(("/v2/", "/v2?")) or target == "/v2"


def kind_of(target: str) -> str:
    """What a request target is about, for counting, well-formed or not: a Kind, or ``api``."""
    if not is_registry_path(target):
        return "api"
    path = unquote(target.partition("?")[0], errors="replace")
    folder, _, last = path.rpartition("/")
    if path.endswith(_UPLOADS) or folder.endswith(_UPLOADS):
        return "upload"
    word = folder.rpartition("/")[2]
    return "tags" if (word, last) == ("tags", "list") else _LOCAL_KINDS.get(word, "ping")


def parse_route(method: str, target: str) -> Route:
    """Parse a target for which ``is_registry_path`` holds.

    Raises MethodNotAllowed, NameInvalid, DigestInvalid, or NameUnknown for a malformed token.
    Source: distribution-spec, "Endpoints"; ``wave.md`` §2.2 with its vectors V15.
    """
    path, _, query = target.partition("?")
    decoded = unquote(path, errors="replace")
    parts = decoded.split("/")[2:]
    if parts and parts[0] == LOCAL:
        return _parse_local(method, decoded, parts[1:], query)
    if method not in _READING:
        raise MethodNotAllowed(
            f"{method[:20]} is not supported here: images are pulled with GET and HEAD, "
            f"and pushed to repositories whose names begin with {LOCAL}/"
        )
    if parts in ([], [""]):
        return Route("ping", query=query)
    if parts[0] == "wt":
        if len(parts) < 2 or not _TOKEN.fullmatch(parts[1]):
            raise unknown_token(parts[1] if len(parts) > 1 else "")
        return _parse_content(decoded, parts[2:], query, token=parts[1], registry="")
    if len(parts) > 1 and ("." in parts[0] or ":" in parts[0] or parts[0] == "localhost"):
        if not is_registry(parts[0]):
            raise NameInvalid(f"{clip(parts[0])} is not a registry host")
        return _parse_content(decoded, parts[1:], query, token="", registry=parts[0])
    return _parse_content(decoded, parts, query, token="", registry=DOCKER_HUB)


def _parse_local(method: str, path: str, parts: list[str], query: str) -> Route:
    if parts[-2:] == ["blobs", "uploads"]:
        parts = [*parts, ""]
    if parts[-3:-1] == ["blobs", "uploads"]:
        repository, reference = "/".join(parts[:-3]), parts[-1]
        if not is_repository(repository):
            raise NameInvalid(f"{clip(path)} is not /v2/{LOCAL}/<name>/blobs/uploads/…, with a name in lower case")
        route = Route("upload", "", LOCAL, repository, reference, query)
        allowed = _LOCAL_METHODS["upload"] if reference else ("POST",)
    else:
        route = _parse_content(path, parts, query, token="", registry=LOCAL)
        allowed = _LOCAL_METHODS.get(route.kind, _READING)
    if method not in allowed:
        allow = ", ".join(allowed)
        raise MethodNotAllowed(f"{method[:20]} is not supported here, but {allow}", allow)
    return route


def _parse_content(path: str, parts: list[str], query: str, *, token: str, registry: str) -> Route:
    *name, kind, reference = parts if len(parts) > 1 else ("", "", "")
    repository = "/".join(name)
    if not is_repository(repository):
        raise NameInvalid(f"{clip(path)} is not /v2/<name>/manifests|blobs|tags/…, with a name in lower case")
    if kind == "tags" and reference == "list":
        return Route("tags", token, registry, repository, "", query)
    kinds = _LOCAL_KINDS if registry == LOCAL else _KINDS
    if kind not in kinds:
        raise NameInvalid(f"{clip(path)} has neither manifests, blobs nor tags/list behind the repository")
    if kind != "manifests" or ":" in reference:
        parse_digest(reference)
    elif not is_tag(reference):
        raise NameInvalid(f"{clip(reference)} is neither a tag nor a digest")
    return Route(kinds[kind], token, registry, repository, reference, query)
