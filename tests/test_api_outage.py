"""Requests for images that are stored here, made while their registry is away: by the whole program."""

from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest

from bench.images import image, index, layer
from bench.upstream import Upstream
from tests.identified import issue
from tests.servers import WaveProxy, push

Start = Callable[..., Upstream]
Wave = Callable[..., WaveProxy]

TOOL = image([layer({"bin/tool": "1"})], entrypoint=["/tool"])
MULTI = index([TOOL, image([layer({"bin/tool": "arm"})], platform="linux/arm64")])
OTHER = image([layer({"bin/other": "1"})])
USER, PASSWORD = "user", "secret"
CONFIG = """
[upstream]
attempts = 2
[cache]
tag_ttl = "1ms"
[local]
anonymous_push = true
[build]
engine = "buildkit"  # which nobody runs here
buildkit_address = "tcp://127.0.0.1:1"
"""


def go_away(server: Upstream, fault: str) -> None:
    if fault == "down":
        server.stop()
    else:
        server.faults.status, server.faults.retry_after = {"/": int(fault)}, "30"


def own_name(proxy: WaveProxy) -> str:
    return f"localhost:{proxy.address.rpartition(':')[2]}"


def post(proxy: WaveProxy, path: str = "/v1alpha2/container", **body: Any) -> tuple[int, str]:
    answer = proxy.request("POST", path, body=body)
    return answer.status, answer.json().get("message", "")


@pytest.mark.parametrize("fault", ["down", "500", "429"])
def test_what_is_stored_is_requested(upstream: Start, wave: Wave, fault: str) -> None:
    server = upstream()
    server.add("tool", MULTI, "1")
    server.add("other", OTHER, "1")
    proxy = wave(upstreams=[server.address], config=CONFIG)
    name, config = f"{server.address}/tool:1", {"env": ["A=1"]}
    proxy.pull(f"{proxy.address}/{name}")
    push(proxy.address, "local/mine", OTHER, "1")
    go_away(server, fault)
    pulled = proxy.pull(proxy.submit(containerImage=name, containerConfig=config)["targetImage"])
    assert "A=1" in pulled.children[0].config["config"]["Env"]
    by_digest = f"{server.address}/tool@{MULTI.digest}"
    assert proxy.pull(proxy.submit(containerImage=by_digest)["targetImage"]).digest == MULTI.digest
    mine = f"{own_name(proxy)}/local/mine:1"
    included = proxy.submit(containerImage=mine, containerIncludes=[name])
    assert proxy.pull(included["targetImage"]).layers[-1] == TOOL.blobs[1].content
    place = f"{own_name(proxy)}/local/frozen"
    frozen = proxy.submit(containerImage=name, containerConfig=config, freeze=True, buildRepository=place)
    build = proxy.request("GET", f"/v1alpha1/builds/{frozen['buildId']}").json()
    assert 'ENV WAVE_ENTRY_CHAIN="/tool"' in build["dockerFile"]
    shown = proxy.request("POST", "/v1alpha1/inspect?platform=linux/amd64", body={"containerImage": name})
    assert (shown.status, shown.json()["container"]["digest"]) == (200, TOOL.digest)
    assert shown.json()["container"]["imageName"] == "tool"


def test_nobody_waits_for_a_silent_registry_for_what_is_stored(upstream: Start, wave: Wave) -> None:
    server = upstream()
    server.add("tool", TOOL, "1")
    config = CONFIG.replace("attempts = 2", 'response_timeout = "1h"')
    proxy = wave(upstreams=[server.address], config=config)
    name = f"{server.address}/tool:1"
    proxy.pull(f"{proxy.address}/{name}")
    server.faults.only, server.faults.stall_at = "/v2/", -1
    assert proxy.pull(proxy.submit(containerImage=name)["targetImage"]).digest == TOOL.digest


@pytest.mark.parametrize(("fault", "status"), [("down", 503), ("500", 503), ("429", 429)])
def test_what_is_not_stored_is_not_requested(upstream: Start, wave: Wave, fault: str, status: int) -> None:
    server = upstream()
    proxy = wave(upstreams=[server.address], config=CONFIG)
    push(proxy.address, "local/mine", OTHER, "1")
    assert post(proxy, containerImage=f"{server.address}/other:1")[0] == 400  # it answers: it has no such image
    go_away(server, fault)
    for number in range(5):
        for path in ("/v1alpha2/container", "/v1alpha1/inspect"):
            said, message = post(proxy, path, containerImage=f"{server.address}/other:{number}")
            assert (said, server.address in message, "/wt/" in message) == (status, True, False)
    mine = f"{own_name(proxy)}/local/mine:1"
    assert post(proxy, containerImage=mine) == (200, "")  # the port itself is not taken for a registry that is away


def test_what_is_stored_for_others_is_not_requested(upstream: Start, wave: Wave, redis_url: str) -> None:
    vault = upstream(auth="bearer", username=USER, password=PASSWORD)
    vault.add("acme/base", OTHER, "1")
    config = f'[registries."{vault.address}"]\ninsecure = true\nallow_private = true\n'
    config += f'username = "{USER}"\npassword = "{PASSWORD}"\nusers = ["*@acme.org"]\n'
    proxy = wave(config=config + CONFIG, redis=redis_url)
    frozen = {"freeze": True, "containerConfig": {"env": ["A=1"]}, "buildRepository": f"{own_name(proxy)}/local/x"}
    file = b64encode(b"FROM scratch\n").decode()

    def asked(user: str, **more: Any) -> dict[str, Any]:
        login = {"towerAccessToken": issue(redis_url, user)} if user else {}
        return {"containerImage": f"{vault.address}/acme/base:1", **login, **more}

    assert proxy.pull(proxy.submit(**asked("alice@acme.org"))["targetImage"]).digest == OTHER.digest
    vault.stop()
    assert proxy.pull(proxy.submit(**asked("alice@acme.org"))["targetImage"]).digest == OTHER.digest
    assert post(proxy, "/v1alpha1/inspect", **asked("alice@acme.org"))[0] == 200
    for user in ("mallory@else.org", ""):
        assert post(proxy, **asked(user))[0] == 503
        assert post(proxy, **asked(user, **frozen))[0] == 503
        assert post(proxy, "/v1alpha1/inspect", **asked(user))[0] == 503
        included = {**asked(user), "containerFile": file, "containerIncludes": [f"{vault.address}/acme/base:1"]}
        del included["containerImage"]
        assert post(proxy, **included)[0] in (400, 503)
