"""Accounts for Basic authentication: users and the hashes of their passwords."""

from base64 import b64decode
from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from re import compile as compile_pattern

from wave_proxy.errors import Unauthorized

BUILDER = "_builder"
"""The user that our own builders are, where the table knows their secret."""

_NOBODY = "0" * 64
_HASH = compile_pattern(r"sha256:([0-9a-f]{64})")


class Accounts:
    """Who may do what others may not. Raises ValueError for a hash that is not ``sha256:<64 hex digits>``."""

    def __init__(self, hashes: Mapping[str, str], *, builder_secret: str = "") -> None:
        self._hashes: dict[str, str] = {}
        for user, text in hashes.items():
            match = _HASH.fullmatch(text)
            if match is None:
                raise ValueError(f"accounts.{user}: expected sha256:<hex of the password's SHA-256>")
            self._hashes[user] = match[1]
        if builder_secret:
            self._hashes[BUILDER] = sha256(builder_secret.encode()).hexdigest()

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def check(self, authorization: str) -> str:
        """The user that an Authorization header proves to be. Raises Unauthorized; takes as long for unknown users."""
        user, password = parse_basic(authorization)
        given = sha256(password.encode()).hexdigest()
        is_right = compare_digest(self._hashes.get(user, _NOBODY), given)
        if not is_right or user not in self._hashes:
            raise Unauthorized("unknown user or wrong password")
        return user


def parse_basic(authorization: str) -> tuple[str, str]:
    """User and password of a Basic header; empty ones when it is none."""
    scheme, _, text = authorization.partition(" ")
    try:
        decoded = b64decode(text.strip(), validate=True).decode() if scheme.lower() == "basic" else ""
    except ValueError:
        decoded = ""
    user, _, password = decoded.partition(":")
    return user, password
