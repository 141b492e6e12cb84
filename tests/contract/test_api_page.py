"""The public API page: its requests word for word, and answers that have what its answers have, host names aside.

What the page says of inspection and of metrics is tested where these are (PAIRS_ELSEWHERE). Under one of its examples
it shows the answer to a container request once more, as that of a build's status: the page's own description of the
status, further down, is what holds (decision 4).
"""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bench.images import layer
from tests.contract.conftest import Service
from tests.contract.wire import Number, is_boolean, is_duration, is_instant, is_text
from tests.patience import until
from tests.servers import Response

V2 = "/v1alpha2/container"
ANY = object()
LAYER = layer({"etc/added": "1"})

PAIRS_ELSEWHERE = {
    "test_api_inspections.py": ("test_the_api_pages_example",),
    "test_api_metrics.py": ("test_the_api_pages_examples",),
}


class Pair(NamedTuple):
    """A request of the page and the answer that it shows, in which ``{…}`` stand for what differs from run to run.

    ``dry`` are requests for Singularity images, whose answer is that of a dry run until these are built.
    """

    request: str
    answer: str
    dry: bool = False


PAIRS: dict[str, Pair] = {
    "Docker image with Conda packages": Pair(
        """{
    "packages":{
    "type": "CONDA",
    "entries": ["salmon", "bwa"],
    "channels": ["conda-forge", "bioconda"]
    }
    }""",
        """{
    "containerToken":"{token}",
    "targetImage":"{wt}/local/build:salmon_bwa--{id}",
    "expiration":"{instant}",
    "buildId":"bd-{id}_1",
    "cached":false,
    "freeze":false
    }""",
    ),
    "Singularity image with Conda packages": Pair(
        """{
    "format": "sif",
    "containerPlatform": "arm64",
    "packages":{
    "type": "CONDA",
    "entries": ["salmon"],
    "channels": ["conda-forge", "bioconda"]
    },
    "freeze": true,
    "buildRepository": "{repository}",
    "towerAccessToken":"{user}",
    "towerEndpoint": "http://localhost:8008/api"
    }""",
        """{
    "targetImage":"oras://{repository}:salmon--{id}",
    "buildId":"{id}_0",
    "cached":false,
    "freeze":true
    }""",
        dry=True,
    ),
    "Docker image with CRAN packages": Pair(
        """{
    "packages": {
    "type": "CRAN",
    "entries": ["dplyr", "ggplot2"],
    "channels": ["cran"],
    "cranOpts": {
    "rImage": "rocker/r-ver:4.4.1",
    "basePackages": "littler r-cran-docopt"
    }
    }
    }""",
        """{
    "requestId": "{token}",
    "containerToken": "{token}",
    "targetImage": "{wt}/local/build:{id}",
    "expiration": "{instant}",
    "containerImage": "{host}/local/build:{id}",
    "buildId": "bd-{id}_1",
    "cached": false,
    "freeze": false,
    "mirror": false
    }""",
    ),
    "Singularity image with CRAN packages": Pair(
        """{
    "format": "sif",
    "containerPlatform": "linux/amd64",
    "packages":{
    "type": "CRAN",
    "entries": ["tidyverse", "data.table"],
    "channels": ["cran"],
    "cranOpts": {
    "rImage": "rocker/r-ver:4.4.1",
    "basePackages": "build-essential"
    }
    },
    "freeze": true,
    "buildRepository": "{repository}",
    "towerAccessToken": "{user}"
    }""",
        """{
    "requestId": "{token}",
    "targetImage": "oras://{repository}:{id}",
    "containerImage": "oras://{repository}:{id}",
    "buildId": "{id}_0",
    "freeze": true,
    "mirror": false,
    "succeeded": true
    }""",
        dry=True,
    ),
    "Docker image with Pixi": Pair(
        """{
    "containerPlatform": "linux/amd64",
    "format": "docker",
    "buildTemplate": "conda/pixi:v1",
    "packages":{
    "type": "CONDA",
    "entries": ["numpy", "pandas", "scikit-learn"],
    "channels": ["conda-forge"],
    "pixiOpts": {
    "pixiImage": "ghcr.io/prefix-dev/pixi:0.59.0-noble",
    "basePackages": "conda-forge::procps-ng",
    "baseImage": "ubuntu:24.04",
    "commands": []
    }
    }
    }""",
        """{
    "requestId":"{token}",
    "containerToken":"{token}",
    "targetImage":"{wt}/local/build:numpy_pandas_scikit-learn--{id}",
    "expiration":"{instant}",
    "containerImage":"{host}/local/build:numpy_pandas_scikit-learn--{id}",
    "buildId":"bd-{id}_1",
    "cached":false,
    "freeze":false,
    "mirror":false
    }""",
    ),
    "Docker image with Micromamba v2": Pair(
        """{
    "containerPlatform": "linux/amd64",
    "format": "docker",
    "buildTemplate": "conda/micromamba:v2",
    "packages":{
    "type": "CONDA",
    "entries": ["bwa=0.7.15", "salmon=1.10.0", "samtools=1.17"],
    "channels": ["conda-forge", "bioconda"],
    "condaOpts": {
    "mambaImage": "mambaorg/micromamba:2-amazon2023",
    "basePackages": "conda-forge::procps-ng",
    "baseImage": "ubuntu:24.04",
    "commands": []
    }
    }
    }""",
        """{
    "requestId":"{token}",
    "containerToken":"{token}",
    "targetImage":"{wt}/local/build:bwa-0.7.15_salmon-1.10.0_samtools-1.17--{id}",
    "expiration":"{instant}",
    "containerImage":"{host}/local/build:bwa-0.7.15_salmon-1.10.0_samtools-1.17--{id}",
    "buildId":"bd-{id}_1",
    "cached":false,
    "freeze":false,
    "mirror":false
    }""",
    ),
    "Singularity image with Pixi": Pair(
        """{
    "containerPlatform": "linux/amd64",
    "format": "sif",
    "buildTemplate": "conda/pixi:v1",
    "packages":{
    "type": "CONDA",
    "entries": ["numpy", "pandas", "scikit-learn"],
    "channels": ["conda-forge"],
    "pixiOpts": {
    "pixiImage": "ghcr.io/prefix-dev/pixi:0.59.0-noble",
    "basePackages": "conda-forge::procps-ng",
    "baseImage": "ubuntu:24.04",
    "commands": []
    }
    },
    "freeze": true,
    "buildRepository": "{repository}",
    "towerAccessToken": "{user}"
    }""",
        """{
    "requestId":"{token}",
    "targetImage":"oras://{repository}:numpy_pandas_scikit-learn--{id}",
    "containerImage":"oras://{repository}:numpy_pandas_scikit-learn--{id}",
    "buildId":"{id}_0",
    "cached":false,
    "freeze":true,
    "mirror":false
    }""",
        dry=True,
    ),
    "Singularity image with Micromamba v2": Pair(
        """{
    "containerPlatform": "linux/amd64",
    "format": "sif",
    "buildTemplate": "conda/micromamba:v2",
    "packages":{
    "type": "CONDA",
    "entries": ["bwa=0.7.15", "salmon=1.10.0", "samtools=1.17"],
    "channels": ["conda-forge", "bioconda"],
    "condaOpts": {
    "mambaImage": "mambaorg/micromamba:2-amazon2023",
    "basePackages": "conda-forge::procps-ng",
    "baseImage": "ubuntu:24.04",
    "commands": []
    }
    },
    "freeze": true,
    "buildRepository": "{repository}",
    "towerAccessToken": "{user}"
    }""",
        """{
    "requestId":"{token}",
    "targetImage":"oras://{repository}:bwa-0.7.15_salmon-1.10.0_samtools-1.17--{id}",
    "containerImage":"oras://{repository}:bwa-0.7.15_salmon-1.10.0_samtools-1.17--{id}",
    "buildId":"{id}_0",
    "cached":false,
    "freeze":true,
    "mirror":false
    }""",
        dry=True,
    ),
}
# Newer answers on the page have more members than older ones; none has any but these.
MEMBERS = {
    *("requestId", "containerToken", "targetImage", "expiration", "containerImage", "buildId"),
    *("cached", "freeze", "mirror", "scanId", "succeeded"),
}
REPOSITORY = "quay.io/hrma017/test"


def curl(service: Service, method: str, path: str, body: str = "") -> Response:
    """A request as the page's are: ``--data`` goes as it stands, newlines and all."""
    return service.wave.request(method, path, body=body or None, headers={"Content-Type": "application/json"})


def reads_as(service: Service, template: str, text: str) -> Mapping[str, str]:
    """What the places of a template hold in a text. Raises AssertionError when it is another text."""
    host = rf"localhost:{service.wave.port}"
    places = {
        "token": r"(?P<token>[0-9a-f]{32})",
        "id": r"(?P<id>[0-9a-f]{16})",
        "instant": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z",
        "wt": rf"{host}/wt/(?P<token>[0-9a-f]{{32}})",
        "host": host,
        "repository": re.escape(REPOSITORY),
    }
    parts = re.split(r"\{(\w+)\}", template)
    pattern = "".join(places[part] if number % 2 else re.escape(part) for number, part in enumerate(parts))
    found = re.fullmatch(pattern, text)
    assert found, f"{text!r} is no {template!r}"
    return found.groupdict()


@pytest.mark.parametrize("name", PAIRS)
def test_the_pages_requests(service: Service, name: str) -> None:
    pair = PAIRS[name]
    request = pair.request.replace("{repository}", REPOSITORY).replace("{user}", service.token)
    if pair.dry:
        request = request.replace("{", '{"dryRun": true,', 1)
    answer = curl(service, "POST", V2, request)
    assert answer.status == 200, answer.body
    found, wanted = answer.json(), json.loads(pair.answer)
    assert wanted.keys() <= found.keys() <= MEMBERS
    seen: dict[str, set[str]] = {"token": {found["requestId"]}, "id": set()}
    for member, value in wanted.items():
        if isinstance(value, bool):
            assert found[member] is value, member
            continue
        for place, text in reads_as(service, value, found[member]).items():
            seen[place].add(text)
    assert {place: len(texts) for place, texts in seen.items()} == {"token": 1, "id": 1}, "one token and one id"


# --- what the page says of each attribute ----------------------------------------------------------------------------

REQUEST: dict[str, Any] = {
    "containerConfig": {
        "entrypoint": ["/bin/bash"],
        "cmd": ["echo", "Hello world"],
        "env": ["FOO=one", "BAR=two"],
        "workingDir": "/some/work/dir",
        "layers": [{**LAYER.inline(), "gzipSize": str(LAYER.size)}],
    },
    "containerPlatform": "linux/amd64",
    "buildRepository": "quay.io/user/my-image",
    "cacheRepository": "quay.io/user/my-cache",
    "timestamp": "2024-04-09T21:19:01.715321+02:00",
    "fingerprint": "abcdef",
    "freeze": False,
    "towerRefreshToken": "refresh",
    "towerEndpoint": "https://api.cloud.seqera.io",
    "towerWorkspaceId": 1234,
}
CONDA_FILE = "bmFtZTogeAo="
FILE = "RlJPTSB1YnVudHU6MjQuMDQK"


@pytest.mark.parametrize("path", ["/container-token", V2])
def test_every_attribute_of_a_request_for_an_image(service: Service, path: str) -> None:
    asked = {**REQUEST, "containerImage": "docker.io/library/ubuntu:latest", "towerAccessToken": service.token}
    answer = curl(service, "POST", path, json.dumps(asked))
    assert answer.status == 200, answer.body
    found = answer.json()
    token = found["containerToken"]
    assert found["targetImage"] == f"localhost:{service.wave.port}/wt/{token}/library/ubuntu:latest"
    assert is_instant(found["expiration"])
    image = service.wave.pull(found["targetImage"]).children[0]
    config = image.config["config"]
    assert (config["Entrypoint"], config["Cmd"]) == (["/bin/bash"], ["echo", "Hello world"])
    assert {"FOO=one", "BAR=two"} <= set(config["Env"])
    assert config["WorkingDir"] == "/some/work/dir"
    assert image.layers[-1] == LAYER.content


@pytest.mark.parametrize("path", ["/container-token", V2])
def test_every_attribute_of_a_request_for_a_build(service: Service, path: str) -> None:
    asked = {**REQUEST, "containerFile": FILE, "towerAccessToken": service.token, "buildContext": LAYER.inline()}
    answer = curl(service, "POST", path, json.dumps(asked))
    assert answer.status == 200, answer.body
    found = answer.json()
    assert found["buildId"].startswith("bd-")
    build = curl(service, "GET", f"/v1alpha1/builds/{found['buildId']}").json()
    assert build["dockerFile"] == "FROM ubuntu:24.04\n"
    assert build["targetImage"].startswith("quay.io/user/my-image:")


def test_a_conda_file(service: Service) -> None:
    """Both pages' tables have it; the newer endpoint warns of it (decision 7)."""
    older = curl(service, "POST", "/container-token", json.dumps({"containerFile": FILE, "condaFile": CONDA_FILE}))
    newer = curl(service, "POST", V2, json.dumps({"condaFile": CONDA_FILE}))
    assert (older.status, newer.status) == (200, 200)
    assert "/local/build:x--" in older.json()["targetImage"]
    assert "/local/build:x--" in newer.json()["targetImage"]
    assert "deprecated" in newer.headers["Warning"]


@pytest.mark.parametrize("strategy", ["none", "tagPrefix", "imageSuffix"])
def test_name_strategies(service: Service, strategy: str) -> None:
    packages = {"type": "CONDA", "entries": ["salmon=1.10.0"], "channels": ["bioconda"]}
    body = json.dumps({"packages": packages, "nameStrategy": strategy, "dryRun": True})
    image = curl(service, "POST", V2, body).json()["containerImage"]
    names = {"none": "build:{id}", "tagPrefix": "build:salmon-1.10.0--{id}", "imageSuffix": "build/salmon:1.10.0--{id}"}
    reads_as(service, f"{{host}}/local/{names[strategy]}", image)


# --- builds ----------------------------------------------------------------------------------------------------------


def test_the_status_of_a_build(service: Service) -> None:
    request = json.dumps({"containerFile": FILE, "buildContext": layer({"status": "1"}).inline()})
    build_id = curl(service, "POST", V2, request).json()["buildId"]
    short = build_id.removeprefix("bd-")  # as the page's older example has it

    def read() -> dict[str, Any]:
        answer = curl(service, "GET", f"/v1alpha1/builds/{short}/status")
        assert answer.status == 200
        document: dict[str, Any] = json.loads(answer.body, parse_float=Number, parse_int=Number)
        assert document["status"] in ("PENDING", "COMPLETED")
        assert document["id"].endswith(short)
        return document

    until(lambda: read()["status"] == "COMPLETED", "the build does not end")
    found = read()
    assert is_text(found["id"])
    assert is_instant(found["startTime"])
    assert is_duration(found["duration"])
    assert is_boolean(found["succeeded"])


def test_the_service(service: Service) -> None:
    answer = curl(service, "GET", "/service-info")
    info = answer.json()["serviceInfo"]
    assert is_text(info["version"])
    assert is_text(info["commitId"])


def test_the_other_pairs_have_their_tests() -> None:
    for file, names in PAIRS_ELSEWHERE.items():
        nodes = ast.walk(ast.parse((Path(__file__).parent.parent / file).read_text()))
        assert set(names) <= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
