"""What goes wrong over the wire, and what surrounds every answer."""

import json
import re
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from socket import create_connection
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message
from structlog.testing import capture_logs

from api.shield import Shield
from bench.images import image, layer
from bench.upstream import Faults, Upstream
from tests.api_server import ApiServer
from tests.documented import check_framework_error
from tests.patience import PATIENCE_S
from tests.servers import free_port, redis_server

LIMIT = 100_000
BASE = image([layer({"base": "1"})])
BUILD = (
    "Container build service is not enabled - Check Wave configuration setting 'wave.build.enabled'"
    " - HTTP status=501 - response=- - here: [build] engine"
)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the module."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def api(redis: str) -> Iterator[ApiServer]:
    """A server without any upstream."""
    with ApiServer(redis, max_body_bytes=LIMIT) as server:
        yield server


@pytest.fixture
def faulty(redis: str, upstream: Callable[..., Upstream]) -> Iterator[tuple[ApiServer, Upstream, str]]:
    """A server, its upstream, and the name of an image there."""
    registry = upstream()
    registry.add("library/base", BASE, "1.0")
    with ApiServer(redis, upstreams=[registry.address]) as server:
        yield server, registry, f"{registry.address}/library/base:1.0"


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1alpha2/container", "/container-token"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"a":NaN}', b"\xff\xfe", b'{"a":1,"a":2}', b"[" * 50_000], ids=repr
)
def test_a_body_that_is_no_json_object(api: ApiServer, path: str, body: bytes) -> None:
    answer = api.request("POST", path, body=body, headers={"Content-Type": "application/json"})
    assert answer.status == 400
    assert answer.json()["message"].startswith("The request body ")


def test_a_wrong_type_names_its_path(api: ApiServer) -> None:
    assert api.refuse(containerImage={"name": "ubuntu"}, containerConfig={"layers": [{"location": 1}]}) == (
        400,
        "containerImage: expected a string, got an object; "
        "containerConfig.layers[0].location: expected a string, got a number; "
        "containerConfig.layers[0].gzipDigest: required; containerConfig.layers[0].gzipSize: required; "
        "containerConfig.layers[0].tarDigest: required",
    )


def test_a_bad_digest_names_its_path(api: ApiServer) -> None:
    bad = {**layer({"a": "b"}).inline(), "gzipDigest": "sha256:1234"}
    status, message = api.refuse(containerImage="ubuntu", containerConfig={"layers": [bad]})
    assert status == 400
    assert message.startswith("containerConfig.layers[0].gzipDigest: 'sha256:1234' is not a digest")


@pytest.mark.parametrize(
    "attributes", [{"containerFile": "YQ=="}, {"condaFile": "YQ=="}, {"packages": {"type": "CRAN"}}]
)
def test_a_server_without_builds_says_so(api: ApiServer, attributes: dict[str, Any]) -> None:
    assert api.refuse(**attributes) == (501, BUILD)


def test_an_announced_body_over_the_limit_is_refused_unread(api: ApiServer) -> None:
    host, port = api.address.split(":")
    with create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
        connection.sendall(b"POST /v1alpha2/container HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n{")
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body) == {"message": f"The request body is over the limit of {LIMIT} bytes"}


def test_a_chunked_body_over_the_limit_is_refused(api: ApiServer) -> None:
    connection = HTTPConnection(api.address, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/container-token", body=iter([b" " * (LIMIT - 1), b"{}"]), encode_chunked=True)
        answer = connection.getresponse()
        assert answer.status == 413
        assert "over the limit" in json.loads(answer.read())["message"]
    finally:
        connection.close()


def test_a_chunked_body_at_the_limit_is_read(api: ApiServer) -> None:
    connection = HTTPConnection(api.address, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/container-token", body=iter([b" " * (LIMIT - 2), b"{}"]), encode_chunked=True)
        answer = connection.getresponse()
        assert answer.status == 400
        assert json.loads(answer.read())["message"].startswith("Specify either")
    finally:
        connection.close()


# --- upstream --------------------------------------------------------------------------------------------------------


def test_an_image_that_does_not_exist(faulty: tuple[ApiServer, Upstream, str]) -> None:
    api, registry, _ = faulty
    for name in ("library/base:2.0", "library/none:1.0", f"library/base@{BASE.layers[0].digest}"):
        assert api.refuse(containerImage=f"{registry.address}/{name}") == (
            400,
            f"Container image '{registry.address}/{name}' does not exist or access is not authorized",
        )


@pytest.mark.parametrize("status", [401, 403])
def test_an_image_that_is_denied(faulty: tuple[ApiServer, Upstream, str], status: int) -> None:
    api, registry, name = faulty
    registry.faults.status = {"/manifests/": status}
    code, message = api.refuse(containerImage=name)
    assert code == 400
    assert message.startswith(f"Container image '{name}' does not exist or access is not authorized - Cause: ")
    assert f'[registries."{registry.address}"]' in message


def test_an_upstream_that_limits_requests(faulty: tuple[ApiServer, Upstream, str]) -> None:
    api, registry, name = faulty
    registry.faults = Faults(status={"/manifests/": 429}, retry_after="17")
    answer = api.post(containerImage=name)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "17")
    assert registry.address in answer.json()["message"]


@pytest.mark.parametrize("status", [500, 502, 503])
def test_an_upstream_that_fails(faulty: tuple[ApiServer, Upstream, str], status: int) -> None:
    api, registry, name = faulty
    registry.faults.status = {"/manifests/": status}
    answer = api.post(containerImage=name)
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json()["message"].startswith(f"Registry '{registry.address}' is not available")


def test_an_upstream_that_is_gone(faulty: tuple[ApiServer, Upstream, str]) -> None:
    api, registry, name = faulty
    registry.stop()
    status, message = api.refuse(containerImage=name)
    assert status == 503
    assert registry.address in message


def test_a_registry_that_nobody_knows(api: ApiServer) -> None:
    status, message = api.refuse(containerImage="registry.invalid/a/b:c")
    assert status == 400
    assert "this machine can't resolve registry.invalid" in message


def test_a_registry_at_a_private_address(api: ApiServer) -> None:
    status, message = api.refuse(containerImage="127.0.0.1:5999/a/b:c")
    assert status == 400
    assert message.startswith("Container image '127.0.0.1:5999/a/b:c' does not exist or access is not authorized")
    assert "allow_private" in message


# --- state -----------------------------------------------------------------------------------------------------------


def test_no_redis(tmp_path: Path, upstream: Callable[..., Upstream]) -> None:
    registry = upstream()
    registry.add("base", BASE, "1.0")
    with ApiServer(f"redis://127.0.0.1:{free_port()}", upstreams=[registry.address]) as api:
        answer = api.post(containerImage=f"{registry.address}/base:1.0")
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["message"] == "the state store (Redis) does not answer; try again in a moment"
        assert api.request("GET", f"/v1alpha2/container/{'0' * 32}/status").status == 503
        health = api.request("GET", "/health")
        assert (health.status, health.json()["status"]) == (503, "DOWN")
        assert api.request("GET", "/service-info").status == 200


# --- what nobody foresaw ---------------------------------------------------------------------------------------------


async def _fail(_: Request) -> Response:
    raise RuntimeError("hunter2")


async def test_a_bug_is_answered_and_logged_without_secrets() -> None:
    app = Starlette(routes=[Route("/token/{token}", _fail)], middleware=[Middleware(Shield)])
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    path = f"/token/{'a1' * 16}"
    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
    with capture_logs() as logs:
        await app(scope, receive, send)
    start, body = sent
    assert start["status"] == 500
    message = json.loads(body["body"])["message"]
    assert re.fullmatch(r"Unexpected error - Error ID: [0-9a-f]{12}", message)
    assert [(line["event"], line["path"]) for line in logs] == [("request failed", "/token/…")]
    assert message.endswith(logs[0]["error_id"])


# --- paths and headers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1alpha2/container/", "/v1alpha2/container/a/b/c", "/container-token/", "//"]
)
def test_unknown_paths(api: ApiServer, path: str) -> None:
    answer = api.request("GET", path, headers={"Content-Type": "application/json"})
    assert answer.status == 404
    assert answer.json() == {
        "_links": {"self": [{"href": path, "templated": False}]},
        "_embedded": {"errors": [{"message": "Page Not Found"}]},
        "message": "Not Found",
    }


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1alpha2/container", "POST"),
        ("PUT", "/container-token", "POST"),
        ("PUT", "/container-token/abc", "DELETE, GET, HEAD"),
        ("DELETE", "/service-info", "GET, HEAD"),
    ],
)
def test_methods_that_a_path_does_not_have(api: ApiServer, method: str, path: str, allowed: str) -> None:
    answer = api.request(method, path)
    assert (answer.status, answer.headers["Allow"]) == (405, allowed)
    assert answer.json() == {
        "_links": {"self": [{"href": path, "templated": False}]},
        "_embedded": {
            "errors": [{"message": f"Method [{method}] not allowed for URI [{path}]. Allowed methods: [{allowed}]"}]
        },
        "message": "Method Not Allowed",
    }


@pytest.mark.parametrize("path", ["/v1alpha2/container", "/container-token", "/v1alpha1/inspect"])
@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded; charset=x", ""])
def test_what_a_form_of_another_site_sends_is_refused(api: ApiServer, path: str, media_type: str) -> None:
    named = {"Content-Type": media_type} if media_type else {}
    for sent, is_ours in (
        ({}, True),
        ({"Origin": f"http://{api.address}"}, True),
        ({"Origin": "https://wave.test", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "http://evil.test"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "https://wave.test", "Sec-Fetch-Site": "cross-site"}, False),
    ):
        answer = api.request("POST", path, body=b"[]", headers={**named, **sent})
        assert (sent, answer.status) == (sent, 400 if is_ours else 403)
    # Browsers ask before they send this for another site, with a method that no path has.
    answer = api.request(
        "POST", path, body=b"{", headers={"Content-Type": "application/json", "Origin": "http://a.test"}
    )
    assert answer.status == 400


@pytest.mark.parametrize(
    "text",
    [
        'Something from String "malicious<script>": not valid',
        'Cannot deserialize value of type X from String "<script>alert(1)</script>": bad',
        "payload <script>alert(1)</script> end",
        'xss <img onerror="alert(1)" src=x> test &lt;',
    ],
)
@pytest.mark.parametrize("field", ["containerImage", "buildRepository", "nameStrategy", "containerPlatform"])
def test_a_message_has_no_character_that_begins_an_element(api: ApiServer, field: str, text: str) -> None:
    attributes = {"containerImage": "ubuntu", field: text}
    answer = api.post(**attributes)
    assert answer.status == 400
    assert not {b"<", b">", b"&"} & {bytes([byte]) for byte in answer.body}
    assert answer.json()["message"].startswith(f"{field}: ")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/service-info", "/v1alpha2/container", "/view/inspect"])
def test_options_are_no_method(api: ApiServer, path: str) -> None:
    answer = api.request("OPTIONS", path)
    assert answer.status == 405
    assert "OPTIONS" not in answer.headers["Allow"]
    check_framework_error(answer.body)


def test_the_service_about_itself(api: ApiServer) -> None:
    info = api.request("GET", "/service-info", headers={"Content-Type": "application/json"})
    assert info.status == 200
    assert info.json()["serviceInfo"]["version"] == "1.37.0"
    assert info.json()["serviceInfo"]["commitId"]
    assert info.json()["serviceInfo"]["waveProxyVersion"] == "0.1.0"
    assert api.request("HEAD", "/service-info").headers["Content-Length"] == str(len(info.body))
    health = api.request("GET", "/health")
    assert (health.status, health.json()) == (200, {"status": "UP"})
    assert api.request("GET", "/favicon.ico").headers["Content-Type"] == "image/gif"
    landing = api.request("GET", "/")
    assert (landing.status, landing.body, landing.headers["Vary"]) == (400, b"", "Accept")
