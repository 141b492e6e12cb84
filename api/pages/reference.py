"""The page of the API's reference: to read it, and to try it."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from api.endpoints import HTML, Answer, endpoint, routes_of
from api.pages.render import page
from api.replies import JSON
from api.shapes import Document


class ReferencePage:
    """The page, of the OpenAPI document that ``document`` gives."""

    def __init__(self, document: Callable[[], Document]) -> None:
        self._document = document
        self.routes = routes_of(self)

    @endpoint("GET", "/openapi", "Service", {200: Answer("The page.", media_types=(HTML,))})
    async def show(self, _: Request) -> Response:
        """This API for people, who can try it."""
        return self._page

    @endpoint(
        "GET", "/openapi/", "Service", {301: Answer("To the page.", headers={"Location": "The page without `/`."})}
    )
    async def redirect(self, _: Request) -> Response:
        """The same page."""
        return RedirectResponse("/openapi", 301)

    @cached_property
    def _page(self) -> Response:
        return page("reference.html", "API", document=self._document(), example=_example, schemes=_schemes)


def _example(operation: dict[str, Any]) -> str:
    """What the form of an operation begins with."""
    example = operation["requestBody"]["content"][JSON].get("example", {})
    return orjson.dumps(example, option=orjson.OPT_INDENT_2).decode()


def _schemes(operation: dict[str, Any]) -> list[str]:
    return [name for scheme in operation.get("security", ()) for name in scheme]
