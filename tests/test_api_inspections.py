"""Inspection over the wire: real registries, images of each kind, and answers as a strict client reads them."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from api.images.inspections import host_name
from bench.images import Image, blob, descriptor, digest_of, image, index, layer
from bench.upstream import Faults, Upstream
from tests.api_server import ApiServer
from tests.servers import distribution, has_distribution, http_request, push, redis_server
from tests.strict_inspect import parse_inspection
from wave_proxy.image.oci import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    DOCKER_SCHEMA1_SIGNED,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)
from wave_proxy.upstream.credentials import Login
from wave_proxy.upstream.egress import endpoint_for

USER, PASSWORD = "user", "secret"
HTPASSWD = f"{USER}:$2y$04$cSIOXkV5cVUjymeJJ4gY0O4Okw1h57wlg4Vz6NQXjVMUvutr8t.vu\n"  # of that password
SCHEMA1 = (Path(__file__).parent / "data" / "schema1.json").read_bytes()  # signed, as Docker 1.9 pushed
SCHEMA1_LAYERS = (b"upper layer", b"lower layer")

OCI = image(
    [layer({"one": "1"}), layer({"two": "2"}, compression="zstd")],
    entrypoint=["/entry"],
    cmd=["--now"],
    env=["PATH=/bin", "EMPTY="],
    working_dir="/work",
    user="1000:1000",
)
ARM = image([layer({"arm": "1"})], platform="linux/arm64/v8")
WINDOWS = image([layer({"exe": "1"})], platform="windows/amd64")
MULTI = index([OCI, ARM, WINDOWS])


def made(config: dict[str, Any], *, family: str = "docker", **members: Any) -> Image:
    """An image of one layer with just that config."""
    is_docker = family == "docker"
    config_blob = blob(json.dumps(config).encode(), DOCKER_CONFIG if is_docker else OCI_CONFIG)
    one = replace(layer({"file": "1"}), media_type=DOCKER_LAYER if is_docker else OCI_LAYER)
    media_type = DOCKER_MANIFEST if is_docker else OCI_MANIFEST
    manifest = {"schemaVersion": 2, "mediaType": media_type, "config": descriptor(config_blob)}
    content = json.dumps({**manifest, "layers": [descriptor(one)], **members}).encode()
    return Image(digest_of(content), media_type, content, (config_blob, one))


# The example of the public API page.
PAGE_IMAGE = "sha256:9a5ce069f40cfe0f2270eafbff0a0f2fa08f1add73571af9f78209e96bb8a5e9"
PAGE_CONTAINER = "4189cbc534955765760c227f328ec1cdd52e8550681c2bf9f8f990b27b644f9c"
PAGE_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PAGE_DIFF_ID = "sha256:d4fc045c9e3a848011de66f34b81f052d4f2c15a17bb196d637e526349601820"
PAGE = made(
    {
        "architecture": "amd64",
        "config": {"Hostname": "", "AttachStdin": False, "Env": [PAGE_PATH], "Cmd": ["/bin/sh"], "Image": PAGE_IMAGE},
        "container": PAGE_CONTAINER,
        "container_config": {"Cmd": ["/bin/sh", "-c", "#(nop)"]},
        "created": "2024-04-19T14:38:17.047396956Z",
        "docker_version": "20.10.23",
        "history": [{"created": "2024-04-19T14:38:17.047396956Z"}],
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [PAGE_DIFF_ID]},
    }
)
FULL = made(
    {
        "architecture": "amd64",
        "config": {
            "Hostname": "h",
            "Domainname": "d",
            "User": "u",
            "Tty": True,
            "AttachStdin": True,
            "AttachStdout": True,
            "AttachStderr": True,
            "WorkingDir": "/w",
            "Entrypoint": "/one",
            "Labels": {"a": "1", "b": ""},
            "ExposedPorts": {"80/tcp": {}},
            "Volumes": {"/v": {}},
        },
        "created": "2024-04-19T16:38:17.047396956+02:00",
        "rootfs": {"type": "layers", "diff_ids": [PAGE_DIFF_ID]},
    },
    family="oci",
    annotations={"made": "by tests"},
    artifactType="application/vnd.example",
)
WEIRD = made(
    {
        "architecture": 64,
        "config": {"Env": [1, "A=1", None], "Cmd": {"not": "it"}, "Labels": {"n": 1}, "Tty": "true", "User": None},
        "created": "0000-00-00T00:00:00Z",
        "rootfs": {"type": ["layers"], "diff_ids": "one"},
    },
    annotations=["none"],
)
CHART_CONFIG = blob(b"name: chart", "application/vnd.cncf.helm.config.v1+json")
CHART_CONTENT = json.dumps(
    {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(CHART_CONFIG), "layers": []}
).encode()
CHART = Image(digest_of(CHART_CONTENT), OCI_MANIFEST, CHART_CONTENT, (CHART_CONFIG,))
OTHER_CONTENT = b'{"schemaVersion":2,"mediaType":"application/vnd.example.thing+json"}'
OTHER = Image(digest_of(OTHER_CONTENT), "application/vnd.example.thing+json", OTHER_CONTENT)


@pytest.fixture(scope="module")
def registry() -> Iterator[Upstream]:
    """One upstream for the module."""
    with Upstream() as upstream:
        for name, item in {"oci": OCI, "multi": MULTI, "full": FULL, "weird": WEIRD}.items():
            upstream.add(name, item, "1.0", "latest")
        upstream.add("some/page", PAGE, "9b80535d04eceefd")
        upstream.add("charts/one", CHART, "1")
        upstream.add("other", OTHER, "1")
        yield upstream


@pytest.fixture(scope="module")
def private() -> Iterator[Upstream]:
    """An upstream that wants a login."""
    with Upstream(auth="bearer", username=USER, password=PASSWORD) as upstream:
        upstream.add("team/tool", OCI, "1")
        yield upstream


@pytest.fixture(scope="module")
def api(registry: Upstream, private: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One server for the module, which has a login for the private upstream."""
    logins = {private.address: Login(USER, PASSWORD)}
    with (
        redis_server(tmp_path_factory.mktemp("redis")) as redis,
        ApiServer(redis, upstreams=[registry.address, private.address], logins=logins) as server,
    ):
        yield server


def inspect(api: ApiServer, name: str, platform: str = "", **attributes: Any) -> dict[str, Any]:
    """What is inside the answer, which a strict client has read."""
    path = f"/v1alpha1/inspect?platform={platform}" if platform else "/v1alpha1/inspect"
    return parse_inspection(api.submit(path, containerImage=name, **attributes))


# --- images ----------------------------------------------------------------------------------------------------------


def test_the_api_pages_example(api: ApiServer, registry: Upstream) -> None:
    config, one = PAGE.blobs
    found = api.submit("/v1alpha1/inspect", containerImage=f"{registry.address}/some/page:9b80535d04eceefd")
    attached = ("attachStdin", "attachStdout", "attachStderr", "tty")
    assert found == {
        "container": {
            "registry": registry.address,
            "hostName": f"http://{registry.address}",
            "imageName": "some/page",
            "reference": "9b80535d04eceefd",
            "digest": PAGE.digest,
            "config": {
                "architecture": "amd64",
                "config": {
                    **dict.fromkeys(attached, False),
                    "env": [PAGE_PATH],
                    "cmd": ["/bin/sh"],
                    "image": PAGE_IMAGE,
                },
                "container": PAGE_CONTAINER,
                "created": "2024-04-19T14:38:17.047396956Z",
                "rootfs": {"type": "layers", "diff_ids": [PAGE_DIFF_ID]},
            },
            "manifest": {
                "schemaVersion": 2,
                "mediaType": DOCKER_MANIFEST,
                "config": {"mediaType": DOCKER_CONFIG, "digest": config.digest, "size": config.size},
                "layers": [{"mediaType": DOCKER_LAYER, "digest": one.digest, "size": one.size}],
            },
            "v1": False,
            "v2": True,
            "oci": False,
        }
    }
    parse_inspection(found)


def test_an_oci_image(api: ApiServer, registry: Upstream) -> None:
    found = inspect(api, f"{registry.address}/oci:1.0")
    assert (found["v1"], found["v2"], found["oci"], found["digest"]) == (False, True, True, OCI.digest)
    assert found["config"]["config"] == {
        **dict.fromkeys(("attachStdin", "attachStdout", "attachStderr", "tty"), False),
        "user": "1000:1000",
        "env": ["PATH=/bin", "EMPTY="],
        "cmd": ["--now"],
        "workingDir": "/work",
        "entrypoint": ["/entry"],
    }
    assert [item["digest"] for item in found["manifest"]["layers"]] == [item.digest for item in OCI.layers]
    assert found["config"]["rootfs"]["diff_ids"] == OCI.config["rootfs"]["diff_ids"]


def test_a_digest_is_a_reference(api: ApiServer, registry: Upstream) -> None:
    found = inspect(api, f"{registry.address}/oci@{OCI.digest}")
    assert found["reference"] == found["digest"] == OCI.digest


def test_everything_that_an_image_can_say(api: ApiServer, registry: Upstream) -> None:
    found = inspect(api, f"{registry.address}/full")
    assert found["reference"] == "latest"
    assert found["config"]["config"] == {
        "hostName": "h",
        "domainName": "d",
        "user": "u",
        "workingDir": "/w",
        "entrypoint": ["/one"],
        **dict.fromkeys(("attachStdin", "attachStdout", "attachStderr", "tty"), True),
        "labels": {"a": "1", "b": ""},
    }
    assert found["config"]["created"] == "2024-04-19T14:38:17.047396956Z"
    assert found["manifest"]["annotations"] == {"made": "by tests"}
    assert found["manifest"]["artifactType"] == "application/vnd.example"


def test_what_has_the_wrong_type_is_left_out(api: ApiServer, registry: Upstream) -> None:
    found = inspect(api, f"{registry.address}/weird")
    assert found["config"] == {
        "config": {**dict.fromkeys(("attachStdin", "attachStdout", "attachStderr", "tty"), False), "env": ["A=1"]},
        "rootfs": {"diff_ids": ["one"]},
    }
    assert "annotations" not in found["manifest"]


def test_an_artifact_has_a_manifest_and_an_empty_config(api: ApiServer, registry: Upstream) -> None:
    found = inspect(api, f"oras://{registry.address}/charts/one:1")
    assert found["config"] == {}
    assert found["manifest"]["config"]["mediaType"] == CHART_CONFIG.media_type


# --- platforms -------------------------------------------------------------------------------------------------------


def test_an_index_is_shown_as_one(api: ApiServer, registry: Upstream) -> None:
    assert inspect(api, f"{registry.address}/multi:1.0") == {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "digest": MULTI.digest,
        "manifests": [
            {
                "mediaType": OCI_MANIFEST,
                "digest": child.digest,
                "size": len(child.manifest),
                "platform": {n: child.config[n] for n in ("architecture", "os", "variant") if n in child.config},
            }
            for child in MULTI.children
        ],
    }


@pytest.mark.parametrize(
    ("platform", "child"),
    [
        ("amd64", OCI),
        ("linux/x86_64", OCI),
        ("arm64", ARM),
        ("linux/aarch64/v8", ARM),
        ("windows/amd64", WINDOWS),
        ("linux%2Farm64", ARM),
    ],
)
def test_a_platform_of_an_index(api: ApiServer, registry: Upstream, platform: str, child: Image) -> None:
    found = inspect(api, f"{registry.address}/multi:1.0", platform)
    assert (found["digest"], found["reference"]) == (child.digest, "1.0")
    assert found["config"]["architecture"] == child.config["architecture"]


def test_the_platform_of_a_plain_image_is_not_looked_at(api: ApiServer, registry: Upstream) -> None:
    assert inspect(api, f"{registry.address}/oci", "arm64")["config"]["architecture"] == "amd64"


@pytest.mark.parametrize(
    ("platform", "message"),
    [
        ("arm", f"Cannot find platform 'linux/arm/v7' in the manifest: {MULTI.manifest.decode()}"),
        ("sparc", "Unsupported container platform: sparc"),
        ("a/b/c/d", "Invalid container platform: a/b/c/d -- offending value: a/b/c/d"),
        (
            "amd64,arm64",
            "Container multi-platform architecture not allowed - offending value: 'amd64,arm64'",
        ),
    ],
)
def test_platforms_that_can_not_be(api: ApiServer, registry: Upstream, platform: str, message: str) -> None:
    path = f"/v1alpha1/inspect?platform={platform}"
    assert api.refuse(path, containerImage=f"{registry.address}/multi:1.0") == (400, message)


# --- requests --------------------------------------------------------------------------------------------------------


def test_what_clients_send_with_it(api: ApiServer, registry: Upstream) -> None:
    name = f"{registry.address}/oci:1.0"
    endpoint = "https://api.cloud.seqera.io"  # the command line always sends it
    expected = inspect(api, name)
    assert inspect(api, name, towerEndpoint=endpoint, towerWorkspaceId="1234", towerRefreshToken=None) == expected
    assert inspect(api, name, towerEndpoint=None, towerWorkspaceId=None, towerAccessToken="") == expected
    body = json.dumps({"containerImage": name, "unknown": [1]})
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        answer = api.request("POST", "/v1alpha1/inspect", body=body, headers=headers)
        assert parse_inspection(answer.json()) == expected
        assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "Missing 'containerImage' attribute"),
        ({"containerImage": ""}, "Missing 'containerImage' attribute"),
        ({"containerImage": 7}, "containerImage: expected a string, got 7"),
        ({"containerImage": "a b"}, "Invalid container image name — offending value: 'a b'"),
        ({"containerImage": "x@sha256:1"}, "'sha256:1' is not a digest: expected sha256:<64 lower-case hex digits>"),
        ({"containerImage": "x" * 5000}, "containerImage: has 5000 bytes, and may have 4096"),
        (
            {"containerImage": "x", "towerWorkspaceId": "home", "towerAccessToken": {}},
            'towerAccessToken: expected a string, got an object; towerWorkspaceId: expected a whole number, got "home"',
        ),
    ],
)
def test_wrong_requests(api: ApiServer, attributes: dict[str, Any], message: str) -> None:
    assert api.refuse("/v1alpha1/inspect", **attributes) == (400, message)


def test_only_post_is_answered(api: ApiServer) -> None:
    answer = api.request("GET", "/v1alpha1/inspect")
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")


def test_a_registry_that_fails_is_named(api: ApiServer, registry: Upstream) -> None:
    missing = f"{registry.address}/not/there:1"
    assert api.refuse("/v1alpha1/inspect", containerImage=missing) == (
        400,
        f"Container image '{missing}' does not exist or access is not authorized",
    )
    other = f"{registry.address}/other:1"
    assert api.refuse("/v1alpha1/inspect", containerImage=other) == (
        400,
        f"'{other}' is application/vnd.example.thing+json, which is no container image",
    )
    registry.faults = Faults(status={"/manifests/": 503})
    try:
        status, message = api.refuse("/v1alpha1/inspect", containerImage=f"{registry.address}/oci:1.0")
    finally:
        registry.faults = Faults()
    assert status == 503
    assert message.startswith(f"Registry '{registry.address}' is not available, try again later")


def test_a_private_image_is_read_with_the_login_for_it(api: ApiServer, private: Upstream, registry: Upstream) -> None:
    assert inspect(api, f"{private.address}/team/tool:1")["digest"] == OCI.digest
    with Upstream(auth="bearer", username=USER, password="another") as closed:
        closed.add("team/tool", OCI, "1")
        name = f"{closed.address}/team/tool:1"
        status, message = api.refuse("/v1alpha1/inspect", containerImage=name)
    assert status in (400, 403)
    assert USER not in message
    assert PASSWORD not in message


@pytest.mark.parametrize(
    ("registry", "name"),
    [
        ("docker.io", "https://registry-1.docker.io"),
        ("quay.io", "https://quay.io"),
        ("mirrored.example", "https://mirrored.example"),
        ("plain.example:5000", "http://plain.example:5000"),
        ("localhost:5000", "http://localhost:5000"),
        ("wave.example", "https://wave.example"),
    ],
)
def test_a_registry_has_its_own_address_whatever_mirror_stands_in_for_it(registry: str, name: str) -> None:
    endpoints = [
        endpoint_for("docker.io", url="http://10.0.0.1:5000/hub"),
        endpoint_for("mirrored.example", url="http://10.0.0.1:5000"),
        endpoint_for("plain.example:5000", insecure=True),
    ]
    known = {endpoint.registry: endpoint for endpoint in endpoints}
    assert host_name(registry, known, "https://wave.example") == name


# --- a real registry -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not has_distribution(), reason="needs docker-registry")
def test_images_of_a_real_registry(tmp_path: Path, redis_url: str) -> None:
    with (
        distribution(tmp_path, schema1=True) as address,
        ApiServer(redis_url, upstreams=[address]) as api,
    ):
        push(address, "oci/image", OCI, "1")
        push(address, "docker/image", PAGE, "1")
        push(address, "many", MULTI, "1")
        _push_schema1(address)
        assert inspect(api, f"{address}/oci/image:1")["digest"] == OCI.digest
        assert inspect(api, f"{address}/docker/image:1")["config"]["container"] == PAGE_CONTAINER
        assert len(inspect(api, f"{address}/many:1")["manifests"]) == 3
        assert inspect(api, f"{address}/many:1", "arm64")["digest"] == ARM.digest
        head = http_request(address, "HEAD", "/v2/legacy/tool/manifests/v1", headers={"Accept": DOCKER_SCHEMA1_SIGNED})
        found = inspect(api, f"{address}/legacy/tool:v1")
    assert found == {
        "registry": address,
        "hostName": f"http://{address}",
        "imageName": "legacy/tool",
        "reference": "v1",
        "digest": head.headers["Docker-Content-Digest"],
        "v1": True,
        "v2": False,
        "oci": False,
        "config": {
            "architecture": "amd64",
            "config": {
                "hostName": "4189cbc53495",
                "user": "app",
                "workingDir": "/work",
                "image": PAGE_IMAGE,
                "attachStdin": False,
                "attachStdout": False,
                "attachStderr": False,
                "tty": True,
                "env": ["PATH=/usr/bin:/bin", "A=1"],
                "cmd": ["/bin/run"],
                "labels": {"maker": "tests"},
            },
            "container": PAGE_CONTAINER,
            "created": "2016-04-19T14:38:17.047396956Z",
        },
        "manifest": {
            "schemaVersion": 1,
            "mediaType": DOCKER_SCHEMA1_SIGNED,
            "layers": [{"digest": digest_of(content)} for content in reversed(SCHEMA1_LAYERS)],
        },
    }


@pytest.mark.skipif(not has_distribution(), reason="needs docker-registry")
def test_a_private_image_of_a_real_registry(tmp_path: Path, redis_url: str) -> None:
    with distribution(tmp_path) as address:
        push(address, "team/tool", OCI, "1")
    with distribution(tmp_path, htpasswd=HTPASSWD) as address:
        name = f"{address}/team/tool:1"
        with ApiServer(redis_url, upstreams=[address], logins={address: Login(USER, PASSWORD)}) as api:
            assert inspect(api, name)["digest"] == OCI.digest
        with ApiServer(redis_url, upstreams=[address]) as api:
            status, message = api.refuse("/v1alpha1/inspect", containerImage=name)
    assert status == 400
    assert message.startswith(f"Container image '{name}' does not exist or access is not authorized - Cause: ")


def _push_schema1(address: str) -> None:
    for content in SCHEMA1_LAYERS:
        location = http_request(address, "POST", "/v2/legacy/tool/blobs/uploads/", body=b"").headers["Location"]
        place = re.sub(r"https?://[^/]+", "", location)
        digest = sha256(content).hexdigest()
        assert http_request(address, "PUT", f"{place}&digest=sha256:{digest}", body=content).status == 201
    sent = http_request(
        address,
        "PUT",
        "/v2/legacy/tool/manifests/v1",
        body=SCHEMA1,
        headers={"Content-Type": DOCKER_SCHEMA1_SIGNED},
    )
    assert sent.status == 201, sent.body
