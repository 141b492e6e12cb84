"""Holds answers against what their endpoints say of themselves: ``api.endpoints`` and ``api.shapes``."""

from functools import cache
from typing import Any
from urllib.parse import unquote

from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.routing import Route

from api.endpoints import Endpoint, declared
from api.openapi import answers_of
from api.shapes import FrameworkError
from tests.servers import Response


def find_endpoint(app: Starlette, method: str, path: str) -> Endpoint | None:
    """The endpoint that answers; None where the framework does, or nothing is declared."""
    for route in app.routes:
        if isinstance(route, Route) and route.path_regex.match(path) and method in (route.methods or ()):
            return declared(route.endpoint)
    return None


def check_answer(app: Starlette, method: str, target: str, answer: Response) -> None:
    """Raises AssertionError for an answer that its endpoint does not have in ``answers``, or not in that shape."""
    path = unquote(target.partition("?")[0], errors="replace")
    endpoint = find_endpoint(app, method, path)
    if endpoint is None:
        return
    told = answers_of(endpoint).get(answer.status)
    where = f"{method} {path} was answered with {answer.status}"
    assert told is not None, f"{where}, which its endpoint(…) does not have among its answers"
    if method == "HEAD" or (told.may_be_empty and not answer.body):
        return
    media_type = (answer.headers["Content-Type"] or "").partition(";")[0]
    if told.shape and (media_type == "application/json" or not told.media_types):
        assert media_type == "application/json", f"{where} and {media_type}"
        _check_shape(told.shape, answer.body, where)
    elif told.media_types:
        assert media_type in told.media_types, f"{where} and {media_type}, and has {told.media_types}"
    else:
        assert answer.body == b"", f"{where} and a body, and should have none: {answer.body[:200]!r}"


def check_framework_error(body: bytes) -> None:
    """Raises AssertionError unless that is the body of an error that no endpoint is responsible for."""
    _check_shape(FrameworkError, body, "a framework error")


def _check_shape(shape: Any, body: bytes, where: str) -> None:
    try:
        _adapter(shape).validate_json(body, strict=True)
    except ValidationError as err:
        raise AssertionError(f"{where} and is not what {shape.__name__} in api/shapes.py says: {err}") from None


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
