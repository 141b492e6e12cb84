"""What the service says of itself."""

from base64 import b64decode
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from api.replies import json_reply
from wave_proxy import __version__
from wave_proxy.errors import StateUnavailable

# The version of the API that we speak. Clients compare it, in strict semver, with the least that they work with.
API_VERSION = "1.37.0"

# A transparent pixel: browsers ask for an icon, and this ends it.
_ICON = b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")


async def service_info(_: Request) -> Response:
    """GET /service-info"""
    info = {"version": API_VERSION, "commitId": f"v{__version__}", "waveProxyVersion": __version__}
    return json_reply({"serviceInfo": info})


async def robots(_: Request) -> Response:
    """GET /robots.txt"""
    return PlainTextResponse("User-agent: *\nDisallow: /\n")


async def favicon(_: Request) -> Response:
    """GET /favicon.ico"""
    return Response(_ICON, media_type="image/gif")


async def landing(_: Request) -> Response:
    """GET /: there is no page to go to. Source: ``wave.md`` §1.12."""
    return Response(status_code=400)


class Health:
    """GET /health: 200 while the state store answers, else 503."""

    def __init__(self, check: Callable[[], Awaitable[None]]) -> None:
        self._check = check

    async def show(self, _: Request) -> Response:
        """The endpoint."""
        try:
            await self._check()
        except StateUnavailable as err:
            return json_reply({"status": "DOWN", "message": str(err)}, 503)
        return json_reply({"status": "UP"})
