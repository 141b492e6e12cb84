"""Counters of the whole program: what users of several organisations did over four workers, to the last one."""

import asyncio
import os
import signal
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from bench.images import digest_of, image, index, layer
from bench.upstream import Upstream
from tests.patience import PATIENCE_S, until
from tests.servers import WaveProxy, split_image
from wave_proxy.image.oci import ACCEPT_MANIFESTS
from wave_proxy.state.identities import AccessTokens
from wave_proxy.state.redis import connect

Start = Callable[..., WaveProxy]

WORKERS = 4
CONFIG = f"""
[accounts]
admin = "sha256:{sha256(b"secret").hexdigest()}"
[quota]
pull_anonymous = "off"
pull_identified = "off"
build_identified = "off"
[build]
engine = "buildkit"  # which nobody runs here: builds are begun, and counted, and fail
buildkit_address = "tcp://127.0.0.1:1"
"""
ADMIN = {"Authorization": f"Basic {b64encode(b'admin:secret').decode()}"}
ADA, BOB = "ada@org1.example", "bob@Org2.example"
USERS = {ADA: "org1.example", BOB: "org2.example"}
FUSION = {
    "location": "https://fusionfs.seqera.io/releases/pkg/2/4/1/fusion-amd64.tar.gz",
    "gzipDigest": digest_of(b"gzip"),
    "gzipSize": 4,
    "tarDigest": digest_of(b"tar"),
}
IMAGE = image([layer({"tool": "1"})])
MULTI = index([IMAGE, image([layer({"tool": "arm"})], platform="linux/arm64")])
# Rounds of 100 pulls: user, what is pulled, how often.
ROUND = ((ADA, "amd64", 40), (BOB, "arm64", 30), (ADA, "fusion", 20), (BOB, "unknown", 10))
ROUNDS = 10


@pytest.fixture
def source(upstream: Callable[..., Upstream]) -> Upstream:
    """A registry with an image, and one for two platforms."""
    started = upstream()
    started.add("library/tool", IMAGE, "1")
    started.add("library/tool", MULTI, "all")
    return started


def issued(proxy: WaveProxy) -> dict[str, str]:
    """An access token for each user."""

    async def issue() -> dict[str, str]:
        async with connect(proxy.redis_url) as redis:
            tokens = AccessTokens(redis)
            return {user: (await tokens.create(user))[0] for user in USERS}

    return asyncio.run(issue())


def manifest_path(answer: Mapping[str, Any], digest: str = "") -> str:
    """Where the image of a container request is pulled."""
    repository, reference = split_image(answer["targetImage"])
    return f"/v2/{repository}/manifests/{digest or reference}"


def paths_of(proxy: WaveProxy, source: Upstream, tokens: Mapping[str, str]) -> dict[str, str]:
    """Where each thing that ROUND names is pulled."""
    one, both = f"{source.address}/library/tool:1", f"{source.address}/library/tool:all"

    def ask(user: str, name: str, **more: Any) -> dict[str, Any]:
        return proxy.submit(containerImage=name, towerAccessToken=tokens[user], **more)

    return {
        "amd64": manifest_path(ask(ADA, one, containerPlatform="amd64")),
        "arm64": manifest_path(ask(BOB, both, containerPlatform="arm64"), MULTI.children[1].digest),
        "fusion": manifest_path(ask(ADA, one, containerPlatform="amd64", containerConfig={"layers": [FUSION]})),
        "unknown": manifest_path(ask(BOB, one)),
    }


def pull_all(proxy: WaveProxy, paths: Iterable[str]) -> int:
    """GET each of these manifests on a connection of the round's own; returns how many there were."""
    connection, number = HTTPConnection(proxy.address, timeout=PATIENCE_S), 0
    try:
        for path in paths:
            connection.request("GET", path, headers={"Accept": ACCEPT_MANIFESTS})
            answer = connection.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True), path
            number += 1
    finally:
        connection.close()
    return number


def pull_rounds(proxy: WaveProxy, paths: Mapping[str, str], rounds: int) -> None:
    """Rounds of 100 pulls by known users and one of nobody's, each split over four connections."""
    anonymous = paths["anonymous"]
    wanted = [paths[what] for _ in range(rounds) for _, what, number in ROUND for _ in range(number)]
    parts = [[*wanted[start :: 4 * rounds], *([anonymous] if start < rounds else [])] for start in range(4 * rounds)]
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda part: pull_all(proxy, part), parts)) == 101 * rounds


def begin_builds(proxy: WaveProxy, tokens: Mapping[str, str], numbers: Iterable[int]) -> None:
    """Ask for builds, no two of them the same: of each ten, seven are Ada's."""

    def ask(number: int) -> None:
        answer = proxy.submit(
            towerAccessToken=tokens[ADA if number % 10 < 7 else BOB],
            containerFile=b64encode(f"FROM scratch\nLABEL number={number}\n".encode()).decode(),
            containerPlatform="arm64" if number % 10 == 9 else "amd64",
        )
        assert answer["cached"] is False

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, numbers))


def read(proxy: WaveProxy, question: str) -> dict[str, Any]:
    """An answer of the metrics endpoints."""
    answer = proxy.request("GET", f"/v1alpha3/metrics/{question}", headers=ADMIN)
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


def wait_for(proxy: WaveProxy, question: str, count: int) -> None:
    """Return when that many are told, or more. Raises AssertionError."""
    until(lambda: read(proxy, question)["count"] >= count, lambda: str(read(proxy, question)))


def by_day(proxy: WaveProxy, series: str, days: Iterable[str]) -> tuple[int, Counter[str]]:
    """The counts of the days on which a test ran: it may begin before midnight."""
    answers = [read(proxy, f"{series}?date={day}") for day in days]
    orgs = sum((Counter(answer.get("orgs", {})) for answer in answers), Counter[str]())
    return sum(answer["count"] for answer in answers), orgs


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def test_a_thousand_pulls_and_a_hundred_builds_over_a_restart(source: Upstream, wave: Start) -> None:
    days = {today()}
    proxy = wave(workers=WORKERS, upstreams=[source.address], config=CONFIG)
    tokens = issued(proxy)
    paths = paths_of(proxy, source, tokens) | {"anonymous": f"/v2/{source.address}/library/tool/manifests/1"}
    pull_rounds(proxy, paths, ROUNDS // 2)
    begin_builds(proxy, tokens, range(50))
    assert proxy.stop() == 0
    proxy.start()
    pull_rounds(proxy, paths, ROUNDS // 2)
    begin_builds(proxy, tokens, range(40, 100))  # the first ten were begun before
    days.add(today())

    wait_for(proxy, "pulls", 1000)
    wait_for(proxy, "builds", 100)
    until(lambda: by_day(proxy, "pulls", days)[0] >= 1000 + ROUNDS, lambda: str(by_day(proxy, "pulls", days)))
    pulls, builds = {"org1.example": 600, "org2.example": 400}, {"org1.example": 70, "org2.example": 30}
    fusion = {"org1.example": 200}
    assert read(proxy, "pulls") == {"metric": "pulls", "count": 1000, "orgs": pulls}
    assert read(proxy, "fusion/pulls") == {"metric": "fusion", "count": 200, "orgs": fusion}
    assert read(proxy, "builds") == {"metric": "builds", "count": 100, "orgs": builds}
    assert by_day(proxy, "pulls", days) == (1000 + ROUNDS, Counter(pulls))
    assert by_day(proxy, "builds", days) == (100, Counter(builds))
    assert by_day(proxy, "fusion/pulls", days) == (200, Counter(fusion))
    for question, count in {
        "pulls?arch=amd64": 600,
        "pulls?arch=arm64": 300,
        "pulls?arch=amd64&org=org1.example": 600,
        "pulls?arch=arm64&org=org1.example": 0,
        "pulls?org=ORG2.example": 400,
        "builds?arch=amd64": 90,
        "builds?arch=arm64": 10,
        "builds?arch=arm64&org=org2.example": 10,
        "mirrors": 0,
        "scans": 0,
    }.items():
        assert read(proxy, question)["count"] == count, question


def test_a_worker_that_is_killed_loses_nothing_that_is_half_a_second_old(source: Upstream, wave: Start) -> None:
    proxy = wave(workers=2, upstreams=[source.address], config=CONFIG)
    path = paths_of(proxy, source, issued(proxy))["amd64"]
    for _ in range(20):
        pull_all(proxy, [path] * 10)
    wait_for(proxy, "pulls", 200)
    for number, pid in enumerate(proxy.workers(), 1):
        os.kill(pid, signal.SIGKILL)
        wait_until_gone(pid)
        pull_when_possible(proxy, path)
        wait_for(proxy, "pulls", 200 + number)  # what is not flushed yet ends with a process
    for _ in range(20):
        pull_all(proxy, [path] * 10)
    wait_for(proxy, "pulls", 402)
    assert read(proxy, "pulls") == {"metric": "pulls", "count": 402, "orgs": {"org1.example": 402}}


def wait_until_gone(pid: int) -> None:
    """Return when a process has no socket any more that would take connections."""
    until(lambda: not Path(f"/proc/{pid}").exists(), "it does not end")


def pull_when_possible(proxy: WaveProxy, path: str) -> None:
    """One pull, as soon as a worker listens."""

    def is_pulled() -> bool:
        try:
            return pull_all(proxy, [path]) == 1
        except ConnectionRefusedError:
            return False

    until(is_pulled, "nobody listens any more")
