"""Images as the api reads them through the port, and as no pull: local ones, those named by a token, stored ones."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from re import compile as compile_pattern
from time import time

from wave_proxy.errors import StateUnavailable
from wave_proxy.image.reference import Reference
from wave_proxy.image.request import ContainerRequest, Identity
from wave_proxy.state.tokens import TokenStore

_BY_TOKEN = compile_pattern(r"wt/([0-9a-f]{32})/(.+)")
_LENT_S = 60.0


class OwnImages:
    """Lends names to read our own images by; ``authority`` is what their names begin with."""

    def __init__(self, tokens: TokenStore, authority: str) -> None:
        self._tokens = tokens
        self._authority = authority

    @asynccontextmanager
    async def open(self, image: Reference, identity: Identity) -> AsyncIterator[Reference]:
        """The name to read an image by until the end of the block, as ``identity`` may; other images keep their own.

        Raises StateUnavailable.
        """
        found = await self._find(image, identity) if self.has(image) else None
        if found is None:
            yield image
            return
        async with self._lent(image, *found) as place:
            yield place

    def has(self, image: Reference) -> bool:
        """Whether an image is read through the port by its own name."""
        return image.registry == self._authority

    def lend(self, image: Reference, identity: Identity) -> AbstractAsyncContextManager[Reference]:
        """A name to read another registry's image by until the end of the block, as ``identity`` may pull it.

        Raises StateUnavailable.
        """
        request = ContainerRequest(str(replace(image, scheme="")), identity=identity)
        return self._lent(replace(image, registry=self._authority), request, image.repository)

    @asynccontextmanager
    async def _lent(self, image: Reference, request: ContainerRequest, repository: str) -> AsyncIterator[Reference]:
        token = await self._tokens.lend(request, _LENT_S)
        try:
            yield replace(image, repository=f"wt/{token}/{repository}")
        finally:
            with suppress(StateUnavailable):  # then it expires
                await self._tokens.take_back(token)

    async def _find(self, image: Reference, identity: Identity) -> tuple[ContainerRequest, str] | None:
        """What stands for one of our images, and the repository behind its token; None when nothing does."""
        if image.repository.startswith("local/"):
            return ContainerRequest(str(replace(image, scheme="")), identity=identity), image.repository
        match = _BY_TOKEN.fullmatch(image.repository)
        record = await self._tokens.find_record(match[1]) if match else None
        if match is None or record is None or not record.is_valid(time()):
            return None
        return record.request, match[2]
