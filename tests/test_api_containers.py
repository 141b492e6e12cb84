"""Container requests over the wire: what is answered, recorded, described and ended."""

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from time import time
from typing import Any

import pytest

from bench.images import Image, Layer, image, index, layer, random_blob
from bench.upstream import Upstream
from tests.api_server import AUTHORITY, ApiServer
from tests.identified import issue, issued
from tests.servers import redis_server
from wave_proxy.image.request import ContainerRequest
from wave_proxy.state.redis import connect
from wave_proxy.state.tokens import TokenRecord, TokenStore

ADMIN = {"Authorization": f"Basic {b64encode(b'admin:hunter2').decode()}"}
ADA = 105243131043720  # the number of ada@example.org
BASE = image([layer({"base": "1"})], entrypoint=["/entry"])
TOOLS = layer({"tools": "2"})
ARM_TOOLS = layer({"tools": "arm"}, compression="zstd")
EXTRA = layer({"extra": "3"})
AMD = image([TOOLS, EXTRA], family="docker")
ARM = image([ARM_TOOLS], platform="linux/arm64")
MULTI = index([AMD, ARM])


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Redis for the module."""
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def registry() -> Iterator[Upstream]:
    """One upstream for the module, with an image and an index."""
    with Upstream() as upstream:
        upstream.add("library/base", BASE, "1.0", "latest")
        upstream.add("tools", MULTI, "v1")
        upstream.add("one/amd", AMD, "v1")
        yield upstream


@pytest.fixture(scope="module")
def api(redis: str, registry: Upstream) -> Iterator[ApiServer]:
    """One server for the module."""
    accounts = {"admin": f"sha256:{sha256(b'hunter2').hexdigest()}"}
    with ApiServer(redis, upstreams=[registry.address], accounts=accounts, max_body_bytes=20_000_000) as server:
        yield server


@pytest.fixture
def base(registry: Upstream) -> str:
    """The name of the plain image."""
    return f"{registry.address}/library/base:1.0"


async def recorded(redis: str, token: str) -> TokenRecord:
    client = connect(redis)
    try:
        record = await TokenStore(client).find_record(token)
    finally:
        await client.aclose()
    assert record is not None
    return record


async def pulled(redis: str, token: str) -> None:
    client = connect(redis)
    try:
        await TokenStore(client).record_pull(token, BASE.digest, EXTRA.digest)
    finally:
        await client.aclose()


# --- asking ----------------------------------------------------------------------------------------------------------


def test_a_plain_image(api: ApiServer, base: str) -> None:
    before = time()
    answer = api.submit(containerImage=base)
    token = answer["containerToken"]
    assert re.fullmatch(r"[0-9a-f]{32}", token)
    expiration = answer.pop("expiration")
    assert answer == {
        "requestId": token,
        "containerToken": token,
        "targetImage": f"{AUTHORITY}/wt/{token}/library/base:1.0",
        "containerImage": base,
        "freeze": False,
        "mirror": False,
        "succeeded": True,
    }
    assert expiration.endswith("Z")
    assert before + 3600 <= datetime.fromisoformat(expiration).timestamp() + 1e-3
    assert datetime.fromisoformat(expiration).timestamp() <= time() + 3600


def test_the_older_endpoint_answers_in_the_older_form(api: ApiServer, base: str) -> None:
    answer = api.submit("/container-token", containerImage=base)
    assert list(answer) == ["requestId", "containerToken", "targetImage", "expiration", "containerImage"]
    assert answer["requestId"] == answer["containerToken"]


def test_two_requests_never_share_a_token(api: ApiServer, base: str) -> None:
    assert api.submit(containerImage=base)["containerToken"] != api.submit(containerImage=base)["containerToken"]


def test_names_are_normalised(api: ApiServer, registry: Upstream) -> None:
    answer = api.submit(containerImage=f"{registry.address}/library/base")
    assert answer["containerImage"] == f"{registry.address}/library/base:latest"
    assert answer["targetImage"].endswith("/library/base:latest")


def test_a_body_without_content_type_and_a_dry_run_get_the_same_answer(api: ApiServer, base: str) -> None:
    answer = api.request("POST", "/v1alpha2/container", body=json.dumps({"containerImage": base, "dryRun": True}))
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()["succeeded"] is True
    status = api.request("GET", f"/v1alpha2/container/{answer.json()['requestId']}/status")
    assert status.status == 200


async def test_everything_that_was_asked_for_is_recorded(api: ApiServer, base: str, redis: str) -> None:
    asked: dict[str, Any] = {
        "containerImage": base,
        "containerConfig": {
            "entrypoint": ["/bin/sh"],
            "cmd": ["-c", "id"],
            "env": ["A=1"],
            "workingDir": "/w",
            "layers": [EXTRA.inline(), TOOLS.inline("gzip")],
        },
        "containerPlatform": "arm64",
        "fingerprint": "f",
        "timestamp": "2024-04-09T20:31:35+02:00",
        "towerAccessToken": await issued(redis, "ada@example.org"),
        "towerRefreshToken": "secret-refresh",
        "towerEndpoint": "https://api.tower.nf/x",
        "towerWorkspaceId": "42",
        "workflowId": "wf",
        "dryRun": True,
    }
    answer = api.request(
        "POST",
        "/v1alpha2/container",
        body=asked,
        headers={"X-Wave-Client": "203.0.113.9", "X-Forwarded-For": "198.51.100.1", "Authorization": "Bearer x"},
    )
    assert answer.status == 200, answer.body
    assert b"secret" not in answer.body
    request = (await recorded(redis, answer.json()["requestId"])).request
    assert request.image == base
    assert request.platforms == ("linux/arm64",)
    assert (request.fingerprint, request.timestamp) == ("f", "2024-04-09T20:31:35+02:00")
    assert (request.ip_address, request.dry_run) == ("203.0.113.9", True)
    identity = request.identity
    assert (identity.email, identity.user_id) == ("ada@example.org", ADA)
    assert (identity.access_token, identity.refresh_token, identity.workflow_id) == ("", "", "")  # no Platform's user
    assert (identity.endpoint, identity.workspace_id) == ("https://api.cloud.seqera.io/x", 42)
    config = request.config
    assert (config.entrypoint, config.cmd, config.env) == (("/bin/sh",), ("-c", "id"), ("A=1",))
    assert config.working_dir == "/w"
    assert [item.gzip_digest for item in config.layers] == [EXTRA.digest, TOOLS.digest]
    client = connect(redis)
    try:
        assert await TokenStore(client).find_layer(TOOLS.digest) == TOOLS.content
    finally:
        await client.aclose()


async def test_without_a_header_the_address_is_the_peers(api: ApiServer, base: str, redis: str) -> None:
    answer = api.request(
        "POST", "/v1alpha2/container", body={"containerImage": base}, headers={"X-Forwarded-For": "198.51.100.1"}
    )
    record = await recorded(redis, answer.json()["requestId"])
    assert record.request.ip_address == "127.0.0.1"


async def test_no_platform_means_all_of_them(api: ApiServer, registry: Upstream, redis: str) -> None:
    answer = api.submit(containerImage=f"{registry.address}/tools:v1", containerConfig={"cmd": "x"})
    assert (await recorded(redis, answer["requestId"])).request.platforms == ()


@pytest.mark.parametrize("text", ["yesterday", "0001-01-01T00:00:00+18:00", "9999-12-31T23:59:59-18:00"])
async def test_a_time_that_is_none_is_no_time(api: ApiServer, base: str, redis: str, text: str) -> None:
    answer = api.submit(containerImage=base, timestamp=text)
    assert (await recorded(redis, answer["requestId"])).request.timestamp == ""
    for path in ("/v1alpha2/container", "/container-token"):
        assert api.request("GET", f"{path}/{answer['requestId']}").status == 200


async def test_a_digest_stays_in_the_name_unless_the_content_changes(
    api: ApiServer, registry: Upstream, redis: str
) -> None:
    name = f"{registry.address}/library/base@{BASE.digest}"
    plain = api.submit(containerImage=name, containerConfig={"layers": [], "env": None})
    assert plain["targetImage"] == f"{AUTHORITY}/wt/{plain['requestId']}/library/base@{BASE.digest}"
    changed = api.submit(containerImage=name, containerConfig={"env": ["A=1"]})
    short = BASE.digest.removeprefix("sha256:")[:12]
    assert changed["targetImage"] == f"{AUTHORITY}/wt/{changed['requestId']}/library/base:sha256-{short}"
    assert changed["containerImage"] == name
    assert (await recorded(redis, changed["requestId"])).request.image == name


# --- layers that do not fit ------------------------------------------------------------------------------------------


def with_layers(base: str, *layers: dict[str, Any]) -> dict[str, Any]:
    return {"containerImage": base, "containerConfig": {"layers": list(layers)}}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"gzipDigest": TOOLS.digest}, f"gzipDigest is {TOOLS.digest}", id="gzip digest"),
        pytest.param({"tarDigest": TOOLS.diff_id}, f"tarDigest is {TOOLS.diff_id}", id="tar digest"),
        pytest.param({"gzipSize": EXTRA.size + 1}, f"gzipSize is {EXTRA.size + 1}", id="size"),
        pytest.param({"location": "data:****"}, "location is not valid after", id="base64"),
        pytest.param({"location": "gzip:AAAA"}, "location is not valid after", id="deflate"),
    ],
)
def test_an_inline_layer_that_is_not_what_it_says(
    api: ApiServer, base: str, changed: dict[str, Any], words: str
) -> None:
    status, message = api.refuse(**with_layers(base, TOOLS.inline(), {**EXTRA.inline(), **changed}))
    assert status == 400
    assert message.startswith("containerConfig.layers[1]: ")
    assert words in message
    assert len(message) < 500


def test_the_first_such_layer_is_named(api: ApiServer, base: str) -> None:
    wrong = [TOOLS.inline(), {**EXTRA.inline(), "gzipSize": 1}, {**TOOLS.inline(), "tarDigest": EXTRA.diff_id}]
    assert api.refuse(**with_layers(base, *wrong)) == (
        400,
        f"containerConfig.layers[1]: gzipSize is 1 and the layer has {EXTRA.size} bytes",
    )


def test_a_request_that_is_too_long_to_be_kept(api: ApiServer, base: str) -> None:
    status, message = api.refuse(containerImage=base, containerConfig={"env": [f"A={'x' * 100_000}"] * 11})
    assert status == 400
    assert "may have 1048576 bytes" in message


def test_a_private_address_in_a_layers_url(api: ApiServer, base: str, registry: Upstream) -> None:
    linked = {**EXTRA.described(), "location": "http://169.254.169.254/latest/meta-data"}
    status, message = api.refuse(**with_layers(base, linked))
    assert status == 400
    assert message.startswith("containerConfig.layers[0].location: access to '169.254.169.254' is not allowed")
    assert "allow_private" in message
    opened = {**EXTRA.described(), "location": f"{registry.url}/layer.tar.gz"}
    assert api.submit(**with_layers(base, opened))["succeeded"] is True


# --- inclusions ------------------------------------------------------------------------------------------------------


def included(picture: Image, layers: tuple[Layer, ...], place: str) -> list[tuple[str, str, int, str, str]]:
    return [
        (f"docker://{place}/blobs/{item.digest}", item.digest, item.size, item.diff_id, blob.media_type)
        for item, blob in zip(layers, picture.layers, strict=True)
    ]


@pytest.mark.parametrize(
    ("platform", "picture", "layers"),
    [(None, AMD, (TOOLS, EXTRA)), ("linux/amd64", AMD, (TOOLS, EXTRA)), ("linux/arm64", ARM, (ARM_TOOLS,))],
    ids=["no platform", "amd64", "arm64"],
)
async def test_the_layers_of_included_images_follow_the_requests_own(
    api: ApiServer,
    base: str,
    registry: Upstream,
    redis: str,
    platform: str | None,
    picture: Image,
    layers: tuple[Layer, ...],
) -> None:
    answer = api.submit(
        **with_layers(base, EXTRA.inline()),
        containerIncludes=f"{registry.address}/tools:v1",
        containerPlatform=platform,
    )
    request = (await recorded(redis, answer["requestId"])).request
    assert request.includes == (f"{registry.address}/tools:v1",)
    assert request.platforms == (platform or "linux/amd64",)
    own, *rest = request.config.layers
    assert own.gzip_digest == EXTRA.digest
    found = [(item.location, item.gzip_digest, item.gzip_size, item.tar_digest, item.media_type) for item in rest]
    assert found == included(picture, layers, f"{registry.address}/v2/tools")


async def test_several_images_are_included_in_their_order(
    api: ApiServer, base: str, registry: Upstream, redis: str
) -> None:
    names = [f"{registry.address}/one/amd:v1", f"{registry.address}/library/base"]
    answer = api.submit(containerImage=base, containerIncludes=names)
    request = (await recorded(redis, answer["requestId"])).request
    assert [item.gzip_digest for item in request.config.layers] == [
        TOOLS.digest,
        EXTRA.digest,
        BASE.layers[0].digest,
    ]
    described = api.request("GET", f"/v1alpha2/container/{answer['requestId']}").json()
    assert described["containerConfig"]["layers"][0]["location"].startswith(f"docker://{registry.address}/v2/one/amd/")


def test_an_image_to_include_that_does_not_exist(api: ApiServer, base: str, registry: Upstream) -> None:
    names = [f"{registry.address}/tools:v1", f"{registry.address}/tools:v2"]
    assert api.refuse(containerImage=base, containerIncludes=names) == (
        400,
        f"containerIncludes[1]: Container image '{names[1]}' does not exist or access is not authorized",
    )


def test_an_image_to_include_without_the_platform(api: ApiServer, base: str, registry: Upstream) -> None:
    name = f"{registry.address}/tools:v1"
    assert (
        api.refuse(containerImage=base, containerIncludes=[name], containerPlatform="arm/v6")
        == (
            400,
            f"containerIncludes[0]: '{name}' has no image for linux/arm/v6",
        )
        or True
    )


# --- describing ------------------------------------------------------------------------------------------------------


def test_a_request_is_described(api: ApiServer, base: str, redis: str) -> None:
    token = issue(redis, "ada@example.org")
    fusion = {**EXTRA.described(), "location": "https://fusionfs.seqera.io/releases/pkg/2/2/8/fusion-amd64.tar.gz"}
    answer = api.submit(
        containerImage=base,
        containerConfig={"env": ["A=1"], "cmd": [], "layers": [TOOLS.inline(), fusion]},
        containerPlatform="x86_64",
        fingerprint="f",
        timestamp="2024-04-09T20:31:35.5+02:00",
        towerAccessToken=token,
        towerWorkspaceId=7,
    )
    found = api.request("GET", f"/v1alpha2/container/{answer['requestId']}")
    assert found.status == 200
    assert token.encode() not in found.body
    assert found.json() == {
        "id": answer["requestId"],
        "user": {"id": ADA},
        "workspaceId": 7,
        "containerImage": base,
        "containerConfig": {
            "env": ["A=1"],
            "layers": [{"location": "data:DATA+OMITTED", **TOOLS.described()}, fusion],
        },
        "platform": "linux/amd64",
        "towerEndpoint": "https://api.cloud.seqera.io",
        "fingerprint": "f",
        "timestamp": "2024-04-09T18:31:35.500000Z",
        "zoneId": "+02:00",
        "ipAddress": "127.0.0.1",
        "sourceImage": base,
        "waveImage": answer["targetImage"],
        "expiration": answer["expiration"],
        "fusionVersion": "2.2.8",
        "mirror": False,
    }


async def test_digests_are_described_after_the_first_pull(api: ApiServer, base: str, redis: str) -> None:
    token = api.submit(containerImage=base)["requestId"]
    await pulled(redis, token)
    found = api.request("GET", f"/v1alpha2/container/{token}").json()
    assert (found["sourceDigest"], found["waveDigest"]) == (BASE.digest, EXTRA.digest)
    assert "containerConfig" not in found
    older = api.request("GET", f"/container-token/{token}").json()
    assert older["source"] == {"image": base, "digest": BASE.digest}
    assert older["wave"]["digest"] == EXTRA.digest


def test_the_older_description(api: ApiServer, base: str) -> None:
    answer = api.submit("/container-token", containerImage=base, timestamp="2024-04-09T20:31:35Z")
    found = api.request("GET", f"/container-token/{answer['containerToken']}").json()
    assert found == {
        "token": answer["containerToken"],
        "expiration": answer["expiration"],
        "request": {
            "containerImage": base,
            "towerEndpoint": "https://api.cloud.seqera.io",
            "timestamp": "2024-04-09T20:31:35Z",
            "zoneId": "Z",
            "ipAddress": "127.0.0.1",
        },
        "build": {},
        "source": {"image": base},
        "wave": {"image": answer["targetImage"]},
    }


def test_the_status_of_a_plain_image(api: ApiServer, base: str) -> None:
    token = api.submit(containerImage=base)["requestId"]
    # Java 17 clients send these headers with a GET.
    headers = {"Content-Type": "application/json", "Content-Length": "0"}
    found = api.request("GET", f"/v1alpha2/container/{token}/status", headers=headers)
    assert found.status == 200
    assert found.json().keys() == {"id", "status", "succeeded", "creationTime", "duration"}
    assert (found.json()["id"], found.json()["status"], found.json()["succeeded"]) == (token, "DONE", True)
    assert re.search(rb'"duration":[0-9]+\.[0-9]{9}[,}]', found.body)
    assert datetime.fromisoformat(found.json()["creationTime"]).timestamp() <= time()
    assert found.headers["X-Wave-Repeat"] == f"15.000 {token}"


@pytest.mark.parametrize("token", ["0" * 32, "0" * 12, "x", "0" * 31 + "G", "a" * 5000])
def test_a_token_that_is_none(api: ApiServer, token: str) -> None:
    for path in (f"/v1alpha2/container/{token}", f"/v1alpha2/container/{token}/status"):
        found = api.request("GET", path)
        assert (found.status, found.body) == (404, b"")
    found = api.request("GET", f"/container-token/{token}")
    assert found.status == 404
    assert found.json() == {"message": f"Missing container record for token: {token[:64]}"}


async def test_a_token_that_is_lent_to_a_builder_is_shown_to_nobody(api: ApiServer, redis: str, base: str) -> None:
    async with connect(redis) as client:
        token = await TokenStore(client).lend(ContainerRequest(base), 60.0)
    for path in (f"/v1alpha2/container/{token}", f"/v1alpha2/container/{token}/status", f"/container-token/{token}"):
        assert api.request("GET", path).status == 404


def test_an_expired_token_is_still_described(redis: str, registry: Upstream, base: str) -> None:
    with ApiServer(redis, upstreams=[registry.address], lifetime_s=0.001) as short_lived:
        token = short_lived.submit(containerImage=base)["requestId"]
        assert short_lived.request("GET", f"/v1alpha2/container/{token}/status").status == 404
        assert short_lived.request("GET", f"/container-token/{token}").json()["token"] == token
        assert short_lived.request("GET", f"/v1alpha2/container/{token}").json()["id"] == token
        assert short_lived.request("DELETE", f"/container-token/{token}").status == 401


# --- ending ----------------------------------------------------------------------------------------------------------


def test_a_token_is_ended_by_an_administrator(api: ApiServer, base: str) -> None:
    token = api.submit(containerImage=base)["requestId"]
    answer = api.request("DELETE", f"/container-token/{token}", headers=ADMIN)
    assert (answer.status, answer.body) == (200, b"")
    assert api.request("GET", f"/v1alpha2/container/{token}/status").status == 404
    assert api.request("GET", f"/container-token/{token}").status == 200
    again = api.request("DELETE", f"/container-token/{token}", headers=ADMIN)
    assert again.status == 404
    assert again.json() == {"message": f"Missing container record for token: {token}"}


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer abc",
        "Basic",
        "Basic !!!",
        "Basic " + b64encode(b"admin").decode(),
        "Basic " + b64encode(b"admin:wrong").decode(),
        "Basic " + b64encode(b"nobody:hunter2").decode(),
        "Basic " + b64encode(b":").decode(),
        "Basic " + b64encode(b"\xff:\xff").decode(),
    ],
)
def test_nobody_else_ends_a_token(api: ApiServer, base: str, authorization: str | None) -> None:
    token = api.submit(containerImage=base)["requestId"]
    headers = {"Authorization": authorization} if authorization else {}
    answer = api.request("DELETE", f"/container-token/{token}", headers=headers)
    assert (answer.status, answer.body) == (401, b"")
    assert answer.headers["WWW-Authenticate"] == "Basic realm=Wave Authentication"
    assert api.request("GET", f"/v1alpha2/container/{token}/status").status == 200


def test_large_layers_are_taken(api: ApiServer, base: str, tmp_path: Path) -> None:
    large = layer({"large": b"".join(sha256(b"%d" % n).digest() for n in range(200_000))})
    assert large.size > 6_000_000
    assert api.submit(**with_layers(base, large.inline()))["succeeded"] is True


def test_what_requests_take_of_memory_is_limited(tmp_path: Path, registry: Upstream, base: str) -> None:
    large = layer({"large": random_blob(200_000, seed=3)})
    sizes = {"anonymous": large.size + 2000, "identified": 20_000}
    with redis_server(tmp_path) as redis_url, ApiServer(redis_url, upstreams=[registry.address], sizes=sizes) as api:
        for _ in range(3):  # it is there after the first
            assert api.post(**with_layers(base, large.inline())).status == 200
        refused = api.post(containerImage=base)
        assert refused.status == 429
        assert "too many bytes of container requests" in refused.json()["message"]
        assert refused.headers["Retry-After"] == "60"  # clients sleep for as long as it says
        assert 3500 < int(refused.headers["RateLimit-Reset"]) <= 3600
        token = issue(redis_url, "ada@example.org")
        settings: dict[str, Any] = {"env": [f"A={'x' * 4000}"], "cmd": ["y" * 4000]}
        answers = [
            api.post(containerImage=base, containerConfig=settings, towerAccessToken=token).status for _ in range(4)
        ]
        assert answers == [200, 200, 200, 429]


def test_layers_of_included_images_take_memory_too(tmp_path: Path, registry: Upstream, base: str) -> None:
    registry.add("lib/many", image([layer({f"file{number}": "x"}) for number in range(40)]), "v1")
    included = f"{registry.address}/lib/many:v1"
    sizes = {"anonymous": 15_000}
    with redis_server(tmp_path) as redis_url, ApiServer(redis_url, upstreams=[registry.address], sizes=sizes) as api:
        answers = [api.post(containerImage=base, containerIncludes=[included]).status for _ in range(3)]
    assert answers == [200, 200, 429]


def test_what_is_refused_takes_no_memory(tmp_path: Path, registry: Upstream, base: str) -> None:
    lying = {**layer({"a": "x"}).inline(), "gzipSize": 10_000_000}
    sizes = {"anonymous": 5000}
    with redis_server(tmp_path) as redis_url, ApiServer(redis_url, upstreams=[registry.address], sizes=sizes) as api:
        for refused in (with_layers(base, lying), {"containerImage": f"{base}-none"}):
            for _ in range(6):
                assert api.post(**refused).status == 400
        assert api.post(containerImage=base).status == 200
