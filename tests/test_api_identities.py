"""Who asks: access tokens in the body and in the header, on every endpoint that takes them."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep, time
from typing import Any

import pytest

from api.identities import Claims, Identities
from bench.images import image, layer
from bench.upstream import Upstream
from tests.api_server import AUTHORITY, ApiServer
from tests.identified import issue
from tests.servers import Response, redis_server
from wave_proxy.errors import AccessTokenRefused
from wave_proxy.image.request import Identity
from wave_proxy.state.identities import AccessTokens
from wave_proxy.state.redis import connect
from wave_proxy.state.tokens import TokenStore

SUBMIT, LEGACY, INSPECT = "/v1alpha2/container", "/container-token", "/v1alpha1/inspect"
ENDPOINTS = [SUBMIT, LEGACY, INSPECT]
NEVER_ISSUED = f"wpt-{'a' * 8}-{'b' * 32}"
OF_A_PLATFORM = "eyJ0aWQiOiAxfS5mb28="
NO_PLATFORM = "the access token is none of this server's, which begin with wpt-, and no Platform is set up here"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the module."""
    with redis_server(tmp_path_factory.mktemp("identities")) as url:
        yield url


@pytest.fixture(scope="module")
def registry() -> Iterator[Upstream]:
    """A registry with one image."""
    with Upstream() as upstream:
        upstream.add("library/base", image([layer({"base": "1"})]), "v1")
        yield upstream


@pytest.fixture(scope="module")
def api(redis: str, registry: Upstream) -> Iterator[ApiServer]:
    """A server that lets everybody in."""
    with ApiServer(redis, upstreams=[registry.address]) as server:
        yield server


@pytest.fixture(scope="module")
def closed(redis: str, registry: Upstream) -> Iterator[ApiServer]:
    """One that wants to know who asks."""
    with ApiServer(redis, upstreams=[registry.address], anonymous=False) as server:
        yield server


@pytest.fixture(scope="module")
def ada(redis: str) -> str:
    """An access token of ada@example.org."""
    return issue(redis, "ada@example.org")


Ask = Callable[..., Response]


@pytest.fixture
def ask(api: ApiServer, registry: Upstream) -> Ask:
    """``ask(path, body's token, header)``, for the registry's image; with ``of`` another server."""

    def send(path: str, token: str | None = None, header: str = "", *, of: ApiServer = api, **more: Any) -> Response:
        body = {"containerImage": f"{registry.address}/library/base:v1", "towerAccessToken": token, **more}
        return of.request("POST", path, body=body, headers={"Authorization": header} if header else {})

    return send


def email_of(redis_url: str, answer: Response) -> str:
    """Whom the request was recorded for."""

    async def find() -> str:
        redis = connect(redis_url)
        try:
            record = await TokenStore(redis).find_record(answer.json()["requestId"])
        finally:
            await redis.aclose()
        assert record is not None
        assert not record.request.identity.access_token
        return record.request.identity.email

    assert answer.status == 200, answer.body
    return asyncio.run(find())


@pytest.mark.parametrize("path", [SUBMIT, LEGACY])
@pytest.mark.parametrize(
    ("body", "header", "email"),
    [
        pytest.param("ADA", "", "ada@example.org", id="in the body"),
        pytest.param("", "Bearer ADA", "ada@example.org", id="in the header"),
        pytest.param(None, "bearer ADA", "ada@example.org", id="in a header in lower case"),
        pytest.param("ADA", "Bearer ADA", "ada@example.org", id="in both"),
        pytest.param("ADA", f"Bearer {OF_A_PLATFORM}", "ada@example.org", id="another in the header"),
        pytest.param("ADA", f"Bearer {NEVER_ISSUED}", "ada@example.org", id="a wrong one in the header"),
        pytest.param(None, f"Bearer {OF_A_PLATFORM}", "", id="a Platform's in the header"),
        pytest.param(None, "Basic YTpi", "", id="another scheme"),
        pytest.param(None, "ADA", "", id="no scheme"),
        pytest.param(None, "", "", id="nobody"),
    ],
)
def test_who_it_is(ask: Ask, redis: str, ada: str, path: str, body: str | None, header: str, email: str) -> None:
    answer = ask(path, ada if body == "ADA" else body, header.replace("ADA", ada))
    assert email_of(redis, answer) == email


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("place", ["body", "header"])
@pytest.mark.parametrize("state", ["unknown", "malformed", "expired", "revoked"])
def test_a_token_of_ours_that_is_not_valid(ask: Ask, redis: str, path: str, place: str, state: str) -> None:
    token = {"unknown": NEVER_ISSUED, "malformed": "wpt-x"}.get(state) or ended(redis, state)
    answer = ask(path, token) if place == "body" else ask(path, None, f"Bearer {token}")
    assert (answer.status, answer.body) == (401, b"")
    why = {"unknown": "does not exist", "malformed": "does not exist"}.get(state, f"is {state} since 20")
    challenge = answer.headers["WWW-Authenticate"]
    assert challenge.startswith(
        'Bearer realm="Wave Authentication", error="invalid_token", error_description="this acc'
    )
    assert why in challenge


def ended(redis_url: str, state: str) -> str:
    """An access token that has ended."""
    token = issue(redis_url, "eve@example.org", expires=time() + 0.5 if state == "expired" else 0.0)

    async def revoke() -> None:
        redis = connect(redis_url)
        tokens = AccessTokens(redis)
        await tokens.revoke([one for one in await tokens.read_all() if one.id == token[4:12]])
        await redis.aclose()

    if state == "revoked":
        asyncio.run(revoke())
    else:
        sleep(0.51)
    return token


@pytest.mark.parametrize(
    ("path", "image", "words"),
    [
        (SUBMIT, "http://quay.io/foo:latest", b"Invalid container repository name"),
        (LEGACY, "http://quay.io/foo:latest", b"Invalid container repository name"),
        (INSPECT, None, b"Missing 'containerImage' attribute"),
    ],
)
def test_an_invalid_request_is_that_before_its_token_is(ask: Ask, path: str, image: str | None, words: bytes) -> None:
    answer = ask(path, NEVER_ISSUED, containerImage=image)
    assert answer.status == 400
    assert words in answer.body


@pytest.mark.parametrize(
    ("path", "endpoint", "message"),
    [
        (SUBMIT, None, f"Missing pairing record for Tower endpoint 'https://api.cloud.seqera.io' - {NO_PLATFORM}"),
        (
            LEGACY,
            "https://api.tower.nf",
            f"Missing pairing record for Tower endpoint 'https://api.cloud.seqera.io' - {NO_PLATFORM}",
        ),
        (
            SUBMIT,
            "https://tower.site/api",
            f"Missing pairing record for Tower endpoint 'https://tower.site/api' - {NO_PLATFORM}",
        ),
        (
            INSPECT,
            "https://tower.site/api",
            f"Tower instance 'https://tower.site/api' has not enabled to connect Wave service 'http://{AUTHORITY}'",
        ),
    ],
)
def test_a_token_of_a_platform_that_is_not_here(ask: Ask, path: str, endpoint: str | None, message: str) -> None:
    answer = ask(path, OF_A_PLATFORM, towerEndpoint=endpoint)
    assert (answer.status, answer.json()) == (400, {"message": message})


@pytest.mark.parametrize("path", ENDPOINTS)
def test_who_is_nobody_may_be_turned_away(ask: Ask, closed: ApiServer, ada: str, path: str) -> None:
    for header in ("", f"Bearer {OF_A_PLATFORM}", "Basic YTpi"):
        answer = ask(path, None, header, of=closed)
        assert answer.status == 400
        assert answer.json()["message"].startswith("Missing user access token - give one as towerAccessToken")
    for token, header in ((ada, ""), (None, f"Bearer {ada}")):
        assert ask(path, token, header, of=closed).status == 200


def test_endpoints_that_need_nobody_ignore_the_header(api: ApiServer, closed: ApiServer, ask: Ask, ada: str) -> None:
    token = ask(SUBMIT, ada).json()["requestId"]
    for server in (api, closed):
        for bearer in (ada, NEVER_ISSUED, OF_A_PLATFORM):
            headers = {"Authorization": f"Bearer {bearer}"}
            assert server.request("GET", f"{SUBMIT}/{token}/status", headers=headers).status == 200
            assert server.request("GET", f"{SUBMIT}/{token}", headers=headers).status == 200
            assert server.request("GET", "/service-info", headers=headers).status == 200


def test_the_record_shows_the_number_of_the_user_and_no_more(api: ApiServer, ask: Ask, ada: str) -> None:
    token = ask(SUBMIT, ada).json()["requestId"]
    described, legacy = api.request("GET", f"{SUBMIT}/{token}"), api.request("GET", f"{LEGACY}/{token}")
    assert described.json()["user"] == legacy.json()["request"]["user"] == {"id": 105243131043720}
    for answer in (described, legacy):
        assert b"example.org" not in answer.body
        assert ada.encode() not in answer.body


def test_a_header_is_enough_for_what_needs_a_user(ask: Ask, ada: str) -> None:
    mirror = {"mirror": True, "buildRepository": "quay.io/x/y"}
    assert (
        b"requires an authenticated request - specify the tower token attribute - give "
        in ask(SUBMIT, None, **mirror).body
    )
    assert b"requires an authenticated request" not in ask(SUBMIT, None, f"Bearer {ada}", **mirror).body


class Listener:
    """In a Platform's place: writes down which tokens it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def identify(self, claims: Claims, bearer: str) -> Identity:
        self.told += [token for token in (claims.access_token, bearer) if token]
        return Identity(7, "pat@platform.org", access_token=claims.access_token)


async def test_a_platform_is_told_no_token_of_ours(redis: str, ada: str) -> None:
    client, platform = connect(redis), Listener()
    identities = Identities(AccessTokens(client), platform)
    for token, bearer in ((OF_A_PLATFORM, ada), (OF_A_PLATFORM, "new"), (ada, OF_A_PLATFORM), ("", OF_A_PLATFORM)):
        await identities.identify(Claims(token), f"Bearer {bearer}")
    with pytest.raises(AccessTokenRefused):
        await identities.identify(Claims(NEVER_ISSUED), f"Bearer {OF_A_PLATFORM}")
    await client.aclose()
    assert platform.told == [OF_A_PLATFORM, OF_A_PLATFORM, "new"]


def test_without_redis_nobody_is_taken_for_anonymous(tmp_path: Path, registry: Upstream) -> None:
    with redis_server(tmp_path) as url:
        token = issue(url, "ada@example.org")
        server = ApiServer(url, upstreams=[registry.address])
        server.__enter__()
    try:
        answer = server.post(containerImage=f"{registry.address}/library/base:v1", towerAccessToken=token)
        assert answer.status == 503
        assert answer.headers["Retry-After"]
    finally:
        server.__exit__(None, None, None)
