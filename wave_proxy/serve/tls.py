"""TLS for the port itself."""

import ssl
from pathlib import Path


class TlsInvalid(Exception):
    """A certificate or key that can't be used, and why."""


def server_context(cert: Path, key: Path | None) -> ssl.SSLContext:
    """The context for a certificate chain and its key (None: in the same file), both PEM. Raises TlsInvalid."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except OSError as err:
        raise TlsInvalid(f"tls_cert {cert} with tls_key {key}: {err}") from None
    context.set_alpn_protocols(["http/1.1"])
    return context
