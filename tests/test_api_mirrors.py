"""Mirrors over the wire: which requests begin one, what they are told, and how a mirror looks until its end."""

from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import pytest

from bench.images import image, layer
from bench.upstream import Upstream
from tests.api_server import AUTHORITY, ApiServer
from tests.identified import issue, issued
from tests.patience import PATIENCE_S
from tests.servers import redis_server
from wave_proxy.image.build import BuildRecord
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import connect
from wave_proxy.state.usage import Usage

ADMIN = {"Authorization": f"Basic {b64encode(b'admin:hunter2').decode()}"}
ACCOUNTS = {"admin": f"sha256:{sha256(b'hunter2').hexdigest()}"}
# What Nextflow sends with every request.
NULLS = {"entrypoint": None, "cmd": None, "env": None, "workingDir": None, "layers": None}

_numbers = iter(range(1000))


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the module."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def source() -> Iterator[Upstream]:
    """Where images are mirrored from."""
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def target() -> Iterator[Upstream]:
    """Where they go."""
    with Upstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def api(redis_url: str, source: Upstream, target: Upstream) -> Iterator[ApiServer]:
    """One server for the module, whose builds go to ``hub/dev`` of the target."""
    known = [source.address, target.address]
    repository = f"{target.address}/hub/dev"
    with ApiServer(redis_url, upstreams=known, accounts=ACCOUNTS, build_repository=repository) as server:
        yield server


@pytest.fixture(scope="module")
def ada(redis_url: str) -> str:
    """The access token of a user."""
    return issue(redis_url, "ada@site.test")


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[BuildStore]:
    """The store as a builder has it."""
    client = connect(redis_url)
    try:
        yield BuildStore(client, BuildLimits(100))
    finally:
        await client.aclose()


class Asking:
    """One image that a user wants mirrored; ``body`` is the request."""

    def __init__(self, source: Upstream, target: Upstream, token: str) -> None:
        self.image = image([layer({"number": str(next(_numbers))})])
        self.repository = f"team/tool-{next(_numbers)}"
        source.add(self.repository, self.image, "1.0")
        self.source = f"{source.address}/{self.repository}:1.0"
        self.target = f"{target.address}/lab/{self.repository}:1.0"
        self.body: dict[str, Any] = {
            "containerImage": self.source,
            "buildRepository": f"{target.address}/lab",
            "mirror": True,
            "towerAccessToken": token,
        }


@pytest.fixture
def asking(source: Upstream, target: Upstream, ada: str) -> Asking:
    return Asking(source, target, ada)


async def claim(store: BuildStore, mirror_id: str) -> Any:
    """Be the builder that has that mirror."""
    while True:
        found = await store.claim("test", PATIENCE_S)
        assert found is not None, "the mirror is not in the queue"
        if found.record.build_id == mirror_id:
            return found
        await store.finish(found, exit_status=1, reason="not the one that is meant")


async def finish(store: BuildStore, mirror_id: str, **result: Any) -> None:
    """Be the builder of that mirror, to its end."""
    found = await claim(store, mirror_id)
    await store.append_log(found, b">> copied\n")
    await store.finish(found, **result)


async def record_of(store: BuildStore, mirror_id: str) -> BuildRecord:
    record = await store.find(mirror_id)
    assert record is not None
    return record


def status_of(api: ApiServer, answer: dict[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = api.request("GET", f"/v1alpha2/container/{answer['requestId']}/status").json()
    return document


# --- requests --------------------------------------------------------------------------------------------------------


async def test_a_mirror_is_begun(api: ApiServer, asking: Asking, store: BuildStore) -> None:
    answer = api.submit(**asking.body, containerConfig=NULLS, containerPlatform="linux/amd64")
    mirror_id = answer["buildId"]
    assert mirror_id.startswith("mr-")
    assert answer == {
        "requestId": answer["requestId"],
        "targetImage": asking.target,
        "containerImage": asking.target,
        "buildId": mirror_id,
        "cached": False,
        "freeze": False,
        "mirror": True,
    }
    spec = (await record_of(store, mirror_id)).spec
    assert (spec.kind, spec.source_image, spec.target_image) == ("mirror", asking.source, asking.target)
    assert (spec.platform, spec.timeout_s, spec.identity.email) == ("", 60.0, "ada@site.test")


@pytest.mark.parametrize("place", ["{}", "{}/", "{}/lab", "{}/lab/"])
def test_the_copys_name_is_the_images_behind_the_place(
    api: ApiServer, asking: Asking, target: Upstream, place: str
) -> None:
    asked = place.format(target.address)
    answer = api.submit(**{**asking.body, "buildRepository": asked})
    assert answer["targetImage"] == f"{asked.rstrip('/')}/{asking.repository}:1.0"


def test_a_bearer_header_says_who_asks(api: ApiServer, asking: Asking, ada: str) -> None:
    body = {name: value for name, value in asking.body.items() if name != "towerAccessToken"}
    answer = api.request("POST", "/v1alpha2/container", body=body, headers={"Authorization": f"Bearer {ada}"})
    assert answer.status == 200, answer.body
    assert answer.json()["mirror"] is True


def test_nobody_is_refused(api: ApiServer, asking: Asking) -> None:
    status, said = api.refuse(**{**asking.body, "towerAccessToken": None})
    assert status == 400
    assert said.startswith("Container mirroring requires an authenticated request - specify the tower token attribute")
    assert "`wave-proxy token create`" in said


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        pytest.param({"buildRepository": None}, 400, "Attribute `buildRepository` is required when", id="nowhere"),
        pytest.param({"freeze": True}, 400, "Attribute `mirror` and `freeze` conflict each other", id="freeze"),
        pytest.param(
            {"containerConfig": {"cmd": ["a"]}}, 400, "Attribute `mirror` and `containerConfig` conflict", id="config"
        ),
        pytest.param(
            {"buildRepository": "{source}/x"}, 400, "Source and target mirror registry are the same - ", id="same"
        ),
        pytest.param(
            {"buildRepository": "{target}/hub/dev"},
            400,
            f"any other repository may be named, on this server {AUTHORITY}/local/mirror",
            id="builds",
        ),
        pytest.param(
            {"buildRepository": "{own}/local/team"},
            400,
            f"buildRepository: a mirror on this server begins with {AUTHORITY}/local/mirror, or with your own ",
            id="others' local repository",
        ),
        pytest.param(
            {"buildRepository": "{own}"}, 400, "buildRepository: a mirror on this server begins with", id="own registry"
        ),
        pytest.param(
            {"containerImage": "{own}/wt/00/library/ubuntu:1"},
            400,
            "containerImage: an image that a token stands for is mirrored by its own name only",
            id="token",
        ),
        pytest.param(
            {"containerImage": "{source}/team/nothing:1"}, 400, "does not exist or access is not authorized", id="gone"
        ),
        pytest.param(
            {"buildRepository": "127.0.0.1:1/lab"}, 400, "is at a private or loopback address", id="private address"
        ),
        pytest.param({"scanMode": "required"}, 501, "Security scan service is not enabled", id="scan"),
    ],
)
def test_refusals(
    api: ApiServer,
    asking: Asking,
    source: Upstream,
    target: Upstream,
    changes: dict[str, Any],
    status: int,
    text: str,
) -> None:
    names = {"source": source.address, "target": target.address, "own": AUTHORITY}
    told = {name: value.format(**names) if isinstance(value, str) else value for name, value in changes.items()}
    found, message = api.refuse(**{**asking.body, **told})
    assert (found, text in message) == (status, True), message


def test_the_older_endpoint_mirrors_nothing(api: ApiServer, asking: Asking) -> None:
    status, message = api.refuse("/container-token", **asking.body)
    assert (status, message) == (400, "Container mirroring requires the use of v2 API")


async def test_a_dry_run_only_says_what_there_is(api: ApiServer, asking: Asking, target: Upstream) -> None:
    answer = api.submit(**asking.body, dryRun=True)
    assert answer["buildId"].startswith("mr-")
    assert answer["buildId"].endswith("_0")
    assert (answer["cached"], answer["succeeded"]) == (False, True)
    found = api.request("GET", f"/v1alpha2/container/{answer['requestId']}/status")
    assert found.status == 404
    assert found.json() == {"message": f"Missing container mirror record with id: {answer['buildId']}"}
    target.add(f"lab/{asking.repository}", asking.image, "1.0")
    assert api.submit(**asking.body, dryRun=True)["cached"] is True


# --- each once -------------------------------------------------------------------------------------------------------


async def test_what_the_target_has_is_not_mirrored(
    api: ApiServer, asking: Asking, target: Upstream, store: BuildStore
) -> None:
    target.add(f"lab/{asking.repository}", asking.image, "1.0")
    answer = api.submit(**asking.body)
    assert "buildId" not in answer
    assert "cached" not in answer
    assert (answer["mirror"], answer["succeeded"]) == (True, True)
    assert answer["targetImage"] == asking.target
    assert status_of(api, answer)["succeeded"] is True


async def test_the_last_mirror_of_it_is_named(
    api: ApiServer, asking: Asking, target: Upstream, store: BuildStore
) -> None:
    first = api.submit(**asking.body)
    await finish(store, first["buildId"], exit_status=0, digest=asking.image.digest)
    target.add(f"lab/{asking.repository}", asking.image, "1.0")
    again = api.submit(**asking.body)
    assert (again["buildId"], again["cached"], again["succeeded"]) == (first["buildId"], True, True)


async def test_who_asks_meanwhile_joins(api: ApiServer, asking: Asking, redis_url: str) -> None:
    other = await issued(redis_url, "eve@site.test")
    bodies = [asking.body, {**asking.body, "towerAccessToken": other}] * 4
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda body: api.submit(**body), bodies))
    assert len({answer["buildId"] for answer in answers}) == 1
    assert {answer["cached"] for answer in answers} == {False}
    assert not any("succeeded" in answer for answer in answers)


async def test_an_image_that_has_changed_is_mirrored_again(
    api: ApiServer, asking: Asking, source: Upstream, target: Upstream, store: BuildStore
) -> None:
    first = api.submit(**asking.body)
    await finish(store, first["buildId"], exit_status=0, digest=asking.image.digest)
    target.add(f"lab/{asking.repository}", asking.image, "1.0")
    source.add(asking.repository, image([layer({"newer": "1"})]), "1.0")
    again = api.submit(**asking.body)
    assert (again["buildId"], again["cached"]) == (first["buildId"].replace("_1", "_2"), False)


async def test_a_name_is_mirrored_from_one_image_at_a_time(
    api: ApiServer, asking: Asking, redis_url: str, target: Upstream, store: BuildStore, ada: str
) -> None:
    first = api.submit(**asking.body)
    with Upstream() as elsewhere:
        elsewhere.add(asking.repository, asking.image, "1.0")
        known = [elsewhere.address, target.address]
        with ApiServer(redis_url, upstreams=known, build_repository="hub.test/dev") as other:
            body = {**asking.body, "containerImage": f"{elsewhere.address}/{asking.repository}:1.0"}
            status, message = other.refuse(**body)
            assert (status, "is being mirrored from another image; try again" in message) == (400, True)
            await finish(store, first["buildId"], exit_status=0, digest=asking.image.digest)
            assert other.submit(**body)["buildId"] not in ("", first["buildId"])


async def test_one_that_failed_is_remembered_for_a_while(api: ApiServer, asking: Asking, store: BuildStore) -> None:
    first = api.submit(**asking.body)
    await finish(store, first["buildId"], exit_status=1, reason="target denied: no")
    again = api.submit(**asking.body)
    assert (again["buildId"], again["cached"], again["succeeded"]) == (first["buildId"], True, False)
    status = status_of(api, again)
    assert status["mirrorId"] == first["buildId"]
    assert "buildId" not in status
    assert (status["status"], status["succeeded"]) == ("DONE", False)
    assert status["reason"] == "Container mirror did not complete successfully"
    assert status["detailsUri"] == f"http://{AUTHORITY}/view/mirrors/{first['buildId']}"


async def test_each_that_is_begun_counts_once(
    asking: Asking, redis_url: str, source: Upstream, target: Upstream
) -> None:
    body = {**asking.body, "towerAccessToken": await issued(redis_url, "ada@count.test")}
    known = [source.address, target.address]
    with ApiServer(redis_url, upstreams=known, build_repository="hub.test/dev") as api:
        for _ in range(3):
            api.submit(**body)
    client = connect(redis_url)
    try:
        assert (await Usage(client).read("mirrors", None, "count.test")).count == 1
    finally:
        await client.aclose()


async def test_a_copy_is_scanned_for_who_asks(
    asking: Asking, redis_url: str, source: Upstream, target: Upstream, store: BuildStore
) -> None:
    known = [source.address, target.address]
    with ApiServer(redis_url, upstreams=known, build_repository="hub.test/dev", scans=True) as api:
        assert "scanId" not in api.submit(**asking.body)
        answer = api.submit(**asking.body, scanMode="required")
        assert answer["scanId"].startswith("sc-")
        assert "succeeded" not in answer
        spec = (await record_of(store, answer["scanId"])).spec
        assert (spec.source_image, spec.made_by) == (asking.target, answer["buildId"])
        await finish(store, answer["buildId"], exit_status=0, digest=asking.image.digest)
        assert status_of(api, answer)["status"] == "SCANNING"
        assert api.request("GET", f"/v1alpha1/mirrors/{answer['buildId']}").json()["scanId"] == answer["scanId"]


# --- how a mirror looks ----------------------------------------------------------------------------------------------


async def test_a_mirror_from_its_beginning_to_its_end(api: ApiServer, asking: Asking, store: BuildStore) -> None:
    answer = api.submit(**asking.body)
    mirror_id, path = answer["buildId"], f"/v1alpha1/mirrors/{answer['buildId']}"
    found = api.request("GET", path).json()
    user_id = found.pop("userId")
    assert isinstance(user_id, int)
    assert found == {
        "mirrorId": mirror_id,
        "sourceImage": asking.source,
        "targetImage": asking.target,
        "creationTime": found["creationTime"],
        "offsetId": "Z",
        "status": "PENDING",
    }
    assert status_of(api, answer)["status"] == "PENDING"
    work = await claim(store, mirror_id)
    await store.append_log(work, b">> copied\n")
    assert status_of(api, answer)["status"] == "BUILDING"
    log = api.request("GET", f"{path}/logs")
    assert (log.body, log.headers["X-Build-Status"]) == (b">> copied\n", "PENDING")
    assert log.headers["Content-Disposition"] == f"attachment; filename={mirror_id}.log"
    assert log.headers["Content-Type"].startswith("text/plain")
    await store.finish(work, exit_status=0, digest=asking.image.digest)
    found = api.request("GET", path).json()
    assert (found["status"], found["exitCode"], found["digest"]) == ("COMPLETED", 0, asking.image.digest)
    assert found["logs"] == ">> copied\n"
    assert found["duration"] >= 0
    assert "ada" not in str(found)
    events = api.request("GET", f"{path}/logs", headers={"Accept": "text/event-stream"})
    assert b"data: >> copied" in events.body
    assert b"event: end" in events.body
    newest = api.request("GET", path.rpartition("_")[0])
    assert newest.json()["mirrorId"] == mirror_id


async def test_the_request_is_described_with_both_images(api: ApiServer, asking: Asking) -> None:
    answer = api.submit(**asking.body)
    found = api.request("GET", f"/v1alpha2/container/{answer['requestId']}").json()
    assert (found["containerImage"], found["sourceImage"], found["waveImage"]) == (
        asking.source,
        asking.target,
        asking.target,
    )
    assert (found["mirror"], found["buildId"]) == (True, answer["buildId"])


@pytest.mark.parametrize("mirror_id", ["mr-0000000000000000_1", "mr-0000000000000000", "bd-0000000000000000_1", "x"])
@pytest.mark.parametrize("rest", ["", "/logs"])
def test_what_is_unknown(api: ApiServer, mirror_id: str, rest: str) -> None:
    answer = api.request("GET", f"/v1alpha1/mirrors/{mirror_id}{rest}")
    assert (answer.status, answer.body) == (404, b"")


async def test_a_mirror_is_cancelled_by_an_account(api: ApiServer, asking: Asking, store: BuildStore) -> None:
    path = f"/v1alpha1/mirrors/{api.submit(**asking.body)['buildId']}"
    assert api.request("DELETE", path).status == 401
    answer = api.request("DELETE", path, headers=ADMIN)
    assert (answer.status, answer.json()["status"]) == (202, "COMPLETED")
    assert api.request("GET", path).json()["reason"] == "cancelled"
    assert api.request("DELETE", path, headers=ADMIN).status == 409
    assert api.request("DELETE", "/v1alpha1/mirrors/mr-0000000000000000_9", headers=ADMIN).status == 404
