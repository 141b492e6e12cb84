"""Paths under ``/v2/``: method and target become one frozen Route, or an error. Nothing else parses paths."""

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from wave_proxy.errors import MethodNotAllowed, NameInvalid, NameUnknown, clip
from wave_proxy.image.oci import parse_digest
from wave_proxy.image.reference import DOCKER_HUB, is_registry, is_repository, is_tag

Kind = Literal["ping", "manifest", "blob", "tags"]

_TOKEN = re.compile(r"[0-9a-f]{32}")
_KINDS: dict[str, Kind] = {"manifests": "manifest", "blobs": "blob"}


@dataclass(frozen=True, slots=True)
class Route:
    """What a request is for.

    ``token`` is empty for the direct form, ``registry`` for the token form, where the token decides. ``reference`` is a
    tag or a digest; for blobs always a digest. ``query`` is what followed the question mark, as it was sent.
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
    """The one answer for a token that is malformed, unknown, expired, deleted, or for another repository."""
    return NameUnknown(
        f"Unknown Wave container for token '{token[:32]}': it was never issued, has expired, or is for another image"
    )


def is_registry_path(target: str) -> bool:
    """Whether a request target belongs to the registry; everything else is the api's."""
    return target.startswith(("/v2/", "/v2?")) or target == "/v2"


def kind_of(target: str) -> str:
    """What a request target is about, for counting, well-formed or not: a Kind, or ``api``."""
    if not is_registry_path(target):
        return "api"
    parts = target.partition("?")[0].rsplit("/", 2)
    return _KINDS.get(parts[-2], "tags" if parts[-2:] == ["tags", "list"] else "ping")


def parse_route(method: str, target: str) -> Route:
    """Parse a target for which ``is_registry_path`` holds.

    Raises MethodNotAllowed, NameInvalid, DigestInvalid, or NameUnknown for a malformed token.
    Source: distribution-spec, "Endpoints"; ``wave.md`` §2.2 with its vectors V15.
    """
    if method not in ("GET", "HEAD"):
        raise MethodNotAllowed(f"{method[:20]} is not supported here: images are pulled with GET and HEAD")
    path, _, query = target.partition("?")
    decoded = unquote(path, errors="replace")
    parts = decoded.split("/")[2:]
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


def _parse_content(path: str, parts: list[str], query: str, *, token: str, registry: str) -> Route:
    *name, kind, reference = parts if len(parts) > 1 else ("", "", "")
    repository = "/".join(name)
    if not is_repository(repository):
        raise NameInvalid(f"{clip(path)} is not /v2/<name>/manifests|blobs|tags/…, with a name in lower case")
    if kind == "tags" and reference == "list":
        return Route("tags", token, registry, repository, "", query)
    if kind not in _KINDS:
        raise NameInvalid(f"{clip(path)} has neither manifests, blobs nor tags/list behind the repository")
    if kind == "blobs" or ":" in reference:
        parse_digest(reference)
    elif not is_tag(reference):
        raise NameInvalid(f"{clip(reference)} is neither a tag nor a digest")
    return Route(_KINDS[kind], token, registry, repository, reference, query)
