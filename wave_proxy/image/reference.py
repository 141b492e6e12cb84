"""Image references: one function that normalises what people type, and its inverse."""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address

from wave_proxy.errors import RequestInvalid

DOCKER_HUB = "docker.io"
HUB_ALIASES = frozenset({"index.docker.io", "registry-1.docker.io"})

_HOST = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9_.-]*[a-zA-Z0-9])?|\[([0-9a-fA-F:]{2,39})\])(?::([0-9]{1,5}))?")
# distribution-spec: <name>; underscores, dots and dashes only between alphanumerics.
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
# Looser than parse_digest: vectors of the service name images by shortened digests, and upstream decides in the end.
_REFERENCE_DIGEST = re.compile(r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[a-zA-Z0-9=_-]+")

MAX_NAME_LENGTH = 255


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised image name: registry, repository in it, and a tag or a digest.

    ``str`` gives ``registry/repository:tag`` or ``registry/repository@sha256:…``, with ``oras://`` in front if given.
    """

    registry: str
    repository: str
    reference: str
    scheme: str = ""

    @property
    def is_digest(self) -> bool:
        """Whether the last part is a digest rather than a tag."""
        return ":" in self.reference

    @property
    def name_and_reference(self) -> str:
        """``repository:tag`` or ``repository@digest``, without the registry."""
        return f"{self.repository}{'@' if self.is_digest else ':'}{self.reference}"

    def __str__(self) -> str:
        return f"{self.scheme}{self.registry}/{self.name_and_reference}"


def is_repository(name: str) -> bool:
    """Whether ``name`` follows the distribution spec's grammar for repositories (at most 255 characters)."""
    return 0 < len(name) <= MAX_NAME_LENGTH and all(_COMPONENT.fullmatch(part) for part in name.split("/"))


def is_tag(text: str) -> bool:
    """Whether ``text`` follows the distribution spec's grammar for tags."""
    return _TAG.fullmatch(text) is not None


def is_registry(host: str) -> bool:
    """Whether ``host`` is a host name or address with an optional port from 1 to 65535."""
    match = _HOST.fullmatch(host)
    if match is None or (match[1] is not None and not _is_ipv6(match[1])):
        return False
    return match[2] is None or 0 < int(match[2]) < 65536


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text)
    except ValueError:
        return False
    return True


def parse_reference(text: str) -> Reference:
    """Normalise an image name as Docker would: ``ubuntu`` is ``docker.io/library/ubuntu:latest``.

    Raises RequestInvalid with the service's own words. Source: ``wave.md`` §4.5b, vectors V6 and V19.
    """
    scheme = "oras://" if text.startswith("oras://") else ""
    rest = text.removeprefix(scheme)
    if "://" in rest:
        raise RequestInvalid(f"Invalid container repository name — offending value: '{text[:200]}'")
    invalid = RequestInvalid(f"Invalid container image name — offending value: '{text[:200]}'")
    head, _, digest = rest.partition("@")
    *parents, last = head.split("/")
    last, colon, tag = last.partition(":")
    if (colon and not parents and not is_repository(last)) or (colon and not tag):
        raise invalid
    # `repository:tag@digest` is legal everywhere: the digest decides and the tag is a comment.
    reference = digest or tag or "latest"
    if ("@" in rest and not _REFERENCE_DIGEST.fullmatch(digest)) or (colon and not is_tag(tag)):
        raise invalid
    segments = [*parents, last]
    registry = DOCKER_HUB
    if len(segments) > 1 and ("." in segments[0] or ":" in segments[0]):
        registry = segments.pop(0)
    if registry in HUB_ALIASES:
        registry = DOCKER_HUB
    if registry == DOCKER_HUB and len(segments) == 1:
        segments.insert(0, "library")
    repository = "/".join(segments)
    if not is_registry(registry) or not is_repository(repository):
        raise invalid
    return Reference(registry, repository, reference, scheme)
