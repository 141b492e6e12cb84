"""Tokens of Platform users that expire are refreshed in the background, so that a long run is not left without one."""

import asyncio
import random
from time import time

import structlog

from wave_proxy.errors import PairingMissing, PlatformError, StateUnavailable
from wave_proxy.state.jwts import KeptPair, TokenPairs
from wave_proxy.upstream.platform import PlatformClient

_log = structlog.get_logger()

_PAUSE_S = 10.0
_BATCH = 10


class Refreshing:
    """Refreshes what is due, in any number of processes."""

    def __init__(self, pairs: TokenPairs, client: PlatformClient) -> None:
        self._pairs = pairs
        self._client = client

    async def run(self) -> None:
        """Refresh, without an end."""
        while True:
            await asyncio.sleep(_PAUSE_S * random.uniform(0.6, 1.4))  # noqa: S311 - so that processes take turns
            try:
                await self.refresh_due(time())
            except StateUnavailable:
                continue
            except Exception:
                _log.exception("refreshing failed")

    async def refresh_due(self, now: float) -> None:
        """Refresh up to ten of the pairs that are due; one that fails is due again as if it had not."""
        await asyncio.gather(*(self._refresh(kept) for kept in await self._pairs.claim_due(now, _BATCH)))

    async def _refresh(self, kept: KeptPair) -> None:
        try:
            await self._client.refresh(kept.endpoint, kept.token, kept.pair, 0.0)
        except (PlatformError, PairingMissing) as err:
            _log.warning("a user's token was not refreshed", endpoint=kept.endpoint, error=str(err))
