"""Inspection of our own images by the whole program: local ones, and those named by a token."""

import asyncio
import os
import signal
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from typing import Any, cast

import pytest

from bench.images import image, index, layer
from bench.upstream import Upstream
from tests.building.works import builder_pids
from tests.patience import until
from tests.servers import WaveProxy, http_request, push
from tests.strict_inspect import parse_inspection
from wave_proxy.state.redis import connect

Start = Callable[..., WaveProxy]

ADMIN = {"Authorization": f"Basic {b64encode(b'admin:secret').decode()}"}
CONFIG = f"""
[accounts]
admin = "sha256:{sha256(b"secret").hexdigest()}"
[quota]
pull_anonymous = "1/1h"  # what counts is refused from the second one on
wait = "0s"
[local]
anonymous_push = true
[build]
engine = "buildkit"  # which nobody runs here
buildkit_address = "tcp://127.0.0.1:1"
"""
AMD = image([layer({"tool": "amd"})], entrypoint=["/tool"])
ARM = image([layer({"tool": "arm"})], platform="linux/arm64")
MULTI = index([AMD, ARM])


@pytest.fixture
def proxy(wave: Start, upstream: Callable[..., Upstream]) -> tuple[WaveProxy, str]:
    """The program, with images in a local repository, and an upstream that has them too."""
    source = upstream()
    source.add("library/tool", MULTI, "1")
    started = wave(upstreams=[source.address], config=CONFIG)
    push(started.address, "local/tools/one", AMD, "1")
    push(started.address, "local/tools/many", MULTI, "1")
    return started, source.address


def inspect(proxy: WaveProxy, name: str, platform: str = "") -> dict[str, Any]:
    answer = proxy.request("POST", f"/v1alpha1/inspect?platform={platform}", body={"containerImage": name})
    assert answer.status == 200, answer.body
    return parse_inspection(answer.json())


async def _tokens(url: str) -> list[str]:
    """The tokens that there is a record of."""
    async with connect(url) as redis:
        return [key.decode().rpartition(":")[2] async for key in redis.scan_iter("wave:token:*")]


def test_our_own_images_are_inspected_and_nothing_counts(proxy: tuple[WaveProxy, str]) -> None:
    program, source = proxy
    authority = f"localhost:{program.port}"
    for _ in range(3):
        one = inspect(program, f"{authority}/local/tools/one:1")
        assert (one["digest"], one["config"]["config"]["entrypoint"]) == (AMD.digest, ["/tool"])
        assert (one["registry"], one["hostName"]) == (authority, f"http://{authority}")
        assert (one["imageName"], one["reference"]) == ("local/tools/one", "1")
        assert inspect(program, f"{authority}/local/tools/one@{AMD.digest}")["digest"] == AMD.digest
        assert len(inspect(program, f"{authority}/local/tools/many:1")["manifests"]) == 2
        assert inspect(program, f"{authority}/local/tools/many:1", "arm64")["digest"] == ARM.digest

    inline = layer({"more": "1"}).inline()
    settings = {"env": ["ADDED=1"], "layers": [inline]}
    asked = program.submit(containerImage=f"{source}/library/tool:1", containerConfig=settings)
    for _ in range(3):
        found = inspect(program, asked["targetImage"], "amd64")
        assert found["config"]["config"]["env"] == ["ADDED=1", "WAVE_ENTRY_CHAIN=/tool"]
        assert [item["digest"] for item in found["manifest"]["layers"]][-1] == inline["gzipDigest"]
        assert found["imageName"] == f"wt/{asked['containerToken']}/library/tool"
    counts = program.request("GET", "/v1alpha2/metrics/pulls", headers=ADMIN).json()
    assert counts == {"metric": "pulls", "count": 0}
    assert asyncio.run(_tokens(program.redis_url)) == [asked["containerToken"]]


def test_what_there_is_not(proxy: tuple[WaveProxy, str]) -> None:
    program, _ = proxy
    unknown = (f"wt/{'0' * 32}/library/tool:1", "wt/short/library/tool:1")
    for name in ("local/tools/none:1", "local/private/0/build:1", *unknown):
        whole = f"localhost:{program.port}/{name}"
        answer = program.request("POST", "/v1alpha1/inspect", body={"containerImage": whole})
        assert answer.status == 400
        start = f"Container image '{whole}' does not exist or access is not authorized"
        assert cast(str, answer.json()["message"]).startswith(start)


def test_an_image_that_is_being_built_is_not_waited_for(proxy: tuple[WaveProxy, str]) -> None:
    program, _ = proxy
    builder = builder_of(program)
    os.kill(builder, signal.SIGSTOP)  # so that the build stays where it is
    try:
        asked = program.submit(containerFile=b64encode(b"FROM scratch\n").decode())
        body = {"containerImage": asked["targetImage"]}
        answer = http_request(program.address, "POST", "/v1alpha1/inspect", body=body)
        build = program.request("GET", f"/v1alpha1/builds/{asked['buildId']}/status").json()
    finally:
        os.kill(builder, signal.SIGCONT)
    assert build["status"] == "PENDING"
    assert (answer.status, "does not exist" in answer.json()["message"]) == (400, True)


def builder_of(program: WaveProxy) -> int:
    """The builder's process, which is started once the others are ready."""
    return until(lambda: builder_pids(program), "no builder is started").pop()
