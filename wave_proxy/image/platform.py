"""Words of the Seqera Platform: where it is, what it is asked, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import md5
from re import compile as compile_pattern
from urllib.parse import urlsplit

SERVICE = "tower"
DEFAULT_ENDPOINT = "https://api.cloud.seqera.io"

# A host that every reader of addresses takes for the same, or a pattern of such hosts; and a port.
_AUTHORITY = compile_pattern(r"(?:[a-zA-Z0-9._*-]+|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")

# Hosts of former names of the Platform. Source: ``wave.md`` §4.2, vectors V18.
_RENAMED = {"/api.tower.nf": "/api.cloud.seqera.io", "/api.stage-tower.net": "/api.cloud.stage-seqera.io"}


@dataclass(frozen=True, slots=True)
class PlatformCall:
    """One request to a Platform. ``uri`` is whole; secrets do not show in ``repr``."""

    method: str
    uri: str
    authorization: str = field(default="", repr=False)
    body: str = field(default="", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlatformReply:
    """What a Platform answers; header names are lower case."""

    status: int
    body: str = field(repr=False)
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class PairingRecord:
    """A Platform that knows us: the key pair, in DER, whose public half it encrypts with."""

    service: str
    endpoint: str
    pairing_id: str
    public_key: bytes
    private_key: bytes = field(repr=False)
    expires: float


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A user's tokens as they are now; ``refresh`` is empty for tokens that do not expire."""

    access: str = field(repr=False)
    refresh: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class PlatformUser:
    """A user of a Platform."""

    user_id: int
    email: str


@dataclass(frozen=True, slots=True)
class CredentialsEntry:
    """What a Platform lists of a user's credentials: no secret. ``registry`` is as the user typed it."""

    name: str
    provider: str
    registry: str


def known_endpoint(text: str) -> str:
    """The endpoint as it is called today, without a slash at its end; an empty text is the public Platform's."""
    for old, new in _RENAMED.items():
        text = text.replace(old, new)
    return text.rstrip("/") or DEFAULT_ENDPOINT


def is_endpoint(text: str) -> bool:
    """Whether this is an http(s) address with a host, and without user, query or fragment."""
    try:
        url = urlsplit(text)
        port_is_valid = url.port is None or url.port > 0
    except ValueError:
        return False
    plain = not (url.query or url.fragment) and text.isascii() and text.isprintable() and " " not in text
    return url.scheme in ("http", "https") and bool(_AUTHORITY.fullmatch(url.netloc)) and plain and port_is_valid


def matches_endpoint(endpoint: str, patterns: tuple[str, ...]) -> bool:
    """Whether an endpoint is one of these; ``*`` in a pattern stands for any text without a slash."""
    parts = endpoint.split("/")
    candidates = (pattern.rstrip("/").split("/") for pattern in patterns)
    return any(len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)) for wanted in candidates)


def pairing_key(service: str, endpoint: str) -> str:
    """What a pairing is filed under, 32 hex digits. Source: ``wave.md`` §10.2, vectors V34."""
    text = f"service\x1c{service}\x1etowerEndpoint\x1c{endpoint}\x1e"
    return md5(text.encode(), usedforsecurity=False).hexdigest()


def session_key(endpoint: str, access_token: str) -> str:
    """What a user's refreshed tokens are filed under, 32 hex digits. Source: ``wave.md`` §10.4, vectors V34."""
    return md5(f"{endpoint}:{access_token}".encode(), usedforsecurity=False).hexdigest()
