"""What the service says of itself."""

from base64 import b64decode
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from api.endpoints import TEXT, Answer, endpoint
from api.replies import json_reply
from api.shapes import HealthShape, ServiceInfo
from wave_proxy import __version__
from wave_proxy.errors import StateUnavailable

# The version of the API that we speak. Clients compare it, in strict semver, with the least that they work with.
API_VERSION = "1.37.0"

# A transparent pixel: browsers ask for an icon, and this ends it.
_ICON = b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")

_GROUP = "Service"


@endpoint("GET", "/service-info", _GROUP, {200: Answer("Its versions.", ServiceInfo)})
async def service_info(_: Request) -> Response:
    """What this server is."""
    info = {"version": API_VERSION, "commitId": f"v{__version__}", "waveProxyVersion": __version__}
    return json_reply({"serviceInfo": info})


@endpoint("GET", "/robots.txt", _GROUP, {200: Answer("Nothing is for crawlers.", media_types=(TEXT,))})
async def robots(_: Request) -> Response:
    """What crawlers may read."""
    return PlainTextResponse("User-agent: *\nDisallow: /\n")


@endpoint("GET", "/favicon.ico", _GROUP, {200: Answer("A transparent pixel.", media_types=("image/gif",))})
async def favicon(_: Request) -> Response:
    """An icon for browsers."""
    return Response(_ICON, media_type="image/gif")


class Health:
    """Whether the state store answers."""

    def __init__(self, check: Callable[[], Awaitable[None]]) -> None:
        self._check = check

    @endpoint(
        "GET",
        "/health",
        _GROUP,
        {200: Answer("It works.", HealthShape), 503: Answer("The state store does not answer.", HealthShape)},
    )
    async def show(self, _: Request) -> Response:
        """Whether the service works, for load balancers."""
        try:
            await self._check()
        except StateUnavailable as err:
            return json_reply({"status": "DOWN", "message": str(err)}, 503)
        return json_reply({"status": "UP"})
