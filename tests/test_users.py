"""Users of a site without a Platform, with the whole program: their tokens, quotas, counters and builds."""

import asyncio
import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.identified import issue
from tests.patience import until
from tests.servers import Response, WaveProxy, http_request, split_image
from tests.test_accounts import SLOW
from tests.test_cli import run
from wave_proxy.image.oci import ACCEPT_MANIFESTS
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import connect

CONFIG = f"""
[quota]
pull_anonymous = "1/1h"
pull_identified = "3/1h"
build_anonymous = "1/1h"
build_identified = "2/1h"
wait = "0s"

[accounts]
admin = "{SLOW}"

[build]
engine = "buildkit"                      # which is not there: builds fail, and count
buildkit_address = "tcp://127.0.0.1:1"

[log]
requests = "all"
level = "debug"

[http]
trusted_proxies = ["127.0.0.1"]
"""


@pytest.fixture(scope="module")
def registry() -> Iterator[Upstream]:
    """A registry with one image."""
    with Upstream() as upstream:
        upstream.add("library/tool", image([layer({"bin/tool": "x"})]), "v1")
        yield upstream


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the program."""
    return tmp_path_factory.mktemp("users") / "data"


@pytest.fixture(scope="module")
def wave(data: Path, registry: Upstream) -> Iterator[WaveProxy]:
    """The program with two workers. A client's address is what it says it is."""
    with WaveProxy(data, workers=2, config=CONFIG, upstreams=[registry.address]) as started:
        yield started


def submit(wave: WaveProxy, token: str, address: str = "", *, header: bool = False, **attributes: Any) -> Response:
    headers = {"X-Forwarded-For": address} if address else {}
    if header:
        headers["Authorization"] = f"Bearer {token}"
    body = {"towerAccessToken": None if header else token or None, **attributes}
    return wave.request("POST", "/v1alpha2/container", body=body, headers=headers)


def pull_once(wave: WaveProxy, answer: Response, address: str) -> Response:
    """One pull: of the manifest."""
    assert answer.status == 200, answer.body
    repository, tag = split_image(answer.json()["targetImage"])
    headers = {"Accept": ACCEPT_MANIFESTS, "X-Forwarded-For": address}
    return http_request(wave.address, "GET", f"/v2/{repository}/manifests/{tag}", headers=headers)


def counts(wave: WaveProxy, path: str) -> dict[str, Any]:
    login = b64encode(b"admin:correct horse").decode()
    answer = wave.request("GET", f"/v1alpha2/metrics/{path}", headers={"Authorization": f"Basic {login}"})
    assert answer.status == 200, answer.body
    document: dict[str, Any] = answer.json()
    return document


def container_file(number: int) -> str:
    return b64encode(f"FROM scratch\nLABEL number={number}\n".encode()).decode()


def test_a_user_has_a_quota_of_pulls_whatever_token_and_address(
    wave: WaveProxy, data: Path, registry: Upstream
) -> None:
    name = f"{registry.address}/library/tool:v1"
    first, second, bob = (issue(wave.redis_url, mail) for mail in ("ada@lab.org", "Ada@lab.org", "bob@lab.org"))
    mine = [submit(wave, first, containerImage=name), submit(wave, second, header=True, containerImage=name)]
    pulled = [pull_once(wave, mine[turn % 2], f"198.51.100.{turn}") for turn in range(4)]
    assert [answer.status for answer in pulled] == [200, 200, 200, 429]
    refused = pulled[3]
    (error,) = refused.json()["errors"]
    assert error["code"] == "TOOMANYREQUESTS"
    assert error["message"].startswith("Request exceeded pull rate limit for user ada@lab.org: 3/1h; try again in ")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert (refused.headers["RateLimit-Limit"], refused.headers["RateLimit-Remaining"]) == ("3", "0")
    others = submit(wave, bob, containerImage=name)
    assert [pull_once(wave, others, "198.51.100.1").status for _ in range(3)] == [200] * 3
    nobody = submit(wave, "", containerImage=name)
    assert [pull_once(wave, nobody, "198.51.100.1").status for _ in range(2)] == [200, 429]


def test_a_user_has_a_quota_of_builds_and_submits_say_when_to_come_back(wave: WaveProxy) -> None:
    ada, bob = issue(wave.redis_url, "ada@build.org"), issue(wave.redis_url, "bob@build.org")
    begun = [submit(wave, ada, f"198.51.100.{turn}", containerFile=container_file(turn)) for turn in range(3)]
    assert [answer.status for answer in begun] == [200, 200, 429]
    refused = begun[2]
    said = refused.json()["message"]
    assert said.startswith("Request exceeded build rate limit for user ada@build.org: 2/1h; try again in ")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert (refused.headers["RateLimit-Limit"], refused.headers["RateLimit-Remaining"]) == ("2", "0")
    assert int(refused.headers["RateLimit-Reset"]) > 60
    dry = submit(wave, ada, containerFile=container_file(7), dryRun=True)
    assert dry.status == 200  # nothing is built
    assert submit(wave, bob, "198.51.100.1", containerFile=container_file(3)).status == 200
    nobody = [submit(wave, "", "198.51.100.9", containerFile=container_file(4 + turn)) for turn in range(2)]
    assert [answer.status for answer in nobody] == [200, 429]
    assert "for IP 198.51.100.9: 1/1h" in nobody[1].json()["message"]
    assert "users with an access token have 2/1h" in nobody[1].json()["message"]


def test_status_is_never_limited(wave: WaveProxy) -> None:
    token = issue(wave.redis_url, "poll@build.org")
    answer = submit(wave, token, containerFile=container_file(20))
    request, build = answer.json()["requestId"], answer.json()["buildId"]
    headers = {"Authorization": f"Bearer {token}"}
    for path in (f"/v1alpha2/container/{request}/status", f"/v1alpha1/builds/{build}/status"):
        assert {wave.request("GET", path, headers=headers).status for _ in range(150)} == {200}


def test_a_build_is_its_users(wave: WaveProxy, data: Path) -> None:
    token = issue(wave.redis_url, "owner@build.org")
    build_id = submit(wave, token, containerFile=container_file(30)).json()["buildId"]
    document = wave.request("GET", f"/v1alpha1/builds/{build_id}").json()
    (listed,) = json.loads(run("token", "list", "--json", "--data", data, "--user", "owner@build.org").stdout)
    assert document["userId"] == listed["userId"]
    assert listed["lastUsed"] is not None

    async def owner() -> str:
        redis = connect(wave.redis_url)
        record = await BuildStore(redis, BuildLimits(4)).find(build_id)
        await redis.aclose()
        assert record is not None
        return record.spec.owner

    assert asyncio.run(owner()) == "owner@build.org"


def test_what_users_do_counts_for_their_organisation(wave: WaveProxy, registry: Upstream) -> None:
    token = issue(wave.redis_url, "eve@counted.example")
    answer = submit(wave, token, containerImage=f"{registry.address}/library/tool:v1")
    assert [pull_once(wave, answer, "198.51.100.20").status for _ in range(3)] == [200] * 3
    for number in (40, 41):
        assert submit(wave, token, containerFile=container_file(number)).status == 200

    def found() -> dict[str, int]:
        return {path: counts(wave, f"{path}?org=counted.example")["count"] for path in ("pulls", "builds")}

    until(lambda: found() == {"pulls": 3, "builds": 2}, lambda: str(found()))  # they are written twice a second


def test_a_revoked_token_asks_for_nothing_more_and_containers_stay(
    wave: WaveProxy, data: Path, registry: Upstream
) -> None:
    name = f"{registry.address}/library/tool:v1"
    token = run("token", "create", "--data", data, "--user", "left@lab.org").stdout.strip()
    before = submit(wave, token, containerImage=name)
    assert before.status == 200
    assert run("token", "revoke", "--user", "left@lab.org", "--data", data).returncode == 0
    for header in (False, True):
        after = submit(wave, token, header=header, containerImage=name)
        assert (after.status, after.body) == (401, b"")
        assert "is revoked since" in after.headers["WWW-Authenticate"]
    assert pull_once(wave, before, "198.51.100.30").status == 200


def test_guesses_at_accounts_are_limited_on_the_api_as_for_pushes(wave: WaveProxy) -> None:
    def attempt(path: str, address: str, password: str) -> Response:
        login = b64encode(f"admin:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "X-Forwarded-For": address}
        return wave.request("GET", path, headers=headers)

    path = "/v1alpha2/metrics/pulls"
    answers = [attempt(path, "198.51.100.40", f"guess {number}") for number in range(22)]
    assert [answer.status for answer in answers] == [401] * 20 + [429] * 2
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
    assert answers[0].headers["WWW-Authenticate"] == "Basic realm=Wave Authentication"
    assert attempt(path, "198.51.100.40", "correct horse").status == 429
    assert attempt(path, "198.51.100.41", "correct horse").status == 200
    assert attempt("/v2/", "198.51.100.41", "wrong").status == 401


def test_no_token_is_written_down(wave: WaveProxy, data: Path, registry: Upstream) -> None:
    token = issue(wave.redis_url, "quiet@lab.org")
    answer = submit(wave, token, header=True, containerImage=f"{registry.address}/library/tool:v1")
    submit(wave, token, containerImage=f"{registry.address}/library/tool:v1")
    wave.request(
        "GET", f"/v1alpha2/container/{answer.json()['requestId']}", headers={"Authorization": f"Bearer {token}"}
    )
    secret = token.rpartition("-")[2]
    assert '"request"' in wave.stderr
    assert secret not in wave.stderr
    kept = b"".join(file.read_bytes() for file in data.rglob("*") if file.is_file())
    assert b"quiet@lab.org" in kept
    assert secret.encode() not in kept


def test_only_known_users(tmp_path: Path, registry: Upstream) -> None:
    name = f"{registry.address}/library/tool:v1"
    with WaveProxy(tmp_path / "data", config="[access]\nanonymous = false\n", upstreams=[registry.address]) as wave:
        for path in ("/v1alpha2/container", "/container-token", "/v1alpha1/inspect"):
            answer = wave.request("POST", path, body={"containerImage": name, "towerAccessToken": None})
            assert answer.status == 400
            assert answer.json()["message"].startswith("Missing user access token - ")
        token = issue(wave.redis_url, "ada@lab.org")
        headers = {"Authorization": f"Bearer {token}"}
        inspected = wave.request("POST", "/v1alpha1/inspect", body={"containerImage": name}, headers=headers)
        assert inspected.status == 200
        wave.pull(wave.submit(containerImage=name, towerAccessToken=token)["targetImage"])
        direct = wave.request("GET", f"/v2/{registry.address}/library/tool/manifests/v1")
        assert direct.status in (403, 404)
