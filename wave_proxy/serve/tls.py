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
        raise TlsInvalid(_explain(cert, key or cert, err)) from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def _explain(cert: Path, key: Path, err: OSError) -> str:
    try:
        if b"-----BEGIN CERTIFICATE-----" not in cert.read_bytes():
            return f"tls_cert {cert} is no PEM certificate"
        if b"PRIVATE KEY-----" not in key.read_bytes():
            return f"tls_key {key} is no PEM private key"
    except OSError as unreadable:
        return f"{unreadable.filename} can't be read: {unreadable.strerror}"
    if isinstance(err, ssl.SSLError) and err.reason == "KEY_VALUES_MISMATCH":
        return f"tls_key {key} is not the key of the first certificate in tls_cert {cert}"
    return f"tls_cert {cert} with tls_key {key}: {err}"
