"""Nextflow's plugin, exchanged with the whole program: every property with its nulls, errors, older versions."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bench.images import layer
from bench.upstream import Upstream
from tests.contract import nextflow
from tests.contract.archives import pack
from tests.contract.conftest import Service, add_images
from tests.contract.nextflow import Failed, Nextflow, conda, conda_file, config, read_build_status, submission
from tests.contract.wave_cli import MANIFEST_TYPES, WaveCli
from tests.contract.wave_cli import submission as cli_submission
from tests.contract.wire import Connection
from tests.patience import until
from tests.servers import WaveProxy

V2 = "/v1alpha2/container"
FILE = "RlJPTSB1YnVudHUKUlVOIHRydWUK"
BUNDLE = {"bin/tool": "#!/bin/sh\n", "modules/local/x/main.nf": "process X {}\n"}


@pytest.fixture
def run(service: Service) -> Nextflow:
    """A run without a token."""
    return Nextflow(service.address, pause_s=0.02)


@pytest.fixture
def identified(service: Service) -> Nextflow:
    """A run with one."""
    return Nextflow(service.address, service.token, pause_s=0.02)


def test_the_body_is_that_of_the_plugin() -> None:
    body = json.loads(submission(containerImage="ubuntu:latest"))
    assert list(body) == list(nextflow.PROPERTIES)
    assert list(body["containerConfig"]) == list(nextflow.CONFIG)
    assert [name for name, value in body.items() if value is not None] == [
        "towerEndpoint",
        "containerImage",
        "containerConfig",
        "containerPlatform",
        "timestamp",
        "fingerprint",
        "freeze",
        "dryRun",
        "mirror",
    ]


# Every property, each with the values that a run gives it.
PROPERTIES: dict[str, dict[str, Any]] = {
    "nulls": {},
    "containerImage": {"containerImage": "docker.io/library/ubuntu:24.04"},
    "containerConfig": {"containerConfig": config(entrypoint=["/e"], cmd=["c"], env=["A=1"], workingDir="/w")},
    "containerConfig is null": {"containerConfig": None},
    "no layers": {"containerConfig": config(layers=[])},
    "module bundle": {"containerConfig": config(layers=[pack(BUNDLE, folders=True)])},
    "containerPlatform": {"containerPlatform": "linux/arm64"},
    "containerPlatform is null": {"containerPlatform": None},
    "buildRepository": {"buildRepository": "quay.io/acme/builds", "cacheRepository": "quay.io/acme/cache"},
    "timestamp and fingerprint are null": {"timestamp": None, "fingerprint": None},
    "timestamp": {"timestamp": "2026-11-23T21:21:13.494450026+01:00"},
    "dryRun": {"dryRun": True},
    "workflowId": {"workflowId": "3Xk2aBcD4e"},
    "containerIncludes": {"containerIncludes": ["acme/tools:v1"]},
    "nameStrategy": {"nameStrategy": "imageSuffix"},
    "scanMode": {"scanMode": "none", "scanLevels": ["LOW", "MEDIUM"]},
    "buildCompression": {"buildCompression": nextflow.filled(nextflow.COMPRESSION, {"mode": "zstd", "level": 3})},
    "buildTemplate": {"buildTemplate": "conda/micromamba:v2"},
    "towerEndpoint is null": {"towerEndpoint": None},
    "towerEndpoint": {"towerEndpoint": "https://api.tower.nf"},
    "towerWorkspaceId": {"towerWorkspaceId": 90071992547409},
    "towerRefreshToken": {"towerRefreshToken": "eyJ0aWQi"},
}


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("user", ["anonymous", "identified"])
def test_an_image_that_is_there(service: Service, user: str, name: str) -> None:
    run = Nextflow(service.address, service.token if user == "identified" else "", pause_s=0.02)
    answer = run.submit(**{"containerImage": "ubuntu:latest", **PROPERTIES[name]})
    run.await_(answer)
    assert re.fullmatch(r"localhost:\d+/wt/[0-9a-f]{32}/library/ubuntu:(latest|24\.04)", answer["targetImage"])
    assert answer["requestId"] in answer["targetImage"]
    assert (answer["freeze"], answer["mirror"], answer["succeeded"]) == (False, False, True)
    service.wave.pull(answer["targetImage"])


def test_a_token_outlives_the_plugins_memory_of_it(run: Nextflow) -> None:
    """For half an hour it asks no second time for the same image, and then the task has yet to begin."""
    expiration = datetime.fromisoformat(run.submit(containerImage="ubuntu")["expiration"])
    assert expiration - datetime.now(UTC) > timedelta(hours=24)


def test_files_of_a_bundle_come_with_their_folders(service: Service, run: Nextflow) -> None:
    layers = [pack(BUNDLE, folders=True), pack({"other": "1"})]
    answer = run.submit(containerImage="ubuntu", containerConfig=config(layers=layers))
    pulled = service.wave.pull(answer["targetImage"])
    added = pulled.children[0].document["layers"][1:]
    assert [blob["digest"] for blob in added] == [packed["gzipDigest"] for packed in layers]


def test_a_linked_layer_is_served(service: Service, run: Nextflow) -> None:
    fusion = layer({"fusion": "binary"})
    service.registry.add_blob("fusionfs/pkg", fusion)
    location = f"{service.registry.url}/v2/fusionfs/pkg/blobs/{fusion.digest}"
    linked = {**fusion.described(), "location": location, "skipHashing": True}
    answer = run.submit(containerImage="ubuntu", containerConfig=config(layers=[linked]))
    pulled = service.wave.pull(answer["targetImage"])
    assert pulled.children[0].layers[-1] == fusion.content


def test_fusion_is_taken_and_told_of(run: Nextflow) -> None:
    """Its layers are linked, one for the task's platform; the plugin merges them in from a file that it reads."""
    location = "https://fusionfs.seqera.io/releases/pkg/2/4/fusion-amd64.tar.gz"
    fusion = {**layer({"fusion": "1"}).described(), "location": location, "skipHashing": True}
    settings = config(entrypoint=["/usr/bin/fusion"], layers=[pack(BUNDLE, folders=True), fusion])
    answer = run.submit(containerImage="ubuntu", containerConfig=settings)
    assert answer["succeeded"] is True
    record = json.loads(run.ask("GET", f"{V2}/{answer['requestId']}").body)
    assert record["fusionVersion"] == "2.4"
    assert [item["location"] for item in record["containerConfig"]["layers"]] == ["data:DATA+OMITTED", location]


# --- builds ----------------------------------------------------------------------------------------------------------

BUILDS: dict[str, dict[str, Any]] = {
    "dockerfile": {"containerFile": FILE},
    "conda": {"packages": conda("bwa=0.7.15", "salmon")},
    "conda file": {"packages": conda_file("channels:\n- bioconda\ndependencies:\n- bwa\n")},
    "conda lock": {"packages": conda("https://prefix.dev/envs/acme/lock.yml")},
    "template": {"packages": conda("numpy"), "buildTemplate": "conda/pixi:v1"},
    "compression": {"containerFile": FILE, "buildCompression": {"mode": "gzip", "level": 9, "force": True}},
    "name strategy": {"packages": conda("numpy"), "nameStrategy": "imageSuffix"},
    "bundle": {"containerFile": FILE, "containerConfig": config(layers=[pack(BUNDLE, folders=True)])},
    "repositories": {
        "containerFile": FILE,
        "buildRepository": "quay.io/acme/nf",
        "cacheRepository": "quay.io/acme/cache",
    },
}


@pytest.mark.parametrize("name", BUILDS)
def test_an_image_that_is_built(run: Nextflow, name: str) -> None:
    asked = {"containerPlatform": "linux/amd64", **BUILDS[name]}
    answer = run.submit(**asked)
    assert re.fullmatch(r"bd-[0-9a-f]{16}_\d+", answer["buildId"])
    assert answer["mirror"] is False
    with pytest.raises(Failed, match=r"^Wave provisioning for container 'localhost:\d+/wt/") as caught:
        run.await_(answer)
    assert "\n- Reason: Container build did not complete successfully\n- Find out more here: http://" in str(
        caught.value
    )
    assert str(caught.value).endswith(f"/view/builds/{answer['buildId']}")


def test_a_build_that_has_failed_just_now_is_no_news(run: Nextflow) -> None:
    """The answer says so at once, and the plugin asks for the status all the same; the command line does not."""
    asked = {"containerFile": nextflow.base64("FROM fails/again\n")}
    with pytest.raises(Failed):
        run.await_(run.submit(**asked))
    again = run.submit(**asked)
    assert (again["cached"], again["succeeded"]) == (True, False)
    with pytest.raises(Failed, match="Container build did not complete successfully"):
        run.await_(again)
    cli = WaveCli(run.address)
    assert cli.await_(cli.submit(cli_submission(**asked))) is None


FROZEN: dict[str, dict[str, Any]] = {
    "image": {"containerImage": "ubuntu", "containerConfig": config(env=["A=1"])},
    "dockerfile": {"containerFile": FILE},
    "conda": {"packages": conda("bwa")},
    "singularity": {"packages": conda("bwa"), "format": "sif", "dryRun": True},
    "singularity of an image": {"containerImage": "ubuntu", "format": "sif", "dryRun": True},
}


@pytest.mark.parametrize("name", FROZEN)
def test_an_image_that_lasts(run: Nextflow, name: str) -> None:
    answer = run.submit(freeze=True, buildRepository="quay.io/acme/nf-frozen", **FROZEN[name])
    assert answer["targetImage"] == answer["containerImage"]
    assert "quay.io/acme/nf-frozen:" in answer["targetImage"]
    assert answer["freeze"] is True
    assert "containerToken" not in answer


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_polling_is_cheap_and_never_limited(service: Service, run: Nextflow) -> None:
    answer = run.submit(containerImage="ubuntu")
    path = f"{V2}/{answer['requestId']}/status"

    def poll(_: int) -> list[int]:
        with Connection(service.address) as connection:
            return [connection.ask("GET", path, run.headers(None)).status for _ in range(250)]

    with ThreadPoolExecutor(4) as pool:
        statuses = [status for found in pool.map(poll, range(4)) for status in found]
    assert statuses == [200] * 1000


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[WaveProxy]:
    """A service where a build an hour is free to everybody, and a pull."""
    with Upstream() as registry:
        add_images(registry)
        text = '[quota]\nbuild_anonymous = "1/1h"\npull_anonymous = "1/1h"\nwait = "0s"\n'
        text += '[build]\nengine = "buildkit"\nbuildkit_address = "tcp://127.0.0.1:1"\n'
        text += f'[registries."docker.io"]\nendpoint = "{registry.url}"\n'
        with WaveProxy(tmp_path / "wave", config=text, upstreams=[registry.address]) as wave:
            yield wave


def test_too_many_submits_say_when_to_come_back_and_polling_goes_on(limited: WaveProxy) -> None:
    run = Nextflow(limited.address)
    for _ in range(3):
        run.submit(containerImage="ubuntu")  # no pull (decision 11)
    answer = run.submit(containerFile=FILE)
    refused = run.ask("POST", V2, submission(containerFile="RlJPTSBvdGhlcgo="))
    assert refused.status == 429
    assert refused.status in nextflow.RETRIED
    retry_after = refused.header("Retry-After")
    assert retry_after is not None
    assert re.fullmatch(r"[1-9]\d*", retry_after)
    assert int(retry_after) <= 60
    assert list(refused.document()) == ["message"]
    path = f"{V2}/{answer['requestId']}/status"
    with Connection(limited.address) as connection:
        assert {connection.ask("GET", path, run.headers(None)).status for _ in range(300)} == {200}
        build = f"/v1alpha1/builds/{answer['buildId']}/status"
        assert {connection.ask("GET", build, run.headers(None)).status for _ in range(300)} == {200}


# --- who asks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bearer", ["eyJhbGciOiJIUzI1NiJ9.e30.x", "TOKEN", "", "a b", "é"])
def test_a_strange_bearer_header_changes_nothing(service: Service, bearer: str) -> None:
    run = Nextflow(service.address, bearer, pause_s=0.02)
    good = run.ask("POST", V2, submission(containerImage="ubuntu", towerAccessToken=service.token))
    assert good.status == 200
    anonymous = run.ask("POST", V2, submission(containerImage="ubuntu"))
    assert anonymous.status == 200
    path = f"{V2}/{good.document()['requestId']}/status"
    assert run.ask("GET", path).status == 200


def test_a_bad_token_is_an_error_that_is_not_retried(service: Service) -> None:
    run = Nextflow(service.address, f"{service.token[:-4]}aaaa")
    answer = run.ask("POST", V2, submission(containerImage="ubuntu", towerAccessToken=run.token))
    assert answer.status == 401
    assert answer.status not in nextflow.RETRIED


def test_the_header_follows_a_refreshed_token_while_the_body_does_not(service: Service) -> None:
    old = f"{service.token[:-4]}aaaa"
    run = Nextflow(service.address, service.token)
    answer = run.ask("POST", V2, submission(containerImage="ubuntu", towerAccessToken=old))
    assert answer.status == 401, "the body's token decides about the operator's own tokens"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        pytest.param({"containerImage": "none/such"}, "does not exist or access is not authorized", id="no image"),
        pytest.param({"containerImage": "ubuntu", "containerFile": FILE}, "cannot be used in the same", id="both"),
        pytest.param({"containerFile": "FROM ubuntu"}, "Invalid 'containerFile' attribute", id="not base64"),
        pytest.param({"containerImage": "ubuntu", "scanLevels": ["low"]}, "scanLevels[0]", id="lower case"),
    ],
)
def test_what_is_wrong_is_told(service: Service, run: Nextflow, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(Failed) as caught:
        run.submit(**asked)
    prefix = f'Wave invalid response: POST http://{service.address}{V2} [400] {{"message":"'
    assert str(caught.value).startswith(prefix)
    assert words in str(caught.value)


def test_a_registry_that_is_out_of_reach_is_worth_another_try(tmp_path: Path, wave: Callable[..., WaveProxy]) -> None:
    with Upstream() as registry:
        program = wave(upstreams=[registry.address])
    run = Nextflow(program.address)
    answer = run.ask("POST", V2, submission(containerImage=f"{registry.address}/library/ubuntu:latest"))
    assert answer.status == 503
    assert answer.status in nextflow.RETRIED
    retry_after = answer.header("Retry-After")
    assert retry_after is not None
    assert retry_after.isdecimal()


# --- older versions --------------------------------------------------------------------------------------------------

OLD = (
    *("towerAccessToken", "towerRefreshToken", "towerWorkspaceId", "towerEndpoint", "containerImage", "containerFile"),
    *("containerConfig", "condaFile", "spackFile", "containerPlatform", "buildRepository", "cacheRepository"),
    *("timestamp", "fingerprint", "freeze", "format", "dryRun"),
)


def old_submission(**given: Any) -> bytes:
    """The body of 22.10 to 23.10."""
    usual = {"towerEndpoint": "https://api.tower.nf", "containerConfig": config(), "freeze": False, "dryRun": False}
    usual |= {"timestamp": "2023-07-01T10:00:00.123456789Z", "fingerprint": "2d2203c04b701332d6399752fee2c6f5"}
    return json.dumps(nextflow.filled(OLD, usual | given)).encode()


def test_an_image_for_version_23(run: Nextflow) -> None:
    answer = run.ask("POST", "/container-token", old_submission(containerImage="ubuntu"))
    document = nextflow.read(answer, "POST", "/container-token")
    host, _, rest = nextflow.read_submitted(document, {}).partition("/")
    assert host
    with Connection(run.address) as connection:
        types = tuple(("Accept", name) for name in MANIFEST_TYPES)
        manifest = connection.ask("GET", f"/v2/{rest.replace(':', '/manifests/')}", (*run.headers(None), *types))
    assert manifest.status == 200


def test_a_conda_file_for_version_23(run: Nextflow) -> None:
    asked = {"containerFile": FILE, "condaFile": nextflow.base64("dependencies:\n- bwa=0.7.15\n")}
    answer = run.ask("POST", "/container-token", old_submission(**asked))
    document = nextflow.read(answer, "POST", "/container-token")
    assert "local/build:bwa-0.7.15--" in nextflow.read_submitted(document, {})


def test_a_build_for_version_24_04(run: Nextflow) -> None:
    answer = run.submit(packages=conda("bwa"), freeze=True, buildRepository="quay.io/acme/nf-24")
    path = f"/v1alpha1/builds/{answer['buildId']}/status"

    def has_ended() -> bool:
        return bool(read_build_status(run.ask("GET", path).document())["status"] == "COMPLETED")

    until(has_ended, "the build does not end")
    assert run.ask("GET", path).document()["succeeded"] is False
