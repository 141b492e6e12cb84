"""The page of the API's reference."""

import re
from collections.abc import Iterator

import pytest

from tests.api_server import ApiServer
from tests.pages.html import Page, read_page
from tests.servers import redis_server


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis, ApiServer(redis) as server:
        yield server


@pytest.fixture(scope="module")
def page(api: ApiServer) -> Page:
    return read_page(api.request("GET", "/openapi"))


def test_every_operation_can_be_read_and_tried(api: ApiServer, page: Page) -> None:
    document = api.request("GET", "/openapi.json").json()
    forms = {(a["data-method"], a["data-path"]) for tag, a in page.elements if tag == "form"}
    told = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert len(told) > 30
    assert forms == told
    for item in document["paths"].values():
        for operation in item.values():
            assert operation["summary"] in page.text


def test_every_document_is_described_once(api: ApiServer, page: Page) -> None:
    names = [attributes["id"] for tag, attributes in page.elements if tag == "details"]
    assert len(set(names)) == len(names)
    assert set(api.request("GET", "/openapi.json").json()["components"]["schemas"]) <= set(names)
    targets = {a["href"][1:] for tag, a in page.elements if tag == "a" and a["href"].startswith("#")}
    assert targets <= set(names)


def test_members_say_what_they_are(page: Page) -> None:
    assert "A container file (Dockerfile) to build, in base64." in page.text
    assert "none, tagPrefix, imageSuffix" in page.text


def test_the_whole_example_of_a_body_is_seen(page: Page) -> None:
    areas = re.findall(r'<textarea data-body rows="(\d+)"[^>]*>\n(.*?)</textarea>', page.source, re.DOTALL)
    assert [int(rows) for rows, _ in areas] == [len(text.splitlines()) for _, text in areas]
    assert max(int(rows) for rows, _ in areas) > 6


def test_the_address_with_a_slash_leads_there(api: ApiServer) -> None:
    answer = api.request("GET", "/openapi/")
    assert (answer.status, answer.headers["Location"]) == (301, "/openapi")
