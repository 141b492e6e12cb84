"""Pairing: a Platform opens a WebSocket, gets our public key, and is asked over it from then on (``wave.md`` §10.1)."""

import asyncio
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from hmac import compare_digest
from secrets import token_hex
from time import time
from typing import Any

import orjson
import structlog
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from wave_proxy.errors import StateUnavailable, clip
from wave_proxy.image.platform import SERVICE, PairingRecord, is_endpoint, known_endpoint, matches_endpoint
from wave_proxy.state.channel import Channel, Session
from wave_proxy.state.pairing import Pairings

_log = structlog.get_logger()

_GOING_AWAY = 1001
_NOT_JSON = 1007
_REFUSED = 1008
_TRY_LATER = 1013


class PairingRules:
    """Who may pair: the endpoints that the operator named, with the token that was agreed on, if there is one."""

    def __init__(self, endpoints: tuple[str, ...], token: str, *, enabled: bool = True) -> None:
        self._endpoints = endpoints
        self._token = token
        self._enabled = enabled

    def refusal(self, service: str, token: str, endpoint: str) -> str:
        """Why this pairing is refused; empty when it is not. Never tells a token."""
        if not self._enabled:
            return "this server pairs with no Platform: [platform] enabled is false"
        if service != SERVICE:
            return f"the service {clip(service, 20)} is not known"
        if not is_endpoint(endpoint):
            return f"the endpoint {clip(endpoint, 60)} is no http(s) address"
        if not matches_endpoint(endpoint, self._endpoints):
            return f"{clip(endpoint, 60)} is not in [platform] endpoints"
        if self._token and not compare_digest(token.encode(), self._token.encode()):
            return "the token is not [platform] pairing_token"
        return ""


class PairingEndpoint:
    """The WebSocket that a Platform keeps open."""

    def __init__(self, rules: PairingRules, pairings: Pairings, channel: Channel) -> None:
        self._rules = rules
        self._pairings = pairings
        self._channel = channel

    @property
    def routes(self) -> list[WebSocketRoute]:
        """Where it is opened."""
        return [WebSocketRoute("/pairing/{service}/token/{token}", self.serve)]

    async def serve(self, socket: WebSocket) -> None:
        """One session, from the pairing to its end."""
        service, token = socket.path_params["service"], socket.path_params["token"]
        given = socket.query_params.get("endpoint", "")
        endpoint = known_endpoint(given) if given else ""
        await socket.accept()
        client = socket.headers.get("x-wave-client", "")
        if why := self._rules.refusal(service, token, endpoint):
            _log.warning("pairing refused", endpoint=clip(given), client=client, reason=why)
            await _close(socket, _REFUSED, why)
            return
        _log.info("a Platform opened a session", endpoint=endpoint, client=client)
        try:
            await self._converse(socket, service, endpoint)
        except StateUnavailable as err:
            await _close(socket, _TRY_LATER, str(err))
        finally:
            with suppress(StateUnavailable):
                await self._channel.announce(endpoint)
            _log.info("the session with a Platform ended", endpoint=endpoint, client=client)

    async def _converse(self, socket: WebSocket, service: str, endpoint: str) -> None:
        record = await self._pairings.obtain(service, endpoint, time())
        with self._channel.session(endpoint, socket.send_text) as session:
            await self._channel.announce(endpoint)
            sender = asyncio.create_task(session.run())
            try:
                await socket.send_text(_pairing_response(record))
                while await self._take(socket, session, service, endpoint):
                    pass
            except WebSocketDisconnect:
                return
            except (ValueError, KeyError):  # a KeyError: it was not text
                await _close(socket, _NOT_JSON, "not a JSON object with @type")
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)

    async def _take(self, socket: WebSocket, session: Session, service: str, endpoint: str) -> bool:
        """Take one message; False when it was the last."""
        message = _read_message(await socket.receive_text())
        match message.get("@type"):
            case "pairing-heartbeat":
                if not await self._pairings.renew(service, endpoint):
                    await _close(socket, _GOING_AWAY, "the pairing is gone: pair again")
                    return False
                await socket.send_text(_heartbeat(message))
            case "proxy-http-response":
                await session.answer(message)
        return True


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    with suppress(WebSocketDisconnect, RuntimeError):  # the other side may be gone by now
        await socket.close(code, reason[:100])


def _read_message(text: str) -> Mapping[str, Any]:
    message = orjson.loads(text)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def _pairing_response(record: PairingRecord) -> str:
    return orjson.dumps(
        {
            "@type": "pairing-response",
            "msgId": token_hex(8),
            "pairingId": record.pairing_id,
            "publicKey": b64encode(record.public_key).decode(),
        }
    ).decode()


def _heartbeat(message: Mapping[str, Any]) -> str:
    return orjson.dumps({"@type": "pairing-heartbeat", "msgId": message.get("msgId")}).decode()
