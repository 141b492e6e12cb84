"""The reference of the API: the OpenAPI document of what this server answers."""

from collections.abc import Iterable
from functools import cached_property

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from api.endpoints import Answer, declared, describe, endpoint, routes_of
from api.openapi import document
from api.replies import JSON
from api.shapes import Document


class Reference:
    """The endpoints of the reference; ``public_url`` is where clients reach the server.

    The document is made when it is first asked for, of the routes that ``complete`` was given.
    """

    def __init__(self, public_url: str) -> None:
        self._public_url = public_url
        self._routes: tuple[BaseRoute, ...] = ()
        self.routes = routes_of(self)

    def complete(self, routes: Iterable[BaseRoute]) -> None:
        """These are all routes of the application."""
        self._routes = tuple(routes)

    @endpoint("GET", "/openapi.json", "Service", {200: Answer("The document.", Document)})
    async def show(self, _: Request) -> Response:
        """This API as an OpenAPI document."""
        return Response(self._content, media_type=JSON)

    @cached_property
    def document(self) -> Document:
        """The document."""
        handlers = [route.endpoint for route in self._routes if isinstance(route, Route) and declared(route.endpoint)]
        return document(map(describe, handlers), self._public_url)

    @cached_property
    def _content(self) -> bytes:
        return orjson.dumps(self.document)
