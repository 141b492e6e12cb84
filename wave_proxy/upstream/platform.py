"""The client for Seqera Platforms: users, their credentials and their runs (``wave.md`` §10.4 and 10.5)."""

import asyncio
from collections.abc import Mapping
from time import monotonic
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import orjson

from wave_proxy.errors import PairingMissing, PlatformError
from wave_proxy.image.platform import (
    CredentialsEntry,
    PlatformCall,
    PlatformReply,
    PlatformUser,
    TokenPair,
    matches_endpoint,
)

_ATTEMPTS = 6
_FIRST_PAUSE_S = 0.325
_MAX_PAUSE_S = 40.0
_REFRESH_S = 10.0  # longer than one call takes

_FORM = {"Content-Type": "application/x-www-form-urlencoded"}
_ACCEPT = {"Accept": "application/json"}


class Transport(Protocol):
    """How a Platform is reached."""

    async def call(self, endpoint: str, call: PlatformCall) -> PlatformReply:
        """Its reply, within some seconds. Raises OSError without a connection, TimeoutError."""


class Pairs(Protocol):
    """The tokens of users as they were last refreshed, by the token that they first had."""

    async def find(self, endpoint: str, token: str) -> TokenPair | None:
        """The pair; None when none is kept."""

    async def replace(self, endpoint: str, token: str, pair: TokenPair) -> None:
        """Keep a pair."""

    async def lock(self, endpoint: str, token: str, wait_s: float) -> bool:
        """Be the only one who refreshes that pair; False when another one does and has not ended in time."""

    async def unlock(self, endpoint: str, token: str) -> None:
        """Let others."""


class PlatformClient:
    """Asks Platforms as one of their users: ``endpoint`` and ``token`` say of which, and as whom.

    All methods but ``refresh`` refresh a token that has expired, once. Only what got no answer is asked again, for up
    to ``patience_s``. They raise PlatformError: with the Platform's status, 503 without a connection, 408 when it does
    not answer in time; PairingMissing for an endpoint that is none of ``endpoints``, which are told nothing.
    """

    def __init__(self, transport: Transport, pairs: Pairs, endpoints: tuple[str, ...]) -> None:
        self._transport = transport
        self._endpoints = endpoints
        self._pairs = pairs

    async def user(self, endpoint: str, token: str, refresh: str, patience_s: float) -> PlatformUser | None:
        """Whose token it is; None when the Platform knows nobody by it. ``refresh`` counts while no pair is kept."""
        document = await self._get(endpoint, token, "user-info", patience_s, refresh=refresh)
        match document:
            case {"user": {"id": int(user_id), **more}}:
                return PlatformUser(user_id, str(more.get("email") or ""))
        return None

    async def credentials(
        self, endpoint: str, token: str, workspace_id: int | None, patience_s: float
    ) -> list[CredentialsEntry]:
        """The user's credentials in a workspace, or his own."""
        document = await self._get(endpoint, token, "credentials", patience_s, {"workspaceId": workspace_id})
        found = document.get("credentials")
        return [_entry(each) for each in found if isinstance(each, dict)] if isinstance(found, list) else []

    async def keys(
        self, endpoint: str, token: str, name: str, pairing_id: str, workspace_id: int | None, patience_s: float
    ) -> str:
        """What one entry of the credentials holds, encrypted for that pairing: see ``decrypt``."""
        query = {"pairingId": pairing_id, "workspaceId": workspace_id}
        document = await self._get(endpoint, token, f"credentials/{quote(name, safe='')}/keys", patience_s, query)
        return str(document.get("keys") or "")

    async def workflow_status(
        self, endpoint: str, token: str, workflow_id: str, workspace_id: int | None, patience_s: float
    ) -> str:
        """How far a run is: ``SUBMITTED``, ``RUNNING``, or how it ended; empty when the Platform does not say."""
        path = f"workflow/{quote(workflow_id, safe='')}"
        document = await self._get(endpoint, token, path, patience_s, {"workspaceId": workspace_id})
        workflow = document.get("workflow")
        return str(workflow.get("status") or "") if isinstance(workflow, dict) else ""

    async def batch_credentials(
        self, endpoint: str, token: str, workflow_id: str, workspace_id: int | None, patience_s: float
    ) -> str:
        """The credentials with which a run's AWS Batch environment is used; empty for any other environment."""
        path = f"workflow/{quote(workflow_id, safe='')}/launch"
        document = await self._get(endpoint, token, path, patience_s, {"workspaceId": workspace_id})
        match document:
            case {"launch": {"computeEnv": {"platform": "aws-batch", "credentialsId": str(name)}}}:
                return name
        return ""

    async def refresh(self, endpoint: str, token: str, pair: TokenPair, patience_s: float) -> TokenPair:
        """A new pair in place of ``pair``, which is kept: one that another process got in the meantime, if it did."""
        uri = f"{endpoint}/oauth/access_token"
        if not await self._pairs.lock(endpoint, token, max(patience_s, _REFRESH_S)):
            raise PlatformError(408, f"Timeout error connecting to '{endpoint}'")
        try:
            kept = await self._pairs.find(endpoint, token)
            if kept is not None and kept.access != pair.access:
                return kept
            form = urlencode({"grant_type": "refresh_token", "refresh_token": pair.refresh})
            reply = await self._ask(endpoint, PlatformCall("POST", uri, "", form, _FORM), patience_s)
            if reply.status >= 400:
                raise PlatformError(reply.status, f"Unexpected Tower response refreshing JWT token: {uri}", reply.body)
            new = _new_pair(reply, pair)
            await self._pairs.replace(endpoint, token, new)
            return new
        finally:
            await self._pairs.unlock(endpoint, token)

    async def _get(
        self,
        endpoint: str,
        token: str,
        path: str,
        patience_s: float,
        query: Mapping[str, str | int | None] | None = None,
        *,
        refresh: str = "",
    ) -> dict[str, Any]:
        """The JSON object at a path of the API."""
        wanted = {name: value for name, value in (query or {}).items() if value is not None}
        uri = f"{endpoint}/{path}{'?' if wanted else ''}{urlencode(wanted)}"
        pair = await self._pairs.find(endpoint, token) or TokenPair(token, refresh)
        reply = await self._ask(endpoint, _get_call(uri, pair), patience_s)
        if reply.status == 401 and pair.refresh:
            pair = await self.refresh(endpoint, token, pair, patience_s)
            reply = await self._ask(endpoint, _get_call(uri, pair), patience_s)
        if reply.status == 200:
            return _object(reply.body, uri)
        raise _failure(reply, uri)

    async def _ask(self, endpoint: str, call: PlatformCall, patience_s: float) -> PlatformReply:
        """The reply, from as many attempts as there is time for."""
        if not matches_endpoint(endpoint, self._endpoints):
            raise PairingMissing(endpoint)
        ends, attempt = monotonic() + patience_s, 0
        while True:
            try:
                return await self._transport.call(endpoint, call)
            except TimeoutError:
                error = PlatformError(408, f"Timeout error connecting to '{endpoint}'")
            except OSError as err:
                text = f"Unexpected I/O error while accessing Tower resource: {call.uri} - cause: {err}"
                error = PlatformError(503, text)
            pause_s = min(_FIRST_PAUSE_S * 3**attempt, _MAX_PAUSE_S)
            attempt += 1
            if attempt >= _ATTEMPTS or monotonic() + pause_s > ends:
                raise error
            await asyncio.sleep(pause_s)


def _get_call(uri: str, pair: TokenPair) -> PlatformCall:
    return PlatformCall("GET", uri, f"Bearer {pair.access}", headers=_ACCEPT)


def _failure(reply: PlatformReply, uri: str) -> PlatformError:
    match reply.status:
        case 401:
            return PlatformError(401, f"Unauthorized access to Tower resource: {uri}")
        case 404:
            return PlatformError(404, f"Tower resource not found: {uri}")
    text = f"Unexpected status code {reply.status} while accessing Tower resource: {uri}"
    return PlatformError(reply.status, text, reply.body)


def _object(body: str, uri: str) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise PlatformError(502, f"Unexpected answer that is no JSON object, of Tower resource: {uri}")
    return document


def _entry(document: Mapping[str, Any]) -> CredentialsEntry:
    """One of the list. The registry stands beside the provider, or among the keys that are no secret."""
    keys = document.get("keys")
    registry = document.get("registry") or (keys.get("registry") if isinstance(keys, dict) else "")
    provider = "" if document.get("deleted") else str(document.get("provider") or "")
    return CredentialsEntry(str(document.get("id") or ""), provider, str(registry or ""))


def _new_pair(reply: PlatformReply, old: TokenPair) -> TokenPair:
    cookies = {}
    for line in reply.headers.get("set-cookie", ()):
        name, _, rest = line.partition("=")
        cookies[name.strip()] = rest.partition(";")[0].strip()
    if not cookies.get("JWT"):
        raise PlatformError(412, "Missing JWT token in Tower client response")
    return TokenPair(cookies["JWT"], cookies.get("JWT_REFRESH_TOKEN") or old.refresh)
