"""Every option of the ``wave`` command line, exchanged with the whole program as that program would."""

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from random import Random
from tarfile import open as open_tar
from typing import Any

import pytest

from tests.contract.archives import pack
from tests.contract.conftest import TOOLS, UBUNTU, UBUNTU_ARM, Service
from tests.contract.wave_cli import (
    MANIFEST_TYPES,
    Failed,
    WaveCli,
    base64,
    conda,
    configured,
    cran,
    headers,
    held_manifest,
    read_inspected,
    read_service_info,
    read_status,
    read_submitted,
    submission,
)
from tests.contract.wire import Connection
from tests.servers import PulledImage

V2 = "/v1alpha2/container"
_NUMBERS = count()


@dataclass(frozen=True)
class Case:
    """What an option adds to the body, and what comes of it: words in the pulled image's config, or in the build."""

    parts: tuple[Mapping[str, Any], ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    wanted: Mapping[str, Any] = field(default_factory=dict)

    def body(self, **more: Any) -> bytes:
        """The whole body."""
        return submission(*self.parts, **{**self.attributes, **more})


def case(*parts: Mapping[str, Any], wanted: Mapping[str, Any] | None = None, **attributes: Any) -> Case:
    return Case(parts, attributes, wanted or {})


@pytest.fixture
def cli(service: Service) -> WaveCli:
    """The program, in a hurry."""
    return WaveCli(service.address, pause_s=0.05)


def platforms(image: PulledImage) -> dict[str, PulledImage]:
    """Architecture to image."""
    return {found.config["architecture"]: found for found in image.children or (image,)}


def files_of(content: bytes) -> dict[str, bytes]:
    """The files of a layer."""
    with open_tar(fileobj=BytesIO(gzip.decompress(content))) as archive:
        found = {entry.name: archive.extractfile(entry) for entry in archive}
    return {name: file.read() for name, file in found.items() if file}


# --- images that are there -------------------------------------------------------------------------------------------

CHAIN = "WAVE_ENTRY_CHAIN=/entry"  # the image's own, for what runs in front of it
LONG = f"a/{'b' * 120}/{'c' * 120}"
IMAGES: dict[str, Case] = {
    "--image": case(wanted={"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "Entrypoint": ["/entry"]}),
    "--config-env": case(configured(env=["A=1", "B=x=y z"]), wanted={"Env": ["PATH=/bin", "A=1", "B=x=y z", CHAIN]}),
    "--config-cmd": case(configured(cmd=["echo a b"]), wanted={"Cmd": ["echo a b"]}),
    "--config-entrypoint": case(configured(entrypoint=["/bin/run me"]), wanted={"Entrypoint": ["/bin/run me"]}),
    "--config-working-dir": case(configured(workingDir="/work"), wanted={"WorkingDir": "/work"}),
    "--config-file": case(
        configured({"entrypoint": ["/a"], "cmd": ["b", "c"], "env": ["D=1"], "workingDir": "/e"}, env=["F=2"]),
        wanted={"Entrypoint": ["/a"], "Cmd": ["b", "c"], "Env": ["PATH=/bin", "F=2", CHAIN], "WorkingDir": "/e"},
    ),
    "--layer": case(configured(layers=[{"x/y": "one"}, {"x/z": "two", LONG: "long"}])),
    "--include": case(containerIncludes=["acme/tools:v1"], containerPlatform="linux/amd64"),
    "--platform": case(containerPlatform="linux/arm64", wanted={"Cmd": ["/bin/sh"]}),
    "--preserve-timestamp": case(configured(layers=[{"kept": "time"}])),
    "--scan-mode none": case(scanMode="none"),
    "--scan-level": case(scanMode="none", scanLevels=["LOW", "MEDIUM", "HIGH", "CRITICAL"]),
    "--dry-run": case(dryRun=True),
    "--tower-endpoint null": case(towerEndpoint=None),
    "--tower-endpoint": case(towerEndpoint="https://api.tower.nf"),
    "--cache-repo": case(cacheRepository="quay.io/acme/cache"),
    "--build-repo": case(buildRepository="quay.io/acme/builds"),
    "--name-strategy": case(nameStrategy="imageSuffix"),
    "--build-compression": case(buildCompression={"mode": "zstd"}),
    "--build-template": case(buildTemplate="conda/micromamba:v2"),
}


@pytest.mark.parametrize("option", IMAGES)
def test_an_image_that_is_there(service: Service, cli: WaveCli, option: str) -> None:
    answer = cli.submit(IMAGES[option].body(containerImage="ubuntu"))
    token = answer["containerToken"]
    assert answer["requestId"] == token
    assert answer["targetImage"].endswith(f"/wt/{token}/library/ubuntu:latest")
    assert answer["containerImage"] == "docker.io/library/ubuntu:latest"
    assert (answer["freeze"], answer["mirror"], answer["succeeded"]) == (False, False, True)
    assert cli.await_(answer) is None
    pulled = platforms(service.wave.pull(answer["targetImage"]))
    image = pulled["arm64" if option == "--platform" else "amd64"]
    assert {name: image.config["config"][name] for name in IMAGES[option].wanted} == IMAGES[option].wanted


def test_layers_arrive_in_their_order(service: Service, cli: WaveCli) -> None:
    answer = cli.submit(IMAGES["--layer"].body(containerImage="ubuntu"))
    for pulled in platforms(service.wave.pull(answer["targetImage"])).values():
        assert [files_of(content) for content in pulled.layers[1:]] == [
            {"x/y": b"one"},
            {"x/z": b"two", LONG: b"long"},
        ]


def test_layers_of_included_images_arrive(service: Service, cli: WaveCli) -> None:
    answer = cli.submit(IMAGES["--include"].body(containerImage="ubuntu"))
    pulled = platforms(service.wave.pull(answer["targetImage"]))["amd64"]
    assert [files_of(content) for content in pulled.layers[1:]] == [{"opt/tools": b"1"}, {"opt/more": b"2"}]


@pytest.mark.parametrize(
    "platform", ["amd64", "x86_64", "linux/amd64", "linux/x86_64", "arm64", "linux/arm64", "aarch64"]
)
def test_platforms_as_they_are_typed(service: Service, cli: WaveCli, platform: str) -> None:
    answer = cli.submit(submission(configured(env=["A=1"]), containerImage="ubuntu", containerPlatform=platform))
    pulled = platforms(service.wave.pull(answer["targetImage"]))
    wanted = "arm64" if platform.endswith(("arm64", "aarch64")) else "amd64"
    assert "A=1" in pulled[wanted].config["config"]["Env"]


def test_layers_of_ten_mebibytes(cli: WaveCli) -> None:
    layers = [{"large": made_bytes(1 << 20, seed)} for seed in range(9)]
    body = submission(configured(layers=layers), containerImage="ubuntu")
    assert len(body) > 12_000_000
    assert cli.submit(body)["succeeded"] is True


def made_bytes(size: int, seed: int) -> bytes:
    """Bytes that do not get smaller when they are packed."""
    return Random(seed).randbytes(size)


@pytest.mark.parametrize("option", ["--scan-mode async", "--scan-mode required"])
def test_a_server_without_scans_says_so(cli: WaveCli, option: str) -> None:
    body = submission(containerImage="ubuntu", scanMode=option.split()[1], scanLevels=["LOW"])
    with pytest.raises(Failed) as caught:
        cli.submit(body)
    shown = str(caught.value)
    assert shown.startswith('Wave invalid response: [501] {"message":"Security scan service is not enabled')


# --- images that are built -------------------------------------------------------------------------------------------

FILE = base64("FROM ubuntu:24.04\nRUN true\n")
ENVIRONMENT = "channels:\n- bioconda\ndependencies:\n- samtools=1.17\n"
LOCK = "https://prefix.dev/envs/acme/lock.yml"
BUILDS: dict[str, Case] = {
    "--containerfile": case(containerFile=FILE, wanted={"dockerFile": "FROM ubuntu:24.04\nRUN true\n"}),
    "--context": case(containerFile=FILE, wanted={"dockerFile": "RUN true"}),
    "--platform": case(
        containerFile=FILE,
        containerPlatform="linux/arm64",
        wanted={"dockerFile": "RUN true", "platform": "linux/arm64"},
    ),
    "--conda": case(conda("bwa=0.7.15", "salmon"), wanted={"condaFile": "- bwa=0.7.15\n- salmon\n"}),
    "--conda lock": case(conda(LOCK), wanted={"dockerFile": LOCK}),
    "--conda-file": case(conda(file=ENVIRONMENT), wanted={"condaFile": "- samtools=1.17\n"}),
    "--conda-channels": case(
        conda("bwa", channels="bioconda defaults"), wanted={"condaFile": "channels:\n- bioconda\n- defaults\n"}
    ),
    "--conda-base-image": case(
        conda("bwa", base_image="acme/micromamba:1"), wanted={"dockerFile": "FROM acme/micromamba:1\n"}
    ),
    "--conda-run-command": case(
        conda("bwa", run_command=["RUN echo one", "USER root"]), wanted={"dockerFile": "RUN echo one\nUSER root\n"}
    ),
    "--pixi-image": case(
        conda("numpy", pixi_image="acme/pixi:1"),
        buildTemplate="conda/pixi:v1",
        wanted={"dockerFile": "FROM acme/pixi:1 AS build\n", "buildTemplate": "conda/pixi:v1"},
    ),
    "--pixi-base-image": case(
        conda("numpy", pixi_base_image="debian:12"),
        buildTemplate="conda/pixi:v1",
        wanted={"dockerFile": "FROM debian:12\n"},
    ),
    "--pixi-base-packages": case(
        conda("numpy", pixi_base_packages="conda-forge::jq"),
        buildTemplate="conda/pixi:v1",
        wanted={"dockerFile": "conda-forge::jq"},
    ),
    "--pixi-run-command": case(
        conda("numpy", pixi_run_command=["RUN echo pixi"]),
        buildTemplate="conda/pixi:v1",
        wanted={"dockerFile": "RUN echo pixi\n"},
    ),
    "--cran": case(cran("dplyr", "bioc::limma"), wanted={"dockerFile": "FROM rocker/r-ver:4.4.1\n"}),
    "--cran-base-image": case(cran("dplyr", base_image="acme/r:4"), wanted={"dockerFile": "FROM acme/r:4\n"}),
    "--cran-run-command": case(cran("dplyr", run_command=["RUN echo r"]), wanted={"dockerFile": "RUN echo r\n"}),
    **{
        f"--build-template {name}": case(packages, buildTemplate=name, wanted={"buildTemplate": name})
        for name, packages in (
            ("conda/micromamba:v1", conda("bwa")),
            ("conda/micromamba:v2", conda("bwa")),
            ("conda/pixi:v1", conda("bwa")),
            ("cran/installr:v1", cran("dplyr")),
        )
    },
    **{
        f"--build-compression {mode}": case(
            containerFile=FILE, buildCompression={"mode": mode}, wanted={"compression": {"mode": mode}}
        )
        for mode in ("gzip", "zstd", "estargz")
    },
    "--build-repo": case(containerFile=FILE, buildRepository="quay.io/acme/builds"),
    "--cache-repo": case(containerFile=FILE, cacheRepository="quay.io/acme/cache"),
    **{
        f"--name-strategy {name}": case(conda("samtools=1.17"), nameStrategy=name)
        for name in ("none", "tagPrefix", "imageSuffix")
    },
    "--layer": case(configured(layers=[{"x": "y"}]), containerFile=FILE),
}
# What makes each build another one: a build is shared by all who ask for the same.
NAMES = {
    "--name-strategy none": "/local/build:{}",
    "--name-strategy tagPrefix": "/local/build:samtools-1.17--{}",
    "--name-strategy imageSuffix": "/local/build/samtools:1.17--{}",
    "--build-repo": "/acme/builds:{}",
}


def unlike_others(option: str) -> dict[str, Any]:
    """A build context, which changes the id and nothing that is looked at."""
    return pack({option: f"{next(_NUMBERS)}"})


@pytest.mark.parametrize("option", BUILDS)
def test_an_image_that_is_built(cli: WaveCli, option: str) -> None:
    answer = cli.submit(BUILDS[option].body(buildContext=unlike_others(option)))
    build_id, token = answer["buildId"], answer["containerToken"]
    assert re.fullmatch(r"bd-[0-9a-f]{16}_1", build_id)
    assert (answer["requestId"], answer["cached"], answer["freeze"]) == (token, False, False)
    assert "succeeded" not in answer
    assert f"/wt/{token}/" in answer["targetImage"]
    assert answer["targetImage"].endswith(NAMES.get(option, "{}").format(build_id[3:19]))
    read_status(cli.get(f"{V2}/{token}/status"))
    build = json.loads(cli.get(f"/v1alpha1/builds/{build_id}").body)
    for name, words in BUILDS[option].wanted.items():
        assert words in build[name] if isinstance(words, str) else build[name] == words
    request = json.loads(cli.get(f"{V2}/{token}").body)
    if option == "--cache-repo":
        assert request["cacheRepository"] == "quay.io/acme/cache"
    if option == "--build-repo":
        assert request["buildRepository"] == "quay.io/acme/builds"


def test_two_platforms_are_built(cli: WaveCli) -> None:
    body = submission(
        containerFile=FILE, containerPlatform="linux/amd64,linux/arm64", buildContext=unlike_others("platforms")
    )
    answer = cli.submit(body)
    assert "succeeded" not in answer
    with pytest.raises(Failed, match="Container provisioning did not complete successfully"):
        cli.await_(answer)


FROZEN: dict[str, Case] = {
    "--freeze of a file": case(containerFile=FILE),
    "--freeze of an image": case(configured(env=["A=1"]), containerImage="ubuntu"),
    "--freeze of packages": case(conda("bwa")),
    "--singularity": case(conda("bwa"), format="sif", dryRun=True),
    "--singularity of an image": case(containerImage="ubuntu", format="sif", dryRun=True),
}


@pytest.mark.parametrize("option", FROZEN)
def test_an_image_that_lasts(cli: WaveCli, option: str) -> None:
    more = {} if "image" in option else {"buildContext": unlike_others(option)}
    answer = cli.submit(FROZEN[option].body(freeze=True, buildRepository="quay.io/acme/frozen", **more))
    name = answer["targetImage"]
    assert answer["containerImage"] == name
    assert "containerToken" not in answer
    assert "expiration" not in answer
    assert answer["requestId"]
    assert (answer["freeze"], answer["mirror"]) == (True, False)
    scheme = "oras://" if "--singularity" in option else ""
    assert name.startswith(f"{scheme}quay.io/acme/frozen:")


def test_a_token_identifies_its_user(service: Service, cli: WaveCli) -> None:
    body = submission(containerImage="ubuntu", towerAccessToken=service.token, towerWorkspaceId=1234)
    answer = cli.submit(body)
    record = json.loads(cli.get(f"{V2}/{answer['requestId']}").body)
    assert record["workspaceId"] == 1234
    assert record["user"]["id"] > 0


def test_a_token_that_nobody_knows_is_refused(cli: WaveCli) -> None:
    with pytest.raises(Failed, match=r"^Wave invalid response: \[40[01]\]"):
        cli.submit(submission(containerImage="ubuntu", towerAccessToken="eyJ0aWQiOiAxfQ"))


def test_every_option_is_exchanged() -> None:
    seen = {name.split()[0] for name in (*IMAGES, *BUILDS, *FROZEN)}
    of_tests = {"--mirror", "--tower-token", "--tower-workspace-id", "--await", "--inspect", "--info"}
    documented = """--image --containerfile --context --layer --config-env --config-cmd --config-entrypoint
        --config-working-dir --config-file --conda --conda-file --conda-channels --conda-base-image --conda-run-command
        --pixi-image --pixi-base-image --pixi-base-packages --pixi-run-command --cran --cran-base-image
        --cran-run-command --build-template --build-compression --freeze --singularity --mirror --build-repo
        --cache-repo --name-strategy --include --platform --scan-mode --scan-level --dry-run --tower-token
        --tower-workspace-id --tower-endpoint --preserve-timestamp --await --inspect --info"""
    assert seen | of_tests == set(documented.split())


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_a_build_that_fails(service: Service, cli: WaveCli) -> None:
    answer = cli.submit(submission(containerFile=FILE, buildContext=unlike_others("fails")))
    with pytest.raises(Failed) as caught:
        cli.await_(answer)
    assert str(caught.value) == (
        "Container provisioning did not complete successfully\n"
        "- Reason: Container build did not complete successfully\n"
        f"- Find out more here: http://localhost:{service.wave.port}/view/builds/{answer['buildId']}"
    )
    again = cli.submit(submission(containerFile=FILE, buildContext=unlike_others("others")))
    assert again["buildId"] != answer["buildId"]


# --- older versions --------------------------------------------------------------------------------------------------


@pytest.fixture
def by_old_ones() -> dict[str, Any]:
    """What all requests of 1.0 to 1.2 have."""
    return {"towerEndpoint": "https://api.tower.nf", "timestamp": "2023-07-01T10:00:00.123456789+02:00"}


def test_an_image_for_the_oldest(service: Service, cli: WaveCli, by_old_ones: dict[str, Any]) -> None:
    body = json.dumps({**by_old_ones, "containerImage": "ubuntu:24.04", "containerConfig": {"layers": []}}).encode()
    answer = read_submitted(cli.post("/container-token", body))
    assert answer["containerToken"] == answer["requestId"]
    manifest = held_manifest(service.address, answer["targetImage"])
    assert manifest.status == 200
    assert manifest.header("Content-Type") in MANIFEST_TYPES


def test_a_conda_file_for_the_oldest(cli: WaveCli, by_old_ones: dict[str, Any]) -> None:
    asked = {
        **by_old_ones,
        "containerFile": base64("FROM mambaorg/micromamba:1.4.2\nCOPY conda.yml /tmp/\n"),
        "condaFile": base64(ENVIRONMENT),
        "freeze": True,
        "buildRepository": "quay.io/acme/old",
    }
    answer = read_submitted(cli.post("/container-token", json.dumps(asked).encode()))
    assert answer["containerImage"] == answer["targetImage"]
    assert answer["targetImage"].startswith("quay.io/acme/old:samtools-1.17--")


# --- asking otherwise ------------------------------------------------------------------------------------------------


def test_service_info(cli: WaveCli) -> None:
    assert read_service_info(cli.get("/service-info")) == "1.37.0"


def test_an_image_is_inspected(cli: WaveCli) -> None:
    found = read_inspected(cli.post("/v1alpha1/inspect", submission(containerImage="acme/tools:v1")))["container"]
    assert (found["registry"], found["imageName"], found["reference"]) == ("docker.io", "acme/tools", "v1")
    assert found["digest"] == TOOLS.digest
    assert [blob["uri"] for blob in found["manifest"]["layers"]] == [
        f"https://registry-1.docker.io/v2/acme/tools/blobs/{blob.digest}" for blob in TOOLS.layers
    ]


def test_an_index_is_inspected(cli: WaveCli) -> None:
    found = read_inspected(cli.post("/v1alpha1/inspect", submission(containerImage="ubuntu")))["index"]
    assert [(entry["platform"]["architecture"], entry["digest"]) for entry in found["manifests"]] == [
        ("amd64", UBUNTU.digest),
        ("arm64", UBUNTU_ARM.digest),
    ]


def test_a_connection_is_kept_for_all_of_a_run(service: Service) -> None:
    body = submission(containerImage="ubuntu")
    with Connection(service.address) as connection:
        submitted = read_submitted(connection.ask("POST", V2, headers(service.address, body), body))
        for _ in range(3):
            path = f"{V2}/{submitted['requestId']}/status"
            assert read_status(connection.ask("GET", path, headers(service.address)))["status"] == "DONE"


# --- what it prints when something is wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "status", "words"),
    [
        pytest.param({"containerImage": "ubuntu latest"}, 400, "Invalid container image name", id="image name"),
        pytest.param(
            {"containerImage": "none/such"}, 400, "'docker.io/none/such:latest' does not exist", id="no image"
        ),
        pytest.param({}, 400, "Specify either 'containerImage' or 'containerFile' attribute", id="nothing"),
        pytest.param({"containerImage": "ubuntu", "freeze": True}, 400, "`buildRepository` must be", id="freeze"),
        pytest.param(
            {"containerImage": "ubuntu", "mirror": True, "buildRepository": "quay.io"},
            400,
            "mirroring requires an authenticated request",
            id="mirror",
        ),
    ],
)
def test_errors_are_short_json(cli: WaveCli, attributes: dict[str, Any], status: int, words: str) -> None:
    answer = cli.post(V2, submission(**attributes))
    with pytest.raises(Failed) as caught:
        read_submitted(answer)
    assert str(caught.value).startswith(f'Wave invalid response: [{status}] {{"message":"')
    assert words in str(caught.value)
    assert list(answer.document()) == ["message"]
    assert len(answer.body) < 1000


@pytest.mark.parametrize("path", [f"{V2}/", "/v1alpha2/containers", "/wave/v1alpha2/container", f"{V2}//"])
def test_no_address_is_redirected(cli: WaveCli, path: str) -> None:
    assert cli.post(path, submission(containerImage="ubuntu")).status == 404
    assert cli.get(path).status == 404


@pytest.mark.parametrize("path", [f"{V2}/{'0' * 32}/status", f"{V2}/abc/status", "/v1alpha1/builds/bd-0_1/status"])
def test_what_does_not_exist(cli: WaveCli, path: str) -> None:
    answer = cli.get(path)
    assert (answer.status, answer.body) == (404, b"")
