"""Hosts and ports that builds ask for, as people write them and as they are told."""

from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Place:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, default_port: int = 0) -> "Place":
        """From ``host:port`` or ``[address]:port``. Raises ValueError."""
        parts = urlsplit(f"//{text}")
        port = parts.port or default_port
        if not parts.hostname or not port or parts.path or "@" in text:
            raise ValueError(f"{text!r} is not host:port")
        return cls(parts.hostname, port)

    @property
    def loopback(self) -> str:
        """The address to listen on in a box to stand for this place; empty when it is not on loopback."""
        if self.host == "localhost":
            return "127.0.0.1"
        try:
            return self.host if ip_address(self.host).is_loopback else ""
        except ValueError:
            return ""
