"""What container requests take of the state store, which keeps them in memory: limited for each who asks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from wave_proxy.image.request import ContainerConfig
from wave_proxy.state.attempts import Attempts
from wave_proxy.state.tokens import TokenStore

_WHAT = "bytes of container requests"
_PERIOD_S = 3600.0
_RECORD_BYTES = 1 << 10  # each takes so much at least


class Sizes:
    """Counts bytes in this process: of each address that is not known, and of each known user, in an hour."""

    def __init__(self, tokens: TokenStore, *, anonymous: int = 64 * 10**6, identified: int = 512 * 10**6) -> None:
        self._tokens = tokens
        self._limits = {
            False: Attempts(f"{_WHAT} from this address", anonymous, _PERIOD_S),
            True: Attempts(f"{_WHAT} of this user", identified, _PERIOD_S),
        }

    @asynccontextmanager
    async def admitted(self, config: ContainerConfig, email: str, ip_address: str) -> AsyncIterator[None]:
        """Let in what is going to be kept in the state store; when the block raises, nothing is, and nothing counts.

        Raises TooManyRequests.
        """
        texts = (*config.env, *config.entrypoint, *config.cmd, config.working_dir)
        linked = (layer.location for layer in config.layers if not layer.is_inline)
        kept = _RECORD_BYTES + sum(map(len, (*texts, *linked))) + await self._tokens.missing_bytes(config.layers)
        limit, who = self._limits[bool(email)], email or ip_address
        limit.check(who)
        until = limit.count(who, kept)
        try:
            yield
        except BaseException:
            limit.take_back(who, kept, until)
            raise
