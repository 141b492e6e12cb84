"""Requests for images that are built, over the wire: names, answers, and one build for all who ask for the same."""

from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.images import image, layer, random_blob
from bench.upstream import Upstream
from tests.api_server import AUTHORITY, ApiServer
from tests.patience import PATIENCE_S
from tests.servers import redis_server
from wave_proxy.image.build import BuildRecord
from wave_proxy.image.limit import Limit
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import connect
from wave_proxy.state.usage import Usage

BASE = image([layer({"base": "1"})], entrypoint=["/entry", "--now"])
BUILT = image([layer({"built": "1"})])
CONDA = {"type": "CONDA", "entries": ["salmon", "bwa"], "channels": ["conda-forge", "bioconda"]}


def base64(text: str) -> str:
    return b64encode(text.encode()).decode()


def dockerfile(text: str) -> dict[str, str]:
    return {"containerFile": base64(text)}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the module."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def registry() -> Iterator[Upstream]:
    """Where builds are looked for, with an image to build on."""
    with Upstream() as upstream:
        upstream.add("library/base", BASE, "1.0")
        yield upstream


@pytest.fixture(scope="module")
def api(redis: str, registry: Upstream) -> Iterator[ApiServer]:
    """One server for the module, whose builds go to ``hub/dev`` of the registry."""
    with ApiServer(redis, upstreams=[registry.address], build_repository=f"{registry.address}/hub/dev") as server:
        yield server


@asynccontextmanager
async def builder(redis: str) -> AsyncIterator[BuildStore]:
    """The store as a builder has it."""
    client = connect(redis)
    try:
        yield BuildStore(client, BuildLimits(100))
    finally:
        await client.aclose()


async def build_of(redis: str, answer: dict[str, Any]) -> BuildRecord:
    async with builder(redis) as store:
        record = await store.find(answer["buildId"])
    assert record is not None
    return record


async def finish(redis: str, answer: dict[str, Any], **result: Any) -> None:
    """Be the builder of that build."""
    async with builder(redis) as store:
        while True:
            claim = await store.claim("test", PATIENCE_S)
            assert claim is not None, "the build is not in the queue"
            if claim.record.build_id == answer["buildId"]:
                await store.append_log(claim, b"STEP 1: it goes\n")
                return await store.finish(claim, **result)
            await store.finish(claim, exit_status=1, reason="not the one that is meant")


# --- answers ---------------------------------------------------------------------------------------------------------


async def test_packages(api: ApiServer, registry: Upstream, redis: str) -> None:
    answer = api.submit(packages=CONDA, containerPlatform="amd64")
    build = await build_of(redis, answer)
    cid = build.spec.container_id
    name = f"{registry.address}/hub/dev:salmon_bwa--{cid}"
    expiration = answer.pop("expiration")
    assert expiration.endswith("Z")
    assert answer == {
        "requestId": answer["requestId"],
        "containerToken": answer["requestId"],
        "targetImage": f"{AUTHORITY}/wt/{answer['requestId']}/hub/dev:salmon_bwa--{cid}",
        "containerImage": name,
        "buildId": f"bd-{cid}_1",
        "cached": False,
        "freeze": False,
        "mirror": False,
    }
    assert build.spec.target_image == name
    assert build.spec.template == "conda/micromamba:v1"
    assert build.spec.conda_file.splitlines()[:3] == ["channels:", "- conda-forge", "- bioconda"]


async def test_the_older_endpoint_tells_of_a_build_while_it_lasts(api: ApiServer, redis: str) -> None:
    file = dockerfile("FROM base\nRUN legacy\n")
    first = api.submit("/container-token", **file)
    assert first["buildId"].endswith("_1")
    assert set(first) == {"requestId", "containerToken", "targetImage", "expiration", "containerImage", "buildId"}
    await finish(redis, first, exit_status=1, reason="no")
    later = api.submit("/container-token", **file)
    assert set(first) - set(later) == {"buildId"}
    assert first["containerImage"] == later["containerImage"]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (None, "hub/dev:samtools-1.0--{id}"),
        ("tagPrefix", "hub/dev:samtools-1.0--{id}"),
        ("imageSuffix", "hub/dev/samtools:1.0--{id}"),
        ("none", "hub/dev:{id}"),
    ],
)
async def test_the_name_follows_the_strategy(
    api: ApiServer, registry: Upstream, redis: str, strategy: str | None, name: str
) -> None:
    packages = {"type": "CONDA", "entries": ["samtools=1.0"], "channels": ["bioconda", f"for-{strategy}"]}
    answer = api.submit(packages=packages, nameStrategy=strategy)
    cid = (await build_of(redis, answer)).spec.container_id
    assert answer["containerImage"] == f"{registry.address}/{name.format(id=cid)}"


def test_a_dry_run_names_the_image_and_builds_nothing(api: ApiServer) -> None:
    answer = api.submit(packages=CONDA, dryRun=True, buildTemplate="conda/micromamba:v2")
    cid = answer["containerImage"].rpartition("--")[2]
    assert (answer["buildId"], answer["cached"], answer["succeeded"]) == (f"{cid}_0", False, True)
    assert api.request("GET", f"/v1alpha1/builds/{cid}_0/status").status == 404
    status = api.request("GET", f"/v1alpha2/container/{answer['requestId']}/status")
    assert status.status == 404
    assert status.json() == {"message": f"Missing container build record with id: {cid}_0"}


def test_what_is_asked_for_twice_is_built_once(api: ApiServer) -> None:
    file = dockerfile("FROM base\nRUN twice\n")
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: api.submit(**file), range(48)))
    assert len({answer["buildId"] for answer in answers}) == 1
    assert len({answer["containerToken"] for answer in answers}) == 48
    assert not any(answer["cached"] for answer in answers)
    assert not any("succeeded" in answer for answer in answers)


async def test_how_a_build_stands(api: ApiServer, redis: str) -> None:
    answer = api.submit(**dockerfile("FROM base\nRUN standing\n"))
    path = f"/v1alpha2/container/{answer['requestId']}/status"
    before = api.request("GET", path).json()
    await finish(redis, answer, exit_status=3, reason="out of memory")
    after = api.request("GET", path).json()
    again = api.submit(**dockerfile("FROM base\nRUN standing\n"))
    assert (before["status"], before["buildId"]) == ("PENDING", answer["buildId"])
    assert before.keys() == {"id", "status", "buildId", "creationTime"}
    assert (after["status"], after["succeeded"]) == ("DONE", False)
    assert after["reason"] == "Container build did not complete successfully"
    assert after["detailsUri"] == f"http://{AUTHORITY}/view/builds/{answer['buildId']}"
    assert after["duration"] >= 0
    assert (again["buildId"], again["cached"], again["succeeded"]) == (answer["buildId"], True, False)


async def test_an_image_that_is_there_is_not_built_again(api: ApiServer, registry: Upstream, redis: str) -> None:
    file = dockerfile("FROM base\nRUN there\n")
    first = api.submit(**file)
    await finish(redis, first, exit_status=0, digest=BUILT.digest)
    registry.add("hub/dev", BUILT, first["containerImage"].rpartition(":")[2])
    second = api.submit(**file)
    status = api.request("GET", f"/v1alpha2/container/{second['requestId']}/status").json()
    assert (second["buildId"], second["cached"], second["succeeded"]) == (first["buildId"], True, True)
    assert (status["status"], status["succeeded"]) == ("DONE", True)


async def test_an_image_of_which_no_build_is_known(api: ApiServer, registry: Upstream) -> None:
    file = dockerfile("FROM base\nRUN foreign\n")
    tag = api.submit(**file, dryRun=True)["containerImage"].rpartition(":")[2]
    registry.add("hub/dev", BUILT, tag)
    answer = api.submit(**file)
    assert "buildId" not in answer
    assert "cached" not in answer
    assert answer["succeeded"] is True


async def test_an_image_that_was_deleted_is_built_again(api: ApiServer, redis: str) -> None:
    file = dockerfile("FROM base\nRUN deleted\n")
    first = api.submit(**file)
    await finish(redis, first, exit_status=0, digest=BUILT.digest)
    second = api.submit(**file)
    assert second["cached"] is False
    assert second["buildId"] == first["buildId"].replace("_1", "_2")


async def test_what_was_asked_for_is_described(api: ApiServer, registry: Upstream) -> None:
    answer = api.submit(packages=CONDA, cacheRepository="cache.example/layers", buildTemplate="conda/pixi:v1")
    for path in ("/v1alpha2/container/", "/container-token/"):
        document = api.request("GET", path + answer["requestId"]).json()
        build = document.get("build", document)
        assert build["buildId"] == answer["buildId"]
        assert build["buildNew"] is True
        assert build["freeze"] is False
        assert build["containerFile"].startswith("FROM ")
        assert "- salmon" in build["condaFile"]
        assert build["buildRepository"] == f"{registry.address}/hub/dev"
        assert build["cacheRepository"] == "cache.example/layers"


# --- freeze ----------------------------------------------------------------------------------------------------------


async def test_an_image_with_changes_is_frozen(api: ApiServer, registry: Upstream, redis: str) -> None:
    base, target = f"{registry.address}/library/base:1.0", f"{registry.address}/mine/frozen"
    config = {"env": ["FOO=one two"], "cmd": ["go"], "workingDir": "/work"}
    answer = api.submit(containerImage=base, containerConfig=config, freeze=True, buildRepository=target)
    build = await build_of(redis, answer)
    name = f"{target}:{build.spec.container_id}"
    assert answer == {
        "requestId": answer["requestId"],
        "targetImage": name,
        "containerImage": name,
        "buildId": build.build_id,
        "cached": False,
        "freeze": True,
        "mirror": False,
    }
    assert build.spec.container_file == (
        f"# wave generated container file\nFROM {base}\n"
        'ENV WAVE_ENTRY_CHAIN="/entry --now"\nWORKDIR /work\nENV FOO="one two"\nCMD ["go"]\n'
    )
    legacy = api.submit(
        "/container-token", containerImage=base, containerConfig=config, freeze=True, buildRepository=target
    )
    assert legacy["targetImage"] == name
    assert legacy["containerToken"] == legacy["requestId"]


async def test_a_build_for_several_platforms_is_one_build(api: ApiServer, redis: str) -> None:
    answer = api.submit(**dockerfile("FROM ubuntu:latest"), containerPlatform="linux/amd64,linux/arm64")
    build = await build_of(redis, answer)
    assert build.spec.platforms == ("linux/amd64", "linux/arm64")
    other = await build_of(redis, api.submit(**dockerfile("FROM ubuntu:latest"), containerPlatform="amd64"))
    assert other.spec.container_id != build.spec.container_id


def test_an_image_to_freeze_that_does_not_exist(api: ApiServer, registry: Upstream) -> None:
    missing = f"{registry.address}/library/base:2.0"
    said = api.refuse(containerImage=missing, freeze=True, buildRepository=f"{registry.address}/mine/frozen")
    assert said == (400, f"Container image '{missing}' does not exist or access is not authorized")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_singularity_is_named_and_not_built_yet(api: ApiServer, registry: Upstream) -> None:
    attributes: dict[str, Any] = {
        "packages": CONDA,
        "format": "sif",
        "freeze": True,
        "buildRepository": f"{registry.address}/mine/sif",
    }
    named = api.submit(**attributes, dryRun=True)
    assert named["targetImage"].startswith(f"oras://{registry.address}/mine/sif:salmon_bwa--")
    status, message = api.refuse(**attributes)
    assert status == 501
    assert "Singularity images are not built by this version yet" in message


@pytest.mark.parametrize(
    ("attributes", "status", "words"),
    [
        pytest.param({"containerFile": "RlJPTQ"}, 400, "Invalid 'containerFile' attribute", id="padding"),
        pytest.param(dockerfile("FROM x\nCOPY /kaniko /\n"), 400, "not allowed (error code: 101)", id="forbidden"),
        pytest.param(
            {
                **dockerfile("FROM x\n"),
                "containerPlatform": "linux/amd64,linux/arm64",
                "freeze": True,
                "buildRepository": "x.test/y",
                "containerConfig": {
                    "layers": [
                        {
                            "location": "https://fusionfs.seqera.io/releases/pkg/2/4/fusion-arm64.tar.gz",
                            "gzipDigest": f"sha256:{'0' * 64}",
                            "gzipSize": 3,
                            "tarDigest": f"sha256:{'0' * 64}",
                        }
                    ]
                },
            },
            400,
            "containerConfig.layers[0]: a layer of one architecture",
            id="platforms",
        ),
        pytest.param(
            {**dockerfile("FROM x\n"), "buildRepository": "10.0.0.1:5000/x"}, 400, "buildRepository", id="private"
        ),
        pytest.param(
            {
                **dockerfile("FROM x\n"),
                "buildContext": {
                    "location": "data:AAAA",
                    "gzipDigest": f"sha256:{'0' * 64}",
                    "gzipSize": 3,
                    "tarDigest": f"sha256:{'0' * 64}",
                },
            },
            400,
            "buildContext: gzipDigest is",
            id="context",
        ),
    ],
)
def test_what_can_not_be_built(api: ApiServer, attributes: dict[str, Any], status: int, words: str) -> None:
    said = api.refuse(**attributes)
    assert said[0] == status
    assert words in said[1]


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("local/build", False),
        ("local/cached", False),
        ("local/cache", True),
        ("local/cache/mine", True),
        ("x/y", False),
    ],
)
def test_a_local_cache_is_not_where_images_are(api: ApiServer, name: str, allowed: bool) -> None:
    answer = api.post(**dockerfile("FROM base\n"), cacheRepository=f"{AUTHORITY}/{name}", dryRun=True)
    assert answer.status == (200 if allowed else 400)
    if not allowed:
        assert f"cacheRepository: a local one begins with {AUTHORITY}/local/cache" in answer.json()["message"]


@pytest.mark.parametrize("name", ["library/x", "local", "wt/0123456789abcdef0123456789abcdef/local/x"])
def test_images_are_pushed_to_local_repositories_of_this_server(api: ApiServer, name: str) -> None:
    status, message = api.refuse(**dockerfile("FROM base\n"), buildRepository=f"{AUTHORITY}/{name}")
    assert status == 400
    assert f"buildRepository: on this server it begins with {AUTHORITY}/local/, got " in message


def test_a_conda_file_of_the_newer_endpoint_is_built_and_warned_of(api: ApiServer) -> None:
    answer = api.post(condaFile=base64("dependencies:\n- samtools=1.9\n"))
    assert answer.status == 200
    assert answer.headers["warning"].startswith('299 - "Attribute `condaFile` is deprecated')
    assert ":samtools-1.9--" in answer.json()["containerImage"]


def test_builds_over_the_limit_are_refused(redis: str, registry: Upstream) -> None:
    repository = f"{registry.address}/limited/dev"
    quotas = {("build", False): Limit(2, 3600.0)}
    with ApiServer(redis, upstreams=[registry.address], build_repository=repository, quotas=quotas) as api:
        for text in ("one", "two", "one", "two", "one"):
            assert api.submit(**dockerfile(f"FROM base\nRUN {text}\n"))["cached"] is False
        refused = api.post(**dockerfile("FROM base\nRUN three\n"))
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) > 0
        assert "Request exceeded build rate limit for IP 127.0.0.1" in refused.json()["message"]
        assert api.post(**dockerfile("FROM base\nRUN three\n"), dryRun=True).status == 200


async def test_contexts_of_builds_that_are_refused_are_not_kept(tmp_path: Path, registry: Upstream) -> None:
    def asked(number: int) -> dict[str, Any]:
        context = layer({"context": random_blob(10_000, seed=number)})
        return {**dockerfile("FROM base\nCOPY context /\n"), "buildContext": context.inline()}

    repository, quotas = f"{registry.address}/contexts/dev", {("build", False): Limit(2, 3600.0)}
    with redis_server(tmp_path) as redis:
        with ApiServer(redis, upstreams=[registry.address], build_repository=repository, quotas=quotas) as api:
            assert [api.post(**asked(number)).status for number in (1, 2, 3, 1, 4)] == [200, 200, 429, 200, 429]
        sizes = {"anonymous": 20_000}
        with ApiServer(redis, upstreams=[registry.address], build_repository=repository, sizes=sizes) as api:
            assert [api.post(**asked(number)).status for number in (1, 5, 6, 7, 1)] == [200, 200, 200, 429, 429]
        client = connect(redis)
        try:
            assert len(await client.keys("wave:layer:*")) == 4
        finally:
            await client.aclose()


async def test_builds_are_counted_when_they_begin(redis: str, registry: Upstream) -> None:
    client = connect(redis)
    try:
        before = (await Usage(client).read("builds", None, "")).count
        with ApiServer(redis, upstreams=[registry.address], build_repository=f"{registry.address}/counted/dev") as api:
            for text in ("a", "b", "a"):
                api.submit(**dockerfile(f"FROM base\nRUN count {text}\n"))
        after = (await Usage(client).read("builds", None, "")).count
    finally:
        await client.aclose()
    assert after - before == 2
