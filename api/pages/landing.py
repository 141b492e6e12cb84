"""The address without a path."""

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from api.endpoints import HTML, Answer, endpoint, routes_of
from api.pages.audience import varying, wants_page
from api.pages.render import page


class Landing:
    """It leads to ``url``, where there is one; else a browser is told what is here. Source: ``wave.md`` §1.12."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.routes = routes_of(self)

    @endpoint(
        "GET",
        "/",
        "Service",
        {
            301: Answer("To the operator's page.", headers={"Location": "The page."}),
            400: Answer(
                "There is no page to go to; browsers get one that says where to go.",
                media_types=(HTML,),
                may_be_empty=True,
            ),
        },
    )
    async def show(self, request: Request) -> Response:
        """The address without a path."""
        if self._url:
            return RedirectResponse(self._url, 301)
        if not wants_page(request):
            return varying(Response(status_code=400))
        paths = {route.path for route in request.app.routes if isinstance(route, Route)}
        return varying(page("landing.html", "wave-proxy", has_pages="/view/inspect" in paths, status=400))
