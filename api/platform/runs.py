"""Tokens that a run has asked for end soon after it: they are short-lived, and extended while it goes on (§4.12)."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import structlog

from wave_proxy.errors import PairingMissing, PlatformError, StateUnavailable
from wave_proxy.image.request import ContainerRequest, Identity
from wave_proxy.state.runs import RunTokens
from wave_proxy.state.tokens import TokenRecord, TokenStore

_log = structlog.get_logger()

_BATCH = 250
_PAUSE_S = 10.0

Clock = Callable[[], float]
Put = Callable[[ContainerRequest], Awaitable[str]]
_Answer = Literal["goes on", "over", "silent", "unknown"]


class RunStatus(Protocol):
    """Who knows of runs."""

    async def is_running(self, identity: Identity) -> bool:
        """Whether the run that asked for a container goes on. Raises PlatformError."""


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Of the tokens of runs, in seconds: how long one lives by itself, and at most; how often its run is asked for."""

    lifetime_s: float = 1200.0
    max_lifetime_s: float = 2 * 86400.0
    check_s: float = 180.0


class Runs:
    """Has the tokens of runs live on while the runs do."""

    def __init__(
        self, due: RunTokens, tokens: TokenStore, platforms: RunStatus, limits: RunLimits, clock: Clock
    ) -> None:
        self._due = due
        self._tokens = tokens
        self._platforms = platforms
        self._limits = limits
        self._clock = clock

    async def record(self, wanted: ContainerRequest, put: Put) -> tuple[str, ContainerRequest]:
        """Record a request with ``put``; returns its token, and the request with the end that clients are told.

        Source: ``wave.md`` §4.12. Raises what ``put`` raises.
        """
        if not is_of_a_run(wanted):
            return await put(wanted), wanted
        limits = self._limits
        token = await put(replace(wanted, expires=wanted.created + limits.lifetime_s))
        await self._due.put(token, wanted.created + limits.check_s)
        return token, replace(wanted, expires=wanted.created + limits.max_lifetime_s)

    async def run(self) -> None:
        """Look after them, without an end; every process may."""
        pause_s = min(_PAUSE_S, self._limits.check_s / 4)
        while True:
            await asyncio.sleep(pause_s * random.uniform(0.6, 1.4))  # noqa: S311 - so that processes take turns
            try:
                while await self.check() == _BATCH:
                    pass
            except StateUnavailable:
                continue
            except Exception:
                _log.exception("looking after the tokens of runs failed")

    async def check(self) -> int:
        """Ask for the runs of tokens that are due; returns how many tokens that were. Raises StateUnavailable."""
        now = self._clock()
        names = await self._due.claim(now, _BATCH, now + self._limits.check_s)
        runs: dict[Identity, list[str]] = {}
        for name in names:
            record = await self._tokens.find_record(name)
            if record is None or self._is_at_its_end(record, now):
                await self._due.remove(name)
            else:
                runs.setdefault(record.request.identity, []).append(name)
        await asyncio.gather(*(self._look(identity, tokens, now) for identity, tokens in runs.items()))
        return len(names)

    def _is_at_its_end(self, record: TokenRecord, now: float) -> bool:
        return not record.is_valid(now) or now >= record.request.created + self._limits.max_lifetime_s

    async def _look(self, identity: Identity, tokens: list[str], now: float) -> None:
        """Ask for one run, once for all of its tokens."""
        match await self._ask(identity):
            case "over":
                await self._due.remove(*tokens)
            case "goes on" | "silent":  # a Platform that is away ends nothing
                for token in tokens:
                    await self._extend(token, now)

    async def _ask(self, identity: Identity) -> _Answer:
        try:
            return "goes on" if await self._platforms.is_running(identity) else "over"
        except (PlatformError, PairingMissing) as err:
            _log.warning("a run can't be asked for", run=identity.workflow_id, error=str(err))
            return "silent" if isinstance(err, PlatformError) and err.is_temporary else "unknown"

    async def _extend(self, token: str, now: float) -> None:
        record = await self._tokens.find_record(token)
        if record is not None:
            ends = record.request.created + self._limits.max_lifetime_s
            await self._tokens.extend(token, min(now + self._limits.lifetime_s, ends))


def is_of_a_run(wanted: ContainerRequest) -> bool:
    """Whether a request is a run's, for an image that is there already."""
    of_a_run = wanted.identity.is_platform and bool(wanted.identity.workflow_id)
    return of_a_run and not wanted.build_id and not wanted.is_durable
