"""Accounts for Basic authentication: users, the hashes of their passwords, and a limit on guessing."""

import asyncio
import hashlib
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from re import compile as compile_pattern
from secrets import token_bytes
from time import monotonic

from wave_proxy.errors import Unauthorized
from wave_proxy.state.attempts import Attempts

BUILDER = "_builder"
"""The user that our own builders are, where the table knows their secret."""

_SHA256 = compile_pattern(r"sha256:([0-9a-f]{64})")
_SCRYPT = compile_pattern(r"scrypt:([0-9]{1,8}):([0-9]{1,3}):([0-9]{1,3}):([0-9a-f]{16,128}):([0-9a-f]{64})")
_EXPECTED = "expected what `wave-proxy account hash` prints (scrypt:…), or sha256:<hex of the password's SHA-256>"

# 16 MiB and 0.2 s for a guess. Source: OWASP's Password Storage Cheat Sheet, "scrypt".
_COST, _BLOCK, _PARALLEL = 1 << 14, 8, 5
_MAX_MEMORY = 256 << 20

_REMEMBERED_S = 300.0
_REMEMBERED = 1000
_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class PasswordHash:
    """The hash of a password: scrypt with its parameters and salt, or SHA-256, with ``cost`` 0 and without a salt."""

    digest: bytes = field(repr=False)
    cost: int = 0
    block: int = 0
    parallel: int = 0
    salt: bytes = field(default=b"", repr=False)

    @property
    def work(self) -> int:
        """How much it takes to compute one, for comparison; 0 for what an event loop may do itself."""
        return self.cost * self.block * self.parallel

    def matches(self, password: str) -> bool:
        """Whether it is that of ``password``; takes the same time if not."""
        return compare_digest(self.digest, self._digest_of(password.encode()))

    def _digest_of(self, password: bytes) -> bytes:
        if not self.work:
            return hashlib.sha256(password).digest()
        return _scrypt(password, self.salt, self.cost, self.block, self.parallel)


def parse_hash(text: str) -> PasswordHash:
    """Read ``scrypt:<N>:<r>:<p>:<hex of the salt>:<hex of 32 bytes>`` or ``sha256:<64 hex digits>``.

    Raises ValueError, whose text does not hold what is no hash: it may be a password.
    """
    if match := _SHA256.fullmatch(text):
        return PasswordHash(bytes.fromhex(match[1]))
    match = _SCRYPT.fullmatch(text)
    if match is None or len(match[4]) % 2:
        raise ValueError(_EXPECTED)
    cost, block, parallel = int(match[1]), int(match[2]), int(match[3])
    if cost < 2 or cost & (cost - 1) or not block or not parallel or 128 * cost * block > _MAX_MEMORY:
        limit = _MAX_MEMORY >> 20
        raise ValueError(f"scrypt:<N>:<r>:<p>: N has to be a power of 2, and 128·N·r at most {limit} MiB")
    return PasswordHash(bytes.fromhex(match[5]), cost, block, parallel, bytes.fromhex(match[4]))


def hash_password(password: str) -> str:
    """The hash of a password with a new salt, as ``parse_hash`` reads it."""
    salt = token_bytes(16)
    digest = _scrypt(password.encode(), salt, _COST, _BLOCK, _PARALLEL)
    return f"scrypt:{_COST}:{_BLOCK}:{_PARALLEL}:{salt.hex()}:{digest.hex()}"


def _scrypt(password: bytes, salt: bytes, cost: int, block: int, parallel: int) -> bytes:
    memory = 128 * block * (cost + parallel + 2)
    return hashlib.scrypt(password, salt=salt, n=cost, r=block, p=parallel, maxmem=memory + (1 << 20), dklen=32)


class Accounts:
    """Who may do what others may not.

    Of one address, 20 wrong logins a minute are answered, in each process. Who logged in is remembered for some
    minutes, as scrypt is slow on purpose.
    """

    def __init__(self, hashes: Mapping[str, str], *, builder_secret: str = "") -> None:
        """``hashes`` by user, as ``parse_hash`` reads them. Raises ValueError that names the user."""
        self._hashes: dict[str, PasswordHash] = {}
        for user, text in hashes.items():
            try:
                self._hashes[user] = parse_hash(text)
            except ValueError as err:
                raise ValueError(f"accounts.{user}: {err}") from None
        # A wrong login takes as long for a user that does not exist, or has a hash of the quick kind.
        self._decoy = max(self._hashes.values(), key=lambda known: known.work, default=PasswordHash(bytes(32)))
        if builder_secret:
            self._hashes[BUILDER] = PasswordHash(hashlib.sha256(builder_secret.encode()).digest())
        self._key = token_bytes(32)
        self._remembered: OrderedDict[bytes, float] = OrderedDict()  # proofs of logins that were right, to their end
        self._attempts = Attempts("wrong logins from this address")
        self._turns = asyncio.Semaphore(_AT_ONCE)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    async def check(self, authorization: str, address: str) -> str:
        """The user that an Authorization header from ``address`` proves to be.

        Raises Unauthorized, TooManyRequests after too many wrong ones.
        """
        user, password = parse_basic(authorization)
        if not user:
            raise Unauthorized("it takes a login of [accounts]")
        if user == BUILDER:  # its secret is too long to be guessed, and builds run beside it
            is_right = BUILDER in self._hashes and self._hashes[BUILDER].matches(password)
        else:
            is_right = await self._is_right(user, password, address)
        if not is_right:
            raise Unauthorized("unknown user or wrong password")
        return user

    async def _is_right(self, user: str, password: str, address: str) -> bool:
        proof = hashlib.blake2b(f"{len(user)}:{user}{password}".encode(), key=self._key, digest_size=32).digest()
        self._attempts.check(address)
        if self._knows(proof):
            return True
        async with self._turns:
            if self._knows(proof):  # of several at once, the first has found out
                return True
            self._attempts.check(address)
            is_right = await self._compare(user, password)
        if is_right:
            self._remember(proof)
        else:
            self._attempts.count(address)
        return is_right

    async def _compare(self, user: str, password: str) -> bool:
        known = self._hashes.get(user)
        is_right = await _matches(known or self._decoy, password) and known is not None
        if not is_right and known is not None and known.work < self._decoy.work:
            await _matches(self._decoy, password)
        return is_right

    def _knows(self, proof: bytes) -> bool:
        return monotonic() < self._remembered.get(proof, 0.0)

    def _remember(self, proof: bytes) -> None:
        self._remembered[proof] = monotonic() + _REMEMBERED_S
        self._remembered.move_to_end(proof)
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)


async def _matches(known: PasswordHash, password: str) -> bool:
    return await asyncio.to_thread(known.matches, password) if known.work else known.matches(password)


def parse_basic(authorization: str) -> tuple[str, str]:
    """User and password of a Basic header; empty ones when it is none."""
    scheme, _, text = authorization.partition(" ")
    try:
        decoded = b64decode(text.strip(), validate=True).decode() if scheme.lower() == "basic" else ""
    except ValueError:
        decoded = ""
    user, _, password = decoded.partition(":")
    return user, password
