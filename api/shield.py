"""What surrounds every answer: security headers, no crawlers, and an answer where something unforeseen happens."""

from re import compile as compile_pattern
from secrets import token_hex

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.replies import json_reply

# Source: ``wave.md`` §0.5.
SECURITY_HEADERS = {
    "Strict-Transport-Security": "max-age=31536000; includeSubDomains",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "strict-origin-when-cross-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' https://fonts.googleapis.com; font-src https://fonts.gstatic.com; "
        "img-src 'self' data:; frame-ancestors 'none'"
    ),
}
CRAWLERS = (
    "googlebot",
    "bingbot",
    "yandexbot",
    "baiduspider",
    "duckduckbot",
    "slurp",
    "facebot",
    "twitterbot",
    "mj12bot",
    "ahrefsbot",
)

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

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            app = Response(status_code=405) if _is_crawler(scope) else self._app
            await app(scope, receive, send_with_headers)
        except ClientDisconnect:
            pass
        except Exception as err:
            error_id = token_hex(6)
            path = _TOKEN.sub("…", scope["path"])
            structlog.get_logger().error("request failed", path=path, error_id=error_id, exc_info=err)
            if started:
                raise
            reply = json_reply({"message": f"Unexpected error - Error ID: {error_id}"}, 500)
            await reply(scope, receive, send_with_headers)


def _is_crawler(scope: Scope) -> bool:
    agent = Headers(scope=scope).get("user-agent", "").lower()
    return scope["path"] != "/robots.txt" and any(name in agent for name in CRAWLERS)
