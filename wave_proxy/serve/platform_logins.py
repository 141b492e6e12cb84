"""Logins that the Platform keeps for its users. The api alone talks to it, and is asked over its Unix socket.

``GET /internal/login?token=…&registry=…&repository=…`` answers 200 with ``username`` and ``password``, 204 when there
is none, or an error status with ``message``.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from time import monotonic

import aiohttp
import structlog
from yarl import URL

from wave_proxy.cache.flight import Flights
from wave_proxy.errors import Denied, StateUnavailable, UpstreamError, UpstreamUnavailable
from wave_proxy.image.oci import read_json_object
from wave_proxy.image.request import Identity
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import Session

_log = structlog.get_logger()

_REMEMBERED_S = 60.0
_AGAIN_S = 5.0  # after a question that failed
_PATIENCE_S = 2.0  # where an answer is known
_ADDRESS = URL("http://api/internal/login")
_TIMEOUT_S = 30.0
_MEMORY = 10_000
_SOURCE = "the Platform's credentials of this workspace"

_Key = tuple[Identity, str, str]


@dataclass(slots=True)
class _Known:
    login: Login | None
    until: float  # monotonic


class PlatformLogins:
    """The logins of Platform users, as one worker knows them: once told, one goes on while nobody answers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._memory: OrderedDict[_Key, _Known] = OrderedDict()
        self._asking: Flights[_Key, Login | None] = Flights()

    async def find(self, identity: Identity, token: str, registry: str, repository: str) -> Login | None:
        """The login of that user for a repository, None when he has none. ``token`` is a container's that is his.

        Raises Denied when the Platform does not know him any more, UpstreamUnavailable.
        """
        key = identity, registry, repository
        known = self._memory.get(key)
        if known is not None and monotonic() < known.until:
            self._memory.move_to_end(key)
            return known.login
        try:
            async with asyncio.timeout(_TIMEOUT_S if known is None else _PATIENCE_S):
                return await self._asking.run(key, lambda: self._ask(key, token))
        except (UpstreamError, StateUnavailable, TimeoutError) as err:
            if known is None:
                raise UpstreamUnavailable(f"credentials of {registry} can't be had from the Platform: {err}") from None
            known.until = monotonic() + _AGAIN_S
            _log.warning("the Platform does not answer, using the last known credentials", error=str(err))
            return known.login

    async def _ask(self, key: _Key, token: str) -> Login | None:
        asked = {"token": token, "registry": key[1], "repository": key[2]}
        try:
            async with asyncio.timeout(_TIMEOUT_S), self._session.get(_ADDRESS.with_query(asked)) as response:
                content = await response.read()
        except aiohttp.ClientError:
            raise UpstreamUnavailable("the API is restarting") from None
        try:
            login = _read(response.status, content)
        except Denied:
            self._memory.pop(key, None)
            raise
        self._memory[key] = _Known(login, monotonic() + _REMEMBERED_S)
        self._memory.move_to_end(key)
        if len(self._memory) > _MEMORY:
            self._memory.popitem(last=False)
        return login

    async def close(self) -> None:
        """End what is being asked, and close the connections to the api."""
        await self._asking.close()
        await self._session.close()


def _read(status: int, content: bytes) -> Login | None:
    if status in (204, 404):  # 404: an api that serves no Platform
        return None
    document = read_json_object(content, "the api's answer about credentials")
    if status == 200:
        match document:
            case {"username": str(username), "password": str(password)}:
                return Login(username, password, _SOURCE)
        raise UpstreamError("the api's answer about credentials has no username and password")
    message = str(document.get("message", f"status {status}"))
    if status in (400, 401, 403):
        raise Denied(message)
    raise UpstreamUnavailable(message)
