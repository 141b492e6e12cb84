"""The OpenAPI document: whole, true to the code, and valid."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from api.endpoints import declared, describe
from tests.api_server import ApiServer
from tests.servers import redis_server

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server that takes builds."""
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as redis,
        ApiServer(redis, build_repository="registry.test/builds") as server,
    ):
        yield server


@pytest.fixture(scope="module")
def document(api: ApiServer) -> dict[str, Any]:
    """The document as it is served."""
    answer = api.request("GET", "/openapi.json")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    found: dict[str, Any] = answer.json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every operation by its method and path."""
    return {
        f"{method.upper()} {path}": operation
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }


def test_every_route_is_in_the_document(api: ApiServer, document: dict[str, Any]) -> None:
    routes = [route for route in api.app.routes if isinstance(route, Route)]
    for route in routes:
        assert declared(route.endpoint), f"{route.path} has no @endpoint(…): see api/endpoints.py"
        assert describe(route.endpoint).summary
    told = {f"{method} {route.path}" for route in routes for method in (route.methods or set()) - {"HEAD"}}
    assert operations(document).keys() == told


def test_no_endpoint_goes_by_undeclared() -> None:
    for file in (ROOT / "api").rglob("*.py"):
        for path in re.findall(r"\bRoute\(\s*f?[\"']([^\"']+)", file.read_text()):
            assert path.startswith("/internal/"), f"{file}: {path} has no @endpoint(…): see api/endpoints.py"


def test_operations_have_names_of_their_own(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(names)) == len(names)


def test_every_member_of_a_request_is_in_the_document(document: dict[str, Any]) -> None:
    members = document["components"]["schemas"]["Submission"]["properties"]
    assert {"containerImage", "towerAccessToken", "packages", "containerConfig", "scanLevels"} <= members.keys()
    assert members["nameStrategy"]["anyOf"][0]["enum"] == ["none", "tagPrefix", "imageSuffix"]


def test_the_server_is_the_one_that_clients_reach(document: dict[str, Any]) -> None:
    assert document["openapi"] == "3.1.0"
    assert document["servers"] == [{"url": "http://wave.example:9090"}]


def test_the_page_in_docs_is_what_the_code_gives(document: dict[str, Any]) -> None:
    script, environment = ROOT / "scripts" / "document-api.py", {**os.environ, "PYTHONPATH": str(ROOT)}
    written = subprocess.run([sys.executable, script], env=environment, check=True, capture_output=True, text=True)
    page = (ROOT / "docs" / "api.md").read_text()
    assert page == written.stdout, "docs/api.md is out of date: run `make docs`"
    told = set(re.findall(r"^\| `(\w+ [^`?]+)", page, re.MULTILINE))
    assert told == operations(document).keys()
