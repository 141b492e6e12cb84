"""Who is asking: the address of the client behind a connection and the proxies in front of us."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

_FORWARDED_FOR = b"x-forwarded-for"
_UNIX = "unix"
_MEMORY = 4096  # peers, and entries
_MOST_ENTRIES = 32  # that are looked at; the rest is taken for one entry, and is no address
_MOST_BYTES = 64  # of an entry


class ClientAddress:
    """Finds a client's address. Only a trusted proxy is believed when it names another than its own."""

    def __init__(self, trusted: Sequence[str]) -> None:
        """``trusted`` are addresses, networks, and ``unix`` for peers without an address. Raises ValueError."""
        self._networks = [ip_network(entry) for entry in trusted if entry != _UNIX]
        self._trusts_unix = _UNIX in trusted
        self._trusts_nobody = not trusted
        self._known_peers = lru_cache(_MEMORY)(self._is_trusted)
        self._known_entries = lru_cache(_MEMORY)(self._read_entry)

    def find(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The client's address, for a socket's peer (empty for a Unix socket) and a request's headers.

        It is the peer's, unless that is a trusted proxy: then the right-most entry of X-Forwarded-For that is none, or
        the left-most where all are. Header names are lower case. What is no address where an address must be found
        leaves the peer's.
        """
        if self._trusts_nobody or not self._known_peers(peer):
            return peer
        # The lines of a header are one list, and each proxy appends to its end.
        entries = b",".join([value for name, value in headers if name == _FORWARDED_FOR])
        found = peer
        for entry in reversed(entries.rsplit(b",", _MOST_ENTRIES)):
            entry = entry.strip()
            if not entry:
                continue
            address, goes_on = self._known_entries(entry) if len(entry) <= _MOST_BYTES else ("", False)
            if not address:
                return peer
            found = address
            if not goes_on:
                break
        return found

    def is_trusted(self, peer: str) -> bool:
        """Whether a socket's peer is a trusted proxy."""
        return self._known_peers(peer)

    def _is_trusted(self, peer: str) -> bool:
        if not peer:
            return self._trusts_unix
        address = _parse(peer.partition("%")[0])
        return address is not None and self._is_in_networks(address)

    def _read_entry(self, entry: bytes) -> tuple[str, bool]:
        """The address that an entry names, empty when it names none; and whether it is a trusted proxy's."""
        address = _parse_entry(entry.decode("latin-1"))
        return ("", False) if address is None else (str(address), self._is_in_networks(address))

    def _is_in_networks(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._networks)


def _parse_entry(text: str) -> IPv4Address | IPv6Address | None:
    """The address in ``192.0.2.1``, ``192.0.2.1:80``, ``2001:db8::1``, ``[2001:db8::1]`` or ``[2001:db8::1]:80``."""
    if text.startswith("["):
        text, closed, port = text[1:].partition("]")
        return _parse(text) if closed and ":" in text and _is_port(port) else None
    host, colon, port = text.partition(":")
    return _parse(host if "." in host and _is_port(colon + port) else text)


def _is_port(text: str) -> bool:
    return not text or (text[0] == ":" and text[1:].isdecimal() and text.isascii() and len(text) <= len(":65535"))


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    # A zone means something on one machine only, and a client could make it as long as it likes.
    try:
        address = ip_address(text) if "%" not in text else None
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
