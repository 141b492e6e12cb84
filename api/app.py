"""The REST application: its routes, and how errors become answers."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Protocol, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from api.containers import Containers
from api.endpoints import route_of
from api.pages.assets import Assets
from api.pages.landing import Landing
from api.pages.reference import ReferencePage
from api.reference import Reference
from api.replies import framework_error, json_reply, reason_of
from api.service import Health, favicon, robots, service_info
from api.shield import Shield
from wave_proxy.errors import AccessTokenRefused, BodyTooLarge, TooManyRequests, Unauthorized, WaveError


class Endpoints(Protocol):
    """Endpoints that belong together."""

    @property
    def routes(self) -> Sequence[BaseRoute]:
        """Where they are, and what answers there."""


def create_app(
    containers: Containers,
    others: Iterable[Endpoints],
    check_state: Callable[[], Awaitable[None]],
    public_url: str,
    landing_url: str = "",
) -> Starlette:
    """The application: container requests and ``others``.

    ``check_state`` raises StateUnavailable without Redis; ``landing_url`` is where the address without a path leads to.
    """
    reference = Reference(public_url)
    app = Starlette(
        routes=[
            *containers.routes,
            *(route for endpoints in others for route in endpoints.routes),
            *reference.routes,
            *ReferencePage(lambda: reference.document).routes,
            *Assets().routes,
            *map(route_of, (service_info, Health(check_state).show, robots, favicon)),
            *Landing(landing_url).routes,
        ],
        middleware=[Middleware(Shield)],
        exception_handlers={WaveError: _answer_error, HTTPException: _answer_framework_error},
    )
    reference.complete(app.routes)
    # Clients do not follow redirects, and a POST must not become a GET.
    app.router.redirect_slashes = False
    return app


async def _answer_error(_: Request, error: Exception) -> Response:
    failure = cast(WaveError, error)
    headers = reason_of(failure)
    if isinstance(failure, Unauthorized):
        return Response(status_code=401, headers={**headers, "WWW-Authenticate": _challenge(failure)})
    if failure.retry_after_s is not None:
        headers["Retry-After"] = str(failure.retry_after_s)
    if isinstance(failure, TooManyRequests) and failure.limit is not None:
        headers["RateLimit-Limit"] = str(failure.limit)
        headers["RateLimit-Remaining"] = str(failure.remaining or 0)
        headers["RateLimit-Reset"] = str(failure.reset_s or 0)
    if isinstance(failure, BodyTooLarge):
        headers["Connection"] = "close"  # the rest of the body is on its way, and nobody wants it
    return json_reply({"message": str(failure)}, failure.status, headers)


def _challenge(failure: Unauthorized) -> str:
    """What a 401 asks for; of an access token it also says why that is refused, as the body is empty by contract."""
    if isinstance(failure, AccessTokenRefused):
        return f'Bearer realm="Wave Authentication", error="invalid_token", error_description="{failure}"'
    return "Basic realm=Wave Authentication"


async def _answer_framework_error(request: Request, error: Exception) -> Response:
    failure = cast(HTTPException, error)
    path = request.url.path
    if failure.status_code != 405:
        text = "Page Not Found" if failure.status_code == 404 else failure.detail
        return framework_error(path, failure.status_code, HTTPStatus(failure.status_code).phrase, text)
    allowed = ", ".join(_methods_of(request))
    text = f"Method [{request.method}] not allowed for URI [{path}]. Allowed methods: [{allowed}]"
    return framework_error(path, 405, failure.detail, text, {"Allow": allowed})


def _methods_of(request: Request) -> list[str]:
    """What the path of a request can be asked with; several routes may share it."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    return sorted({name for r in routes if r.path_regex.match(request.url.path) for name in r.methods or ()})
