"""Usage metrics over the wire: the examples of the API page, every question, and who may ask."""

import asyncio
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest

from tests.api_server import ApiServer
from tests.servers import redis_server
from wave_proxy.state.redis import connect
from wave_proxy.state.usage import Usage

Count = Callable[[Usage], None]

ADMIN = {"Authorization": f"Basic {b64encode(b'foo:bar').decode()}"}
TODAY = "2026-03-01"
ARCHITECTURES = "arch should be one of [amd64, x86_64, x86-64, arm64, aarch64, arm]"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the module."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def api(redis: str) -> Iterator[ApiServer]:
    """One server for the module."""
    with ApiServer(redis, accounts={"foo": f"sha256:{sha256(b'bar').hexdigest()}"}) as server:
        yield server


def counted(redis: str, days: Mapping[str, Count]) -> None:
    """Have nothing in the counters but what processes counted that ended on these days, a second before midnight."""

    async def work() -> None:
        async with connect(redis) as client:
            await client.flushdb()
            for day, count in days.items():
                end = datetime.fromisoformat(f"{day}T23:59:59+00:00").astimezone(UTC).timestamp()
                usage = Usage(client, lambda end=end: end)  # type: ignore[misc]
                count(usage)
                await usage.close()

    asyncio.run(work())


def ask(api: ApiServer, path: str) -> Any:
    """The answer. Raises AssertionError when its status is not 200."""
    answer = api.request("GET", path, headers=ADMIN)
    assert answer.status == 200, f"{answer.status} {answer.body!r}"
    assert answer.headers["Content-Type"] == "application/json"
    return answer.json()


# --- the API page ----------------------------------------------------------------------------------------------------


def builds(**organisations: int) -> Count:
    """So many builds of ``seqera`` and of ``gmail``."""

    def count(usage: Usage) -> None:
        for user in _users(organisations):
            usage.count_job("builds", user, "linux/amd64")

    return count


def pulls(*, fusion: bool = False, **organisations: int) -> Count:
    """So many pulls, with Fusion or without."""

    def count(usage: Usage) -> None:
        for user in _users(organisations):
            usage.count(user, fusion=fusion)

    return count


def _users(organisations: Mapping[str, int]) -> list[str]:
    users = {"seqera": "ada@seqera.io", "gmail": "bob@gmail.com"}
    return [users[name] for name, number in organisations.items() for _ in range(number)]


DAY, EARLIER = "2024-04-08", "2024-04-07"
BUILDS = {DAY: builds(gmail=4, seqera=4), EARLIER: builds(seqera=9, gmail=1)}
# The page's own numbers for one day and for one organisation on that day do not fit together.
PULLS = {DAY: pulls(seqera=1, gmail=3), EARLIER: pulls(seqera=6, gmail=1)}
FUSION = {DAY: pulls(fusion=True, gmail=1), EARLIER: pulls(fusion=True, seqera=1)}


@pytest.mark.parametrize(
    ("query", "days", "answer"),
    [
        ("builds", BUILDS, {"metric": "builds", "count": 18, "orgs": {"seqera.io": 13, "gmail.com": 5}}),
        ("builds?date=2024-04-08&org=seqera.io", BUILDS, {"count": 4}),
        ("builds?date=2024-04-08", BUILDS, {"metric": "builds", "count": 8, "orgs": {"gmail.com": 4, "seqera.io": 4}}),
        ("builds?org=seqera.io", BUILDS, {"metric": "builds", "count": 13, "orgs": {"seqera.io": 13}}),
        ("pulls", PULLS, {"metric": "pulls", "count": 11, "orgs": {"seqera.io": 7, "gmail.com": 4}}),
        ("pulls?date=2024-04-08&org=seqera.io", {DAY: pulls(seqera=5)}, {"count": 5}),
        ("pulls?date=2024-04-08", PULLS, {"metric": "pulls", "count": 4, "orgs": {"seqera.io": 1, "gmail.com": 3}}),
        ("pulls?org=seqera.io", PULLS, {"metric": "pulls", "count": 7, "orgs": {"seqera.io": 7}}),
        ("fusion/pulls", FUSION, {"metric": "fusion", "count": 2, "orgs": {"seqera.io": 1, "gmail.com": 1}}),
        ("fusion/pulls?date=2024-04-08&org=seqera.io", {DAY: pulls(fusion=True, seqera=2)}, {"count": 2}),
        ("fusion/pulls?date=2024-04-08", FUSION, {"metric": "fusion", "count": 1, "orgs": {"gmail.com": 1}}),
        ("fusion/pulls?org=seqera.io", FUSION, {"metric": "fusion", "count": 1, "orgs": {"seqera.io": 1}}),
    ],
)
def test_the_api_pages_examples(
    api: ApiServer, redis: str, query: str, days: dict[str, Count], answer: dict[str, Any]
) -> None:
    counted(redis, days)
    assert ask(api, f"/v1alpha2/metrics/{query}") == answer


# --- vectors V28 -----------------------------------------------------------------------------------------------------

EVENTS = (
    ("a@org1.com", "linux/amd64"),
    ("b@org1.com", "linux/arm64"),
    ("c@org2.com", "linux/arm64"),
    (None, ""),
    (None, "linux/aarch64"),
    ("d@org2.com", ""),
)
SERIES = {"builds": "builds", "pulls": "pulls", "fusion/pulls": "fusion", "mirrors": "mirrors", "scans": "scans"}
BOTH: dict[str, Any] = {"orgs": {"org1.com": 2, "org2.com": 2}}
QUESTIONS: dict[str, dict[str, Any]] = {
    "?date=today": {"count": 6, **BOTH},
    "?date=2026-02-28": {"count": 0},
    "?date=2024-13-45": {"count": 0},
    "?date=today&org=org1.com": {"count": 2, "orgs": {"org1.com": 2}},
    "?org=org1.com": {"count": 2, "orgs": {"org1.com": 2}},
    "?org=ORG1.com": {"count": 2, "orgs": {"ORG1.com": 2}},
    "?org=*": {"count": 0, "orgs": {"*": 0}},
    "": {"count": 4, **BOTH},
    "?date=&org=&arch=": {"count": 4, **BOTH},
    "?date=today&arch=arm64": {"arch": "arm64", "count": 3, "orgs": {"org1.com": 1, "org2.com": 1}},
    "?arch=arm64": {"arch": "arm64", "count": 3, "orgs": {"org1.com": 1, "org2.com": 1}},
    "?arch=aarch64": {"arch": "arm64", "count": 3, "orgs": {"org1.com": 1, "org2.com": 1}},
    "?org=org1.com&arch=amd64": {"arch": "amd64", "count": 1, "orgs": {"org1.com": 1}},
    "?date=today&org=org1.com&arch=x86_64": {"arch": "amd64", "count": 1, "orgs": {"org1.com": 1}},
    "?org=org2.com&arch=amd64": {"arch": "amd64", "count": 0, "orgs": {"org2.com": 0}},
    "?date=today&arch=amd64": {"arch": "amd64", "count": 1, "orgs": {"org1.com": 1}},
    "?date=2026-02-28&arch=amd64": {"arch": "amd64", "count": 0},
    "?arch=arm": {"arch": "arm", "count": 0},
}


def everything(usage: Usage) -> None:
    """The vectors' events, as each thing that is counted."""
    for email, platform in EVENTS:
        usage.count(email, fusion=True, architecture=platform.removeprefix("linux/"))
        usage.count_job("builds", email, platform)
        usage.count_job("mirrors", email, platform)
        usage.count_job("scans", email, platform)


def test_every_question_about_everything_that_is_counted(api: ApiServer, redis: str) -> None:
    counted(redis, {TODAY: everything})
    for path, metric in SERIES.items():
        for question, answer in QUESTIONS.items():
            got = ask(api, f"/v1alpha3/metrics/{path}{question.replace('today', TODAY)}")
            assert got == {"metric": metric, **answer}, f"{path} {question}"


def test_the_older_version_knows_no_architectures(api: ApiServer, redis: str) -> None:
    counted(redis, {TODAY: everything})
    for path, metric in SERIES.items():
        where = f"/v1alpha2/metrics/{path}"
        assert ask(api, f"{where}?arch=arm64") == {"metric": metric, "count": 4, **BOTH}
        assert ask(api, f"{where}?date={TODAY}&arch=amd64") == {"metric": metric, "count": 6, **BOTH}
        assert ask(api, f"{where}?date={TODAY}&org=nobody.com") == {"count": 0}
        assert ask(api, f"{where}?org=nobody.com") == {"metric": metric, "count": 0, "orgs": {"nobody.com": 0}}


def test_nothing_is_counted_yet(api: ApiServer, redis: str) -> None:
    counted(redis, {})
    for version in ("v1alpha2", "v1alpha3"):
        for path, metric in SERIES.items():
            assert ask(api, f"/{version}/metrics/{path}") == {"metric": metric, "count": 0}


# --- who asks, and how -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("date=2024-03-2", "date format should be yyyy-MM-dd"),
        ("date=2024-03-25T00:00", "date format should be yyyy-MM-dd"),
        ("date=25.03.2024&arch=sparc", "date format should be yyyy-MM-dd"),
        ("date=%D9%A2%D9%A0%D9%A2%D9%A4-03-25", "date format should be yyyy-MM-dd"),
        ("arch=sparc", ARCHITECTURES),
        ("arch=AMD64", ARCHITECTURES),
        ("date=2024-03-25&arch=linux/amd64", ARCHITECTURES),
    ],
)
def test_wrong_questions(api: ApiServer, query: str, message: str) -> None:
    for version in ("v1alpha2", "v1alpha3"):
        answer = api.request("GET", f"/{version}/metrics/builds?{query}", headers=ADMIN)
        assert (answer.status, answer.json()) == (400, {"message": message})


@pytest.mark.parametrize(
    "authorization",
    ["", "Basic", "Basic Zm9v", f"Basic {b64encode(b'foo:baz').decode()}", f"Bearer {b64encode(b'foo:bar').decode()}"],
)
@pytest.mark.parametrize("path", ["/v1alpha2/metrics/builds", "/v1alpha3/metrics/fusion/pulls?date=wrong"])
def test_only_those_with_an_account_are_told(api: ApiServer, path: str, authorization: str) -> None:
    answer = api.request("GET", path, headers={"Authorization": authorization} if authorization else {})
    assert (answer.status, answer.body) == (401, b"")
    assert answer.headers["WWW-Authenticate"] == "Basic realm=Wave Authentication"


def test_other_series_and_methods_are_none(api: ApiServer) -> None:
    assert api.request("GET", "/v1alpha2/metrics/secrets", headers=ADMIN).status == 404
    assert api.request("POST", "/v1alpha2/metrics/builds", headers=ADMIN, body=b"").status == 405
