"""Tokens that are in use live on: a pull late in a token's life has it live as long again."""

from collections import OrderedDict
from time import monotonic, time

import structlog

from wave_proxy.errors import StateUnavailable
from wave_proxy.serve.resolve import Target
from wave_proxy.state.tokens import TokenStore

_log = structlog.get_logger()

_PAUSE_S = 300.0  # between two tries for a token
_TRIED = 100_000


class Lifetimes:
    """What one worker does for the tokens that are pulled from it."""

    def __init__(self, tokens: TokenStore, lifetime_s: float) -> None:
        self._tokens = tokens
        self._lifetime_s = lifetime_s
        self._pause_s = min(_PAUSE_S, lifetime_s / 10)
        self._tried: OrderedDict[str, float] = OrderedDict()

    async def prolong(self, target: Target) -> None:
        """Called for each pull: in the second half of a token's life, it is moved on to a whole one from now."""
        request, now = target.request, time()
        if request is None or request.expires - now > self._lifetime_s / 2:
            return
        # A builder's own end with the build, and those of a workflow with that.
        if request.uncounted or (request.identity.workflow_id and request.identity.is_platform):
            return
        if monotonic() < self._tried.get(target.token, 0.0):
            return
        self._tried[target.token] = monotonic() + self._pause_s
        self._tried.move_to_end(target.token)
        if len(self._tried) > _TRIED:
            self._tried.popitem(last=False)
        try:
            await self._tokens.extend(target.token, now + self._lifetime_s)
        except StateUnavailable as err:
            _log.warning("a token in use was not extended", error=str(err))
