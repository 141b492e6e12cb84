"""The endpoints that try credentials of registries."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.upstream import Upstream
from tests.api_server import ApiServer
from tests.servers import Response, redis_server

NEWER, OLDER = "/v1alpha2/validate-creds", "/validate-creds"


@pytest.fixture(scope="module")
def registry() -> Iterator[Upstream]:
    """A registry that wants a login."""
    with Upstream(auth="bearer") as upstream:
        yield upstream


@pytest.fixture
def api(tmp_path: Path, registry: Upstream) -> Iterator[ApiServer]:
    """A server that may reach it."""
    with redis_server(tmp_path) as redis, ApiServer(redis, upstreams=[registry.address]) as server:
        yield server


def ask(api: ApiServer, path: str, body: object, address: str = "192.0.2.1") -> Response:
    document = {"request": body} if path == OLDER else body
    return api.request("POST", path, body=document, headers={"X-Wave-Client": address})


@pytest.mark.parametrize("path", [NEWER, OLDER])
@pytest.mark.parametrize(("password", "expected"), [("secret", b"true"), ("wrong", b"false")])
def test_the_answer_is_a_bare_boolean(
    api: ApiServer, registry: Upstream, path: str, password: str, expected: bytes
) -> None:
    answer = ask(api, path, {"userName": "user", "password": password, "registry": registry.address})
    assert (answer.status, answer.body) == (200, expected)
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("path", [NEWER, OLDER])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"userName": None}, "userName: required"),
        ({"password": ""}, "password: required"),
        ({"registry": "  "}, "registry: required"),
        ({"password": 4711}, "password: expected a string, got a number"),
        ({"password": "x" * 5000}, "password: has 5000 bytes"),
        ({"registry": "localhost:5000"}, "Access to localhost is not allowed: localhost"),
        ({"registry": "nosuch.invalid"}, "Unable to resolve host: nosuch.invalid"),
        ({"registry": "169.254.169.254"}, "Invalid registry hostname"),
    ],
)
def test_what_is_wrong_is_named(api: ApiServer, path: str, wrong: dict[str, object], words: str) -> None:
    answer = ask(api, path, {"userName": "user", "password": "hunter2", "registry": "quay.io", **wrong})
    assert answer.status == 400
    prefix = "request." if path == OLDER and ":" in words and words[0].islower() else ""
    assert answer.json()["message"].startswith(f"{prefix}{words}")
    assert "4711" not in answer.json()["message"]


@pytest.mark.parametrize(
    ("path", "body"), [(NEWER, {}), (OLDER, {}), (OLDER, {"request": None}), (OLDER, {"request": "x"})]
)
def test_an_empty_body(api: ApiServer, path: str, body: dict[str, object]) -> None:
    answer = api.request("POST", path, body=body)
    assert answer.status == 400
    assert ("userName: required" if path == NEWER else "request: ") in answer.json()["message"]


def test_nobody_guesses_at_speed(api: ApiServer, registry: Upstream) -> None:
    def guess(number: int, address: str) -> Response:
        path = (NEWER, OLDER)[number % 2]
        body = {"userName": "user", "password": f"guess {number}", "registry": registry.address}
        return ask(api, path, body, address)

    answers = [guess(number, "192.0.2.7") for number in range(35)]
    assert [answer.status for answer in answers] == [200] * 30 + [429] * 5
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
    assert "too many checks of credentials from this address" in answers[-1].json()["message"]
    right = ask(api, NEWER, {"userName": "user", "password": "secret", "registry": registry.address}, "192.0.2.7")
    assert right.status == 429
    assert guess(1, "192.0.2.8").status == 200
