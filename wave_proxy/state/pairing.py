"""Platforms that are paired with us, and the keys for what they send: owner of ``wave:pairing:*``.

``wave:pairing:<md5 of service and endpoint>`` is a hash: ``service``, ``endpoint``, ``pairing_id``, ``public_key`` and
``private_key`` (DER), ``expires`` (epoch seconds). When the lease is over the next pairing makes new keys; until then,
and as long as the record is kept, these go on working.
"""

import asyncio
from secrets import randbits
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from wave_proxy.image.platform import PairingRecord, pairing_key
from wave_proxy.state.redis import Redis, answered

LEASE_S = 86400.0
KEPT_S = 30 * 86400

# KEYS: a pairing's key. ARGV: now, for how many seconds it is kept, and the fields of a new record. Returns the fields
# of the record that counts: the one that is there while its lease lasts, whoever made it.
_OBTAIN = """
if tonumber(redis.call('hget', KEYS[1], 'expires') or 0) <= tonumber(ARGV[1]) then
    redis.call('hset', KEYS[1], unpack(ARGV, 3))
end
redis.call('expire', KEYS[1], ARGV[2])
return redis.call('hgetall', KEYS[1])
"""


class Pairings:
    """Pairing records by service and endpoint."""

    def __init__(self, redis: Redis, *, lease_s: float = LEASE_S) -> None:
        self._redis = redis
        self._lease_s = lease_s

    async def find(self, service: str, endpoint: str) -> PairingRecord | None:
        """The record of a Platform; None when it was never paired, or not for 30 days. Raises StateUnavailable."""
        async with answered():
            fields = cast(dict[bytes, bytes], await self._redis.hgetall(_key(service, endpoint)))
        return _record(fields) if fields else None

    async def obtain(self, service: str, endpoint: str, now: float) -> PairingRecord:
        """The record of a Platform, with new keys when there is none or its lease is over. Raises StateUnavailable."""
        known = await self.find(service, endpoint)
        if known is not None and known.expires > now:
            return known
        public_key, private_key = await asyncio.to_thread(_new_keys)
        fields = {
            "service": service,
            "endpoint": endpoint,
            "pairing_id": str(randbits(48)),
            "public_key": public_key,
            "private_key": private_key,
            "expires": str(now + self._lease_s),
        }
        members = [part for item in fields.items() for part in item]
        async with answered():
            pairs: Any = await self._redis.eval(
                _OBTAIN, 1, _key(service, endpoint), str(now), str(KEPT_S), *cast(list[str], members)
            )
        return _record(dict(zip(pairs[::2], pairs[1::2], strict=True)))

    async def renew(self, service: str, endpoint: str) -> bool:
        """Keep the record for another 30 days; False when there is none (any more). Raises StateUnavailable."""
        async with answered():
            return bool(await self._redis.expire(_key(service, endpoint), KEPT_S))


def _new_keys() -> tuple[bytes, bytes]:
    private = generate_private_key(public_exponent=65537, key_size=2048)
    return (
        private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
    )


def _record(fields: dict[bytes, bytes]) -> PairingRecord:
    return PairingRecord(
        service=fields[b"service"].decode(),
        endpoint=fields[b"endpoint"].decode(),
        pairing_id=fields[b"pairing_id"].decode(),
        public_key=fields[b"public_key"],
        private_key=fields[b"private_key"],
        expires=float(fields[b"expires"]),
    )


def _key(service: str, endpoint: str) -> str:
    return f"wave:pairing:{pairing_key(service, endpoint)}"
