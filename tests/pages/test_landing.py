"""The address without a path, for people and for programs."""

from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request

from api.pages.landing import Landing
from tests.api_server import ApiServer
from tests.pages.html import Page, read_page
from tests.servers import redis_server

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis, ApiServer(redis) as server:
        yield server


def test_people_are_told_where_to_go(api: ApiServer) -> None:
    answer = api.request("GET", "/", headers=BROWSER)
    assert (answer.status, answer.headers["Vary"]) == (400, "Accept")
    page = read_page(answer)
    assert page.links["Read the API, and try it"] == "/openapi"
    assert page.links["Look at an image as its registry has it"] == "/view/inspect"
    for path in page.links.values():
        assert api.request("GET", path).status == 200


def test_programs_get_what_they_always_got(api: ApiServer) -> None:
    answer = api.request("GET", "/", headers={"Accept": "*/*"})
    assert (answer.status, answer.body, answer.headers["Vary"]) == (400, b"", "Accept")


async def test_where_there_are_no_pages_none_is_linked() -> None:
    headers = [(b"accept", b"text/html")]
    answer = await Landing("").show(Request({"type": "http", "headers": headers, "app": Starlette()}))
    page = Page(bytes(answer.body).decode())
    assert set(page.links.values()) == {"/openapi"}
