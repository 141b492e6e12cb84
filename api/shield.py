"""An answer where something unforeseen happens."""

from re import compile as compile_pattern
from secrets import token_hex

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.replies import json_reply

_TOKEN = compile_pattern(r"[0-9a-f]{12,}")


class Shield:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_and_tell(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, send_and_tell)
        except ClientDisconnect:
            pass
        except Exception as err:
            error_id = token_hex(6)
            path = _TOKEN.sub("…", scope["path"])
            structlog.get_logger().error("request failed", path=path, error_id=error_id, exc_info=err)
            if started:
                raise
            reply = json_reply({"message": f"Unexpected error - Error ID: {error_id}"}, 500)
            await reply(scope, receive, send)
