"""Names under which a job pulls through wave-proxy, as the one who asked for it may: tokens that end with their use."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from builder.work import until_answered
from wave_proxy.errors import StateUnavailable
from wave_proxy.image.build import BuildSpec
from wave_proxy.image.reference import Reference
from wave_proxy.image.request import ContainerRequest
from wave_proxy.state.tokens import TokenStore

_LEEWAY_S = 60.0  # a token outlives the job a little


class Lending:
    """Lends repositories of wave-proxy; ``authority`` is what the names of its own images begin with."""

    def __init__(self, tokens: TokenStore, authority: str) -> None:
        self._tokens = tokens
        self.authority = authority

    @asynccontextmanager
    async def lend(self, spec: BuildSpec, image: Reference) -> AsyncIterator[str]:
        """The repository at wave-proxy that ``image``'s own is read through, until the end of the block."""
        if image.registry == self.authority and image.repository.startswith("wt/"):
            yield image.repository  # it names a token already
            return
        request = ContainerRequest(image=str(image), identity=spec.identity, ip_address=spec.ip_address)
        token = await until_answered(lambda: self._tokens.lend(request, spec.timeout_s + _LEEWAY_S))
        try:
            yield f"wt/{token}/{image.repository}"
        finally:
            with suppress(StateUnavailable):  # then it expires
                await self._tokens.take_back(token)
