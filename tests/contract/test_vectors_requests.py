"""Vectors that show in requests and their answers: V2, V6, V7, V14, V15, V19, V22, V28, V30, V36 (``wave.md`` §12)."""

import json
import re
from typing import Any

import pytest

from tests.contract.archives import pack
from tests.contract.conftest import Service
from tests.contract.wave_cli import Failed, WaveCli, base64, conda, configured, cran, headers, submission
from tests.contract.wire import Answer, Connection

V2 = "/v1alpha2/container"
PAGE_CRAN = {
    "type": "CRAN",
    "entries": ["dplyr", "ggplot2"],
    "channels": ["cran"],
    "cranOpts": {"rImage": "rocker/r-ver:4.4.1", "basePackages": "littler r-cran-docopt"},
}


@pytest.fixture
def cli(service: Service) -> WaveCli:
    """The command line."""
    return WaveCli(service.address, pause_s=0.05)


def refused(cli: WaveCli, **attributes: Any) -> str:
    """The message of a request that is refused with 400."""
    answer = cli.post(V2, json.dumps(attributes).encode())
    assert answer.status == 400, answer.text
    document = answer.document()
    assert list(document) == ["message"]
    return str(document["message"])


def dry(cli: WaveCli, **attributes: Any) -> dict[str, Any]:
    """What a request would be given."""
    return cli.submit(submission(attributes, dryRun=True))


def build_of(cli: WaveCli, answer: dict[str, Any]) -> dict[str, Any]:
    """The record of a build."""
    found: dict[str, Any] = json.loads(cli.get(f"/v1alpha1/builds/{answer['buildId']}").body)
    return found


# --- V2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "platform", "repository", "wanted"),
    [
        pytest.param("FROM foo", "linux/amd64", "wave/build", "7efaa2ed59c58a16", id="V2 amd64"),
        pytest.param("FROM foo", "linux/arm64", "wave/build", "be9ee6ac1eeff4b5", id="V2 arm64"),
        pytest.param("FROM ubuntu:latest", "linux/amd64", "docker.io/wave", "33d3626c806a9022", id="V2 ubuntu"),
        pytest.param(
            "FROM ubuntu:latest", "linux/amd64,linux/arm64", "docker.io/wave", "19bc00e2e889a343", id="V2 both"
        ),
    ],
)
def test_v2_ids_of_builds(cli: WaveCli, file: str, platform: str, repository: str, wanted: str) -> None:
    answer = dry(cli, containerFile=base64(file), containerPlatform=platform, buildRepository=repository)
    assert answer["buildId"] == f"{wanted}_0"
    assert answer["containerImage"].endswith(f"wave{repository.removeprefix('docker.io/wave')[4:]}:{wanted}")


def test_v2_the_pages_id_is_that_of_another_text(cli: WaveCli) -> None:
    """Decision 15: the hash is the service's, the text that it is of is our own."""
    answer = dry(cli, packages=PAGE_CRAN, buildRepository="quay.io/wave/build")
    assert re.fullmatch("[0-9a-f]{16}_0", answer["buildId"])
    assert answer["containerImage"] == f"quay.io/wave/build:{answer['buildId'][:-2]}"


# --- V6, V7 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", [None, ""], ids=["V6 null", "V6 empty"])
def test_v6_no_image(cli: WaveCli, image: str | None) -> None:
    assert refused(cli, containerImage=image) == "Specify either 'containerImage' or 'containerFile' attribute"
    answer = cli.post("/v1alpha1/inspect", json.dumps({"containerImage": image}).encode())
    assert (answer.status, answer.document()) == (400, {"message": "Missing 'containerImage' attribute"})


@pytest.mark.parametrize("platform", ["foo", "linux/foo", "null", " "], ids=lambda text: f"V7 {text!r}")
def test_v7_no_platform(cli: WaveCli, platform: str) -> None:
    assert "container platform" in refused(cli, containerImage="ubuntu", containerPlatform=platform)


@pytest.mark.parametrize(
    ("platform", "wanted"),
    [
        *((text, "linux/amd64") for text in (None, "x86_64", "amd64", "linux/amd64")),
        *((text, "linux/arm/v7") for text in ("arm", "linux/arm", "linux/arm/7", "linux/arm/v7")),
        *((text, "linux/arm/v5") for text in ("linux/arm/5", "linux/arm/v5")),
        *((text, "linux/arm64") for text in ("arm64", "linux/arm64", "linux/aarch64", "linux/arm64/v8")),
        ("linux/arm64/v7", "linux/arm64/v7"),
    ],
    ids=lambda text: f"V7 {text}",
)
def test_v7_platforms_of_builds(cli: WaveCli, platform: str | None, wanted: str) -> None:
    context = pack({f"platform {platform}": "1"})
    answer = cli.submit(submission(containerFile=base64("FROM foo"), containerPlatform=platform, buildContext=context))
    assert build_of(cli, answer)["platform"] == wanted


# --- V14 -------------------------------------------------------------------------------------------------------------

LOCK = "https://foo.com/lock.yml"


@pytest.mark.parametrize(
    ("packages", "template"),
    [
        pytest.param(conda("bwa"), "conda/micromamba:v1", id="V14 CONDA, by decision 2"),
        pytest.param(cran("dplyr"), "cran/installr:v1", id="V14 CRAN"),
        pytest.param({"containerFile": base64("FROM foo")}, None, id="V14 no packages"),
    ],
)
def test_v14_default_templates(cli: WaveCli, packages: dict[str, Any], template: str | None) -> None:
    answer = cli.submit(submission(packages, buildContext=pack({f"template {template}": "1"})))
    assert build_of(cli, answer).get("buildTemplate") == template


def test_v14_a_lock_is_fetched_by_the_build(cli: WaveCli) -> None:
    answer = cli.submit(submission(conda(LOCK)))
    build = build_of(cli, answer)
    assert "condaFile" not in build
    assert LOCK in build["dockerFile"]
    assert answer["containerImage"].endswith(f":{answer['buildId'][3:19]}")


@pytest.mark.parametrize("entries", [[LOCK, "https://bar.com/lock.yml"], [LOCK, "bwa"]], ids=["V14 two", "V14 more"])
def test_v14_only_one_lock(cli: WaveCli, entries: list[str]) -> None:
    words = "No more than one Conda lock remote file can be specified at the same time"
    assert refused(cli, packages={"type": "CONDA", "entries": entries}) == words


@pytest.mark.parametrize("entries", [None, []], ids=["V14 null", "V14 empty"])
def test_v14_nothing_to_install(cli: WaveCli, entries: list[str] | None) -> None:
    assert "packages: names nothing to install" in refused(cli, packages={"type": "CONDA", "entries": entries})


def test_v14_packages_of_bioconductor(cli: WaveCli) -> None:
    build = build_of(cli, cli.submit(submission(cran("dplyr", "ggplot2", "bioc::GenomicRanges"))))
    words = build["dockerFile"]
    assert "package=dplyr" in words
    assert "package=ggplot2" in words
    assert "bioconductor=GenomicRanges" in words


# --- V15 -------------------------------------------------------------------------------------------------------------


def manifest(cli: WaveCli, repository: str, reference: str) -> Answer:
    with Connection(cli.address) as connection:
        return connection.ask("GET", f"/v2/{repository}/manifests/{reference}", headers(cli.address))


def test_v15_a_durable_image_is_not_pulled_by_its_token(cli: WaveCli) -> None:
    asked = submission(containerFile=base64("FROM foo"), freeze=True, buildRepository="quay.io/acme/frozen")
    answer = cli.submit(asked)
    name, _, tag = answer["targetImage"].rpartition(":")
    refusal = manifest(cli, f"wt/{answer['requestId']}/{name.partition('/')[2]}", tag)
    (error,) = refusal.document()["errors"]
    assert (refusal.status, error["code"]) == (404, "NAME_UNKNOWN")
    assert answer["targetImage"] in error["message"]


@pytest.mark.parametrize(
    ("image", "repository", "reference"),
    [
        pytest.param("ubuntu:latest", "library/ubuntu", "latest", id="V15 docker.io"),
        pytest.param("quay.io/acme/tools:v1", "acme/tools", "v1", id="V15 quay.io"),
    ],
)
def test_v15_a_token_leads_to_its_image(cli: WaveCli, image: str, repository: str, reference: str) -> None:
    token = cli.submit(submission(containerImage=image))["containerToken"]
    assert manifest(cli, f"wt/{token}/{repository}", reference).status == 200
    for wrong in ("library/debian", "ubuntu", f"{repository}/x"):
        assert manifest(cli, f"wt/{token}/{wrong}", reference).status == 404


@pytest.mark.parametrize(
    ("path", "status"),
    [
        pytest.param("/v1/library/hello-world/manifests/latest", 404, id="V15 another version"),
        pytest.param("/v2/library/hello-world/foo/latest", 400, id="V15 no such thing, by decision 9"),
        pytest.param("/v2/foo:bar/blobs/latest", 400, id="V15 no registry, by decision 9"),
    ],
)
def test_v15_no_paths_of_registries(cli: WaveCli, path: str, status: int) -> None:
    assert cli.get(path).status == status


# --- V19 -------------------------------------------------------------------------------------------------------------

IMAGE = "Invalid container image name — offending value: '{}'"
NAME = "Invalid container repository name — offending value: '{}'"
PROTOCOL = "Container build repository should not include any protocol prefix - offending value: '{}'"
INCOMPLETE = "Container build repository is invalid or incomplete - offending value: '{}'"
TAG = "Container build repository should not include any tag suffix - offending value: '{}'"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *(("containerImage", text, IMAGE) for text in ("docker:quay.io/foo:latest", "ubuntu: latest")),
        *(("containerImage", text, IMAGE) for text in ("ubuntu:latest ", "   ")),
        ("containerImage", "http://quay.io/foo:latest", NAME),
        ("buildRepository", "foo.com", INCOMPLETE),
        ("buildRepository", "http://foo.com", PROTOCOL),
        ("buildRepository", "foo.com/ubuntu:latest", TAG),
        *(
            ("cacheRepository", text, rule.replace("build repository", "build cache repository"))
            for text, rule in (("foo.com", INCOMPLETE), ("http://foo.com", PROTOCOL), ("foo.com/ubuntu:latest", TAG))
        ),
    ],
)
def test_v19_messages(cli: WaveCli, field: str, value: str, message: str) -> None:
    wrong = refused(cli, **{"containerFile": base64("FROM foo"), field: value})
    assert wrong.startswith(f"{field}: {message.format(value)}")


MIRROR = {"containerImage": "ubuntu", "mirror": True}


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        pytest.param({}, "Attribute `buildRepository` is required when specifying `mirror` mode", id="V19 no target"),
        pytest.param({"buildRepository": "http://foo.com"}, PROTOCOL.format("http://foo.com"), id="V19 protocol"),
        pytest.param({"buildRepository": "foo.com/x:latest"}, TAG.format("foo.com/x:latest"), id="V19 tag"),
        pytest.param(
            {"buildRepository": "docker.io"},
            "Source and target mirror registry are the same - offending value 'docker.io'",
            id="V19 the same",
        ),
        pytest.param({"buildRepository": "quay.io", "freeze": True}, "`mirror` and `freeze` conflict", id="V19 freeze"),
        pytest.param(
            {"buildRepository": "quay.io", **configured(env=["A=1"])},
            "`mirror` and `containerConfig` conflict",
            id="V19 config",
        ),
        pytest.param(
            {"buildRepository": "quay.io", **conda("bwa")}, "`mirror` and `packages` conflict", id="V19 packages"
        ),
    ],
)
def test_v19_messages_of_mirrors(service: Service, cli: WaveCli, attributes: dict[str, Any], message: str) -> None:
    assert message in refused(cli, **MIRROR, towerAccessToken=service.token, **attributes)


# --- V22 -------------------------------------------------------------------------------------------------------------


def test_v22_mirrors_have_ids_of_their_own(service: Service, cli: WaveCli) -> None:
    body = submission(MIRROR, buildRepository="quay.io/lib/", towerAccessToken=service.token)
    answer = cli.submit(body)
    assert re.fullmatch(r"mr-\w+", answer["buildId"])
    assert answer["mirror"] is True
    assert answer["targetImage"] == answer["containerImage"] == "quay.io/lib/library/ubuntu:latest"


# --- V30 -------------------------------------------------------------------------------------------------------------

HOSTILE = (
    'Something from String "malicious<script>": not valid',
    "<script>alert(1)</script>",
    "payload <script>alert(1)</script> end",
    'xss <img onerror="alert(1)" src=x> test',
)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"V30 {text[:30]}")
@pytest.mark.parametrize("field", ["containerImage", "nameStrategy", "containerPlatform", "buildRepository"])
def test_v30_a_message_is_read_by_nobody_as_a_page(cli: WaveCli, field: str, text: str) -> None:
    """Decision 9: 400 that names field and value, where the service cuts the value out of what it did not expect."""
    answer = cli.post(V2, submission({"containerImage": "ubuntu", field: text}))
    assert answer.status == 400
    assert str(answer.document()["message"]).startswith(f"{field}: ")
    assert answer.header("Content-Type") == "application/json"
    assert answer.header("X-Content-Type-Options") == "nosniff"


# --- V36 -------------------------------------------------------------------------------------------------------------


def test_v36_the_states_of_a_build(cli: WaveCli) -> None:
    answer = cli.submit(submission(containerFile=base64("FROM v36")))
    with pytest.raises(Failed, match="Reason: Container build did not complete successfully"):
        cli.await_(answer)
    found = cli.get(f"{V2}/{answer['requestId']}/status").document()
    assert found.keys() == {
        *("id", "status", "buildId", "succeeded", "reason", "detailsUri", "creationTime", "duration")
    }
    assert (found["status"], found["succeeded"]) == ("DONE", False)
    assert found["detailsUri"].endswith(f"/view/builds/{answer['buildId']}")
