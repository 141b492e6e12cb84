"""Where an added layer may come from: the forms of its location, and the addresses that nobody may name."""

from dataclasses import dataclass
from ipaddress import ip_address
from re import compile as compile_pattern
from socket import inet_aton, inet_ntoa
from urllib.parse import urlsplit

from wave_proxy.errors import DigestInvalid, RequestInvalid
from wave_proxy.image.oci import parse_digest
from wave_proxy.image.reference import is_registry, is_repository
from wave_proxy.upstream.egress import is_public

MAX_LOCATION_CHARS = 14_000_000
MAX_URL_CHARS = 8 << 10

FORMS = (
    "'data:<base64 of the tar.gz>', 'gzip:<base64 of the deflated tar.gz>', an http:// or https:// URL, "
    "or 'docker://<registry>/v2/<repository>/blobs/<digest>'"
)

_DOCKER = compile_pattern(r"docker://([^/]+)/v2/(.+)/blobs/([^/]+)")
# What resolvers take for an IPv4 address: up to four decimal, octal or hexadecimal numbers.
_NUMERIC_HOST = compile_pattern(r"(?:0x[0-9a-f]*|[0-9]+)(?:\.(?:0x[0-9a-f]*|[0-9]+)){0,3}")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class OpenHosts:
    """What the configuration opens: registries by name, and addresses (``host:port``) that may be private."""

    registries: frozenset[str] = frozenset()
    addresses: frozenset[str] = frozenset()


def address_of(url: str) -> str:
    """``host:port`` that an http(s) URL leads to, in lower case. Raises ValueError for one that has no such thing."""
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError("not an http or https URL with a host")
    return f"{parts.hostname}:{parts.port or _DEFAULT_PORTS[parts.scheme]}"


def check_location(location: str, hosts: OpenHosts) -> None:
    """Raises RequestInvalid when ``location`` is too long, of no known form, or leads to a private address.

    A host name that merely resolves to such an address is found out when it is connected to, not here.
    """
    if len(location) > MAX_LOCATION_CHARS:
        raise RequestInvalid("Container layer exceeds the maximum allowed size")
    if location.startswith(("data:", "gzip:")):
        if "\0" in location:
            raise RequestInvalid("must not contain the character NUL")
    elif location.startswith(("http://", "https://", "docker://")) and len(location) > MAX_URL_CHARS:
        raise RequestInvalid(f"an address may have {MAX_URL_CHARS} characters")
    elif location.startswith(("http://", "https://")):
        _check_url(location, hosts)
    elif location.startswith("docker://"):
        _check_blob(location, hosts)
    else:
        raise RequestInvalid(f"unsupported location type {location[:20]!r}: expected {FORMS}")


def blob_digest(location: str) -> str:
    """The digest at the end of a ``docker://`` location that was checked; empty for other forms."""
    match = _DOCKER.fullmatch(location)
    return match[3] if match else ""


def _check_url(location: str, hosts: OpenHosts) -> None:
    # The library's own words may repeat a part of the URL, and a URL may hold secrets.
    invalid = RequestInvalid("not a valid http:// or https:// URL")
    if not location.isprintable() or " " in location:
        raise invalid
    try:
        parts = urlsplit(location)
        address = address_of(location)
    except ValueError:
        raise invalid from None
    if "@" in parts.netloc:
        raise RequestInvalid("a layer's URL must not contain a user or password")
    if address not in hosts.addresses:
        _check_host(parts.hostname or "")


def _check_blob(location: str, hosts: OpenHosts) -> None:
    match = _DOCKER.fullmatch(location)
    if match is None or not is_registry(match[1]) or not is_repository(match[2]):
        expected = "docker://<registry>/v2/<repository>/blobs/<digest>"
        raise RequestInvalid(f"{location[:80]!r} is not of the form {expected}")
    try:
        parse_digest(match[3])
    except DigestInvalid as err:
        raise RequestInvalid(str(err)) from None
    if match[1] not in hosts.registries:
        _check_host(urlsplit(f"//{match[1]}").hostname or "")


def _check_host(host: str) -> None:
    name = host.lower().rstrip(".")
    address = _literal(name)
    is_local = name in ("localhost", "localhost.localdomain") or name.endswith(".localhost")
    if is_local or (address and not is_public(address)):
        raise RequestInvalid(
            f"access to {host!r} is not allowed: it is a private, loopback or link-local address, which only the "
            f"server's operator can open (allow_private in [registries])"
        )


def _literal(host: str) -> str:
    """The address that ``host`` spells, also in the short and numeric forms that resolvers understand; else empty."""
    try:
        return str(ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return inet_ntoa(inet_aton(host)) if _NUMERIC_HOST.fullmatch(host) else ""
    except OSError:
        return ""
