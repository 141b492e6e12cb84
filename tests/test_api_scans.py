"""Scans over the wire: which requests begin one, how it is named and shown, and what its result does to a status."""

from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from api.building.naming import hash_attributes
from api.scan_orders import ScanOrders
from bench.images import Image, image, index, layer
from bench.upstream import Upstream
from tests.api_server import AUTHORITY, ApiServer
from tests.servers import redis_server
from wave_proxy.image.build import BuildRecord, BuildSpec
from wave_proxy.image.request import ContainerRequest, Identity
from wave_proxy.image.scan import Vulnerability, count_severities
from wave_proxy.state.builds import BuildLimits, BuildStore, Claim
from wave_proxy.state.redis import Redis, connect
from wave_proxy.state.scans import ScanReports
from wave_proxy.state.usage import Usage

NOT_ENABLED = (
    "Security scan service is not enabled - Check Wave configuration setting 'wave.scan.enabled'"
    " - HTTP status=501 - response=- - here: [scan] program"
)
SPDX = b'{"spdxVersion":"SPDX-2.3"}'
BAD = Vulnerability("CVE-1", "CRITICAL", "It's bad", "openssl", "1.0", "1.1", "https://cve.test/1")
MILD = Vulnerability("CVE-2", "LOW")

_numbers = iter(range(1000))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the module."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def registry() -> Iterator[Upstream]:
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def api(redis_url: str, registry: Upstream) -> Iterator[ApiServer]:
    """A server with scans, whose builds go to ``hub/dev`` of the registry."""
    repository = f"{registry.address}/hub/dev"
    with ApiServer(redis_url, upstreams=[registry.address], build_repository=repository, scans=True) as server:
        yield server


@pytest.fixture(scope="module")
def without(redis_url: str, registry: Upstream) -> Iterator[ApiServer]:
    """A server without scans."""
    repository = f"{registry.address}/hub/dev"
    with ApiServer(redis_url, upstreams=[registry.address], build_repository=repository) as server:
        yield server


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connect(redis_url) as client:
        yield client


@pytest.fixture
async def builder(redis: Redis) -> AsyncIterator["Builder"]:
    made = Builder(redis)
    yield made
    await made.end_all()


class Builder:
    """Does the jobs of builds and of scans."""

    def __init__(self, redis: Redis) -> None:
        self.builds = BuildStore(redis, BuildLimits(100))
        self.reports = ScanReports(redis)

    async def claim(self, job_id: str) -> Claim:
        claim = await self.builds.claim("tests", 0.0)
        assert claim is not None
        assert claim.record.build_id == job_id
        return claim

    async def build(self, answer: dict[str, Any], exit_status: int = 0) -> None:
        await self.builds.finish(await self.claim(answer["buildId"]), exit_status=exit_status, digest=BUILT.digest)

    async def scan(
        self, answer: dict[str, Any], *found: Vulnerability, exit_status: int = 0, log: str = "ok\n"
    ) -> None:
        claim = await self.claim(answer["scanId"])
        await self.builds.append_log(claim, log.encode())
        if exit_status == 0:
            await self.reports.keep(claim.record.build_id, count_severities(found), found, SPDX)
        await self.builds.finish(claim, exit_status=exit_status, reason="broken" if exit_status else "")

    async def record(self, job_id: str) -> BuildRecord:
        found = await self.builds.find(job_id)
        assert found is not None
        return found

    async def end_all(self) -> None:
        while claim := await self.builds.claim("end", 0.0):
            await self.builds.finish(claim, exit_status=1)

    async def is_idle(self) -> bool:
        return await self.builds.queue_length() == (0, 0)


BUILT = image([layer({"built": "1"})])


def a_file() -> dict[str, str]:
    """A container file that nobody has built."""
    return {"containerFile": b64encode(f"FROM scratch\nENV N={next(_numbers)}\n".encode()).decode()}


@pytest.fixture
def plain(registry: Upstream) -> tuple[str, Image]:
    """An image that nobody has scanned."""
    number = next(_numbers)
    made = image([layer({"number": str(number)})])
    registry.add(f"library/plain-{number}", made, "1.0")
    return f"{registry.address}/library/plain-{number}:1.0", made


def status(api: ApiServer, answer: dict[str, Any]) -> dict[str, Any]:
    found = api.request("GET", f"/v1alpha2/container/{answer['requestId']}/status")
    assert found.status == 200
    document: dict[str, Any] = found.json()
    return document


def show(api: ApiServer, scan_id: str) -> dict[str, Any]:
    found = api.request("GET", f"/v1alpha1/scans/{scan_id}")
    assert found.status == 200
    document: dict[str, Any] = found.json()
    return document


# --- where scans are off ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["async", "required"])
def test_there_are_none_here(without: ApiServer, plain: tuple[str, Image], mode: str) -> None:
    assert without.refuse(containerImage=plain[0], scanMode=mode) == (501, NOT_ENABLED)


@pytest.mark.parametrize("what", ["", "/logs", "/spdx"])
def test_none_is_shown_here(without: ApiServer, what: str) -> None:
    answer = without.request("GET", f"/v1alpha1/scans/sc-{0:016x}_1{what}")
    assert (answer.status, answer.json()) == (501, {"message": NOT_ENABLED})


async def test_builds_go_on_without(without: ApiServer, builder: Builder) -> None:
    answer = without.submit(**a_file())
    assert "scanId" not in answer
    await builder.build(answer)
    assert await builder.is_idle()


# --- images that are there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [None, "none"])
async def test_a_plain_image_is_scanned_only_on_request(
    api: ApiServer, builder: Builder, plain: tuple[str, Image], mode: str | None
) -> None:
    answer = api.submit(containerImage=plain[0], scanMode=mode)
    assert "scanId" not in answer
    assert answer["succeeded"] is True
    assert await builder.is_idle()


async def test_a_plain_image_is_scanned_at_once(api: ApiServer, builder: Builder, plain: tuple[str, Image]) -> None:
    answer = api.submit(containerImage=plain[0], scanMode="async", containerPlatform="arm64")
    assert "succeeded" not in answer
    assert status(api, answer)["succeeded"] is True
    assert status(api, answer)["scanId"] == answer["scanId"]
    spec = (await builder.record(answer["scanId"])).spec
    assert (spec.kind, spec.target_image, spec.platform) == ("scan", plain[0], "linux/arm64")
    assert spec.source_image == f"{plain[0].removesuffix(':1.0')}@{plain[1].digest}"
    described = api.request("GET", f"/v1alpha2/container/{answer['requestId']}").json()
    assert described["scanId"] == answer["scanId"]
    await builder.scan(answer)


async def test_a_dry_run_scans_nothing(api: ApiServer, builder: Builder, plain: tuple[str, Image]) -> None:
    assert "scanId" not in api.submit(containerImage=plain[0], scanMode="required", dryRun=True)
    assert "scanId" not in api.submit(**a_file(), scanMode="required", dryRun=True)
    assert await builder.is_idle()


async def test_an_image_is_scanned_once(api: ApiServer, builder: Builder, plain: tuple[str, Image]) -> None:
    def submit(_: int) -> dict[str, Any]:
        return api.submit(containerImage=plain[0], scanMode="async")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(submit, range(24)))
    await builder.scan(answers[0])
    assert {answer["scanId"] for answer in [*answers, submit(0)]} == {answers[0]["scanId"]}
    assert answers[0]["scanId"].endswith("_1")
    assert await builder.is_idle()


async def test_an_image_that_has_changed_is_scanned_again(
    api: ApiServer, builder: Builder, registry: Upstream, plain: tuple[str, Image]
) -> None:
    first = api.submit(containerImage=plain[0], scanMode="async")
    await builder.scan(first)
    repository = plain[0].partition("/")[2].removesuffix(":1.0")
    registry.add(repository, image([layer({"changed": repository})]), "1.0")
    second = api.submit(containerImage=plain[0], scanMode="async")
    assert second["scanId"] != first["scanId"]
    await builder.scan(second)


async def test_after_a_while_an_image_is_scanned_again(redis: Redis, builder: Builder, registry: Upstream) -> None:
    plainly = await _of_image(redis, builder, registry, memory_s=3600.0)
    late = await _of_image(redis, builder, registry, memory_s=0.0)
    assert plainly.endswith("_1")
    assert late == plainly.removesuffix("_1") + "_2"


async def _of_image(redis: Redis, builder: Builder, registry: Upstream, *, memory_s: float) -> str:
    """The id of a scan of one and the same image, which is done."""
    orders = ScanOrders(builder.builds, ScanReports(redis), Usage(redis), enabled=True, memory_s=memory_s)
    wanted = ContainerRequest(image=f"{registry.address}/library/aging:1", scan_mode="async")
    (scan_id,) = await orders.of_image(wanted, BUILT.digest)
    await builder.scan({"scanId": scan_id})
    return scan_id


async def test_scans_are_counted_when_they_are_begun(redis: Redis, builder: Builder, registry: Upstream) -> None:
    usage = Usage(redis)
    orders = ScanOrders(builder.builds, ScanReports(redis), usage, enabled=True)
    identity = Identity(email="ada@scans.example")
    image = f"{registry.address}/library/counted:1"
    wanted = ContainerRequest(image, platforms=("linux/arm64",), identity=identity, scan_mode="async")
    for _ in range(3):  # the second and the third join the first
        (scan_id,) = await orders.of_image(wanted, BUILT.digest)
    await builder.scan({"scanId": scan_id})
    await usage.close()
    counts = [await usage.read("scans", None, "scans.example", name) for name in (None, "arm64", "amd64")]
    assert [found.count for found in counts] == [1, 1, 0]


# --- builds ----------------------------------------------------------------------------------------------------------


async def test_a_build_is_scanned_when_it_is_done(api: ApiServer, builder: Builder) -> None:
    answer = api.submit(**a_file())
    assert status(api, answer)["status"] == "PENDING"
    assert show(api, answer["scanId"])["status"] == "PENDING"
    await builder.build(answer)
    assert (status(api, answer)["status"], status(api, answer)["succeeded"]) == ("DONE", True)
    record = await builder.record(answer["scanId"])
    assert record.spec.source_image == answer["containerImage"]
    await builder.scan(answer, BAD)
    assert "vulnerabilities" not in status(api, answer)
    build = api.request("GET", f"/v1alpha1/builds/{answer['buildId']}").json()
    assert build["scanId"] == answer["scanId"]


async def test_a_build_that_is_not_to_be_scanned(api: ApiServer, builder: Builder) -> None:
    answer = api.submit(**a_file(), scanMode="none")
    assert "scanId" not in answer
    await builder.build(answer)
    assert await builder.is_idle()


async def test_a_build_that_fails_is_not_scanned(api: ApiServer, builder: Builder) -> None:
    file = a_file()
    answer = api.submit(**file, scanMode="required")
    await builder.build(answer, exit_status=1)
    assert await builder.is_idle()
    assert show(api, answer["scanId"])["status"] == "FAILED"
    assert status(api, answer)["reason"] == "Container build did not complete successfully"
    again = api.submit(**file, scanMode="required")
    assert again["succeeded"] is False
    assert "scanId" not in again


async def test_an_image_that_was_built_before_is_scanned_only_on_request(
    api: ApiServer, builder: Builder, registry: Upstream
) -> None:
    file = a_file()
    first = api.submit(**file, scanMode="none")
    await builder.build(first)
    registry.add("hub/dev", BUILT, first["containerImage"].rpartition(":")[2])
    implied = api.submit(**file)
    assert (implied["succeeded"], "scanId" in implied) == (True, False)
    asked = api.submit(**file, scanMode="async")
    assert asked["cached"] is True
    await builder.scan(asked)
    known = api.submit(**file)
    assert known["scanId"] == asked["scanId"]
    assert await builder.is_idle()


async def test_two_platforms_are_two_scans(api: ApiServer, builder: Builder) -> None:
    answer = api.submit(**a_file(), containerPlatform="linux/amd64,linux/arm64", scanMode="required")
    await builder.build(answer)
    children = api.request("GET", f"/v1alpha2/container/{answer['requestId']}").json()["scanChildIds"]["refs"]
    assert [child["value"] for child in children] == ["linux/amd64", "linux/arm64"]
    assert children[0]["id"] == answer["scanId"]
    await builder.scan({"scanId": children[0]["id"]})
    assert status(api, answer)["status"] == "SCANNING"
    await builder.scan({"scanId": children[1]["id"]}, BAD)
    assert status(api, answer)["vulnerabilities"] == {"CRITICAL": 1}


# --- results ---------------------------------------------------------------------------------------------------------


async def test_what_is_required_decides(api: ApiServer, builder: Builder, plain: tuple[str, Image]) -> None:
    strict = api.submit(containerImage=plain[0], scanMode="required", scanLevels=["LOW", "MEDIUM"])
    lenient = api.submit(containerImage=plain[0], scanMode="required", scanLevels=["LOW", "CRITICAL"])
    assert status(api, strict)["status"] == "SCANNING"
    await builder.scan(strict, BAD, MILD)
    details = {"detailsUri": f"http://{AUTHORITY}/view/scans/{strict['scanId']}"}
    assert status(api, strict).items() >= {"status": "DONE", "succeeded": False, **details}.items()
    assert status(api, strict)["vulnerabilities"] == {"LOW": 1, "CRITICAL": 1}
    assert status(api, strict)["reason"].endswith("with severity: CRITICAL")
    assert status(api, lenient)["succeeded"] is True
    assert status(api, lenient)["reason"].endswith("requested security levels: LOW,CRITICAL")


async def test_a_failed_scan(api: ApiServer, builder: Builder, plain: tuple[str, Image]) -> None:
    answer = api.submit(containerImage=plain[0], scanMode="required")
    await builder.scan(answer, exit_status=124)
    found = status(api, answer)
    assert (found["succeeded"], found["reason"]) == (False, "Container security scan did not complete successfully")
    shown = show(api, answer["scanId"])
    assert (shown["status"], shown["exitCode"], shown["reason"]) == ("FAILED", 124, "broken")
    assert "vulnerabilities" not in shown
    assert api.request("GET", f"/v1alpha1/scans/{answer['scanId']}/spdx").status == 404


async def test_a_scan_that_is_forgotten(
    api: ApiServer, builder: Builder, redis: Redis, plain: tuple[str, Image]
) -> None:
    answer = api.submit(containerImage=plain[0], scanMode="required")
    await builder.scan(answer)
    await redis.delete(f"wave:{{builds}}:build:{answer['scanId']}")
    found = api.request("GET", f"/v1alpha2/container/{answer['requestId']}/status")
    assert found.status == 404
    assert found.json() == {"message": f"Missing container scan record with id: {answer['scanId']}"}


async def test_a_scan_is_shown(api: ApiServer, builder: Builder, plain: tuple[str, Image]) -> None:
    answer = api.submit(containerImage=plain[0], scanMode="async")
    assert show(api, answer["scanId"]).keys() == {"id", "containerImage", "startTime", "status"}
    await builder.scan(answer, BAD, MILD, log="don't panic\n")
    shown = show(api, answer["scanId"])
    assert shown.pop("startTime")
    assert shown.pop("duration") > 0
    assert shown == {
        "id": answer["scanId"],
        "containerImage": plain[0],
        "status": "SUCCEEDED",
        "exitCode": 0,
        "logs": "dont panic\n",
        "vulnerabilities": [
            {
                "id": "CVE-1",
                "severity": "CRITICAL",
                "title": "It's bad",
                "pkgName": "openssl",
                "installedVersion": "1.0",
                "fixedVersion": "1.1",
                "primaryUrl": "https://cve.test/1",
            },
            {
                "id": "CVE-2",
                "severity": "LOW",
                "title": "",
                "pkgName": "",
                "installedVersion": "",
                "fixedVersion": "",
                "primaryUrl": "",
            },
        ],
    }
    bare = answer["scanId"].removeprefix("sc-").partition("_")[0]
    assert show(api, bare)["id"] == answer["scanId"]


async def test_a_scan_of_a_build_names_it_and_not_the_request(api: ApiServer, builder: Builder) -> None:
    answer = api.submit(**a_file())
    shown = show(api, answer["scanId"])
    assert shown["buildId"] == answer["buildId"]
    assert answer["requestId"] not in str(shown)
    await builder.build(answer)


async def test_a_long_log_is_cut_in_the_record_alone(
    api: ApiServer, builder: Builder, plain: tuple[str, Image]
) -> None:
    answer = api.submit(containerImage=plain[0], scanMode="async")
    log = "x" * 10_001
    await builder.scan(answer, log=log)
    assert show(api, answer["scanId"])["logs"] == f"{log[:-1]} [truncated]"
    assert api.request("GET", f"/v1alpha1/scans/{answer['scanId']}/logs").body == log.encode()


async def test_log_and_spdx_are_attachments(api: ApiServer, builder: Builder, plain: tuple[str, Image]) -> None:
    scan_id = (answer := api.submit(containerImage=plain[0], scanMode="async"))["scanId"]
    await builder.scan(answer)
    log = api.request("GET", f"/v1alpha1/scans/{scan_id}/logs")
    assert (log.status, log.body) == (200, b"ok\n")
    assert log.headers["Content-Disposition"] == f"attachment; filename={scan_id}.log"
    assert log.headers["Content-Type"] == "application/octet-stream"
    spdx = api.request("GET", f"/v1alpha1/scans/{scan_id}/spdx")
    assert (spdx.status, spdx.body) == (200, SPDX)
    assert spdx.headers["Content-Disposition"] == f'attachment; filename="spdx-{scan_id}.json"'
    assert spdx.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("what", ["", "/logs", "/spdx"])
@pytest.mark.parametrize("scan_id", [f"sc-{9:016x}_1", "9" * 16, "sc-x", f"bd-{9:016x}_1"])
def test_a_scan_that_is_none(api: ApiServer, scan_id: str, what: str) -> None:
    answer = api.request("GET", f"/v1alpha1/scans/{scan_id}{what}")
    assert (answer.status, answer.body) == (404, b"")


def test_the_ids_are_those_of_the_service() -> None:
    vectors = {
        (("image", "x"),): "94be9fbddcc3af8e",  # V4
        (("image", "x"), ("digest", "y")): "00769af315dcb1fe",  # V4
        (("image", "docker.io/foo/bar:latest"),): "057d44d43bb7f81c",  # V4
        (("image", "private.cr.seqera.io/wave/build:49b26ca0c3a07b1b"),): "a6acedfe6969f4bf",  # the API page's
    }
    assert {attributes: hash_attributes(attributes) for attributes in vectors} == vectors


async def test_the_id_of_a_build_on_docker_hub_is_that_of_the_api_page(redis: Redis, builder: Builder) -> None:
    tag = "bwa-0.7.15_salmon-1.10.0_samtools-1.17--40730eb5c2c3dc6e"
    spec = BuildSpec("40730eb5c2c3dc6e", f"docker.io/hrma017/dev:{tag}", "", build_repository="hrma017/dev")
    orders = ScanOrders(builder.builds, ScanReports(redis), Usage(redis), enabled=True)
    (scan_id,) = await orders.of_job(spec, "bd-40730eb5c2c3dc6e_1", is_cached=False, asked=False)
    assert scan_id == "sc-f36486d1a7e3053a_1"


async def test_an_index_is_scanned_as_it_is_asked_for(api: ApiServer, builder: Builder, registry: Upstream) -> None:
    registry.add("library/both", index([BUILT, image([layer({"a": "2"})])]), "1")
    first = api.submit(containerImage=f"{registry.address}/library/both:1", scanMode="async")
    other = api.submit(
        containerImage=f"{registry.address}/library/both:1", scanMode="async", containerPlatform="linux/arm64"
    )
    assert first["scanId"].endswith("_1")
    assert other["scanId"].endswith("_2")
    assert await builder.builds.queue_length() == (2, 0)
