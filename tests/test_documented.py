"""The check that every answer of the tests' server goes through finds what an endpoint does not say of itself."""

from http.client import HTTPMessage
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response as Answered
from starlette.routing import Route

from api.endpoints import TEXT, Answer, endpoint, route_of
from api.replies import JSON
from api.shapes import BuildStatus, Message
from tests.documented import check_answer
from tests.servers import Response

STATUS = {"id": "bd-1", "status": "PENDING", "startTime": "2026-01-31T00:00:00Z"}
ANSWERS = {
    200: Answer("How far.", BuildStatus),
    202: Answer("Text.", media_types=(TEXT,)),
    404: Answer("Nothing."),
    409: Answer("Done.", Message, may_be_empty=True),
}


@endpoint("GET", "/builds/{build_id}", "Builds", ANSWERS)
async def show(_: Request) -> Answered:
    """A build."""
    return Answered()


async def undeclared(_: Request) -> Answered:
    return Answered()


APP = Starlette(routes=[route_of(show), Route("/other", undeclared)])


def check(status: int, body: bytes, media_type: str = "", path: str = "/builds/a", method: str = "GET") -> None:
    headers = HTTPMessage()
    if media_type:
        headers["Content-Type"] = media_type
    check_answer(APP, method, path, Response(status, headers, body))


@pytest.mark.parametrize(
    ("status", "body", "media_type"),
    [
        (200, orjson.dumps(STATUS), JSON),
        (200, orjson.dumps({**STATUS, "succeeded": True, "duration": 1.5}), JSON),
        (202, b"log", f"{TEXT}; charset=utf-8"),
        (404, b"", ""),
        (409, b"", ""),
        (409, b'{"message":"a"}', JSON),
        (405, b"", ""),
        (500, b'{"message":"a"}', JSON),
    ],
)
def test_what_is_told_passes(status: int, body: bytes, media_type: str) -> None:
    check(status, body, media_type, "/builds/a?b=c")


@pytest.mark.parametrize(
    ("status", "body", "media_type", "problem"),
    [
        (201, b"", "", "does not have among its answers"),
        (200, orjson.dumps({**STATUS, "more": 1}), JSON, "more"),
        (200, orjson.dumps({**STATUS, "status": "DONE"}), JSON, "PENDING"),
        (200, orjson.dumps({**STATUS, "succeeded": None}), JSON, "succeeded"),
        (200, orjson.dumps({"id": "a"}), JSON, "startTime"),
        (200, orjson.dumps(STATUS), TEXT, "text/plain"),
        (202, b"{}", JSON, "application/json"),
        (404, b"{}", JSON, "should have none"),
        (409, b"{}", JSON, "message"),
    ],
)
def test_what_is_not_told_is_found(status: int, body: bytes, media_type: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        check(status, body, media_type)


@pytest.mark.parametrize(("method", "path"), [("GET", "/nothing"), ("PUT", "/builds/a"), ("GET", "/other")])
def test_what_no_endpoint_answers_is_not_held_against_any(method: str, path: str) -> None:
    check(418, b"x", "x/y", path, method)


def test_head_has_no_body() -> None:
    check(200, b"", JSON, method="HEAD")


@pytest.mark.parametrize("handler", [undeclared, lambda _: None])
def test_what_is_not_declared_has_no_route(handler: Any) -> None:
    with pytest.raises(TypeError, match="is not declared as an endpoint"):
        route_of(handler)
