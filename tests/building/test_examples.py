"""The public API page's requests for builds, word for word, and what they make: images in which docker finds tools."""

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.images import layer
from tests.building.images import why_no_images
from tests.building.scene import PASSWORD, PRIVATE_BASE, USER, VAULT, Scene, open_scene
from tests.building.works import why_no_builds
from tests.clients.programs import Client, docker_daemon, find, reason_to_skip_daemon, skip_unless_it_runs

SKIP = why_no_builds() or why_no_images()
pytestmark = pytest.mark.skipif(bool(SKIP), reason=SKIP)

RUN = ("run", "--rm", "--network=none")
NO_DOCKER = reason_to_skip_daemon("dockerd", "docker", "Debian packages docker.io, and docker-cli where it exists")

MICROMAMBA = {"packages": {"type": "CONDA", "entries": ["salmon", "bwa"], "channels": ["conda-forge", "bioconda"]}}
CRAN = {
    "packages": {
        "type": "CRAN",
        "entries": ["dplyr", "ggplot2"],
        "channels": ["cran"],
        "cranOpts": {"rImage": "rocker/r-ver:4.4.1", "basePackages": "littler r-cran-docopt"},
    }
}
PIXI = {
    "containerPlatform": "linux/amd64",
    "format": "docker",
    "buildTemplate": "conda/pixi:v1",
    "packages": {
        "type": "CONDA",
        "entries": ["numpy", "pandas", "scikit-learn"],
        "channels": ["conda-forge"],
        "pixiOpts": {
            "pixiImage": "ghcr.io/prefix-dev/pixi:0.59.0-noble",
            "basePackages": "conda-forge::procps-ng",
            "baseImage": "ubuntu:24.04",
            "commands": [],
        },
    },
}
MICROMAMBA_2 = {
    "containerPlatform": "linux/amd64",
    "format": "docker",
    "buildTemplate": "conda/micromamba:v2",
    "packages": {
        "type": "CONDA",
        "entries": ["bwa=0.7.15", "salmon=1.10.0", "samtools=1.17"],
        "channels": ["conda-forge", "bioconda"],
        "condaOpts": {
            "mambaImage": "mambaorg/micromamba:2-amazon2023",
            "basePackages": "conda-forge::procps-ng",
            "baseImage": "ubuntu:24.04",
            "commands": [],
        },
    },
}


def base64(text: str) -> str:
    return b64encode(text.encode()).decode()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """The program with registries, channels and CRAN, for the module."""
    with open_scene(tmp_path_factory.mktemp("scene")) as opened:
        yield opened


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """docker with a daemon of its own, where containers run."""
    if NO_DOCKER:
        pytest.skip(NO_DOCKER)
    with docker_daemon() as client:
        skip_unless_it_runs(client, RUN, tmp_path_factory.mktemp("probe"))
        yield client


def conda_lock(scene: Scene, answer: Mapping[str, Any]) -> str:
    found = scene.wave.request("GET", f"/v1alpha1/builds/{answer['buildId']}/condalock")
    assert found.status == 200
    return found.body.decode()


def packages_of(lock: str) -> list[str]:
    """The addresses in a lock, without the packages' digests."""
    return [line.partition("#")[0] for line in lock.splitlines() if "://" in line]


def check_shape(answer: Mapping[str, Any], names: str) -> None:
    """The documented members, which belong together."""
    token, build = answer["containerToken"], answer["buildId"].removeprefix("bd-").partition("_")[0]
    tag = f"{names}--{build}" if names else build
    assert re.fullmatch("[0-9a-f]{16}", build)
    assert answer["buildId"] == f"bd-{build}_1"
    assert answer["requestId"] == token
    assert answer["containerImage"].endswith(f"/local/build:{tag}")
    assert answer["targetImage"].endswith(f"/wt/{token}/local/build:{tag}")
    assert (answer["cached"], answer["freeze"], answer["mirror"]) == (False, False, False)
    assert set(answer) == {
        *("requestId", "containerToken", "targetImage", "expiration", "containerImage"),
        *("buildId", "cached", "freeze", "mirror"),
    }


# --- the page's requests ---------------------------------------------------------------------------------------------


def test_conda_packages(scene: Scene, docker: Client) -> None:
    answer = scene.wave.submit(**MICROMAMBA)
    check_shape(answer, "salmon_bwa")
    printed = docker(*RUN, answer["targetImage"], "sh", "-c", "salmon; bwa; procps-ng")
    assert printed == "salmon 1.10.3\nbwa 0.7.18\nprocps-ng 4.0.4\n"
    assert scene.built(answer)["duration"] > 0
    lock = conda_lock(scene, answer).splitlines()
    assert "@EXPLICIT" in lock
    assert any(
        re.fullmatch(rf"http://{scene.channels}/bioconda/\S+/salmon-1.10.3-0.tar.bz2#\w+", line) for line in lock
    )
    assert ">> CONDA_LOCK_START" not in scene.log(answer)
    again = scene.wave.submit(**MICROMAMBA)
    assert (again["buildId"], again["cached"], again["succeeded"]) == (answer["buildId"], True, True)


def test_conda_packages_of_certain_versions_on_a_base_image(scene: Scene, docker: Client) -> None:
    answer = scene.wave.submit(**MICROMAMBA_2)
    check_shape(answer, "bwa-0.7.15_salmon-1.10.0_samtools-1.17")
    printed = docker(
        *RUN, answer["targetImage"], "sh", "-c", "bwa; salmon; samtools; command -v micromamba || echo none"
    )
    assert printed == "bwa 0.7.15\nsalmon 1.10.0\nsamtools 1.17\nnone\n"
    assert "/samtools-1.17-0.tar.bz2" in conda_lock(scene, answer)


def test_conda_packages_with_pixi(scene: Scene, docker: Client) -> None:
    answer = scene.wave.submit(**PIXI)
    check_shape(answer, "numpy_pandas_scikit-learn")
    printed = docker(*RUN, answer["targetImage"], "bash", "-c", "numpy; pandas; scikit-learn")
    assert printed == "numpy 1.26.4\npandas 2.2.3\nscikit-learn 1.5.2\n"
    assert "scikit-learn" in conda_lock(scene, answer)


def test_cran_packages(scene: Scene, docker: Client) -> None:
    answer = scene.wave.submit(**CRAN)
    check_shape(answer, "")
    printed = docker(*RUN, answer["targetImage"], "Rscript", "-e", "dplyr::says(); ggplot2::says()")
    assert printed.split() == ["dplyr", "1.1.4", "ggplot2", "3.5.1"]


def test_a_dockerfile_with_a_build_context(scene: Scene, docker: Client) -> None:
    file = 'FROM ubuntu:24.04\nCOPY words /words\nRUN tr a-z A-Z </words >/loud\nCMD ["cat", "/loud"]\n'
    answer = scene.wave.submit(
        containerFile=base64(file), buildContext=layer({"words": "hello from the context\n"}).inline()
    )
    check_shape(answer, "")
    assert docker(*RUN, answer["targetImage"]) == "HELLO FROM THE CONTEXT\n"


def test_a_dockerfile_for_two_platforms(scene: Scene, docker: Client) -> None:
    file = "FROM scratch\nARG TARGETARCH\nCOPY busybox /busybox\nCOPY words-$TARGETARCH /words\n"
    busybox = Path(find("busybox")).read_bytes()
    context = layer({"busybox": busybox, "words-amd64": "for amd64\n", "words-arm64": "for arm64\n"})
    answer = scene.wave.submit(
        containerFile=base64(file), buildContext=context.inline(), containerPlatform="linux/amd64,linux/arm64"
    )
    assert docker(*RUN, answer["targetImage"], "/busybox", "cat", "/words") == "for amd64\n"
    scene.built(answer)
    answered = scene.wave.request("GET", f"/v2/{answer['targetImage'].partition('/')[2].replace(':', '/manifests/')}")
    entries = answered.json()["manifests"]
    assert [entry["platform"] for entry in entries] == [
        {"os": "linux", "architecture": "amd64"},
        {"os": "linux", "architecture": "arm64"},
    ]


# --- what else a request can say -------------------------------------------------------------------------------------


def test_bioconductor_packages(scene: Scene, docker: Client) -> None:
    packages = {**CRAN["packages"], "entries": ["bioc::limma"]}
    answer = scene.wave.submit(packages=packages)
    assert docker(*RUN, answer["targetImage"], "Rscript", "-e", "limma::says()").split() == ["limma", "3.60.0"]


def test_the_lock_of_one_build_makes_another(scene: Scene, docker: Client) -> None:
    packages = {"type": "CONDA", "entries": ["samtools=1.21"], "channels": ["conda-forge", "bioconda"]}
    first = scene.wave.submit(packages=packages)
    scene.built(first)
    url = scene.write_file("lock.txt", conda_lock(scene, first))
    second = scene.wave.submit(packages={"type": "CONDA", "entries": [url]})
    assert docker(*RUN, second["targetImage"], "samtools") == "samtools 1.21\n"
    assert packages_of(conda_lock(scene, second)) == packages_of(conda_lock(scene, first))


def test_packages_that_do_not_exist_together(scene: Scene) -> None:
    packages = {
        "type": "CONDA",
        "entries": ["salmon=1.10.3", "old-boost-tool"],
        "channels": ["conda-forge", "bioconda"],
    }
    answer = scene.wave.submit(packages=packages)
    status = scene.ended(answer)
    assert status["succeeded"] is False
    assert status["reason"].startswith("unsatisfiable packages: ")
    repository, reference = answer["targetImage"].partition("/")[2].rsplit(":", 1)
    refused = scene.wave.request("GET", f"/v2/{repository}/manifests/{reference}")
    (error,) = refused.json()["errors"]
    assert (refused.status, error["code"]) == (404, "MANIFEST_UNKNOWN")
    assert "unsatisfiable packages" in error["message"]
    assert "Could not solve for environment specs" in error["message"]


# --- freeze, and registries that want a login ------------------------------------------------------------------------


def inspected(image: str, *options: str) -> dict[str, Any]:
    """What skopeo says of an image's config."""
    skopeo = Client("skopeo")
    document: dict[str, Any] = json.loads(skopeo("inspect", "--config", *options, f"docker://{image}"))
    return document


@pytest.mark.skipif(not find("skopeo"), reason="skopeo is not installed (Debian package skopeo)")
def test_an_image_is_frozen_with_its_changes(scene: Scene) -> None:
    target = f"{scene.registry}/frozen/image"
    config: dict[str, Any] = {
        "env": ["GREETING=hello world"],
        "workingDir": "/srv",
        "entrypoint": ["/bin/echo", 'a "b"'],
        "cmd": ["c"],
    }
    config["layers"] = [layer({"srv/added": "by the request\n"}).inline()]
    answer = scene.wave.submit(
        containerImage="ubuntu:24.04", containerConfig=config, freeze=True, buildRepository=target
    )
    assert answer["targetImage"] == answer["containerImage"]
    assert answer["targetImage"].startswith(f"{target}:")
    assert "containerToken" not in answer
    scene.built(answer)
    seen = inspected(answer["targetImage"], "--tls-verify=false")["config"]
    assert "GREETING=hello world" in seen["Env"]
    assert seen["WorkingDir"] == "/srv"
    assert seen["Entrypoint"] == ["/bin/echo", 'a "b"']
    assert seen["Cmd"] == ["c"]
    again = scene.wave.submit(
        containerImage="ubuntu:24.04", containerConfig=config, freeze=True, buildRepository=target
    )
    assert (again["cached"], again["targetImage"]) == (True, answer["targetImage"])


@pytest.mark.skipif(not find("skopeo"), reason="skopeo is not installed (Debian package skopeo)")
def test_a_private_base_and_a_private_target(scene: Scene) -> None:
    file = f'FROM {scene.private}/{PRIVATE_BASE}\nENTRYPOINT ["/old", "entry"]\n'
    target = f"{VAULT}/frozen/file"
    config = {"env": ["KEY=value"], "cmd": ["go"]}
    answer = scene.wave.submit(containerFile=base64(file), containerConfig=config, freeze=True, buildRepository=target)
    scene.built(answer)
    tag = answer["targetImage"].removeprefix(f"{target}:")
    stored = f"{scene.vault}/frozen/file:{tag}"
    seen = inspected(stored, "--tls-verify=false", f"--creds={USER}:{PASSWORD}")["config"]
    assert seen["Entrypoint"] == ["/old", "entry"]
    assert seen["Cmd"] == ["go"]
    assert {"KEY=value", "WAVE_ENTRY_CHAIN=/old entry"} <= set(seen["Env"])
    assert PASSWORD not in scene.log(answer)
